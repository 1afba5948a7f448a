"""Short blocks joined by a band solve (evidence/banded.py): against chain.py."""

from __future__ import annotations

import pytest
import torch

from pyro_em.evidence.banded import MOST, Banded, blocks_of, is_short
from pyro_em.evidence.blocked import Blocks, Scratch
from pyro_em.evidence.chain import smooth
from tests.test_scanned import in_blocks, rows


@pytest.mark.parametrize(
    ("steps", "chains", "states", "length"),
    [(2, 1, 2, 2), (3, 2, 3, 2), (97, 3, 4, 5), (98, 2, 4, 7), (40, 3, 3, 40), (900, 1, 3, 4), (900, 1, 3, 64)],
)
def test_band_solves(steps: int, chains: int, states: int, length: int) -> None:
    """Against chain.py, at the first call and at a second one, which knows the rate; some transitions are forbidden.

    The longest chains leave the range of floats at first.
    """
    A = rows(states, states)
    A[0, -1] = 0.0
    A = A / A.sum(-1, keepdim=True)
    density = 2.5 * torch.randn(steps, chains, states, generator=torch.Generator().manual_seed(1))
    pi = rows(states, seed=4)
    unary = density.clone()
    unary[0] += pi.log()
    expected = smooth(unary, A.log()[None, None])
    blocks = Blocks(steps, chains, length, -(-steps // length))
    likelihood, order = in_blocks(density, blocks)
    inside = (order >= 0) & (torch.div(order, chains, rounding_mode="floor") < steps - 1)
    banded = Banded(blocks, states)
    leaves = banded.solved(pi.unsqueeze(-1), A, likelihood) is None
    assert leaves == (steps == 900)
    for _ in range(2):
        found = banded.smooth(pi.unsqueeze(-1), A, likelihood, Scratch())
        assert found is not None
        log_evidence = found.log_scale + density.amax(-1).sum(0)
        torch.testing.assert_close(log_evidence, expected.log_evidence, rtol=1e-13, atol=0)
        states_of = torch.empty(steps * chains, states)
        states_of[order[order >= 0]] = found.states.permute(1, 2, 0)[order >= 0]
        torch.testing.assert_close(states_of.reshape(expected.unary.shape), expected.unary, rtol=0, atol=1e-12)
        pairs = A * ((found.left * inside).flatten(1) @ found.right.flatten(1).mT)
        torch.testing.assert_close(pairs, expected.total_pairs(None), rtol=0, atol=1e-10)
        assert not bool(found.right[:, -1, blocks.per_chain - 1 :: blocks.per_chain].any())
    again = banded.solved(pi.unsqueeze(-1), A, likelihood)
    assert again is not None
    other = Banded(blocks, states)  # at another rate: not a bit differs
    other.set_rate(1.01 * float(found.log_scale.mean()) / steps)
    second = other.solved(pi.unsqueeze(-1), A, likelihood)
    assert second is not None and torch.equal(second.states, again.states)
    torch.testing.assert_close(second.log_scale, again.log_scale, rtol=1e-15, atol=0)


@pytest.mark.parametrize("steps", [12, 13])
def test_rows_that_do_not_sum_to_one_are_not_for_band_solves(steps: int) -> None:
    """They would count behind the last step."""
    blocks = Blocks(steps, 1, 4, -(-steps // 4))
    likelihood, _ = in_blocks(torch.zeros(steps, 1, 3), blocks)
    banded = Banded(blocks, 3)
    assert banded.solved(rows(3).unsqueeze(-1), rows(3, 3), likelihood) is not None
    assert banded.solved(rows(3).unsqueeze(-1), (1 - 1e-9) * rows(3, 3), likelihood) is None


@pytest.mark.parametrize("states", [1, 2, 5, 12])
@pytest.mark.parametrize(("steps", "chains"), [(2, 1), (3, 40), (997, 1), (10_000, 1), (200, 30)])
def test_blocks_hold_all_steps(steps: int, chains: int, states: int) -> None:
    """Longer ones for longer chains, and none that is empty."""
    blocks = blocks_of(steps, chains, states)
    assert 2 <= blocks.length <= steps
    assert blocks.length * (blocks.per_chain - 1) < steps <= blocks.length * blocks.per_chain
    assert blocks_of(4 * steps, chains, states).length >= blocks.length


def test_which_chains_are_short() -> None:
    assert is_short(2, 1, 2) and is_short(MOST // 25, 1, 5)
    assert not is_short(1, 1, 2) and not is_short(MOST // 25 + 1, 1, 5)


@pytest.mark.parametrize("rate", [-5.0, -1e6, 3.0])
def test_messages_that_leave_the_range_are_not_held(rate: float) -> None:
    """After parameters of quite another likelihood: too large, and too small; the next call knows better."""
    blocks = Blocks(900, 2, 5, 180)
    likelihood, _ = in_blocks(torch.randn(900, 2, 3, generator=torch.Generator().manual_seed(2)), blocks)
    banded, pi, A = Banded(blocks, 3), rows(3).unsqueeze(-1), rows(3, 3)
    banded.set_rate(rate)
    assert banded.solved(pi, A, likelihood) is None
    found = banded.smooth(pi, A, likelihood, Scratch())
    again = banded.solved(pi, A, likelihood)
    assert found is not None and again is not None
    torch.testing.assert_close(again.log_scale, found.log_scale, rtol=1e-13, atol=0)
    torch.testing.assert_close(again.states, found.states, rtol=0, atol=1e-12)
