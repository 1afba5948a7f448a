"""Runs of another kind than EM's loop: stochastic EM, and EM that begins at other temperatures.

Stochastic EM (Celeux and Diebolt 1985): each update is the M-step of one posterior draw of the latents. The updates
are a Markov chain around the maximum and do not converge; what is returned is the average of the last half of them,
a mean over the chain's stationary law.

Deterministic annealing (Ueda and Nakano 1998): the E-step at temperature T is q(z) ∝ p(z|x,θ)^(1/T). High temperatures
smooth the likelihood, and the schedule ends at T = 1, where ordinary EM goes on from the parameters reached: its limit
is an EM limit.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.e_step.assigned import Assigned
from pyro_em.errors import DegenerateLikelihoodError, InputError, MonotonicityError, NonFiniteError
from pyro_em.loop import (
    MONOTONE,
    Callback,
    EMMap,
    Ended,
    History,
    Iterate,
    Steps,
    at,
    record,
    told_to_stop,
)
from pyro_em.problem import Problem
from pyro_em.stop import Outcome
from pyro_em.types import Params

COOLING, NEAR = 0.9, 0.01  # of a schedule given by its first temperature

Temperature = float | Sequence[float] | Callable[[int], float]


def temperatures(given: Temperature) -> Iterator[float]:
    """Temperatures of the updates before T = 1 is reached.

    A number T0 stands for 1 + (T0 - 1)·0.9^k until that is within 0.01 of 1; a sequence for its entries; a function
    for its values at k = 0, 1, ... until the first that is 1.
    :raises InputError: for a temperature that is not a positive finite number, naming the iteration.
    """
    values: Iterable[Any]
    if callable(given):
        values = itertools.takewhile(lambda t: t != 1, map(given, itertools.count()))
    elif isinstance(given, int | float) and not isinstance(given, bool):
        cooled = (1 + (given - 1) * COOLING**k for k in itertools.count())
        values = itertools.takewhile(lambda t: not abs(t - 1) < NEAR, cooled)
    elif isinstance(given, Sequence | Tensor) and not isinstance(given, str):
        values = [float(t) if isinstance(t, Tensor) else t for t in given]
    else:
        raise InputError(f"temperature: give a number, a sequence of numbers or a function, not {given!r}.")
    return map(_checked, itertools.count(), values)


def check_temperature(given: Temperature | None) -> None:
    """Raise `InputError` for a schedule that is none; a function is called for its first value only."""
    if given is not None:
        for _ in itertools.islice(temperatures(given), 1 if callable(given) else 10_000):
            pass


def _checked(iteration: int, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < float("inf")):
        raise InputError(f"temperature: at iteration {iteration} it is {value!r}; temperatures are positive numbers.")
    return float(value)


def annealed(
    em: EMMap,
    start: Params,
    schedule: Iterator[float],
    max_iter: int,
    callbacks: Sequence[Callback],
    number: int,
    go_on: Callable[[Params, History, int], Steps[Ended]],
) -> Steps[Ended]:
    """Updates at the temperatures of `schedule`, then `go_on` from the parameters reached.

    Where two updates have one temperature, the second objective is not lower; between temperatures no objective is
    compared.
    """
    began, history, problem = time.perf_counter(), History(), em.problem
    engine = Assigned(problem, "sum")
    params = {name: value.to(problem.parameters[name].value.dtype) for name, value in start.items()}
    before: Iterate | None = None
    iteration = 0
    try:
        for temperature in itertools.islice(schedule, max_iter):
            same = before is not None and engine.temperature == temperature
            engine.temperature = temperature
            em.num_e_steps += 1
            current = at(problem, params, engine.e_step(params), iteration)
            if same and before is not None and current.objective < before.objective - MONOTONE * before.rounding:
                raise MonotonicityError(iteration, before.objective, current.objective)
            before = current
            score = em.score(current) / problem.graph.num_observations
            record(history, current, score, em.num_e_steps, began, temperature)
            if told_to_stop(callbacks, current, score, number):
                return Ended(current, Outcome.interrupted, history, tuple(sorted(em.empty)))
            params, iteration = em.update(current), iteration + 1
    except DegenerateLikelihoodError as error:
        error.iteration = iteration + 1
        if before is None:
            raise
        return Ended(before, Outcome.degenerate, history, tuple(sorted(em.empty)), error)
    except (KeyboardInterrupt, NonFiniteError, MonotonicityError) as error:
        if before is None:
            raise
        return Ended(before, Outcome.interrupted, history, tuple(sorted(em.empty)), error)
    return (yield from go_on(params, history, iteration))


def stochastic(em: EMMap, start: Params, max_iter: int, callbacks: Sequence[Callback], number: int) -> Steps[Ended]:
    """`max_iter` updates from posterior draws, and the average of the last half of them."""
    began, history = time.perf_counter(), History()
    current = yield from em.at(start, 0)
    kept: list[Params] = []
    try:
        while True:
            score = em.score(current) / em.problem.graph.num_observations
            record(history, current, score, em.num_e_steps, began)
            if told_to_stop(callbacks, current, score, number):
                return Ended(current, Outcome.interrupted, history, tuple(sorted(em.empty)))
            if current.iteration > max_iter // 2:
                kept.append(current.params)
            if current.iteration >= max_iter:
                break
            current = yield from em.at(em.update(current), current.iteration + 1)
        if len(kept) > 1:
            current = yield from em.at(_average(em.problem, kept), current.iteration)
            record(history, current, em.score(current) / em.problem.graph.num_observations, em.num_e_steps, began)
    except DegenerateLikelihoodError as error:
        error.iteration = current.iteration + 1
        return Ended(current, Outcome.degenerate, history, tuple(sorted(em.empty)), error)
    except (KeyboardInterrupt, NonFiniteError) as error:
        return Ended(current, Outcome.interrupted, history, tuple(sorted(em.empty)), error)
    return Ended(current, Outcome.averaged, history, tuple(sorted(em.empty)))


def _average(problem: Problem, kept: Sequence[Params]) -> Params:
    """Mean of the iterates; the last one of a parameter whose space is not convex, such as correlation factors."""
    found = {}
    for name, last in kept[-1].items():
        mean = torch.stack([params[name] for params in kept]).mean(0)
        inside = bool(problem.parameters[name].constraint.check(mean).all())
        found[name] = mean if inside else last
    return found
