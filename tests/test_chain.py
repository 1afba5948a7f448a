"""Chains of potentials: smoothing, filtering, best and drawn paths, against all paths and step-by-step oracles.

Every way to the messages: the tree, blocks of time and one block, scaled probabilities and log-space.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_em.evidence import chain, two_level
from pyro_em.evidence.forward import filtered
from pyro_em.evidence.paths import best_path, drawn_path

SHAPES = pytest.mark.parametrize(("lead", "width"), [(False, False), (True, False), (False, True), (True, True)])
WAYS = pytest.mark.parametrize("way", ["tree", "one block", "blocks", "log-space", "log-space blocks"])


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(*shape: int, seed: int = 0) -> Tensor:
    table = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2
    return table / table.sum(-1, keepdim=True)


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11, msg=lambda m: f"{what}: {m}")


def _go(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(chain, "TREE", 10**9 if way == "tree" else 0)
    monkeypatch.setattr(chain, "SHORT", 0)
    monkeypatch.setattr(two_level, "FEWEST", 0 if "blocks" in way else 10**9)
    if "log-space" in way:
        monkeypatch.setattr(chain, "LOWEST", math.inf)


def _paths(unary: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """All paths of one chain, and their log-densities."""
    T, K = unary.shape
    paths = torch.cartesian_prod(*[torch.arange(K)] * T).reshape(-1, T)
    joint = unary[torch.arange(T), paths].sum(-1)
    for t in range(1, T):
        joint = joint + pair[t - 1, paths[:, t - 1], paths[:, t]]
    return paths, joint


def _brute(unary: Tensor, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, unary and pairwise posteriors of one chain."""
    paths, joint = _paths(unary, pair)
    w = torch.softmax(joint, 0)
    hot = torch.nn.functional.one_hot(paths, unary.shape[1]).double()
    pairs = torch.einsum("p,pti,ptj->tij", w, hot[:, :-1], hot[:, 1:])
    return joint.logsumexp(0), torch.einsum("p,pti->ti", w, hot), pairs


def _potentials(T: int, lead: bool, width: bool, B: int = 3, K: int = 3) -> tuple[Tensor, Tensor]:
    unary = 3 * _normal(T, B, K)
    pair = _rows(T - 1 if lead else 1, B if width else 1, K, K).log()
    pair[..., 0, 1] = -torch.inf
    return unary, pair


@WAYS
@pytest.mark.parametrize("T", [2, 3, 5, 6, 7])
@SHAPES
def test_smoothing_against_all_paths(
    monkeypatch: pytest.MonkeyPatch, T: int, lead: bool, width: bool, way: str
) -> None:
    _go(monkeypatch, way)
    unary, pair = _potentials(T, lead, width)
    B, K = unary.shape[1:]
    found = chain.smooth(unary, pair)
    weight = _rows(T - 1, B)
    full = pair.expand(T - 1, B, K, K)
    for b in range(B):
        log_evidence, one, two = _brute(unary[:, b], full[:, b])
        _same(found.log_evidence[b], log_evidence, "log Z")
        _same(found.unary[:, b], one, "unary")
        _same(found.pairs()[:, b], two, "pairs")
    assert (found.pairs()[..., 0, 1] == 0).all()
    _same(found.total_pairs(weight), (weight[..., None, None] * found.pairs()).sum((0, 1)), "total")
    monkeypatch.setattr(chain, "CELLS", 2 * B * K * K)  # two steps at once
    again, joint = chain.smooth(unary, pair), found.pairs()[-1].mT
    _same(again.total_pairs(weight), (weight[..., None, None] * found.pairs()).sum((0, 1)), "total of parts")
    before, seen = again.before(T - 2, T - 1)[0], joint.sum(-1) > 0
    _same((before / before.sum(-1, keepdim=True))[seen], (joint / joint.sum(-1, keepdim=True))[seen], "before")


def test_steps_are_cut_by_the_cells_of_their_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    messages, pair = torch.zeros(5, 3, 2), torch.zeros(1, 1, 2, 2)
    for cells, expected in ((24, [(0, 2), (2, 4), (4, 5)]), (60, [(0, 5)]), (1, [(i, i + 1) for i in range(5)])):
        monkeypatch.setattr(chain, "CELLS", cells)
        assert list(chain.steps_of_cells(messages, pair)) == expected


@WAYS
def test_smoothing_where_scaled_numbers_underflow(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The only possible path has e^-900 of the density of the impossible ones at every step."""
    _go(monkeypatch, way)
    T, B = 9, 2
    unary = torch.zeros(T, B, 2)
    unary[..., 0] = -900.0
    unary[0, :, 1] = -torch.inf
    pair = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]).reshape(1, 1, 2, 2)
    found = chain.smooth(unary, pair)
    _same(found.log_evidence, torch.full((B,), -900.0 * T), "log Z")
    assert (found.unary[..., 0] == 1).all()
    assert (found.pairs()[..., 0, 0] == 1).all()


@WAYS
def test_smoothing_of_impossible_chains(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Impossible chains have evidence zero and no posterior; their neighbours in the batch are right."""
    _go(monkeypatch, way)
    unary = _normal(6, 2, 2)
    unary[3, 0] = -torch.inf
    pair = _rows(1, 1, 2, 2).log()
    found = chain.smooth(unary, pair)
    assert found.log_evidence[0] == -torch.inf
    assert (found.unary[:, 0] == 0).all()
    assert (found.pairs()[:, 0] == 0).all()
    _same(found.unary[:, 1:], chain.smooth(unary[:, 1:], pair).unary, "unary")


@pytest.mark.parametrize("fewest", [0, 10**9])
@pytest.mark.parametrize("T", [1, 2, 3, 7])
@SHAPES
def test_best_path_against_all_paths(
    monkeypatch: pytest.MonkeyPatch, T: int, lead: bool, width: bool, fewest: int
) -> None:
    monkeypatch.setattr(two_level, "FEWEST", fewest)
    unary, pair = _potentials(max(T, 2), lead, width)
    unary, pair = unary[:T], pair[: max(1, T - 1)]
    path, value = best_path(unary, pair)
    for b in range(3):
        paths, joint = _paths(unary[:, b], pair.expand(max(1, T - 1), 3, 3, 3)[:, b])
        assert path[:, b].tolist() == paths[joint.argmax()].tolist()
        _same(value[b], joint.max(), "value")


@pytest.mark.parametrize("fewest", [0, 10**9])
@SHAPES
def test_filtering_against_smoothing_of_the_past(
    monkeypatch: pytest.MonkeyPatch, lead: bool, width: bool, fewest: int
) -> None:
    monkeypatch.setattr(two_level, "FEWEST", fewest)
    unary, pair = _potentials(7, lead, width)
    states, evidences = filtered(unary[0], unary[1:], pair)
    for t in range(7):
        so_far = chain.smooth(unary[: t + 1], pair[: max(1, t)])
        _same(states[t], so_far.unary[-1], "filtered")
        _same(evidences[: t + 1].sum(0), so_far.log_evidence, "evidence")


@pytest.mark.parametrize("lead", [False, True])
def test_a_long_chain_step_by_step(lead: bool) -> None:
    """T = 5000, with a state that is left for good and densities far apart: filter, log Z, best path, smoothing."""
    T, K = 5000, 4
    unary = 3 * _normal(T, 1, K, seed=2)
    unary[1000, 0, 0] = -1e4  # an outlier in all states but the last
    unary[1000, 0, 1:3] = -2e4
    A = _rows(T - 1 if lead else 1, 1, K, K, seed=3)
    A[..., 3, :3] = 0.0
    A[..., 3, 3] = 1.0
    A[..., :3, 3] *= 1e-3
    pair = (A / A.sum(-1, keepdim=True)).log()
    table, density = pair.expand(T - 1, 1, K, K)[:, 0].numpy(), unary[:, 0].numpy()
    forward, best, back = [density[0]], [density[0]], np.zeros((T, K), int)
    with np.errstate(divide="ignore"):
        for t in range(1, T):
            forward.append(np.logaddexp.reduce(forward[-1][:, None] + table[t - 1], 0) + density[t])
            score = best[-1][:, None] + table[t - 1]
            back[t] = score.argmax(0)
            best.append(score.max(0) + density[t])
    expected = np.array([np.exp(x - np.logaddexp.reduce(x)) for x in forward])
    states, evidences = filtered(unary[0], unary[1:], pair)
    np.testing.assert_allclose(states[:, 0].numpy(), expected, rtol=0, atol=1e-10)
    log_evidence = np.logaddexp.reduce(forward[-1])
    assert float(evidences.sum()) == pytest.approx(log_evidence, rel=1e-12)
    found = chain.smooth(unary, pair)
    assert float(found.log_evidence[0]) == pytest.approx(log_evidence, rel=1e-12)
    torch.testing.assert_close(found.unary[-1], states[-1], rtol=0, atol=1e-11)
    path = [int(best[-1].argmax())]
    for t in range(T - 1, 0, -1):
        path.append(int(back[t][path[-1]]))
    ours, value = best_path(unary, pair)
    assert ours[:, 0].tolist() == path[::-1]
    assert float(value[0]) == pytest.approx(best[-1].max(), rel=1e-12)


def test_drawn_paths_of_a_long_chain() -> None:
    """Frequencies of states and of pairs along drawn paths are the posterior's, within five standard errors."""
    torch.manual_seed(0)
    unary, pair = _potentials(3000, False, False, B=1)
    found = chain.smooth(unary, pair)
    paths = torch.stack([drawn_path(found)[:, 0] for _ in range(60)])
    hot = torch.nn.functional.one_hot(paths, 3).double()
    expected = found.unary[:, 0]
    error = (hot.mean(0) - expected).sum(0) / (expected * (1 - expected)).sum(0).sqrt() * math.sqrt(60)
    assert float(error.abs().max()) < 5 * 2  # neighbours are correlated: twice the error of independent steps
    pairs = torch.einsum("ptj,ptk->jk", hot[:, :-1], hot[:, 1:]) / 60
    assert float(pairs[0, 1]) == 0.0
    torch.testing.assert_close(pairs, found.total_pairs(None), rtol=0.02, atol=5.0)


@pytest.mark.parametrize("steps", [300, 5000])
@pytest.mark.parametrize("tables", ["one", "each"])
def test_long_chains_with_a_table_for_every_step_are_multiplied_up(
    steps: int, tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products take little more memory than the tables; of one table they would take K² times the data."""
    unary, pair = 3 * _normal(steps, 1, 3), _rows(steps - 1, 1, 3, 3).log()
    pair = pair[:1] if tables == "one" else pair
    multiplied = []
    tree = chain._tree
    monkeypatch.setattr(chain, "_tree", lambda *given: multiplied.append(steps) or tree(*given))
    found = chain.smooth(unary, pair)
    assert bool(multiplied) == (steps == 300 or tables == "each")
    _go(monkeypatch, "blocks")
    expected = chain.smooth(unary, pair)
    torch.testing.assert_close(found.log_evidence, expected.log_evidence, rtol=1e-13, atol=0)
    _same(found.unary, expected.unary, "states")
    _same(found.pairs(), expected.pairs(), "pairs")
