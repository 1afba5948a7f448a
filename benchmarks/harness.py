"""Paired timing of EM implementations: seconds per update, set-up cancelled, same work asserted first.

Contenders start from the same parameters. Before anything is timed, each performs the same number of updates
and their log-likelihoods must agree to `AGREEMENT`. Then come rounds; in a round every contender is timed for
n1 and for n2 updates, one contender after the other, the order reversed in every second round, and

    seconds per update = (t(n2) - t(n1)) / (n2 - n1),      set-up = t(n1) - n1 · seconds per update

so that what happens once (tracing, compiling, validation, a closing E-step) is reported beside, not mixed in.
A ratio is formed within a round, as both then saw the same machine; the table shows the median over rounds.
A difference that is not positive was swallowed by noise: it is kept as None and counted, never clipped.

This file does arithmetic and calls; where and in which process it happens is the matter of run.py.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AGREEMENT = 1e-9  # relative difference of log-likelihoods after equally many updates
AGREED_AFTER = 3  # updates

LogLikelihood = Callable[[], float]
Fit = Callable[[int], LogLikelihood]
Record = dict[str, Any]


class Disagreement(AssertionError):
    """Two contenders do not do the same work, so that their times cannot be compared."""


@dataclass(frozen=True)
class Contender:
    """`fit(n)` performs exactly n updates; it returns how to get their log-likelihood, which is not timed.

    `counts` are n1 and n2: further apart where one update is short against the set-up.
    """

    name: str
    fit: Fit
    counts: tuple[int, int]


@dataclass(frozen=True)
class Spread:
    """Of the rounds that could be resolved; NaN without any."""

    median: float
    low: float
    high: float
    resolved: int

    @property
    def steady(self) -> bool:
        """Whether the rounds agree within a factor of two; otherwise noise was measured, not the contenders."""
        return self.resolved > 0 and self.high <= 2.0 * self.low

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        """Median, smallest and largest of the values that are not None."""
        known = [value for value in values if value is not None]
        if not known:
            return cls(math.nan, math.nan, math.nan, 0)
        return cls(statistics.median(known), min(known), max(known), len(known))


def seconds_per_update(first: float, second: float, counts: tuple[int, int]) -> float | None:
    """From the times of n1 and n2 updates; None if noise swallowed the difference."""
    difference = (second - first) / (counts[1] - counts[0])
    return difference if difference > 0 else None


def setup_seconds(first: float, per_update: float | None, counts: tuple[int, int]) -> float | None:
    """What n1 updates took beyond the updates."""
    return None if per_update is None else first - counts[0] * per_update


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float | None]:
    """Theirs ÷ ours, round by round: above 1 we are faster."""
    return [None if mine is None or other is None else other / mine for mine, other in zip(ours, theirs, strict=True)]


def relative_difference(values: Mapping[str, float]) -> float:
    """Largest difference among the values, relative to their size; infinite if one is not finite."""
    if not all(math.isfinite(value) for value in values.values()):
        return math.inf
    size = max(abs(value) for value in values.values())
    return (max(values.values()) - min(values.values())) / max(size, 1e-300)


def assert_agreement(contenders: Sequence[Contender], updates: int = AGREED_AFTER) -> Record:
    """Let each perform `updates` updates, and compare. This warms every contender up, too.

    :raises Disagreement: naming all log-likelihoods.
    """
    found = {contender.name: contender.fit(updates)() for contender in contenders}
    difference = relative_difference(found)
    if difference > AGREEMENT:
        shown = ", ".join(f"{name} {value!r}" for name, value in found.items())
        raise Disagreement(
            f"After {updates} updates from the same start the log-likelihoods differ by {difference:.1e} (relative; "
            f"at most {AGREEMENT:.0e} is allowed): {shown}. The contenders do not do the same work."
        )
    return {"updates": updates, "log_likelihood": found, "relative_difference": difference}


def timed(fit: Fit, updates: int) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    fit(updates)
    return time.perf_counter() - began


def measure(contenders: Sequence[Contender], rounds: int) -> dict[str, Record]:
    """Rounds of paired timings: by contender, lists over rounds."""
    times: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        order = contenders if number % 2 == 0 else contenders[::-1]
        for contender in order:
            first, second = (timed(contender.fit, updates) for updates in contender.counts)
            times[contender.name].append((first, second))
    return {contender.name: _record(contender, times[contender.name]) for contender in contenders}


def _record(contender: Contender, times: list[tuple[float, float]]) -> Record:
    per_update = [seconds_per_update(first, second, contender.counts) for first, second in times]
    setup = [setup_seconds(first, each, contender.counts) for (first, _), each in zip(times, per_update, strict=True)]
    return {"counts": list(contender.counts), "seconds_per_update": per_update, "setup_seconds": setup}
