"""Whole fits, from the call to the result: for contenders whose updates are not the same, but whose maximum is.

Every contender stops by its own rule. Each fits once, and their log-likelihoods must lie within `gap` (nats) of the
best; the seconds of this fit, the first one of the process after the imports, are told apart. Then come rounds, in
which each is timed for a whole fit, tracing and compiling included, the order reversed in every second round: these are
later fits of the process, for ours and for the peer. A ratio is formed within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import Disagreement, LogLikelihood, Record
from benchmarks.machine import set_threads
from benchmarks.workload import Spawn

WholeFit = Callable[[], LogLikelihood]


@dataclass(frozen=True)
class Whole:
    """The first of `makes` is ours; `targets` say how many times faster than a peer we want to be."""

    name: str
    title: str
    problem: Callable[[bool], Any]
    makes: Mapping[str, Callable[[Any], WholeFit]]
    targets: Mapping[str, float]
    gap: float
    calls: tuple[str, ...] = field(default=("timings",), init=False)

    def collect(self, spawn: Spawn, rounds: int) -> Record:
        """All in one process: ratios are formed within a round."""
        return {"kind": "whole", **spawn("timings", rounds=rounds), "targets": dict(self.targets), "gap": self.gap}

    def timings(self, rounds: int, tiny: bool) -> Record:
        """Agreement, which warms every contender up, then paired rounds."""
        problem, threads = self.problem(tiny), torch.get_num_threads()
        fits = {name: make(problem) for name, make in self.makes.items()}
        set_threads(threads)  # making them may have imported a peer
        found, first = {}, {}
        for name, fit in fits.items():
            began = time.perf_counter()
            answer = fit()
            first[name], found[name] = time.perf_counter() - began, answer()
        best = max(found.values())
        if not all(best - value <= self.gap for value in found.values()):
            shown = ", ".join(f"{name} {value!r}" for name, value in found.items())
            raise Disagreement(f"{self.name}: not all log-likelihoods are within {self.gap} of the best: {shown}.")
        seconds: dict[str, list[float]] = {name: [] for name in fits}
        for number in range(rounds):
            for name in list(fits)[:: 1 if number % 2 == 0 else -1]:
                began = time.perf_counter()
                fits[name]()
                seconds[name].append(time.perf_counter() - began)
        contenders = {name: {"seconds": own, "first_seconds": first[name]} for name, own in seconds.items()}
        return {"agreement": {"log_likelihood": found}, "contenders": contenders}
