"""The one loop of every exact algorithm: E-step, score, stop?, step.

A plain step is the EM map θ -> M(θ) followed by a check that the objective did not fall; an accelerator
(accelerate/) puts several maps into one step. State (`Iterate`) is carried; `History` is recorded. Only θ
goes round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pyro_em.e_step.base import Engine, Expectation
from pyro_em.errors import DegenerateLikelihoodError, MonotonicityError, NonFiniteError
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem
from pyro_em.stop import Outcome, StoppingRule
from pyro_em.types import Params

MONOTONE = 16.0  # eps·Σ|ll_n|: the largest drop that rounding explains (worst seen anywhere is 1.7)


@dataclass(frozen=True)
class Iterate:
    """Carried from one iteration to the next: parameters and the E-step at them."""

    params: Params
    expectation: Expectation
    objective: float
    iteration: int


@dataclass
class History:
    """Recorded once per accepted iterate; equally long lists. `num_e_steps` is cumulative."""

    objective: list[float] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    log_prior: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    num_e_steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in vars(self).items()}


@dataclass(frozen=True)
class Step:
    """What a callback sees at each accepted iterate. Return True from the callback to stop the fit."""

    iteration: int
    params: Params
    objective: float
    log_likelihood: float
    score: float


Callback = Callable[[Step], bool | None]


@dataclass
class Ended:
    """Where a run of the loop ended: the last complete iterate, why, and what was recorded."""

    last: Iterate
    outcome: Outcome
    history: History
    empty: tuple[str, ...]
    error: BaseException | None = None


def rounding(iterate: Iterate) -> float:
    """Σ|ll_n| in units of the last place of the parameters' precision."""
    dtypes = {p.dtype for p in iterate.params.values()} or {torch.float64}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return eps * (1.0 + iterate.expectation.magnitude + abs(iterate.objective))


def at(problem: Problem, engine: Engine, params: Params, iteration: int) -> Iterate:
    """E-step at `params`."""
    expectation = engine.e_step(params)
    objective = expectation.log_likelihood + (expectation.log_prior if problem.with_prior else 0.0)
    return Iterate(params, expectation, objective, iteration)


class Stepper(Protocol):
    """Anything that advances a fit by one update."""

    def step(self, current: Iterate) -> Iterate:
        """The next iterate, its objective not below that of `current` (up to rounding)."""
        ...


@dataclass
class EMMap:
    """The map θ -> M(θ) in one run from one start. Its `step` is the plain EM step.

    `num_e_steps` and `empty` (parameters of which some entry saw no data) are recorded as it is used.
    """

    problem: Problem
    engine: Engine
    m_step: MStep
    num_e_steps: int = 0
    empty: set[str] = field(default_factory=set)

    def at(self, params: Params, iteration: int) -> Iterate:
        """E-step at `params`; counted even if it fails."""
        self.num_e_steps += 1
        return at(self.problem, self.engine, params, iteration)

    def update(self, current: Iterate) -> Params:
        """M(θ), not evaluated. Spends the statistics of `current`: read its score before."""
        params, info = self.m_step.update(current.params, current.expectation)
        self.empty |= set(info.empty)
        return params

    def step(self, current: Iterate) -> Iterate:
        """The plain EM step."""
        return self.reached(self.update(current), current)

    def reached(self, params: Params, current: Iterate) -> Iterate:
        """E-step at `params` = M(θ), one update after `current`.

        :raises MonotonicityError: if the objective fell.
        """
        following = self.at(params, current.iteration + 1)
        if following.objective < current.objective - MONOTONE * rounding(current):
            raise MonotonicityError(following.iteration, current.objective, following.objective)
        return following


def run_loop(
    problem: Problem,
    engine: Engine,
    m_step: MStep,
    start: Params,
    rule: StoppingRule,
    callbacks: Iterable[Callback] = (),
    accelerator: Callable[[EMMap], Stepper] | None = None,
) -> Ended:
    """Iterate from `start` until the rule, a callback, an error or Ctrl-C ends it.

    Errors after the first E-step do not lose the last complete iterate: they come back in `Ended.error`.
    """
    began = time.perf_counter()
    history = History()
    callbacks = tuple(callbacks)
    em = EMMap(problem, engine, m_step)
    stepper: Stepper = em if accelerator is None else accelerator(em)
    current = em.at(start, 0)
    num_observations = problem.graph.num_observations
    try:
        while True:
            score = m_step.score(current.params, current.expectation) / num_observations
            _record(history, current, score, em.num_e_steps, began)
            step = Step(
                current.iteration,
                current.params,
                current.objective,
                current.expectation.log_likelihood,
                score,
            )
            answers = [callback(step) for callback in callbacks]  # all of them are called
            if any(answers):
                return Ended(current, Outcome.interrupted, history, tuple(sorted(em.empty)))
            outcome = rule.outcome(current.iteration, score, current.objective, rounding(current))
            if outcome is not None:
                return Ended(current, outcome, history, tuple(sorted(em.empty)))
            current = stepper.step(current)
    except DegenerateLikelihoodError as error:
        error.iteration = current.iteration + 1
        return Ended(current, Outcome.degenerate, history, tuple(sorted(em.empty)), error)
    except (KeyboardInterrupt, NonFiniteError, MonotonicityError) as error:
        return Ended(current, Outcome.interrupted, history, tuple(sorted(em.empty)), error)


def _record(history: History, current: Iterate, score: float, num_e_steps: int, began: float) -> None:
    history.objective.append(current.objective)
    history.log_likelihood.append(current.expectation.log_likelihood)
    history.log_prior.append(current.expectation.log_prior)
    history.score.append(score)
    history.num_e_steps.append(num_e_steps)
    history.seconds.append(time.perf_counter() - began)
