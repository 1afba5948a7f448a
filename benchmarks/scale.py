"""The cost of one row in one update, over sizes of the data: flat if the work is linear and stays in cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.harness import Contender, Record, measure
from benchmarks.paired import Make
from benchmarks.problems import Mixture
from benchmarks.workload import Spawn


@dataclass(frozen=True)
class Scale:
    """`counts(N)` are n1 and n2; `flat_within` is the relative deviation allowed from the smallest cost."""

    name: str
    title: str
    problem: Callable[[int], Mixture]
    make: Make
    sizes: Sequence[int]
    flat_within: float
    calls: tuple[str, ...] = field(default=("timings",), init=False)

    def collect(self, spawn: Spawn, rounds: int) -> Record:
        """All sizes in one process, interleaved."""
        return {"kind": "scale", **spawn("timings", rounds=rounds), "flat_within": self.flat_within}

    def timings(self, rounds: int, tiny: bool) -> Record:
        """Seconds per update, by size."""
        sizes = (1000, 2000) if tiny else self.sizes
        contenders = [
            Contender(str(size), self.make(self.problem(size)), (2, 4) if tiny else _counts(size, max(sizes)))
            for size in sizes
        ]
        return {"sizes": list(sizes), "contenders": measure(contenders, rounds)}


def _counts(size: int, largest: int) -> tuple[int, int]:
    """Enough updates to outweigh the noise of the set-up, and at small sizes that of the clock."""
    return 2, 2 + max(40, largest // size)
