"""Workloads that pair `pyro_em.fit` with peers: seconds per update, set-up, peak memory, distance to the limit.

The limit is what the arithmetic alone would take on this machine, from the anchors of the same process: two
products Φ W and Rᵀ Φ, 4·N·K·P flops for P features a row (mixture: [1, x, x_i x_j]; items: [1, x]), and N·K
exponentials, for each start. Equal rows of discrete data count once, as they can be collapsed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.chains import Chain
from benchmarks.harness import AGREED_AFTER, Contender, Fit, Record, assert_agreement, measure
from benchmarks.machine import peak_bytes, set_threads
from benchmarks.problems import ItemResponse, LatentClasses, LinearSystems, MixedLogit, Mixture, Regressions
from benchmarks.workload import Spawn

OURS = "pyro_em"
Make = Callable[[Any], Fit]
TINY_COUNTS = (1, 3)


@dataclass(frozen=True)
class Entry:
    """One contender: how it is made from the problem, n1 and n2, and how many times faster we want to be."""

    make: Make
    counts: tuple[int, int]
    target: float | None = None


@dataclass(frozen=True)
class Paired:
    """The first entry is ours. `problem(tiny)` makes data and start."""

    name: str
    title: str
    problem: Callable[[bool], Any]
    entries: Mapping[str, Entry]
    peak_target: int | None = None  # bytes
    starts: int = 1
    calls: tuple[str, ...] = field(default=("timings", "peak"), init=False)

    def collect(self, spawn: Spawn, rounds: int) -> Record:
        """Timings in one process, then the peak memory of each contender in one of its own."""
        record = spawn("timings", rounds=rounds)
        for name, own in record["contenders"].items():
            own["peak_bytes"] = spawn("peak", contender=name)["peak_bytes"]
        targets = {name: entry.target for name, entry in self.entries.items() if entry.target is not None}
        return {"kind": "paired", **record, "targets": targets, "peak_target": self.peak_target}

    def timings(self, rounds: int, tiny: bool) -> Record:
        """Agreement, then paired rounds, and the work of one update."""
        problem = self.problem(tiny)
        contenders = [self._contender(name, problem, tiny) for name in self.entries]
        agreement = assert_agreement(contenders)
        return {"agreement": agreement, "contenders": measure(contenders, rounds), "work": work(problem, self.starts)}

    def peak(self, contender: str, tiny: bool) -> Record:
        """Memory that a few updates need beyond the data and the libraries."""
        fit = self._contender(contender, self.problem(tiny), tiny).fit
        return {"peak_bytes": peak_bytes(lambda: fit(AGREED_AFTER))}

    def _contender(self, name: str, problem: Any, tiny: bool) -> Contender:
        entry, threads = self.entries[name], torch.get_num_threads()
        fit = entry.make(problem)
        set_threads(threads)  # making it may have imported a peer
        return Contender(name, fit, TINY_COUNTS if tiny else entry.counts)


def work(
    problem: Mixture | LatentClasses | Regressions | Chain | LinearSystems | ItemResponse | MixedLogit, starts: int = 1
) -> dict[str, int]:
    """Floating point operations and exponentials of one update of all starts."""
    if isinstance(problem, Regressions | Chain | LinearSystems | ItemResponse | MixedLogit):
        return problem.work()
    if isinstance(problem, LatentClasses):
        rows, features = len(problem.data.unique(dim=0)), 1 + problem.data.shape[1]
        size = problem.num_classes
    else:
        rows, width = problem.data.shape
        features = 1 + 2 * width if problem.diagonal else 1 + width + width * (width + 1) // 2
        size = problem.num_components
    return {"flops": 4 * starts * rows * size * features, "exps": starts * rows * size}
