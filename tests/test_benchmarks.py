"""The benchmarks: their arithmetic, that every workload is listed and runs, and that peers do the same work.

Nothing here looks at a clock: sizes are tiny, the figures mean nothing.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures, gap, peers, report
from benchmarks.harness import (
    Contender,
    Disagreement,
    Fit,
    Spread,
    assert_agreement,
    measure,
    ratios,
    relative_difference,
    seconds_per_update,
    setup_seconds,
)
from benchmarks.paired import OURS, Paired, work
from benchmarks.problems import latent_classes, mixture
from benchmarks.run import main, run
from benchmarks.workload import Workload
from benchmarks.workloads import WORKLOADS

NEEDS = {
    "pomegranate": "pomegranate",
    "StepMix": "stepmix",
    "dynamax": "dynamax",
}  # peers that the extra `test` does not install


def test_set_up_cancels() -> None:
    """t(n) = 3 + 0.25 n."""
    each = seconds_per_update(3.5, 8.0, (2, 20))
    assert each == pytest.approx(0.25)
    assert setup_seconds(3.5, each, (2, 20)) == pytest.approx(3.0)


def test_a_difference_lost_in_noise_is_not_a_time() -> None:
    assert seconds_per_update(1.0, 1.0, (1, 2)) is None
    assert seconds_per_update(1.0, 0.9, (1, 2)) is None
    assert setup_seconds(1.0, None, (1, 2)) is None


def test_ratios_are_formed_within_a_round() -> None:
    """The second round was twice as slow for both: the ratio does not notice, a ratio of medians would."""
    assert ratios([1.0, 2.0, None], [3.0, 6.0, 9.0]) == [3.0, 3.0, None]
    assert ratios([1.0], [None]) == [None]


def test_spread() -> None:
    assert Spread.of([3.0, None, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    none = Spread.of([None])
    assert none.resolved == 0
    assert math.isnan(none.median)


def _recording(log: list[tuple[str, int]], name: str, likelihood: float = -1.0) -> Contender:
    def fit(updates: int) -> Callable[[], float]:
        log.append((name, updates))
        return lambda: likelihood

    return Contender(name, fit, (1, 3))


def test_rounds_interleave_and_turn_round() -> None:
    log: list[tuple[str, int]] = []
    found = measure([_recording(log, "a"), _recording(log, "b")], 2)
    assert log == [(name, n) for name in ("a", "b", "b", "a") for n in (1, 3)]
    assert all(len(own["seconds_per_update"]) == 2 and own["counts"] == [1, 3] for own in found.values())


def test_agreement_is_asked_before_anything_is_timed() -> None:
    log: list[tuple[str, int]] = []
    same = assert_agreement([_recording(log, "a", -1000.0), _recording(log, "b", -1000.0 + 1e-7)], 4)
    assert log == [("a", 4), ("b", 4)]
    assert same["relative_difference"] == pytest.approx(1e-10, rel=1e-3)
    for other in (-1000.0 + 2e-6, math.nan):
        with pytest.raises(Disagreement, match=r"After 3 updates .* do not do the same work"):
            assert_agreement([_recording(log, "a", -1000.0), _recording(log, "b", other)])


def test_relative_difference_of_zeros() -> None:
    assert relative_difference({"a": 0.0, "b": 0.0}) == 0.0


def test_work_counts_equal_rows_of_items_once() -> None:
    assert work(mixture(50, 2, 3)) == {"flops": 4 * 50 * 2 * 10, "exps": 100}
    assert work(mixture(50, 2, 3, diagonal=True), starts=2) == {"flops": 2 * 4 * 50 * 2 * 7, "exps": 200}
    assert work(latent_classes(1000, 2, 3)) == {"flops": 4 * 4 * 3 * 3, "exps": 12}


def test_arrival_is_the_first_point_within_the_gap() -> None:
    run = [(1, 0.1, -5.0), (3, 0.2, -1.0 - 0.9e-3), (4, 0.3, -1.0)]
    found = gap.arrivals([run, run[:1]], -1.0)
    assert found["evaluations"] == [3, None]
    assert found["seconds"] == [0.2, None]
    assert found["shortfall"] == [0.0, 4.0]


def test_every_workload_is_listed() -> None:
    names = "A1 A2 A3 A4 B1 B2 B3 hmm-small D F small front-end whole-fit scale-N scale-K scale-D scale-T "
    names += "gap-gaussian gap-large gap-mixed gap-poisson regressions poisson-regressions C2 C3 irt "
    names += "glmm C1 LMM LMM-crossed"
    assert names.split() == list(WORKLOADS)
    for name, workload in WORKLOADS.items():
        assert workload.name == name
        assert all(callable(getattr(workload, call)) for call in workload.calls)


def _here(workload: Workload) -> dict[str, Any]:
    """A tiny round in this process, with what run.py adds."""

    def spawn(call: str, **arguments: Any) -> dict[str, Any]:
        return getattr(workload, call)(**arguments, tiny=True)

    machine = {
        "cpu": "none", "cores": 1, "python": "3", "versions": {"torch": "2", "stepmix": None}, "threads": 1,
        "load": [0.1, 0.2], "anchors": {"gemm": 1e9, "exp": 1e9, "copy": 1e9},
    }  # fmt: skip
    about = {"workload": workload.name, "title": workload.title, "tiny": True, "finished": "now", "machine": machine}
    return json.loads(json.dumps({**about, **workload.collect(spawn, 1)}))


@pytest.mark.parametrize(
    "name",
    [
        "small",
        "B3",
        "F",
        "front-end",
        "whole-fit",
        "scale-N",
        "gap-gaussian",
        "gap-mixed",
        "gap-poisson",
        "poisson-regressions",
        "irt",
        "C1",
        "LMM",
        "LMM-crossed",
    ],
)
def test_a_tiny_workload_runs_and_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RESTARTS", 3)
    record = _here(WORKLOADS[name])
    text = report.table([record])
    assert record["title"] in text
    assert "Tiny sizes" in text
    assert "Losses and missed targets" in text
    for contender in record["contenders"]:
        assert contender in text or contender in (OURS, "1000", "2000")


def _installed(fit: str) -> bool:
    return fit not in NEEDS or importlib.util.find_spec(NEEDS[fit]) is not None


@pytest.mark.filterwarnings("default")  # what peers warn about on import is theirs
@pytest.mark.parametrize("name", ["A1", "A4", "D", "C2"])
def test_peers_do_the_same_work(name: str) -> None:
    workload = WORKLOADS[name]
    assert isinstance(workload, Paired)
    problem = workload.problem(True)
    made: dict[str, Fit] = {peer: entry.make(problem) for peer, entry in workload.entries.items() if _installed(peer)}
    if len(made) < 2:
        pytest.skip("no peer of this workload is installed: pip install 'pyro-em[bench]'")
    assert_agreement([Contender(peer, fit, (1, 2)) for peer, fit in made.items()])


def test_a_run_of_its_own_process() -> None:
    record = run(WORKLOADS["scale-N"], rounds=1, tiny=True)
    assert record["machine"]["threads"] == 1
    assert record["machine"]["anchors"]["gemm"] > 0
    assert [len(own["seconds_per_update"]) for own in record["contenders"].values()] == [1, 1]


def test_a_wrong_name_lists_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["A9"])
    assert "no workload 'A9'. Names: A1, A2" in capsys.readouterr().err


PAIRED: dict[str, Any] = {
    "workload": "X", "title": "made up", "kind": "paired", "tiny": False, "finished": "now",
    "contenders": {
        OURS: {"seconds_per_update": [1.0, 1.0, 1.0], "setup_seconds": [0.5] * 3, "peak_bytes": 3_000_000},
        "peer": {"seconds_per_update": [0.5, 0.6, 0.7], "setup_seconds": [0.1] * 3, "peak_bytes": None},
    },
    "targets": {"peer": 2.0}, "peak_target": 2_000_000, "work": {"flops": 10, "exps": 1},
    "machine": {
        "cpu": "none", "cores": 1, "python": "3", "versions": {}, "threads": 1, "load": [0.9, 1.5],
        "anchors": {"gemm": 100.0, "exp": 10.0},
    },
}  # fmt: skip


def test_losses_are_printed() -> None:
    text = report.table([PAIRED])
    assert "0.60× (0.50–0.70)" in text
    assert "**missed** (slower)" in text
    assert "- X: 0.60× peer, 2.00× was asked." in text
    assert "- X: peak memory 3 MB above the data, 2 MB was asked." in text
    assert "Others were computing" in text
    assert figures.limit_ratio(PAIRED) == pytest.approx(1.0 / 0.2)


def test_rounds_that_differ_are_no_result() -> None:
    """Ratios 3, 5 and 9 are above the 2 that was asked, and still prove nothing."""
    peer = {**PAIRED["contenders"]["peer"], "seconds_per_update": [3.0, 5.0, 9.0]}
    record = {**PAIRED, "contenders": {**PAIRED["contenders"], "peer": peer}}
    text = report.table([record])
    assert "**unsteady**" in text
    assert "met" not in text
    assert "- X: the rounds against peer differ, 3.00× to 9.00×: noise, no result." in text


def test_what_does_not_grow_is_told_apart() -> None:
    """90 µs an update and 50 ns a step up to 11,000, 10 beyond; the average cost of a step is far from flat."""
    times = {"1000": 140e-6, "11000": 640e-6, "111000": 1640e-6}
    found = {size: {"seconds_per_update": [t] * 3, "setup_seconds": [0.25] * 3} for size, t in times.items()}
    scale = {"kind": "scale", "sizes": [1000, 11000, 111000], "units": [1000, 11000, 111000], "contenders": found}
    record = {**PAIRED, **scale, "flat_within": 0.5, "letter": "T", "unit": "step"}
    more, fixed = figures.marginal_costs(record)
    assert fixed == pytest.approx(90e-6) and more == {11000: pytest.approx(50e-9), 111000: pytest.approx(10e-9)}
    text = report.table([record])
    assert "| T = 1,000 | step | 140.00 (140.00–140.00) | 90 µs beside them | 0.25 |" in text
    assert "| T = 111,000 | step | 14.77 (14.77–14.77) | 10.00 | 0.25 |" in text
    assert "- X: the cost of a step varies by 848%, 50% was asked." in text


def test_the_nearest_line_and_peers_of_the_smallest_size() -> None:
    """70 µs an update and 30 ns a step to the digit; then one length off it, by whose relative residual alone a line is
    judged. A peer that is faster at the smallest size is a shortfall."""
    units = [1000, 10_000, 1_000_000]
    found = {str(n): {"seconds_per_update": [70e-6 + 30e-9 * n], "setup_seconds": [0.25]} for n in units}
    peers = {
        name: {"seconds_per_update": [seconds], "setup_seconds": [0.5]}
        for name, seconds in (("pyro_em", 100e-6), ("slow", 400e-6), ("quick", 50e-6))
    }
    scale = {"kind": "scale", "sizes": units, "units": units, "contenders": found, "beside": peers}
    record = {**PAIRED, **scale, "flat_within": None, "letter": "T", "unit": "step"}
    assert figures.nearest_line(record) == pytest.approx((70e-6, 30e-9, 0.0), abs=1e-12)
    text = report.table([record])
    assert "| 70.0 µs an update + 30.00 ns a step | 0% |" in text
    assert "| slow, T = 1,000 | step | 400.00 (400.00–400.00) | 4.00× (4.00–4.00) ours | 0.50 |" in text
    assert "- X: 0.50× quick at T = 1,000 (0.50–0.50)." in text and "× slow at" not in text
    found["10000"]["seconds_per_update"] = [2 * (70e-6 + 30e-9 * 10_000)]
    fixed, each, residual = figures.nearest_line(record)
    residuals = [(fixed + each * n) / found[str(n)]["seconds_per_update"][0] - 1 for n in units]
    assert residual == pytest.approx(max(map(abs, residuals))) and 0.2 < residual < 0.5
    # Least squares: no other line has a smaller sum.
    for a, b in ((1.01, 1.0), (0.99, 1.0), (1.0, 1.01), (1.0, 0.99)):
        others = [(a * fixed + b * each * n) / found[str(n)]["seconds_per_update"][0] - 1 for n in units]
        assert sum(x * x for x in others) > sum(x * x for x in residuals)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    from benchmarks.draw import draw

    draw([PAIRED]).savefig(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([])


def test_no_file_hides_a_library() -> None:
    """`python benchmarks/demo.py` has the folder first on its path, where torch too looks for what it imports."""
    folder = Path(__file__).parent.parent / "benchmarks"
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import torch, pyro, arviz"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
