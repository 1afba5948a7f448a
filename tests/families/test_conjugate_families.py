"""Conjugate priors: the mode of a kernel with its prior is the numerical maximum of the posterior."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em.charts import chart
from pyro_em.distributions import InverseWishart
from pyro_em.families import FAMILIES
from pyro_em.kernels import Kernel
from tests.families.cases import (
    CASES,
    CELLS,
    SIZE,
    Arguments,
    constraint_of,
    maximise,
    moments,
    objective,
    positive,
    problem,
)

# likelihood row, argument, prior class, prior arguments
CONJUGATE: list[tuple[str, str, type, Callable[[], Arguments]]] = [
    ("Poisson", "rate", dist.Gamma, CASES["Gamma"][1]),
    ("Exponential", "rate", dist.Gamma, CASES["Gamma"][1]),
    ("Exponential", "rate", dist.Exponential, CASES["Exponential"][1]),
    ("Gamma", "rate", dist.Gamma, CASES["Gamma"][1]),
    ("HalfNormal", "scale", dist.HalfNormal, CASES["HalfNormal"][1]),
    ("Normal", "scale", dist.HalfNormal, CASES["HalfNormal"][1]),
    ("Normal", "loc", dist.Normal, CASES["Normal"][1]),
    ("Normal", "scale", dist.HalfCauchy, CASES["HalfCauchy"][1]),
    ("Normal", "scale", dist.Gamma, CASES["Gamma"][1]),
    ("Normal", "scale", dist.LogNormal, CASES["LogNormal"][1]),
    ("Normal", "scale", dist.InverseGamma, CASES["InverseGamma"][1]),
    ("Poisson", "rate", dist.HalfCauchy, CASES["HalfCauchy"][1]),
    ("Exponential", "rate", dist.LogNormal, CASES["LogNormal"][1]),
    ("Normal", "loc", dist.Laplace, CASES["Laplace"][1]),
    ("Normal", "loc", dist.StudentT, CASES["StudentT"][1]),
    ("Normal", "loc", dist.Cauchy, CASES["Cauchy"][1]),
    ("LogNormal", "loc", dist.Normal, CASES["Normal"][1]),
    ("Bernoulli(probs)", "probs", dist.Beta, CASES["Beta"][1]),
    ("Binomial(probs)", "probs", dist.Beta, CASES["Beta"][1]),
    ("Categorical(probs)", "probs", dist.Dirichlet, CASES["Dirichlet"][1]),
    ("Multinomial(probs)", "probs", dist.Dirichlet, CASES["Dirichlet"][1]),
    (
        "MultivariateNormal(scale_tril)",
        "loc",
        dist.MultivariateNormal,
        CASES["MultivariateNormal(precision_matrix)"][1],
    ),
    (
        "MultivariateNormal(covariance_matrix)",
        "loc",
        dist.Normal,
        lambda: {"loc": torch.randn(CELLS, SIZE), "scale": positive(CELLS, SIZE)},
    ),
    (
        "MultivariateNormal(covariance_matrix)",
        "covariance_matrix",
        InverseWishart,
        CASES["InverseWishart"][1],
    ),
    (
        "MultivariateNormal(precision_matrix)",
        "precision_matrix",
        dist.Wishart,
        CASES["Wishart(covariance_matrix)"][1],
    ),
]


@pytest.mark.parametrize(("name", "argument", "prior", "make"), CONJUGATE)
def test_conjugate_prior_adds_to_the_posterior_mode(
    name: str, argument: str, prior: type, make: Callable[[], Arguments]
) -> None:
    cls, family, args, value, weights, center = problem(name)
    prior_args = make()
    likelihood = family.kernel(argument, moments(family, weights, value, args, center), args, center)
    prior_kernel = FAMILIES[prior].value_kernel(prior_args)
    assert likelihood is not None and prior_kernel is not None
    own = chart(constraint_of(cls, args, argument), args[argument])

    def function(free: Tensor) -> Tensor:
        theta = own.from_free(free)
        log_prior = FAMILIES[prior].log_prob(prior_args, theta).sum()
        return objective(family, weights, value, {**args, argument: theta}).sum() + log_prior

    best = own.from_free(maximise(function, own.to_free(args[argument])))
    total: Kernel = likelihood + prior_kernel
    torch.testing.assert_close(total.argmax(), best, rtol=1e-8, atol=1e-8)


def test_inverse_gamma_prior_of_a_variance() -> None:
    # Normal(0, √v) with v ~ InverseGamma(a, b): v* = (b + S/2) / (a + 1 + n/2), a textbook result.
    data, a, b = torch.tensor([1.0, -2.0, 0.5]), 3.0, 2.0
    family = FAMILIES[dist.Normal]
    sums = [torch.tensor(3.0), data.sum(), data.square().sum()]
    kernel = family.kernel("scale", sums, {"loc": 0.0})
    prior = FAMILIES[dist.InverseGamma].value_kernel({"concentration": a, "rate": b})
    assert kernel is not None and prior is not None
    best = (kernel.power(0.5) + prior).argmax()  # type: ignore[attr-defined]
    assert best.item() == pytest.approx((b + data.square().sum().item() / 2) / (a + 1 + 1.5), rel=1e-14)
