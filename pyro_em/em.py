"""`EM`: the same algorithms in the shape of `pyro.infer.SVI`, one step at a time.

As with SVI, parameters live in Pyro's param store: a step starts from what the store holds and leaves its
update there. (Parameter-role sample sites have no store entry; the object keeps them.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
from torch import Tensor

from pyro_em.binding import bound_for
from pyro_em.checks import collinear
from pyro_em.device import on_device
from pyro_em.e_step.auto import chosen
from pyro_em.e_step.base import Engine, Expectation
from pyro_em.errors import InputError, MonotonicityError
from pyro_em.loop import MONOTONE, Iterate, at
from pyro_em.m_step.auto import MStep
from pyro_em.model.missing import complete_cases
from pyro_em.options import EXACT, check_given, checked_rules
from pyro_em.problem import Problem
from pyro_em.store import isolated_rng, write_params
from pyro_em.types import Model, Params


@dataclass(frozen=True)
class _Bound:
    """A problem and the data objects it was made for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    problem: Problem
    m_step: MStep
    engine: Engine

    def same(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) != len(self.args) or kwargs.keys() != self.kwargs.keys():
            return False
        pairs = [*zip(args, self.args, strict=True), *((kwargs[k], self.kwargs[k]) for k in kwargs)]
        return all(a is b for a, b in pairs)


def _at(bound: _Bound, params: Params, iteration: int) -> tuple[Iterate, Expectation]:
    expectation = bound.engine.e_step(params)
    return at(bound.problem, params, expectation, iteration), expectation


class EM:
    """EM with SVI's interface.

    :param model, guide, optim: as in `pyro_em.fit`.
    :param loss: accepted for symmetry with SVI; EM's loss is the negative objective, so only None or an
        `ExactELBO` are meaningful.
    :param algorithm: "em", "map-em" or "gem".
    :param options: `e_step`, `m_step`, `roles`, `weights`, `missing`, as in `pyro_em.fit`.

    Example, with the model of `fit`::

        >>> em = pyro_em.EM(model)
        >>> losses = [em.step(x) for _ in range(10)]
        >>> losses[0] > losses[-1]
        True
    """

    def __init__(
        self,
        model: Model,
        guide: Model | None = None,
        optim: Any = None,
        loss: Any = None,
        *,
        algorithm: str = "em",
        **options: Any,
    ) -> None:
        from pyro_em.elbo import ExactELBO

        if algorithm not in EXACT:
            raise InputError(f"EM: algorithm must be one of {', '.join(EXACT)}; use pyro.infer.SVI for svi.")
        check_given(model, options.get("weights"))
        unknown = sorted(options.keys() - {"e_step", "m_step", "roles", "weights", "missing"})
        if unknown:
            raise InputError(
                f"EM: it has no option {', '.join(map(repr, unknown))}. Its options: e_step, m_step, roles, weights, "
                "missing. Each step() is one iteration; how many, and from where, is the caller's loop and param store."
            )
        if loss is not None and not isinstance(loss, ExactELBO):
            raise InputError("EM: its loss is the exact ELBO. Use pyro.infer.SVI for another loss.")
        self.model, self.guide = complete_cases(model, options.pop("missing", None)), guide
        self.optim, self.algorithm = optim, algorithm
        self.m_step_option = options.pop("m_step", "auto")
        self.rules = checked_rules(options.pop("e_step", "auto"))
        self.roles, self.weights = options.pop("roles", None), options.pop("weights", None)
        self._bound: _Bound | None = None
        self._sampled: Params = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the bound problem, which the next step makes again. (The parameters are in the param store.)"""
        return {**self.__dict__, "_bound": None}

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bound:
        """The problem of these data; kept as long as the same objects come in."""
        if self._bound is not None and self._bound.same(args, kwargs):
            return self._bound
        with isolated_rng(None):
            problem = bound_for(
                self.model, args, kwargs, self.algorithm, self.guide, self.roles, self.weights, self.rules, False
            ).problem  # fmt: skip
            problem, m_step, engine = chosen(problem, self.m_step_option, self.algorithm, self.optim)
            collinear(m_step.collinear)
        self._bound = _Bound(args, kwargs, problem, m_step, engine)
        return self._bound

    def _current(self, problem: Problem) -> Params:
        store = pyro.get_param_store()
        params: dict[str, Tensor] = {}
        for name, record in problem.parameters.items():
            if record.kind == "sample":
                params[name] = self._sampled.get(name, record.value)
            else:
                params[name] = store[name].detach().clone() if name in store else record.value
        return params

    def _e_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Bound, Iterate, Expectation]:
        bound = self._bind(args, kwargs)
        return bound, *_at(bound, self._current(bound.problem), 0)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One EM iteration; returns the loss *before* the update, as `SVI.step` does.

        :raises MonotonicityError: if the update lowers the objective.
        """
        with on_device(args, kwargs):
            return self._step(args, kwargs)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        bound, current, expectation = self._e_step(args, kwargs)
        problem, m_step = bound.problem, bound.m_step
        params, _ = m_step.update(current.params, expectation)
        following, _ = _at(bound, params, 1)
        if following.objective < current.objective - MONOTONE * current.rounding:
            raise MonotonicityError(1, current.objective, following.objective)
        self._sampled = {n: params[n] for n, r in problem.parameters.items() if r.kind == "sample"}
        write_params(problem.parameters, params, problem.modules())
        return -current.objective

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss at the current parameters, without an update."""
        with on_device(args, kwargs):
            return -self._e_step(args, kwargs)[1].objective

    def run(self, *args: Any, num_steps: int = 1000, **kwargs: Any) -> list[float]:
        """`num_steps` steps; their losses."""
        return [self.step(*args, **kwargs) for _ in range(num_steps)]
