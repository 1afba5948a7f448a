"""Time to a gap: evaluations and seconds until the objective is within 1e-3 nat of the best that anyone reached.

Evaluations are E-steps for EM and its accelerations, losses with a gradient for L-BFGS and SVI. Seconds run from
the call of the fit, tracing and compiling included. The optimum is the best objective of all contenders and of
a long accelerated fit, so that a contender in another mode simply does not arrive.

SVI is Pyro's: TraceEnum_ELBO, Adam, no guide needed as all latents are summed out. Its learning rate is the best of
`RATES` for this problem, chosen beforehand: the choice is not counted against it. L-BFGS minimises the same loss
with torch's strong Wolfe line search.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from torch import Tensor

import pyro_em
from benchmarks.harness import Record
from benchmarks.workload import Spawn
from pyro_em.types import Params

RATES = (0.003, 0.01, 0.03, 0.1)
GAP = 1e-3  # nat
TINY_LIMIT = 5
SVI_NAME = "Pyro SVI"

Climb = list[tuple[int, float, float]]  # evaluations, seconds, objective there


@dataclass(frozen=True)
class Problem:
    """A model, its arguments, and the start (constrained values)."""

    model: Callable[..., None]
    args: tuple[Any, ...]
    start: Params


@dataclass(frozen=True)
class Gap:
    """`limit` bounds the updates of each contender; `target` is E-steps of plain EM ÷ those of the best,
    if one is asked for.

    `names` are the contenders, all of them by default.
    """

    name: str
    title: str
    problem: Callable[[bool], Problem]
    limit: int
    target: float | None
    names: tuple[str, ...] = ("em", "squarem", "anderson", "L-BFGS", SVI_NAME)
    calls: tuple[str, ...] = field(default=("climbs",), init=False)

    def collect(self, spawn: Spawn, rounds: int) -> Record:
        """All climbs in one process."""
        return {"kind": "gap", **spawn("climbs", rounds=rounds), "gap": GAP, "target": self.target}

    def climbs(self, rounds: int, tiny: bool) -> Record:
        """Each contender climbs once a round, all until their limit or convergence."""
        problem, limit = self.problem(tiny), TINY_LIMIT if tiny else self.limit
        contenders = {name: climb for name, climb in _contenders(limit).items() if name in self.names}
        rate = None
        if SVI_NAME in self.names:
            rate = _best_rate(problem, 1 if tiny else limit // 4)
            contenders[SVI_NAME] = functools.partial(by_svi, limit=limit, rate=rate)
        climbs: dict[str, list[Climb]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, climb in contenders.items():
                climbs[name].append(climb(problem))
        optimum = max(objective for runs in climbs.values() for run in runs for _, _, objective in run)
        return {
            "optimum": optimum,
            "svi_rate": rate,
            "contenders": {name: arrivals(runs, optimum) for name, runs in climbs.items()},
        }


def arrivals(runs: list[Climb], optimum: float) -> Record:
    """Where each run first came within the gap: evaluations, seconds (None: never), and its best objective."""
    found = [next(((n, s) for n, s, value in run if value >= optimum - GAP), None) for run in runs]
    return {
        "evaluations": [None if at is None else at[0] for at in found],
        "seconds": [None if at is None else at[1] for at in found],
        "shortfall": [optimum - max(value for _, _, value in run) for run in runs],
    }


def _contenders(limit: int) -> dict[str, Callable[[Problem], Climb]]:
    return {
        "em": lambda p: by_fit(p, limit),
        "squarem": lambda p: by_fit(p, limit, accelerate="squarem"),
        "anderson": lambda p: by_fit(p, limit, accelerate="anderson"),
        "em, mixed": lambda p: by_fit(p, limit, precision="mixed"),
        "L-BFGS": lambda p: by_lbfgs(p, limit),
    }


def by_fit(problem: Problem, limit: int, **options: Any) -> Climb:
    """`pyro_em.fit`; a callback tells the seconds, the history the E-steps."""
    seconds: dict[int, float] = {}  # by iteration: mixed precision says one of them twice, at its end in float64
    began = time.perf_counter()
    result = pyro_em.fit(
        problem.model, *problem.args, init=problem.start, max_iter=limit, tol=1e-12, progress=False, **options,
        callbacks=[lambda step: seconds.update({step.iteration: time.perf_counter() - began})],
    )  # fmt: skip
    history = result.history
    return list(zip(map(int, history["num_e_steps"]), seconds.values(), history["objective"], strict=True))


def _loss(problem: Problem) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """-log p(x|θ) by Pyro's own enumeration, and the unconstrained leaves, at the start."""
    pyro.clear_param_store()
    model, elbo = config_enumerate(problem.model), TraceEnum_ELBO(max_plate_nesting=1)

    def loss() -> Tensor:
        return elbo.differentiable_loss(model, _no_guide, *problem.args)

    loss()  # makes the parameters
    store = pyro.get_param_store()
    for name, value in problem.start.items():
        store[name] = value
    return loss, [parameter.unconstrained() for parameter in store.values()]  # type: ignore[attr-defined]


def _no_guide(*args: object) -> None:
    """Every latent is summed out."""


def by_lbfgs(problem: Problem, limit: int) -> Climb:
    """torch.optim.LBFGS on the marginal likelihood."""
    began = time.perf_counter()
    loss, leaves = _loss(problem)
    optimiser = torch.optim.LBFGS(
        leaves, max_iter=limit, max_eval=limit, tolerance_grad=1e-9, tolerance_change=0, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    climb: Climb = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        climb.append((len(climb) + 1, time.perf_counter() - began, _objective(value)))
        return value

    optimiser.step(closure)
    return climb


def by_svi(problem: Problem, limit: int, rate: float) -> Climb:
    """Pyro's SVI with Adam."""
    began = time.perf_counter()
    _loss(problem)
    optimiser = pyro.optim.Adam({"lr": rate})  # type: ignore[attr-defined]
    svi = SVI(config_enumerate(problem.model), _no_guide, optimiser, TraceEnum_ELBO(max_plate_nesting=1))
    climb: Climb = []
    for step in range(limit):
        objective = -float(svi.step(*problem.args))
        climb.append((step + 1, time.perf_counter() - began, objective if math.isfinite(objective) else -math.inf))
    return climb


def _best_rate(problem: Problem, limit: int) -> float:
    return max(RATES, key=lambda rate: max(value for _, _, value in by_svi(problem, limit, rate)))


def _objective(loss: Tensor) -> float:
    value = -float(loss.detach())
    return value if math.isfinite(value) else -math.inf
