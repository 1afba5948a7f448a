"""The stored records as one picture: ratios with the targets, cost of a row, way to the optimum.

python -m benchmarks.draw            reads benchmarks/results/*.json, writes benchmarks/results/table.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is written, no window opened

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures import costs_of_a_unit, peer_ratios
from benchmarks.harness import Record, Spread
from benchmarks.report import stored

FASTER, SLOWER, ASKED = "#0072b2", "#d55e00", "#000000"  # told apart by colour-blind readers, too


def draw(records: Sequence[Record]) -> Figure:
    """One panel for each kind of record there is.

    :raises ValueError: if there are none.
    """
    kinds = {record["kind"] for record in records}
    ratio = [record for record in records if record["kind"] in ("paired", "cold", "whole")]
    panels = [
        (panel, chosen)
        for panel, chosen in (
            (_ratios, ratio),
            (_scale, [record for record in records if record["kind"] == "scale"]),
            (_gap, [record for record in records if record["kind"] == "gap"]),
        )
        if chosen
    ]
    if not panels:
        raise ValueError(f"There is nothing to draw in {len(records)} records of kinds {sorted(kinds)}.")
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False, layout="constrained")
    for (panel, chosen), ax in zip(panels, axes[0], strict=True):
        panel(ax, chosen)
    return figure


def _ratios(ax: Axes, records: Sequence[Record]) -> None:
    bars = [
        (f"{record['workload']} : {peer}", spread, record.get("targets", {}).get(peer))
        for record in records
        for peer, spread in peer_ratios(record).items()
        if spread.resolved
    ]
    for place, (_, spread, asked) in enumerate(bars):
        ax.plot([spread.low, spread.high], [place, place], color="grey", zorder=1)
        ax.plot(spread.median, place, "o", color=FASTER if spread.median >= 1 else SLOWER, zorder=2)
        if asked is not None:
            ax.plot(asked, place, "|", color=ASKED, markersize=14)
    ax.axvline(1, color="grey", linewidth=0.8)
    ax.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlabel("peer ÷ ours (median and range of paired rounds; | asked)")
    ax.set_title("Right of 1 we are faster")


def _scale(ax: Axes, records: Sequence[Record]) -> None:
    for record in records:
        cost = {size: spread for size, spread in costs_of_a_unit(record).items() if spread.resolved}
        cheapest = min(spread.median for spread in cost.values())
        label = f"{record['letter']} ({1e9 * cheapest:.2g} ns a {record['unit']})"
        ax.plot(list(cost), [spread.median / cheapest for spread in cost.values()], "o-", label=label)
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("size")
    ax.set_ylabel("cost of a unit ÷ the cheapest")
    ax.set_title("Is the work linear?")
    ax.legend()


def _gap(ax: Axes, records: Sequence[Record]) -> None:
    for record in records:
        for name, own in record["contenders"].items():
            steps, seconds = Spread.of(own["evaluations"]), Spread.of(own["seconds"])
            if steps.resolved:
                ax.plot(steps.median, seconds.median, "o")
                label = f"{record['workload'].removeprefix('gap-')} {name}"
                ax.annotate(
                    label, (steps.median, seconds.median), textcoords="offset points", xytext=(4, 4), fontsize=7
                )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("evaluations")
    ax.set_ylabel("seconds, tracing included")
    ax.set_title("To within 1e-3 nat of the optimum")


def main() -> None:
    """Read, draw, write."""
    folder = Path(__file__).resolve().parent / "results"
    draw(stored(folder)).savefig(folder / "table.png", format="png", dpi=150)
    print(folder / "table.png")


if __name__ == "__main__":
    main()
