"""The cost of one unit of work in one update, over sizes: flat if the work is linear and stays in cache.

The unit is a row where N grows, a row and component where K does, a row and feature (of [1, x, x_i x_j]) for D.
An update's cost is the median step of the clock in one fit's own history: the set-up of 10 million rows takes as long
as many updates, and its noise would drown the difference of two fits. Set-up is what a fit takes beside its updates:
tracing, compiling, the final check.

An update costs something whatever the size, which the average of a small one shows: the report also says what each
size costs more than the one before, per unit, and what the smallest costs beside its units at that price; and the line
`a` an update + `b` a unit that is nearest to all sizes. Whether the smallest is fast nevertheless, peers say: `beside`
is the workload of the smallest size with them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import Record
from benchmarks.paired import Paired, work
from benchmarks.workload import Spawn
from pyro_em.result import FitResult

FIRST = 8  # updates, by which the EM map is recorded (pyro_em/evaluator.py) where enough of them follow


@dataclass(frozen=True)
class Scale:
    """`fit(problem, updates)` performs them; `units(size)` is what the time of one is divided by, `unit` its name.

    `flat_within` is the relative deviation allowed from the smallest cost, None where none is asked for.
    """

    name: str
    title: str
    letter: str
    problem: Callable[[int], Any]
    fit: Callable[[Any, int], FitResult]
    sizes: Sequence[int]
    units: Callable[[int], int]
    unit: str
    flat_within: float | None = None
    tiny: Sequence[int] = (1000, 2000)
    beside: Paired | None = None
    calls: tuple[str, ...] = field(default=("timings", "peers"), init=False)

    def collect(self, spawn: Spawn, rounds: int) -> Record:
        """All sizes in one process, interleaved; the smallest with its peers in another."""
        found = spawn("timings", rounds=rounds)
        if self.beside is not None:
            found["beside"] = spawn("peers", rounds=rounds)["contenders"]
        return {"kind": "scale", **found, "flat_within": self.flat_within, "letter": self.letter, "unit": self.unit}

    def peers(self, rounds: int, tiny: bool) -> Record:
        """The timings of `beside`."""
        assert self.beside is not None
        return self.beside.timings(rounds, tiny)

    def timings(self, rounds: int, tiny: bool) -> Record:
        """Seconds per update and of the set-up, by size."""
        sizes = self.tiny if tiny else self.sizes
        problems = {size: self.problem(size) for size in sizes}
        found: dict[int, Record] = {}
        for number in range(rounds):
            for size in sizes if number % 2 == 0 else sizes[::-1]:
                problem = problems[size]
                updates = FIRST + (3 if tiny else _count(problem))
                began = time.perf_counter()
                seconds = self.fit(problem, updates).history["seconds"]
                setup = time.perf_counter() - began - seconds[-1]
                clock = torch.tensor(seconds, dtype=torch.float64)
                empty = {"counts": [FIRST, updates], "seconds_per_update": [], "setup_seconds": []}
                own = found.setdefault(size, empty)
                own["seconds_per_update"].append(statistics.median(clock.diff()[FIRST:].tolist()))
                own["setup_seconds"].append(setup)
        return {"sizes": list(sizes), "units": [self.units(size) for size in sizes], "contenders": found}


def _count(problem: Any) -> int:
    """Updates of about a second in all, several even where one takes longer."""
    return min(2000, max(5, 25_000_000_000 // work(problem)["flops"]))


def features(width: int) -> int:
    """Length of [1, x, x_i x_j (i <= j)]."""
    return 1 + width + width * (width + 1) // 2
