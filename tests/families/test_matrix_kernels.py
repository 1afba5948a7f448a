"""Quadratic and Wishart kernels: digits far from zero, directions without information, singular matrices."""

from __future__ import annotations

import pytest
import torch

from pyro_em.kernels import (
    QuadraticKernel,
    WishartKernel,
)
from tests.families.test_kernels import CELLS, KERNELS, difference, positive, spd


def test_quadratic_keeps_its_digits_far_from_zero() -> None:
    # Mean 0.1 above an offset of 1e8, to the last digit of the offset's float64 neighbour.
    offset = torch.tensor(1e8)
    kernel = QuadraticKernel(torch.tensor(0.1), torch.tensor(1.0), offset)
    prior = QuadraticKernel(torch.tensor(0.0), torch.tensor(1.0), offset)
    assert (kernel + prior).argmax() - offset == pytest.approx(0.05, abs=2e-8)
    assert kernel.gradient(offset + 0.125) == pytest.approx(-0.025, abs=1e-15)


def test_quadratic_elementwise_plus_vector_is_a_vector() -> None:
    vector = QuadraticKernel(torch.randn(2, 3), spd(2), torch.randn(3), vector=True)
    scalar = QuadraticKernel(torch.randn(3), positive(3), torch.randn(()))
    theta, other = torch.randn(2, 3), torch.randn(2, 3)
    expected = difference(vector, theta, other) + difference(scalar, theta, other).sum(-1)
    for total in (vector + scalar, scalar + vector):
        torch.testing.assert_close(difference(total, theta, other), expected, rtol=1e-11, atol=1e-11)
        assert total.gradient(total.argmax()).abs().max() < 1e-12


def test_quadratic_without_information_in_a_direction_stays_there() -> None:
    direction = torch.tensor([3.0, 4.0]) / 5
    kernel = QuadraticKernel(2 * direction, torch.outer(direction, direction), torch.tensor([1.0, 1.0]), vector=True)
    torch.testing.assert_close(kernel.argmax(), torch.tensor([1.0, 1.0]) + 2 * direction)


@pytest.mark.parametrize("name", ["quadratic", "quadratic, vectors"])
def test_quadratic_rescaled_by_zero_and_negative_factors(name: str) -> None:
    make, draw = KERNELS[name]
    kernel, theta, other = make(), draw(), draw()
    factor = torch.randn(theta.shape)
    factor[..., 0] = 0.0
    expected = difference(kernel, factor * theta, factor * other)
    actual = difference(kernel.rescale(factor), theta, other)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_wishart_in_the_precision_is_the_same_function() -> None:
    kernel, sigma = WishartKernel(positive(CELLS), spd(CELLS)), spd(CELLS)
    moved = kernel.inverted()
    torch.testing.assert_close(moved.value(sigma.inverse()), kernel.value(sigma), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.argmax().inverse(), kernel.argmax(), rtol=1e-10, atol=1e-10)


def test_wishart_reports_singular_and_unbounded_matrices_as_such() -> None:
    flat = torch.diag(torch.tensor([1.0, 0.0]))
    kernel = WishartKernel(torch.ones(()), flat)
    torch.testing.assert_close(kernel.argmax(), flat / 2)
    assert kernel.inverted().argmax().isinf().all()
