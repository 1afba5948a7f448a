"""A bound problem as what it was bound from, so that results can be pickled, copied, and sent between processes.

A `Problem` holds runs of the model: distributions with handlers around them, autograd history, nothing that pickles.
All of it follows from the arguments of `bind`. So a pickled problem *is* these, and is bound again where it is read:
the model has to be importable there, as any function that is pickled. A result binds its problem again only when
somebody asks for it. A problem never changes: a copy shares the model and the data.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_em.device import on_device
from pyro_em.evidence.rule import Quadrature
from pyro_em.model.folding import unfolded
from pyro_em.problem import Problem, bind
from pyro_em.store import isolated_rng
from pyro_em.types import Model, Params


@dataclass(frozen=True)
class Recipe:
    """Arguments of `bind`; called, it binds. `roles` are those of the continuous sites, `params` the start."""

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    with_prior: bool
    roles: Mapping[str, str]
    weights: Mapping[str, Tensor]
    params: Params
    rules: Mapping[str, Quadrature]

    def __call__(self) -> Problem:
        with on_device(self.args, self.kwargs), isolated_rng(0):
            return bind(
                self.model,
                self.args,
                self.kwargs,
                with_prior=self.with_prior,
                roles=self.roles,
                weights=self.weights,
                params=self.params,
                rules=self.rules,
            )

    def __deepcopy__(self, memo: Any) -> Recipe:
        return self


def recipe_of(problem: Problem) -> Recipe:
    """How to bind a problem again."""
    sites, graph = problem.capture.sites, problem.graph
    return Recipe(
        unfolded(problem.model),
        problem.args,
        problem.kwargs,
        problem.with_prior,
        {n: r.role for n, r in problem.roles.items() if r.role != "data" and n in sites and not sites[n].discrete},
        {graph.plate_names[symbol]: weight.reshape(-1) for symbol, weight in graph.plate_weights.items()},
        {name: value.detach() for name, value in problem.start.items()},
        problem.rules,
    )


def _bound(recipe: Recipe) -> Problem:
    return recipe()


def _reduced(problem: Problem) -> tuple[Callable[[Recipe], Problem], tuple[Recipe]]:
    return _bound, (recipe_of(problem),)


copyreg.pickle(Problem, _reduced)
