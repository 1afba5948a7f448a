"""What a fit iterates on: the model bound to its rows, or to the few pseudo-rows that say as much (condense.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pyro_em.condense import condense
from pyro_em.errors import Refusal
from pyro_em.evidence.rule import Quadrature
from pyro_em.model.counting import num_rows
from pyro_em.model.data import as_data
from pyro_em.options import point_estimated
from pyro_em.problem import Problem, bind
from pyro_em.store import unspent_rng
from pyro_em.types import Model


@dataclass(frozen=True)
class Bound:
    """`problem` is iterated on; `whole` binds all rows, which results speak of; `notes` are for the plan."""

    problem: Problem
    whole: Callable[[], Problem]
    notes: tuple[str, ...] = ()
    weighted: bool = False

    @property
    def num_observations(self) -> float:
        """n of BIC; the weights of pseudo-rows have it up to rounding."""
        count = num_rows(self.problem.graph, self.problem.capture)
        return float(round(count)) if self.notes and not self.weighted else count

    @property
    def result_problem(self) -> Problem | Callable[[], Problem]:
        """The problem of all rows, or how to get it if somebody asks."""
        return self.whole if self.notes else self.problem


def bound_for(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    algorithm: str,
    guide: Model | None,
    roles: Mapping[str, str] | None,
    weights: Mapping[str, Tensor] | None,
    rules: Mapping[str, Quadrature],
    rows: bool,
) -> Bound:
    """The problem of a fit or plan.

    :param rows: something else than an update reads the data (annealing).
    :raises Refusal, InputError, ResourceError: as `bind`.
    """
    args, kwargs = as_data(args), as_data(kwargs)
    deltas = point_estimated(guide, args, kwargs)
    options: dict[str, Any] = {"with_prior": algorithm == "map-em", "roles": roles, "deltas": deltas, "rules": rules}
    whole = partial(bind, model, args, kwargs, weights=weights, **options)
    if algorithm in ("em", "map-em") and not (rows or guide or rules):
        with unspent_rng():  # as if it had not been tried
            few = condense(model, args, kwargs, weights)
        problem = None
        if few is not None:
            with contextlib.suppress(Refusal):  # what is wrong is said of all rows
                problem = few.restored(bind(few.model, args, kwargs, weights=few.weights, **options))
        if few is not None and problem is not None:
            return Bound(problem, whole, (few.note,), bool(weights))
    problem = whole()
    return Bound(problem, lambda: problem)
