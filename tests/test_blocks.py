"""Gaussian systems in blocks (evidence/blocks.py) against one dense solve; data in blocks (state_space/blocks.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_em.evidence.blocks import System, factor, simplex
from pyro_em.state_space.blocks import MANY, Blocks

K, N_B, ELEMENTS = 2, 3, 4
GENERATOR = torch.Generator().manual_seed(0)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def _system(common: bool, one_factor: bool = False) -> tuple[System, Tensor, Tensor]:
    """A system of four elements, with entries that they share or without, and J and h as one matrix and vector."""
    roots = _randn(1 if one_factor else ELEMENTS, K, K + 2)
    precision, linear = roots @ roots.mT + torch.eye(K), _randn(ELEMENTS, K)
    own = torch.block_diag(*precision.expand(ELEMENTS, K, K))
    if not common:
        return System(linear, precision), own, linear.reshape(-1)
    cross, root = 0.3 * _randn(ELEMENTS, K, N_B), _randn(N_B, N_B + 2)
    shared, linear_b = root @ root.mT + 5 * torch.eye(N_B), _randn(N_B)
    tall = cross.reshape(-1, N_B)
    J = torch.cat([torch.cat([own, tall], 1), torch.cat([tall.mT, shared], 1)])
    return System(linear, precision, linear_b, cross, shared), J, torch.cat([linear.reshape(-1), linear_b])


@pytest.mark.parametrize("one_factor", [False, True])
@pytest.mark.parametrize("common", [False, True])
def test_a_system_is_the_dense_one(common: bool, one_factor: bool) -> None:
    system, J, h = _system(common, one_factor)
    factored = factor(system)
    assert factored is not None
    own, shared = factored.solve(system.linear, system.linear_b)
    found = own.reshape(-1) if shared is None else torch.cat([own.reshape(-1), shared])
    torch.testing.assert_close(found, torch.linalg.solve(J, h), rtol=1e-11, atol=1e-12)
    parts = factored.log_det()
    total = parts[0].expand(ELEMENTS).sum() + parts[1]
    assert float(total) == pytest.approx(float(torch.logdet(J)), rel=1e-12)
    inverse, (first, second) = torch.linalg.inv(J), factored.covariance()
    for i, block in enumerate(first.expand(ELEMENTS, K, K)):
        place = slice(K * i, K * i + K)
        torch.testing.assert_close(block, inverse[place, place], rtol=1e-11, atol=1e-12)
    if common:
        assert second is not None
        torch.testing.assert_close(second, inverse[-N_B:, -N_B:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("common", [False, True])
def test_deviations_have_the_covariance_of_the_system(common: bool) -> None:
    """Of one element and the shared entries: moment-matched numbers give J⁻¹ exactly."""
    system, J, _ = _system(common)
    factored = factor(system)
    assert factored is not None
    points = simplex(K + N_B if common else K)
    torch.testing.assert_close(points.mT @ points / len(points), torch.eye(points.shape[1]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(points.mean(0), torch.zeros(points.shape[1]), rtol=0, atol=1e-12)
    own, shared = factored.spread(points[:, None, :K], points[:, K:] if common else None)
    inverse = torch.linalg.inv(J)
    for i in range(ELEMENTS):
        here = own[:, i] if shared is None else torch.cat([own[:, i], shared], -1)
        index = torch.tensor([K * i, K * i + 1, *(range(ELEMENTS * K, len(J)) if common else ())])
        expected = inverse[index[:, None], index]
        torch.testing.assert_close(here.mT @ here / len(points), expected, rtol=1e-10, atol=1e-12)


def test_what_is_not_positive_definite_has_no_factors() -> None:
    system = _system(common=True)[0]
    assert factor(System(system.linear, -system.precision)) is None
    assert system.common is not None
    assert factor(System(system.linear, system.precision, system.linear_b, system.cross, 1e-3 * system.common)) is None


@pytest.mark.parametrize("sequences", [2, 20, MANY])
def test_data_are_cut_once_for_each_size_of_state(sequences: int) -> None:
    y = _randn(sequences, 21, 2).numpy()
    two, three = Blocks.of(y, 2), Blocks.of(y, 3)
    assert Blocks.of(y, 3) is three
    assert three.num_sequences == two.num_sequences == sequences
    for found, D in ((two, 2), (three, 3)):
        many, cut = sequences >= MANY, 21 % found.length
        rows = found.rows.transpose(2, 0, 1) if many else found.rows.swapaxes(0, 1)
        lead = found.lead.transpose(2, 0, 1) if many else found.lead.swapaxes(0, 1)
        np.testing.assert_array_equal(lead[..., D:], y[:, :cut])
        np.testing.assert_array_equal(rows[..., D:].reshape(sequences, -1, 2), y[:, cut:])
    assert Blocks.of(y.copy(), 3) is not three
