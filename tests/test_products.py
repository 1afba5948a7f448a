"""Products by either library are the same, but for rounding."""

from __future__ import annotations

import pytest
import torch

import pyro_em
from models import gmm
from pyro_em import products
from pyro_em.evidence import blocked
from pyro_em.evidence.blocked import Blocks, Scratch, smooth_blocked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_and_transposes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an E-step multiplies: columns of a wide matrix, a transposed table."""
    generator = torch.Generator().manual_seed(0)
    wide, table = torch.randn(7, 90, generator=generator, dtype=dtype), torch.randn(5, 40, dtype=dtype)
    found = []
    for suits in (True, False):
        monkeypatch.setattr(products, "by_numpy", lambda x, suits=suits: suits)
        found.append(products.product_(wide[:, 20:60], table.mT, torch.empty(7, 5, dtype=dtype)))
    expected = wide[:, 20:60].double() @ table.mT.double()
    for own in found:
        torch.testing.assert_close(own.double(), expected, rtol=0, atol=40 * torch.finfo(dtype).eps * 10)


def test_fits_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of rows, several starts."""
    x = gmm.simulate(30_000, 3, 4)
    fits = []
    for suits in (True, False):
        monkeypatch.setattr(products, "by_numpy", lambda y, suits=suits: suits)
        fits.append(pyro_em.fit(gmm.model, x, 3, restarts=2, seed=0, max_iter=5, tol=0))
    assert fits[0].log_likelihood == pytest.approx(fits[1].log_likelihood, rel=1e-13, abs=0)
    for name, value in fits[0].params.items():
        torch.testing.assert_close(value, fits[1].params[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("overlap", [48, 10**9])
def test_chains_in_blocks_agree(overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both routes to what a block needs from its neighbours, in parts of the same memory."""
    monkeypatch.setattr(blocked, "WIDE", 0)
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(4, 4, generator=generator, dtype=torch.float64) + 0.2
    table /= table.sum(-1, keepdim=True)
    likelihood = torch.rand(4, 60, 20, generator=generator, dtype=torch.float64)
    found = []
    for suits in (True, False):
        monkeypatch.setattr(products, "by_numpy", lambda x, suits=suits: suits)
        scratch = Scratch()
        scratch.overlap = overlap
        own = smooth_blocked(table[:1].mT.contiguous(), table, likelihood.clone(), Blocks(1200, 1, 60, 20), scratch)
        assert own is not None and scratch.overlap == overlap
        found.append(own)
    torch.testing.assert_close(found[0].log_scale, found[1].log_scale, rtol=1e-14, atol=0)
    torch.testing.assert_close(found[0].states, found[1].states, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[0].left, found[1].left, rtol=1e-12, atol=1e-14)


def test_threads_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's library is not to take more processors than torch was given."""
    x = torch.zeros(2, 2)
    monkeypatch.setattr(products, "_numpy_suits", lambda: True)
    monkeypatch.setattr(products, "_numpy_threads", lambda: torch.get_num_threads())
    assert products.by_numpy(x)
    assert not products.by_numpy(x.long())
    monkeypatch.setattr(products, "_numpy_threads", lambda: torch.get_num_threads() + 1)
    assert not products.by_numpy(x)
