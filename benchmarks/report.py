"""Records as a Markdown report: what was measured on which machine, and last, every loss and every missed target.

    python -m benchmarks.report          of the records in benchmarks/results/

Times are medians over rounds, with the smallest and largest in brackets; a ratio is peer ÷ ours, formed within a
round, so above 1 we are faster. Nothing is left out for being unfavourable: `shortfalls` is what the table ends with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.figures import (
    costs_of_a_unit,
    fewest,
    limit_ratio,
    marginal_costs,
    nearest_line,
    ours,
    peer_ratios,
    peers_of_smallest,
    unevenness,
)
from benchmarks.harness import Record, Spread
from benchmarks.workloads import WORKLOADS

BUSY = 0.5  # load before the workload starts, above which somebody else was computing
MISSING = "–"


def table(records: Sequence[Record]) -> str:
    """The whole report."""
    if not records:
        return "No records."
    parts = [_head(records)]
    for kind, write in (("paired", _paired), ("whole", _whole), ("cold", _cold), ("scale", _scale), ("gap", _gap)):
        chosen = [record for record in records if record["kind"] == kind]
        if chosen:
            parts.append(write(chosen))
    lost = [line for record in records for line in shortfalls(record)]
    parts.append("Losses and missed targets:\n\n" + "\n".join(f"- {line}" for line in lost or ["none"]))
    return "\n\n".join(parts)


def shortfalls(record: Record) -> list[str]:
    """What did not go as asked, in sentences."""
    name, kind = record["workload"], record["kind"]
    found = []
    if kind in ("paired", "cold", "whole"):
        targets = record.get("targets", {})
        for peer, ratio in peer_ratios(record).items():
            asked = targets.get(peer)
            if not ratio.resolved:
                found.append(f"{name}: no round resolved the time against {peer}.")
            elif not ratio.steady:
                spread = f"{ratio.low:.2f}× to {ratio.high:.2f}×"
                found.append(f"{name}: the rounds against {peer} differ, {spread}: noise, no result.")
            elif asked is not None and ratio.median < asked:
                found.append(f"{name}: {ratio.median:.2f}× {peer}, {asked:.2f}× was asked.")
            elif asked is None and ratio.median < 1:
                found.append(f"{name}: slower than {peer}, {ratio.median:.2f}×.")
    if kind == "paired":
        peak, most = record["contenders"][ours(record)]["peak_bytes"], record["peak_target"]
        if peak is not None and most is not None and peak > most:
            found.append(f"{name}: peak memory {peak / 1e6:.0f} MB above the data, {most / 1e6:.0f} MB was asked.")
    if kind == "cold":
        seconds = Spread.of(record["contenders"][ours(record)]["seconds"]).median
        if seconds > record["target_seconds"]:
            found.append(f"{name}: {seconds:.2f} s, {record['target_seconds']:.2f} s was asked.")
    if kind == "scale" and record["flat_within"] is not None and not unevenness(record) <= record["flat_within"]:
        asked = f"{record['flat_within']:.0%} was asked"
        found.append(f"{name}: the cost of a {record['unit']} varies by {unevenness(record):.0%}, {asked}.")
    if kind == "scale":
        for peer, ratio in peers_of_smallest(record).items():
            if not ratio.steady or ratio.median < 1:
                where = f"{record['letter']} = {record['sizes'][0]:,}"
                found.append(f"{name}: {ratio.median:.2f}× {peer} at {where} ({ratio.low:.2f}–{ratio.high:.2f}).")
    if kind == "gap":
        found += _gap_shortfalls(record)
    return found


def _gap_shortfalls(record: Record) -> list[str]:
    name, contenders = record["workload"], record["contenders"]
    plain, quickest = fewest(record, ["em"]), fewest(record, ["squarem", "anderson"])
    found = [
        f"{name}: {own} did not arrive in any round (short by {min(values['shortfall']):.2g} nat at best)."
        for own, values in contenders.items()
        if not Spread.of(values["evaluations"]).resolved
    ]
    if record["target"] is not None and plain < record["target"] * quickest:
        found.append(f"{name}: {plain / quickest:.1f}× fewer E-steps than plain EM, {record['target']:.0f}× was asked.")
    seconds = {own: Spread.of(values["seconds"]).median for own, values in contenders.items()}
    arrived = [seconds[own] for own in ("squarem", "anderson") if own in seconds and not math.isnan(seconds[own])]
    best = min(arrived, default=math.inf)
    for peer in ("L-BFGS", "Pyro SVI"):
        if seconds.get(peer, math.inf) < best:
            found.append(f"{name}: {peer} arrives in {seconds[peer]:.3f} s, we in {best:.3f} s.")
    return found


def _head(records: Sequence[Record]) -> str:
    machine = records[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    loads = [load for record in records if (load := record["machine"]["load"])]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores; {machine['threads']} thread(s), float64; Python "
        f"{machine['python']}, {versions}.",
        f"Measured {min(r['finished'] for r in records)} to {max(r['finished'] for r in records)}.",
    ]
    if loads:
        low, high = min(load[0] for load in loads), max(load[1] for load in loads)
        note = " Others were computing at the same time: read the ratios, not the times." if low > BUSY else ""
        lines.append(f"Load average {low:.1f} to {high:.1f}.{note}")
    if any(record["tiny"] for record in records):
        lines.append("**Tiny sizes: a smoke test, no measurement.**")
    return "\n".join(lines)


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _paired(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        mine = record["contenders"][ours(record)]
        ratio, limit = peer_ratios(record), limit_ratio(record)
        for peer, spread in ratio.items():
            own, asked = record["contenders"][peer], record["targets"].get(peer)
            rows.append([
                record["workload"],
                record["title"],
                _milliseconds(Spread.of(mine["seconds_per_update"])),
                peer,
                _milliseconds(Spread.of(own["seconds_per_update"])),
                _spread(spread, 1, 2, "×"),
                MISSING if asked is None else f"≥ {asked:.2f}×",
                _verdict(spread, asked),
                f"{_setup(mine)} / {_setup(own)}",
                f"{_megabytes(mine['peak_bytes'])} / {_megabytes(own['peak_bytes'])}",
                MISSING if limit is None else f"{limit:.1f}",
            ])  # fmt: skip
    header = [
        "", "workload", "ours, ms an update", "peer", "peer, ms", "peer ÷ ours", "asked", "", "set-up, s: ours / peer",
        "peak MB: ours / peer", "ours ÷ limit",
    ]  # fmt: skip
    return _rows(header, rows)


def _whole(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        mine, likelihood = record["contenders"][ours(record)], record["agreement"]["log_likelihood"]
        for peer, spread in peer_ratios(record).items():
            own, asked = record["contenders"][peer], record["targets"].get(peer)
            rows.append([
                record["workload"],
                record["title"],
                _spread(Spread.of(mine["seconds"]), 1, 3),
                f"{mine['first_seconds']:.3f}" if "first_seconds" in mine else MISSING,
                peer,
                _spread(Spread.of(own["seconds"]), 1, 3),
                _spread(spread, 1, 2, "×"),
                MISSING if asked is None else f"≥ {asked:.2f}×",
                _verdict(spread, asked),
                f"{likelihood[ours(record)] - likelihood[peer]:+.1e}",
            ])  # fmt: skip
    header = [
        "", "whole fit", "ours, s", "ours, first of the process, s", "peer", "peer, s", "peer ÷ ours", "asked", "",
        "log-likelihood, ours - peer",
    ]  # fmt: skip
    return _rows(header, rows)


def _cold(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        ratio = {ours(record): None, **peer_ratios(record)}
        for name, own in record["contenders"].items():
            spread = ratio[name]
            asked = f"≤ {record['target_seconds']:.2f} s" if spread is None else MISSING
            seconds = _spread(Spread.of(own["seconds"]), 1, 3)
            rows.append([record["title"], name, seconds, "" if spread is None else _spread(spread, 1, 2, "×"), asked])
    return _rows(["whole fit", "", "s", "peer ÷ ours", "asked"], rows)


def _scale(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        more, fixed = marginal_costs(record)
        for size, spread in costs_of_a_unit(record).items():
            setup = _setup(record["contenders"][str(size)])
            cost = f"{1e9 * more[size]:.2f}" if size in more else f"{1e6 * fixed:.0f} µs beside them"
            own = [f"{record['letter']} = {size:,}", record["unit"], _spread(spread, 1e9, 2), cost, setup]
            rows.append([record["title"], *own])
        for peer, ratio in peers_of_smallest(record).items():
            own, units = record["beside"][peer], record["units"][0]
            cost = Spread.of([None if s is None else s / units for s in own["seconds_per_update"]])
            cells = [f"{peer}, {record['letter']} = {record['sizes'][0]:,}", record["unit"], _spread(cost, 1e9, 2)]
            rows.append([record["title"], *cells, f"{_spread(ratio, 1, 2, '×')} ours", _setup(own)])
        constant, each, residual = nearest_line(record)
        line = f"{1e6 * constant:.1f} µs an update + {1e9 * each:.2f} ns a {record['unit']}"
        rows.append(["nearest line, its largest relative residual", "", "", line, f"{residual:.0%}", ""])
        asked = "" if record["flat_within"] is None else f" (asked: ≤ {record['flat_within']:.0%})"
        rows.append([f"spread{asked}", "", "", f"{unevenness(record):.0%}", "", ""])
    return _rows(["scale", "", "unit", "ns a unit and update", "ns, each beyond the row above", "set-up, s"], rows)


def _gap(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        for name, own in record["contenders"].items():
            steps, seconds = Spread.of(own["evaluations"]), Spread.of(own["seconds"])
            rate = f" (Adam, rate {record['svi_rate']})" if name == "Pyro SVI" else ""
            arrived = f"{steps.median:.0f}" if steps.resolved else f"short by {min(own['shortfall']):.2g} nat"
            rows.append([record["title"], name + rate, arrived, _spread(seconds, 1, 3)])
    return _rows(["time to a gap", "", "evaluations", "s, tracing included"], rows)


def _verdict(ratio: Spread, asked: float | None) -> str:
    if not ratio.resolved:
        return "unresolved"
    if not ratio.steady:
        return "**unsteady**"
    met = "" if asked is None else "met" if ratio.median >= asked else "**missed**"
    return f"{met} (slower)".strip() if ratio.median < 1 else met


def _spread(spread: Spread, scale: float, digits: int, unit: str = "") -> str:
    if not spread.resolved:
        return MISSING
    low, middle, high = (f"{scale * x:.{digits}f}" for x in (spread.low, spread.median, spread.high))
    return f"{middle}{unit} ({low}–{high})"


def _milliseconds(spread: Spread) -> str:
    return _spread(spread, 1e3, 3 if spread.median < 1e-3 else 1)


def _setup(own: Record) -> str:
    spread = Spread.of(own["setup_seconds"])
    return f"{spread.median:.2f}" if spread.resolved else MISSING


def _megabytes(size: int | None) -> str:
    return MISSING if size is None else f"{size / 1e6:.0f}"


def stored(folder: Path) -> list[Record]:
    """Records of a folder, in the order of the table of workloads, then by name."""
    places = {name: place for place, name in enumerate(WORKLOADS)}
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(records, key=lambda record: places.get(record["workload"], len(places)))


if __name__ == "__main__":
    print(table(stored(Path(__file__).resolve().parent / "results")))
