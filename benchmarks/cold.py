"""The first fit in a fresh process, as a user meets it: tracing, compiling and 50 updates, after the imports.

Nothing is cancelled here and nothing is warm; every round is a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import Contender, Record, assert_agreement
from benchmarks.machine import set_threads
from benchmarks.paired import Make
from benchmarks.workload import Spawn


@dataclass(frozen=True)
class Cold:
    """`target_seconds` is for the first contender, which is ours."""

    name: str
    title: str
    problem: Callable[[bool], Any]
    makes: Mapping[str, Make]
    updates: int
    target_seconds: float
    calls: tuple[str, ...] = field(default=("agreement", "once"), init=False)

    def collect(self, spawn: Spawn, rounds: int) -> Record:
        """One process per contender and round, the order reversed in every second round."""
        record = spawn("agreement")
        seconds: dict[str, list[float]] = {name: [] for name in self.makes}
        for number in range(rounds):
            for name in list(self.makes)[:: 1 if number % 2 == 0 else -1]:
                seconds[name].append(spawn("once", contender=name)["seconds"])
        contenders = {name: {"seconds": values} for name, values in seconds.items()}
        return {
            "kind": "cold",
            **record,
            "contenders": contenders,
            "updates": self.updates,
            "target_seconds": self.target_seconds,
        }

    def agreement(self, tiny: bool) -> Record:
        """After all updates."""
        problem = self.problem(tiny)
        contenders = [Contender(name, make(problem), (1, 2)) for name, make in self.makes.items()]
        return {"agreement": assert_agreement(contenders, self._updates(tiny))}

    def once(self, contender: str, tiny: bool) -> Record:
        """Seconds of the first fit in this process."""
        problem, threads = self.problem(tiny), torch.get_num_threads()
        fit = self.makes[contender](problem)
        set_threads(threads)
        began = time.perf_counter()
        fit(self._updates(tiny))
        return {"seconds": time.perf_counter() - began}

    def _updates(self, tiny: bool) -> int:
        return 3 if tiny else self.updates
