"""Which chains are summed in blocks (state_space/steady.py), and which step by step, where sums would lose digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_em.state_space import steady
from pyro_em.state_space.linear_gaussian import Chain, ChainMoments

GENERATOR = torch.Generator().manual_seed(0)
EYE = torch.eye(2, dtype=torch.float64)


def _correlated(gap: float, scale: float = 1.0) -> Tensor:
    """Noise of two coordinates with correlation 1 − gap, the second of another size."""
    size = torch.tensor([1.0, scale], dtype=torch.float64)
    own = torch.tensor([[1.0, 1.0 - gap], [1.0 - gap, 1.0]], dtype=torch.float64)
    return own * size * size.unsqueeze(-1)


def _chain(T: int = 12, Q: Tensor = EYE, R: Tensor = EYE, y: Tensor | None = None) -> Chain:
    A = torch.tensor([[0.9, 0.1], [0.0, 0.7]])
    y = torch.randn(3, T, 2, generator=GENERATOR, dtype=torch.float64) if y is None else y
    none = torch.zeros(1, 1, 2)
    return Chain(
        torch.zeros(1, 2), EYE[None], A[None, None], none, Q[None, None], EYE[None, None], none, R[None, None], y
    )


NOISES: dict[str, tuple[Tensor, bool]] = {
    "independent": (EYE, False),
    "of two sizes": (torch.diag(torch.tensor([1.0, 1e-12])), False),
    "correlated": (_correlated(1e-3), False),
    "correlated, of two sizes": (_correlated(1e-3, 1e-4), False),
    "nearly singular": (_correlated(1e-7), True),
    "nearly singular, of two sizes": (_correlated(1e-7, 1e4), True),
    "singular": (torch.ones(2, 2), True),
    "no covariance": (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), True),
    "of one coordinate": (torch.diag(torch.tensor([1.0, 0.0])), False),
    "none": (torch.zeros(2, 2), False),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_that_is_nearly_singular(name: str) -> None:
    noise, expected = NOISES[name]
    assert steady._nearly_singular(noise.double().numpy()) is expected


@pytest.mark.parametrize(
    ("options", "by_steps"),
    [
        ({}, False),
        ({"T": 1}, True),
        ({"Q": _correlated(1e-7)}, True),
        ({"R": _correlated(1e-7)}, True),
        ({"Q": _correlated(1e-3), "R": _correlated(1e-3)}, False),
    ],
    ids=["plain", "one step", "states", "data", "correlated"],
)
def test_the_way_that_is_taken(options: dict[str, Any], by_steps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that both ways agree, where both can be gone."""
    chain, taken = _chain(**options), []
    slow = steady._step_by_step

    def noted(*args: Any) -> tuple[Any, Any]:
        taken.append(True)
        return slow(*args)

    monkeypatch.setattr(steady, "_step_by_step", noted)
    found = steady.steady_moments(chain)
    assert bool(taken) is by_steps
    log_evidence, row = slow(chain, torch.ones(3, dtype=torch.float64))
    np.testing.assert_allclose(found.log_evidence.numpy(), log_evidence, rtol=1e-10)
    np.testing.assert_allclose(_row(found), row, rtol=1e-8, atol=1e-9)


def _row(found: ChainMoments) -> Any:
    sites = found.initial, found.transition, found.observation, found.first
    return np.concatenate([x.reshape(-1).numpy() for own in sites for x in vars(own).values()])


@pytest.mark.parametrize("sequences", [2, 40])
@pytest.mark.parametrize("steps", [3, 13, 50])
@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("first_unseen", [False, True])
def test_blocks_are_the_steps(sequences: int, steps: int, size: float, first_unseen: bool) -> None:
    """Few sequences and many, short and long, with gains that move over several blocks; weighted, with offsets."""
    own = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=own, dtype=torch.float64)

    y = 3.0 * normal(sequences, steps, 3)
    A, C = 0.95 * torch.linalg.qr(normal(2, 2))[0], normal(3, 2)
    seen = None
    if first_unseen:
        seen = torch.ones(1, steps, 3, dtype=torch.bool)
        seen[:, 0] = False
    chain = Chain(
        normal(1, 2), size * EYE[None].double(), A[None, None], normal(1, 1, 2), _correlated(0.3)[None, None],
        C[None, None], normal(1, 1, 3), torch.eye(3).double()[None, None], y, seen,
    )  # fmt: skip
    weight = torch.rand(sequences, generator=own, dtype=torch.float64)
    found = steady._summed(chain, weight)
    assert found is not None
    log_evidence, row = steady._step_by_step(chain, weight)
    np.testing.assert_allclose(found.log_evidence, log_evidence, rtol=1e-12)
    np.testing.assert_allclose(steady._row(*found.sites), row, rtol=1e-10, atol=1e-11 * abs(row).max())


@pytest.mark.parametrize("steps", [129, 200])
def test_gains_that_never_stand_still(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state without noise is known better at every step: chunks of steps are those steps one by one."""
    A, Q = torch.diag(torch.tensor([1.0, 0.8])).double(), torch.diag(torch.tensor([0.0, 0.5])).double()
    none, C = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1, 2).double()
    y = torch.randn(3, steps, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    b = none.expand(1, 1, 2)
    R = torch.ones(1, 1, 1, 1).double()
    chain = Chain(b[0], EYE[None].double(), A[None, None], b, Q[None, None], C, none, R, y)
    found = _row(steady.steady_moments(chain))
    monkeypatch.setattr("pyro_em.state_space.riccati.LONG", steps)
    np.testing.assert_allclose(_row(steady.steady_moments(chain)), found, rtol=1e-11)
    log_evidence, row = steady._step_by_step(chain, torch.ones(3, dtype=torch.float64))
    np.testing.assert_allclose(found, row, rtol=1e-9, atol=1e-10 * abs(row).max())
    np.testing.assert_allclose(steady.steady_moments(chain).log_evidence, log_evidence, rtol=1e-12)


def test_data_that_change_in_place_are_new_data() -> None:
    """What is made of the data is made once for one tensor, as long as its version stays."""
    y = torch.randn(3, 12, 2, generator=GENERATOR, dtype=torch.float64)
    chain = _chain(y=y)
    before = steady.steady_moments(chain)
    again = steady.steady_moments(chain)
    assert torch.equal(again.log_evidence, before.log_evidence)
    y.mul_(2.0)
    changed, fresh = steady.steady_moments(chain), steady.steady_moments(_chain(y=y.clone()))
    assert not torch.equal(changed.log_evidence, before.log_evidence)
    torch.testing.assert_close(changed.log_evidence, fresh.log_evidence, rtol=1e-13, atol=0)
