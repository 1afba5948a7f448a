"""Slopes of kernels in free coordinates: their own shorter formulas are the derivative that a chart pulls back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_em.charts import chart
from pyro_em.kernels import BetaKernel, Kernel, Mean, PowerKernel, QuadraticKernel, SimplexKernel, WishartKernel
from pyro_em.slopes import free_slopes
from tests.families.test_kernels import positive, rows, spd

ZERO = torch.zeros(())
CASES: dict[str, tuple[Constraint, Callable[[], Kernel], Callable[[], Tensor]]] = {
    "scale": (constraints.positive, lambda: PowerKernel(-positive(4), ZERO, positive(4), 2.0), lambda: positive(4)),
    "variance": (constraints.positive, lambda: PowerKernel(-positive(4), ZERO, positive(4), 1.0), lambda: positive(4)),
    "rate": (constraints.positive, lambda: PowerKernel(positive(4), positive(4), ZERO, 1.0), lambda: positive(4)),
    "rate with a prior": (
        constraints.positive,
        lambda: PowerKernel(torch.tensor([1.0, -1.0, 0.0, 2.0]), positive(4), positive(4), 0.5),
        lambda: positive(4),
    ),
    "bounded": (
        constraints.greater_than(0.2),
        lambda: PowerKernel(-positive(4), ZERO, positive(4), 2.0),
        lambda: positive(4),
    ),
    "probability": (constraints.unit_interval, lambda: BetaKernel(positive(4), positive(4)), lambda: torch.rand(4)),
    "simplex": (constraints.simplex, lambda: SimplexKernel(positive(4, 3)), lambda: rows(4)),
    "location": (
        constraints.real,
        lambda: QuadraticKernel(torch.randn(4), positive(4), torch.randn(4)),
        lambda: torch.randn(4),
    ),
    "covariance": (constraints.positive_definite, lambda: WishartKernel(positive(4), spd(4)), lambda: spd(4)),
    "precision": (
        constraints.positive_definite,
        lambda: WishartKernel(positive(4), spd(4), inverse=True),
        lambda: spd(4),
    ),
}


def largest_slope(constraint: Constraint, theta: Tensor, kernel: Kernel) -> Tensor:
    return free_slopes(constraint, theta, kernel).abs().max()


@pytest.mark.parametrize("name", CASES)
def test_largest_slope_is_that_of_the_chart(name: str) -> None:
    constraint, make, draw = CASES[name]
    kernel, theta = make(), draw()
    expected = chart(constraint, theta).pull_back(theta, kernel.gradient(theta)).abs().max()
    torch.testing.assert_close(largest_slope(constraint, theta, kernel), expected, rtol=1e-11, atol=1e-12)


def test_entries_on_the_boundary_have_no_slope() -> None:
    theta = torch.tensor([[0.25, 0.0, 0.75], [0.5, 0.25, 0.25]])
    kernel = SimplexKernel(torch.tensor([[1.0, 5.0, 3.0], [2.0, 1.0, 1.0]]))
    expected = chart(constraints.simplex, theta).pull_back(theta, kernel.gradient(theta)).abs().max()
    torch.testing.assert_close(largest_slope(constraints.simplex, theta, kernel), expected)
    scale = torch.tensor([0.0, 2.0])
    kernel_of_scales = PowerKernel(torch.tensor([-4.0, -4.0]), ZERO, torch.tensor([3.0, 3.0]), 2.0)
    assert float(largest_slope(constraints.positive, scale, kernel_of_scales)) == pytest.approx(2.5)  # 4 - 2·3/2²


def test_a_factor_s_derivative_is_that_of_the_matrix() -> None:
    for inverse in (False, True):
        kernel, factor = WishartKernel(positive(4), spd(4), inverse), torch.linalg.cholesky(spd(4))
        leaf = factor.clone().requires_grad_()
        (expected,) = torch.autograd.grad(kernel.value(leaf @ leaf.mT).sum(), leaf)
        torch.testing.assert_close(
            kernel.factor_value(factor), kernel.value(factor @ factor.mT), rtol=1e-12, atol=1e-12
        )
        found = kernel.factor_gradient(factor)
        assert found is not None
        torch.testing.assert_close(found.tril(), expected.tril(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("vector", [False, True])
def test_a_weighted_mean_is_the_quadratic_that_it_stands_for(vector: bool) -> None:
    weight, origin = positive(4), torch.randn(3) if vector else torch.randn(4)
    moment = torch.randn(4, 3) if vector else torch.randn(4)
    metric = torch.linalg.cholesky(spd(4)).mT if vector else positive(4)
    kernel = QuadraticKernel.of_mean(Mean(weight, moment, metric, vector), origin)
    plain = QuadraticKernel(kernel.linear, kernel.precision, origin, vector)
    theta = torch.randn(4, 3) if vector else torch.randn(4)
    moved = kernel.rebase(theta)
    for own in (kernel, moved):
        torch.testing.assert_close(own.argmax(), plain.argmax(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own.gradient(theta), plain.gradient(theta), rtol=1e-10, atol=1e-10)
    assert (kernel + plain).mean is None  # two of them need not have one metric
    assert kernel.rescale(torch.full_like(theta, 2.0)).mean is None


def test_a_mean_of_near_singular_precision_is_the_mean() -> None:
    """h/Λ by a solve loses digits as Λ does; moment by weight does not."""
    metric = torch.diag(torch.tensor([1.0, 1e-8])) @ torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    weight, moment = torch.tensor([4.0]), torch.tensor([[2.0, -6.0]])
    kernel = QuadraticKernel.of_mean(Mean(weight, moment, metric.unsqueeze(0), vector=True), torch.zeros(2))
    assert kernel.argmax().tolist() == [[0.5, -1.5]]
    nobody = QuadraticKernel.of_mean(Mean(ZERO.expand(1), torch.zeros(1, 2), metric.unsqueeze(0), True), torch.ones(2))
    assert not nobody.is_informed and nobody.argmax().tolist() == [[1.0, 1.0]]
