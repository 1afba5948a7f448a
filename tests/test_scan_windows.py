"""Long chains in windows (e_step/scan_windows.py) and many in groups (scan_groups.py), here small ones: against the
reference, windows by both ways of joining them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.e_step.scan_groups import Grouped
from pyro_em.e_step.scan_windows import Windowed
from pyro_em.e_step.scanned import Scanned, compile_scanned
from pyro_em.evaluator import Evaluator
from pyro_em.evidence import banded, windows
from pyro_em.evidence.windows import Groups, Windows, cut
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem, bind
from pyro_em.recordings import Mapped, Request, Whole
from tests.test_scanned import _agree, _data, bernoulli, categorical, chain, diagonal, full, normal, poisson, rows


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of some 60 steps, 40 of them to forget."""
    monkeypatch.setattr(banded, "MOST", 0)
    monkeypatch.setattr(windows, "CELLS", 9 * 100)
    monkeypatch.setattr(windows, "MARGIN", 30)


def _counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each way to join the windows of a chain succeeds."""
    counts = {"_forgetful": 0, "_carried": 0}
    for name in counts:
        way = getattr(Windowed, name)

        def noted(self: Windowed, *args: Any, name: str = name, way: Callable[..., Any] = way) -> Any:
            found = way(self, *args)
            counts[name] += found is not None
            return found

        monkeypatch.setattr(Windowed, name, noted)
    return counts


def _windowed(problem: Problem) -> Scanned:
    engine = compile_scanned(problem)
    assert all(isinstance(program.whole, Windowed) for program in engine.programs)
    return engine


@pytest.mark.parametrize("emission", [normal, diagonal, full, poisson, categorical, bernoulli])
@pytest.mark.parametrize(("steps", "sequences"), [(300, 1), (331, 2)])
def test_families(emission: Any, steps: int, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way alone: what one of them cannot do would go to the other, or through blocks."""
    problem = bind(chain, (_data(emission, steps, sequences), emission), {}, with_prior=False)
    engine = _windowed(problem)
    (program,) = engine.programs
    assert program.pieces is not None and program.pieces.count > 2
    counts = _counted(monkeypatch)
    _agree(problem)
    assert counts["_forgetful"] > 0 and counts["_carried"] == 0
    monkeypatch.setattr(Windowed, "_forgetful", lambda *args: None)
    _agree(problem)
    assert counts["_carried"] > 0
    engine.e_step(problem.start)
    assert engine.compact  # not through blocks


@pytest.mark.parametrize("carried", [False, True])
def test_masks_and_weights(carried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged lengths, holes, a sequence without data, weights of sequences."""
    if carried:
        monkeypatch.setattr(Windowed, "_forgetful", lambda *args: None)
    data = _data(normal, 290, 5)
    seen = torch.arange(290).unsqueeze(-1) < torch.tensor([290, 140, 0, 289, 1])
    seen[110:120, 3] = False
    for weights in (None, {"sequences": torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0])}):
        problem = bind(chain, (data, normal), {"seen": seen}, with_prior=False, weights=weights)
        assert _windowed(problem).programs[0].blocks.chains == 5
        _agree(problem)


@pytest.mark.parametrize("emission", [normal, diagonal, poisson, categorical])
def test_groups(emission: Any) -> None:
    """Seven groups of three sequences and one of two, with padding; the last group works in memory of its own."""
    problem = bind(chain, (_data(emission, 31, 23), emission), {}, with_prior=False)
    engine = compile_scanned(problem)
    (program,) = engine.programs
    assert isinstance(program.whole, Grouped) and program.pieces is not None and program.pieces.count == 8
    _agree(problem)
    engine.e_step(problem.start)
    assert engine.compact


def test_groups_with_masks_and_weights() -> None:
    """Ragged lengths, holes, sequences without data, weights of sequences; an impossible one is named."""
    data = _data(normal, 30, 8)
    seen = torch.arange(30).unsqueeze(-1) < torch.tensor([30, 14, 0, 29, 1, 30, 30, 12])
    seen[11:20, 3] = False
    for weights in (None, {"sequences": torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 1.0, 0.0, 0.25])}):
        problem = bind(chain, (data, normal), {"seen": seen}, with_prior=False, weights=weights)
        assert isinstance(compile_scanned(problem).programs[0].whole, Grouped)
        _agree(problem)
    symbols = torch.zeros(30, 8, dtype=torch.long)
    symbols[23, 6] = 3
    never = {"B": torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(3, 1), "pi": rows(3), "A": rows(3, 3)}
    with pytest.raises(pyro_em.NonFiniteError, match=r"rows 6 of plate.*from step 23 on"):
        pyro_em.fit(chain, symbols, categorical, init=never, max_iter=1)


def _sticky() -> dict[str, Tensor]:
    """States that are kept for some thousand steps and hardly seen."""
    K = 3
    A = 0.9995 * torch.eye(K) + 0.0005 / K
    return {"A": A / A.sum(-1, keepdim=True), "mu": torch.tensor([0.0, 0.1, 0.2]), "sd": torch.ones(K)}


def test_what_does_not_forget_is_carried_over_the_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    problem = bind(chain, (data, normal), {}, with_prior=False, params=_sticky())
    counts = _counted(monkeypatch)
    engine = _windowed(problem)
    engine.e_step(problem.start)
    assert counts == {"_forgetful": 0, "_carried": 1} and engine.compact
    _agree(problem)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
def test_forbidden_transitions_an_outlier_and_what_is_impossible() -> None:
    """A left-right chain keeps its zeros, also where a window's states cannot have been: the first of them are not
    reached from the last. A point at 1e4 sigma leaves everything finite; impossible data are named."""
    data = torch.cat([_data(normal, 160, 1), torch.full((1, 1), 1e4), _data(normal, 160, 1)])
    left_right = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]])
    start = {"A": left_right, "pi": torch.tensor([1.0, 0.0, 0.0])}
    _agree(bind(chain, (data, normal), {}, with_prior=False, params=start), tolerance=1e-9)
    result = pyro_em.fit(chain, data, normal, init={**start}, max_iter=10, tol=0)
    assert all(bool(value.isfinite().all()) for value in result.params.values())
    assert bool((result.params["A"][left_right == 0] == 0.0).all())
    symbols = torch.zeros(350, 2, dtype=torch.long)
    symbols[230, 1] = 3
    never = {"B": torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(3, 1), "pi": rows(3), "A": rows(3, 3)}
    with pytest.raises(pyro_em.NonFiniteError, match=r"rows 1 of plate.*from step 230 on"):
        pyro_em.fit(chain, symbols, categorical, init=never, max_iter=1)


def test_not_a_bit_depends_on_the_rate() -> None:
    """Nor on how its logarithm and that of the messages add up: a replay would differ from the code."""
    problem = bind(chain, (_data(normal, 300, 1), normal), {}, with_prior=False)
    engine = compile_scanned(problem)
    (whole,) = (program.whole for program in engine.programs)
    assert isinstance(whole, Windowed)
    (expected,) = engine.core([engine.before(problem.start, torch.tensor(1.0))])
    for units in (-70, -41, -13, 0, 5):
        whole._rates = [[whole.banded._rate_of(units) for _ in own] for own in whole._rates]
        (found,) = engine.core([engine.before(problem.start, torch.tensor(1.0))])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("sizes", [(300, 1), (31, 23)])
def test_one_recording_holds_the_update(sizes: tuple[int, int]) -> None:
    """Replays change no bit, of windows and of groups."""
    problem = bind(chain, (_data(normal, *sizes), normal), {}, with_prior=False)
    m_step = MStep(problem, "auto", "em")
    engine, other = compile_scanned(problem), compile_scanned(problem)
    assert all(isinstance(program.whole, Windowed | Grouped) for program in engine.programs)
    evaluator = Evaluator(engine, m_step)
    params, magnitude, mapped = problem.start, 0.0, 0
    for _ in range(8):
        (found,) = evaluator([Request(params, magnitude)])
        assert not isinstance(found, Exception)
        expected = other.e_step(params)
        assert found.log_likelihood == expected.log_likelihood
        updated = m_step.update(params, expected)[0]
        if isinstance(found, Mapped):
            mapped += 1
            assert all(torch.equal(found.updated[name], updated[name]) for name in updated)
        params, magnitude = updated, found.magnitude
    assert mapped and isinstance(evaluator._recording, Whole) and not evaluator.refusal


@pytest.mark.parametrize("steps", [101, 137, 5000, 99_999])
@pytest.mark.parametrize("states", [2, 3])
def test_every_step_is_counted_once(steps: int, states: int) -> None:
    """The own blocks of all windows are the chain's, and only the last one ends with padding."""
    found = cut(steps, 1, states)
    assert (found is None) == (steps <= 900 // states**2)
    if found is None:
        return
    assert isinstance(found, Windows)
    order = found.order().reshape(found.count, found.length, -1)
    own = [order[i][:, slice(*found.inner(i))] for i in range(found.count)]
    assert torch.equal(torch.cat([x.T.reshape(-1) for x in own])[:steps], torch.arange(steps))
    assert int((order[:-1] < 0).sum()) == 0 and int((order[-1] < 0).sum()) < found.length
    assert found.columns == found.count * order.shape[-1]


def test_windows_and_groups_are_for_few_states() -> None:
    assert cut(10**6, 1, windows.STATES + 1) is None and cut(20, 10**4, windows.GROUPED + 1) is None
    assert cut(50, 3, 3) is not None and cut(50, 2, 3) is None  # one group


@pytest.mark.parametrize(("steps", "chains", "count"), [(31, 23, 8), (100, 3, 3), (7, 15, 2), (2, 1000, 20)])
def test_every_row_is_in_one_group(steps: int, chains: int, count: int) -> None:
    found = cut(steps, chains, 3)
    assert isinstance(found, Groups) and found.count == count
    order = found.order()
    assert torch.equal(order[order >= 0].sort().values, torch.arange(steps * chains))
    assert len(order) == found.length * found.columns and bool((order < 0).any()) == found.padded
    ends = torch.tensor([found.blocks(i).columns * found.length for i in range(count)]).cumsum(0).tolist()
    for i, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        own = order[begin:end]
        assert set((own[own >= 0] % chains).tolist()) == set(range(*found.members(i).indices(chains)))
