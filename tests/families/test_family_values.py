"""Densities on the boundary of supports and parameters, values of other dtypes, and digits far from zero."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch

from pyro_em.families import FAMILIES
from pyro_em.kernels import QuadraticKernel
from tests.families.cases import SIZE, moments, row

inf = math.inf
# distribution, arguments, value, exact log probability
BOUNDARY: list[tuple[type, dict[str, Any], Any, float]] = [
    (dist.Bernoulli, {"probs": 0.0}, 0.0, 0.0),
    (dist.Bernoulli, {"probs": 0.0}, 1.0, -inf),
    (dist.Bernoulli, {"probs": 1.0}, 1.0, 0.0),
    (dist.Bernoulli, {"probs": 1.0}, 0.0, -inf),
    (dist.Bernoulli, {"logits": -inf}, 0.0, 0.0),
    (dist.Bernoulli, {"logits": -inf}, 1.0, -inf),
    (dist.Bernoulli, {"logits": inf}, 1.0, 0.0),
    (dist.Binomial, {"total_count": 3.0, "probs": 0.0}, 0.0, 0.0),
    (dist.Binomial, {"total_count": 3.0, "probs": 0.0}, 1.0, -inf),
    (dist.Binomial, {"total_count": 3.0, "probs": 1.0}, 3.0, 0.0),
    (dist.Binomial, {"total_count": 0.0, "probs": 0.5}, 0.0, 0.0),
    (dist.Geometric, {"probs": 1.0}, 0.0, 0.0),
    (dist.Geometric, {"probs": 1.0}, 2.0, -inf),
    (dist.Geometric, {"probs": 0.0}, 2.0, -inf),
    (dist.NegativeBinomial, {"total_count": 2.0, "probs": 0.0}, 0.0, 0.0),
    (dist.NegativeBinomial, {"total_count": 2.0, "probs": 0.0}, 1.0, -inf),
    (dist.NegativeBinomial, {"total_count": 0.0, "probs": 0.5}, 0.0, 0.0),
    (dist.Categorical, {"probs": [0.0, 0.25, 0.75]}, 0, -inf),
    (dist.Categorical, {"probs": [0.0, 0.25, 0.75]}, 2, math.log(0.75)),
    (dist.Categorical, {"probs": [0.0, 1.0, 3.0]}, 1, math.log(0.25)),
    (dist.Categorical, {"logits": [-inf, 0.0, 0.0]}, 0, -inf),
    (dist.Categorical, {"logits": [-inf, 0.0, 0.0]}, 1, math.log(0.5)),
    (dist.OneHotCategorical, {"probs": [0.0, 0.25, 0.75]}, [0.0, 1.0, 0.0], math.log(0.25)),
    (dist.OneHotCategorical, {"probs": [0.0, 0.25, 0.75]}, [1.0, 0.0, 0.0], -inf),
    (dist.OneHotCategorical, {"logits": [-inf, 0.0, 0.0]}, [0.0, 1.0, 0.0], math.log(0.5)),
    (dist.Multinomial, {"probs": [0.0, 0.5, 0.5]}, [0.0, 1.0, 1.0], math.log(0.5)),
    (dist.Multinomial, {"probs": [0.0, 0.5, 0.5]}, [1.0, 1.0, 0.0], -inf),
    (dist.Poisson, {"rate": 0.0}, 0.0, 0.0),
    (dist.Poisson, {"rate": 0.0}, 3.0, -inf),
    (dist.Beta, {"concentration1": 1.0, "concentration0": 2.0}, 0.0, math.log(2)),
    (dist.Beta, {"concentration1": 2.0, "concentration0": 1.0}, 0.0, -inf),
    (dist.Beta, {"concentration1": 0.5, "concentration0": 1.0}, 0.0, inf),
    (dist.Dirichlet, {"concentration": [1.0, 1.0, 1.0]}, [0.0, 0.5, 0.5], math.log(2)),
    (dist.Dirichlet, {"concentration": [2.0, 1.0, 1.0]}, [0.0, 0.5, 0.5], -inf),
    (dist.Gamma, {"concentration": 1.0, "rate": 2.0}, 0.0, math.log(2)),
    (dist.Gamma, {"concentration": 3.0, "rate": 2.0}, 0.0, -inf),
    (dist.Exponential, {"rate": 2.0}, 0.0, math.log(2)),
    (dist.InverseGamma, {"concentration": 3.0, "rate": 2.0}, 0.0, -inf),
    (dist.HalfNormal, {"scale": 1.0}, 0.0, math.log(2 / math.pi) / 2),
    (dist.Uniform, {"low": 0.0, "high": 2.0}, 3.0, -inf),
    (dist.Weibull, {"scale": 1.0, "concentration": 2.0}, 0.0, -inf),
]


@pytest.mark.parametrize(("cls", "args", "value", "expected"), BOUNDARY)
def test_log_prob_is_exact_on_the_boundary_and_its_gradient_finite(
    cls: type, args: dict[str, Any], value: Any, expected: float
) -> None:
    leaves = {name: torch.tensor(number, requires_grad=True) for name, number in args.items()}
    point = torch.tensor(value, requires_grad=isinstance(value, float | list))
    actual = FAMILIES[cls].log_prob(leaves, point)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-15, atol=1e-15)
    wanted = [*leaves.values(), *([point] if point.requires_grad else [])]
    for gradient in torch.autograd.grad(actual, wanted, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_values_of_integers_and_flags_are_counts() -> None:
    for value in (torch.tensor([True, False]), torch.tensor([1, 0]), torch.tensor([1.0, 0.0])):
        actual = FAMILIES[dist.Bernoulli].log_prob({"probs": 0.25}, value)
        torch.testing.assert_close(actual, torch.tensor([0.25, 0.75]).log())
        for statistic in FAMILIES[dist.Bernoulli].statistics(value):
            assert statistic.dense().dtype == torch.float64


def test_python_numbers_do_not_lose_digits() -> None:
    torch.set_default_dtype(torch.float32)  # the autouse fixture hands it back
    value = torch.tensor([3.0], dtype=torch.float64)
    actual = FAMILIES[dist.Poisson].log_prob({"rate": 0.1}, value)
    assert actual.item() == pytest.approx(3 * math.log(0.1) - 0.1 - math.lgamma(4), abs=1e-14)


def test_enumerated_values_broadcast_to_the_left_of_the_arguments() -> None:
    probs = row(4)
    value = torch.arange(SIZE).reshape(SIZE, 1, 1)
    actual = FAMILIES[dist.Categorical].log_prob({"probs": probs}, value)
    torch.testing.assert_close(actual, probs.log().T.unsqueeze(1))


def test_total_counts_may_differ_between_values() -> None:
    totals, value = torch.tensor([3.0, 9.0, 1.0]), torch.tensor([1.0, 9.0, 0.0])
    family = FAMILIES[dist.Binomial]
    sums = [s.dense().sum(0) for s in family.statistics(value, {"total_count": totals})]
    kernel = family.kernel("probs", [torch.tensor(3.0), *sums], {"total_count": totals})
    assert kernel is not None
    assert kernel.argmax().item() == pytest.approx(10 / 13, rel=1e-15)


def test_normal_far_from_zero_keeps_ten_digits() -> None:
    # Mean 1e6 and spread 1: Σx² − (Σx)²/n would leave four digits of the variance.
    value, center = torch.randn(50) + 1e6, torch.tensor(1e6)
    family = FAMILIES[dist.Normal]
    weights = torch.ones(50, 1)
    sums = moments(family, weights, value, {}, center)
    located = family.kernel("loc", sums, {"scale": torch.ones(1)}, center)
    assert isinstance(located, QuadraticKernel)
    mean, scale = (value - 1e6).mean(), (value - 1e6).std(correction=0)
    torch.testing.assert_close(located.argmax() - 1e6, mean.reshape(1), rtol=0, atol=2e-10)
    spread = family.kernel("scale", sums, {"loc": located.argmax()}, center)
    assert spread is not None
    torch.testing.assert_close(spread.argmax(), scale.reshape(1), rtol=1e-10, atol=0)


def test_multivariate_normal_far_from_zero_keeps_ten_digits() -> None:
    offset = torch.tensor([1e6, -1e6, 0.0])
    value = torch.randn(50, SIZE) + offset
    family = FAMILIES[dist.MultivariateNormal]
    sums = moments(family, torch.ones(50, 1), value, {}, offset)
    loc = value.mean(0, keepdim=True)
    kernel = family.kernel("covariance_matrix", sums, {"loc": loc}, offset)
    assert kernel is not None
    expected = torch.cov((value - offset).T, correction=0).unsqueeze(0)
    torch.testing.assert_close(kernel.argmax(), expected, rtol=1e-9, atol=1e-9)


def test_collapsed_data_give_a_scale_of_exactly_zero() -> None:
    value = torch.full((5,), 3.7)
    family = FAMILIES[dist.Normal]
    sums = moments(family, torch.ones(5, 1), value, {}, torch.tensor(3.7))
    kernel = family.kernel("scale", sums, {"loc": torch.tensor([3.7])}, torch.tensor(3.7))
    assert kernel is not None
    assert kernel.argmax().item() == 0
