"""The one loop of every exact algorithm: E-step, score, stop?, step.

A plain step is the EM map θ -> M(θ) followed by a check that the objective did not fall; an accelerator
(accelerate/) puts several maps into one step. State (`Iterate`) is carried; `History` is recorded. Only θ
goes round.

A run is a generator: it *asks* for E-steps, and whoever drives it (`drive`) answers. So several starts advance
together, and their E-steps are one pass over the data (evaluator.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from pyro_em.e_step.base import Expectation
from pyro_em.errors import DegenerateLikelihoodError, MonotonicityError, NonFiniteError
from pyro_em.evaluator import Evaluator
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem
from pyro_em.recordings import Evaluated, Mapped, Point, Request, params_of
from pyro_em.stop import Outcome, StoppingRule
from pyro_em.types import Params

EPS = {d: torch.finfo(d).eps for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
DOUBLE = EPS[torch.float64]
MONOTONE = 16.0  # eps·Σ|ll_n|: the largest drop that rounding explains (worst seen anywhere is 1.7)


@dataclass(eq=False)  # not frozen, as all that is made once an update: that costs a microsecond each time
class Iterate:
    """Carried from one iteration to the next: where it is, and the E-step there."""

    at: Params | Point
    expectation: Evaluated
    objective: float
    iteration: int

    @property
    def params(self) -> Params:
        """By name."""
        return params_of(self.at)

    @property
    def rounding(self) -> float:
        """Σ|ll_n| in units of the last place of the parameters' precision, and the E-step's own error."""
        known = self.expectation
        eps = DOUBLE if isinstance(known, Mapped) else max((EPS[p.dtype] for p in self.params.values()), default=DOUBLE)
        return eps * (1.0 + known.magnitude + abs(self.objective)) + known.error / MONOTONE


@dataclass
class History:
    """Recorded once per accepted iterate; equally long lists. `num_e_steps` is cumulative.

    `temperature` is there if a fit was annealed.
    """

    objective: list[float] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    log_prior: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    num_e_steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in vars(self).items() if values or name != "temperature"}


@dataclass(frozen=True)
class Step:
    """What a callback sees at each accepted iterate. Return True from the callback to stop the run.

    `start` numbers the starts of a fit with restarts, which may advance together.

    >>> seen = []
    >>> def watch(step):
    ...     seen.append(step.objective)
    ...     return step.iteration == 2
    >>> result = pyro_em.fit(model, x, callbacks=[watch])
    >>> len(seen), str(result.outcome)
    (3, 'Interrupted by a callback or by Ctrl-C: the last complete iterate is returned.')
    """

    iteration: int
    params: Params
    objective: float
    log_likelihood: float
    score: float
    start: int = 0


Callback = Callable[[Step], bool | None]


@dataclass
class Ended:
    """Where a run of the loop ended: the last complete iterate, why, and what was recorded."""

    last: Iterate
    outcome: Outcome
    history: History
    empty: tuple[str, ...]
    error: BaseException | None = None


def at(problem: Problem, where: Params | Point, expectation: Evaluated, iteration: int) -> Iterate:
    """The iterate at which an E-step was made."""
    climbed = expectation.log_likelihood
    if isinstance(expectation, Expectation) and expectation.climbed is not None:
        climbed = expectation.climbed
    objective = climbed + (expectation.log_prior if problem.with_prior else 0.0)
    return Iterate(where, expectation, objective, iteration)


T = TypeVar("T")
Steps = Generator[Request, Evaluated, T]  # asks for E-steps, gets them, and returns a T


class Stepper(Protocol):
    """Anything that advances a fit by one update."""

    def step(self, current: Iterate) -> Steps[Iterate]:
        """The next iterate, its objective not below that of `current` (up to rounding)."""
        ...


@dataclass
class EMMap:
    """The map θ -> M(θ) in one run from one start. Its `step` is the plain EM step.

    `num_e_steps` and `empty` (parameters of which some entry saw no data) are recorded as it is used.
    """

    problem: Problem
    m_step: MStep
    num_e_steps: int = 0
    empty: set[str] = field(default_factory=set)
    rough: bool = False  # ask for E-steps with products in float32 (precision.py)
    expected: float = math.inf  # updates to come, as far as is known
    _magnitude: float = 0.0

    def at(self, where: Params | Point, iteration: int) -> Steps[Iterate]:
        """E-step there; counted even if it fails."""
        self.num_e_steps += 1
        expectation = yield Request(where, self._magnitude, self.rough, self.expected)
        self._magnitude = expectation.magnitude
        return at(self.problem, where, expectation, iteration)

    def score(self, current: Iterate) -> float:
        """max|∂ objective/∂u| over the parameters that move, not divided by N."""
        known = current.expectation
        return known.score if isinstance(known, Mapped) else self.m_step.score(current.params, known)

    def update(self, current: Iterate) -> Params:
        """M(θ), not evaluated. Spends the statistics of `current`: read its score before."""
        return params_of(self._following(current))

    def _following(self, current: Iterate) -> Params | Point:
        known = current.expectation
        if isinstance(known, Mapped):
            self.empty |= known.empty
            return known.following
        params, info = self.m_step.update(current.params, known)
        self.empty |= set(info.empty)
        return params

    def step(self, current: Iterate) -> Steps[Iterate]:
        """The plain EM step."""
        return self.reached(self._following(current), current)

    def reached(self, where: Params | Point, current: Iterate) -> Steps[Iterate]:
        """E-step at M(θ), one update after `current`.

        :raises MonotonicityError: if the objective fell.
        """
        following = yield from self.at(where, current.iteration + 1)
        fall = current.objective - following.objective
        if fall > 0 and fall > MONOTONE * current.rounding:
            raise MonotonicityError(following.iteration, current.objective, following.objective)
        return following


def run_from(
    em: EMMap,
    start: Params,
    rule: StoppingRule,
    callbacks: Iterable[Callback] = (),
    accelerator: Callable[[EMMap], Stepper] | None = None,
    number: int = 0,
    history: History | None = None,
    iteration: int = 0,
) -> Steps[Ended]:
    """Iterate from `start` until the rule, a callback, an error or Ctrl-C ends it.

    :param history: of `iteration` updates that were made before.

    Errors after the first E-step do not lose the last complete iterate: they come back in `Ended.error`.
    """
    history = History() if history is None else history
    began = time.perf_counter() - (history.seconds[-1] if history.seconds else 0.0)
    callbacks = tuple(callbacks)
    stepper: Stepper = em if accelerator is None else accelerator(em)
    current = yield from em.at(start, iteration)
    num_observations = em.problem.graph.num_observations
    try:
        while True:
            score = em.score(current) / num_observations
            record(history, current, score, em.num_e_steps, began)
            if told_to_stop(callbacks, current, score, number):
                return Ended(current, Outcome.interrupted, history, tuple(sorted(em.empty)))
            outcome = rule.outcome(current.iteration, score, current.objective, current.rounding)
            if outcome is not None:
                return Ended(current, outcome, history, tuple(sorted(em.empty)))
            em.expected = rule.remaining(current.iteration, score)
            current = yield from stepper.step(current)
    except DegenerateLikelihoodError as error:
        error.iteration = current.iteration + 1
        return Ended(current, Outcome.degenerate, history, tuple(sorted(em.empty)), error)
    except (KeyboardInterrupt, NonFiniteError, MonotonicityError) as error:
        return Ended(current, Outcome.interrupted, history, tuple(sorted(em.empty)), error)


def drive(evaluator: Evaluator, runs: Sequence[Steps[Ended]], together: bool) -> list[Ended]:
    """Answer the runs' requests until all have ended; those after an error that is no collapse are not begun.

    :param together: one E-step for all runs that go on, instead of one run after the other.
    """
    ended: list[Ended] = []
    groups = [list(runs)] if together else [[run] for run in runs]
    for group in groups:
        ended += _drive(evaluator, group)
        if any(e.error is not None and e.outcome is not Outcome.degenerate for e in ended):
            break
    return ended


def _drive(evaluator: Evaluator, runs: Sequence[Steps[Ended]]) -> list[Ended]:
    ended: dict[int, Ended] = {}
    pending: dict[int, Request] = {}

    def advance(i: int, answer: Evaluated | BaseException | None) -> None:
        try:
            if isinstance(answer, BaseException):
                pending[i] = runs[i].throw(answer)
            else:
                pending[i] = runs[i].send(answer)  # type: ignore[arg-type]
        except StopIteration as stop:
            pending.pop(i, None)
            ended[i] = stop.value

    for i in range(len(runs)):
        advance(i, None)
    while pending:
        going = list(pending)
        answers: Sequence[Evaluated | BaseException]
        try:
            answers = evaluator([pending[i] for i in going])
        except KeyboardInterrupt as error:
            answers = [error for _ in going]
        for i, answer in zip(going, answers, strict=True):
            advance(i, answer)
    return [ended[i] for i in range(len(runs))]


def told_to_stop(callbacks: Sequence[Callback], current: Iterate, score: float, number: int) -> bool:
    """Show an iterate to all callbacks."""
    if not callbacks:
        return False
    likelihood = current.expectation.log_likelihood
    step = Step(current.iteration, current.params, current.objective, likelihood, score, number)
    answers = [callback(step) for callback in callbacks]  # all of them are called
    return any(answers)


def record(
    history: History, current: Iterate, score: float, num_e_steps: int, began: float, temperature: float | None = None
) -> None:
    """Append an iterate to the history."""
    history.objective.append(current.objective)
    history.log_likelihood.append(current.expectation.log_likelihood)
    history.log_prior.append(current.expectation.log_prior)
    history.score.append(score)
    history.num_e_steps.append(num_e_steps)
    history.seconds.append(time.perf_counter() - began)
    if temperature is not None or history.temperature:
        history.temperature.append(1.0 if temperature is None else temperature)
