"""`EM`: the same algorithms in the shape of `pyro.infer.SVI`, one step at a time.

As with SVI, parameters live in Pyro's param store: a step starts from what the store holds and leaves its
update there. (Parameter-role sample sites have no store entry; the object keeps them.)
"""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor

from pyro_em.errors import InputError, MonotonicityError
from pyro_em.loop import MONOTONE, Iterate, at, rounding
from pyro_em.m_step.auto import MStep
from pyro_em.options import EXACT, point_estimated
from pyro_em.problem import Problem, bind
from pyro_em.store import isolated_rng, write_params
from pyro_em.types import Model, Params


class EM:
    """EM with SVI's interface.

    :param model, guide, optim: as in `pyro_em.fit`.
    :param loss: accepted for symmetry with SVI; EM's loss is the negative objective, so only None or an
        `ExactELBO` are meaningful.
    :param algorithm: "em", "map-em" or "gem".
    :param options: `m_step`, `roles`, `weights`, as in `pyro_em.fit`.

    Example::

        em = pyro_em.EM(model)
        losses = [em.step(data) for _ in range(100)]
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
        if loss is not None and not isinstance(loss, ExactELBO):
            raise InputError("EM: its loss is the exact ELBO. Use pyro.infer.SVI for another loss.")
        self.model, self.guide, self.optim, self.algorithm = model, guide, optim, algorithm
        self.m_step_option = options.pop("m_step", "auto")
        self.options = options
        self._bound: tuple[tuple[Any, ...], dict[str, Any], Problem, MStep] | None = None
        self._sampled: Params = {}

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Problem, MStep]:
        if self._bound is not None:
            seen_args, seen_kwargs, problem, m_step = self._bound
            same = len(args) == len(seen_args) and all(a is b for a, b in zip(args, seen_args, strict=True))
            if same and kwargs.keys() == seen_kwargs.keys() and all(kwargs[k] is seen_kwargs[k] for k in kwargs):
                return problem, m_step
        with isolated_rng(None):
            problem = bind(
                self.model,
                args,
                kwargs,
                with_prior=self.algorithm == "map-em",
                deltas=point_estimated(self.guide, args, kwargs),
                **self.options,
            )
            m_step = MStep(problem, self.m_step_option, self.algorithm, self.optim)
        self._bound = (args, kwargs, problem, m_step)
        return problem, m_step

    def _current(self, problem: Problem) -> Params:
        store = pyro.get_param_store()
        params: dict[str, Tensor] = {}
        for name, record in problem.parameters.items():
            if record.kind == "sample":
                params[name] = self._sampled.get(name, record.value)
            else:
                params[name] = store[name].detach().clone() if name in store else record.value
        return params

    def _e_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Problem, MStep, Iterate]:
        problem, m_step = self._bind(args, kwargs)
        return problem, m_step, at(problem, self._current(problem), 0)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One EM iteration; returns the loss *before* the update, as `SVI.step` does.

        :raises MonotonicityError: if the update lowers the objective.
        """
        problem, m_step, current = self._e_step(args, kwargs)
        sufficient = m_step.sufficient(current.run, current.evidence)
        params, _ = m_step.update(current.params, current.evidence, sufficient)
        following = at(problem, params, 1)
        if following.objective < current.objective - MONOTONE * rounding(current):
            raise MonotonicityError(1, current.objective, following.objective)
        self._sampled = {n: params[n] for n, r in problem.parameters.items() if r.kind == "sample"}
        leaves = current.run.leaves
        modules = {n: leaves[n] for n, r in problem.parameters.items() if r.kind == "module" and n in leaves}
        write_params(problem.parameters, params, modules)
        return -current.objective

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss at the current parameters, without an update."""
        return -self._e_step(args, kwargs)[2].objective

    def run(self, *args: Any, num_steps: int = 1000, **kwargs: Any) -> list[float]:
        """`num_steps` steps; their losses."""
        return [self.step(*args, **kwargs) for _ in range(num_steps)]
