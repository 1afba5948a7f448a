"""The cost of one unit of work in one update, over sizes: flat if the work is linear and stays in cache.

The unit is a row where N grows, a row and component where K does, a row and feature (of [1, x, x_i x_j]) for D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import Contender, Record, measure
from benchmarks.paired import Make, work
from benchmarks.workload import Spawn


@dataclass(frozen=True)
class Scale:
    """`units(size)` is what the time of an update is divided by, `unit` what it is called.

    `flat_within` is the relative deviation allowed from the smallest cost, None where none is asked for.
    """

    name: str
    title: str
    letter: str
    problem: Callable[[int], Any]
    make: Make
    sizes: Sequence[int]
    units: Callable[[int], int]
    unit: str
    flat_within: float | None = None
    tiny: Sequence[int] = (1000, 2000)
    calls: tuple[str, ...] = field(default=("timings",), init=False)

    def collect(self, spawn: Spawn, rounds: int) -> Record:
        """All sizes in one process, interleaved."""
        found = spawn("timings", rounds=rounds)
        return {"kind": "scale", **found, "flat_within": self.flat_within, "letter": self.letter, "unit": self.unit}

    def timings(self, rounds: int, tiny: bool) -> Record:
        """Seconds per update, by size."""
        sizes = self.tiny if tiny else self.sizes
        problems = {size: self.problem(size) for size in sizes}
        contenders = [
            Contender(str(size), self.make(problem), (2, 4) if tiny else _counts(problem))
            for size, problem in problems.items()
        ]
        units = [self.units(size) for size in sizes]
        return {"sizes": list(sizes), "units": units, "contenders": measure(contenders, rounds)}


def _counts(problem: Any) -> tuple[int, int]:
    """Some seconds of updates, so that they outweigh the noise of the set-up, and at small sizes that of the clock.

    Where the work of an update is that of a second, the recording (pyro_em/evaluator.py), which n1 = 25 leaves
    behind, makes no difference: the ordinary updates are timed, and fewer.
    """
    flops = work(problem)["flops"]
    return (25, 25 + 40_000_000_000 // flops) if flops < 10_000_000_000 else (2, 6)


def features(width: int) -> int:
    """Length of [1, x, x_i x_j (i <= j)]."""
    return 1 + width + width * (width + 1) // 2
