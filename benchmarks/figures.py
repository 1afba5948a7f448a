"""What the figures of a record come to: ratios within rounds, costs of a unit, the line nearest to all sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from benchmarks.harness import Record, Spread, ratios


def ours(record: Record) -> str:
    """Our contender: the first."""
    return next(iter(record["contenders"]))


def peer_ratios(record: Record) -> dict[str, Spread]:
    """Peer ÷ ours of a paired, cold or whole record."""
    key = "seconds_per_update" if record["kind"] == "paired" else "seconds"
    mine = record["contenders"][ours(record)][key]
    return {
        name: Spread.of(ratios(mine, own[key])) for name, own in record["contenders"].items() if name != ours(record)
    }


def limit_ratio(record: Record) -> float | None:
    """Our time per update ÷ what the arithmetic alone would take on this machine."""
    anchors, work = record["machine"]["anchors"], record["work"]
    mine = Spread.of(record["contenders"][ours(record)]["seconds_per_update"])
    if not anchors or not mine.resolved:
        return None
    return mine.median / (work["flops"] / anchors["gemm"] + work["exps"] / anchors["exp"])


def costs_of_a_unit(record: Record) -> dict[int, Spread]:
    """Seconds per unit of work and update, by size."""
    return {
        size: Spread.of([None if s is None else s / units for s in _per_update(record, str(size))])
        for size, units in zip(record["sizes"], record["units"], strict=True)
    }


def _per_update(record: Record, contender: str) -> list[float | None]:
    return record["contenders"][contender]["seconds_per_update"]


def marginal_costs(record: Record) -> tuple[dict[int, float], float]:
    """Seconds that each unit costs beyond the size before, and those of an update of the smallest size beside its units
    at the first of these prices: what does not grow."""
    sizes, units = record["sizes"], record["units"]
    times = [spread.median * n for spread, n in zip(costs_of_a_unit(record).values(), units, strict=True)]
    found = {size: (times[i + 1] - times[i]) / (units[i + 1] - units[i]) for i, size in enumerate(sizes[1:])}
    return found, times[0] - units[0] * found[sizes[1]]


def nearest_line(record: Record) -> tuple[float, float, float]:
    """a and b of an update of a + b · units seconds, by least squares of relative residuals, and their largest."""
    units = np.array(record["units"], float)
    times = units * [spread.median for spread in costs_of_a_unit(record).values()]
    line = np.stack([1 / times, units / times], 1)
    (fixed, each), *_ = np.linalg.lstsq(line, np.ones(len(times)), rcond=None)
    return float(fixed), float(each), float(np.abs(line @ [fixed, each] - 1).max())


def peers_of_smallest(record: Record) -> dict[str, Spread]:
    """Peer ÷ ours of the smallest size, where there are peers."""
    contenders = record.get("beside", {})
    mine = next(iter(contenders), None)
    key = "seconds_per_update"
    return {
        name: Spread.of(ratios(contenders[mine][key], own[key])) for name, own in contenders.items() if name != mine
    }


def unevenness(record: Record) -> float:
    """How far the dearest unit is above the cheapest."""
    medians = [spread.median for spread in costs_of_a_unit(record).values()]
    return max(medians) / min(medians) - 1


def fewest(record: Record, names: Iterable[str]) -> float:
    """Least median number of evaluations among the contenders; infinite if none arrived."""
    contenders = record["contenders"]
    found = [Spread.of(contenders[name]["evaluations"]) for name in names if name in contenders]
    return min((spread.median for spread in found if spread.resolved), default=math.inf)
