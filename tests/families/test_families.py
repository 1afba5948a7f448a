"""Families: every law over one table with each family once, then the boundary and the conjugate pairs.

The oracles are torch's own `log_prob`, its derivatives, and a numerical maximisation of Σ w log p in
unconstrained coordinates, started away from the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from pyro_em.charts import chart
from pyro_em.distributions import InverseWishart
from pyro_em.families import FAMILIES, Family, family_of
from pyro_em.kernels import Kernel, QuadraticKernel

CELLS, ROWS, SIZE = 2, 30, 3

Arguments = dict[str, Tensor]


def positive(*shape: int) -> Tensor:
    return 0.5 + torch.rand(shape) * 2


def spd(*shape: int) -> Tensor:
    root = torch.randn(*shape, SIZE, SIZE + 3)
    return root @ root.mT / SIZE + 0.2 * torch.eye(SIZE)


def probability(*shape: int) -> Tensor:
    return 0.1 + 0.8 * torch.rand(shape)


def row(*shape: int) -> Tensor:
    return torch.distributions.Dirichlet(torch.full((SIZE,), 2.0)).sample(shape)


# Each row: distribution class, random arguments over cells.
CASES: dict[str, tuple[type, Callable[[], Arguments]]] = {
    "Bernoulli(probs)": (dist.Bernoulli, lambda: {"probs": probability(CELLS)}),
    "Bernoulli(logits)": (dist.Bernoulli, lambda: {"logits": torch.randn(CELLS)}),
    "Binomial(probs)": (
        dist.Binomial,
        lambda: {"total_count": torch.tensor(7.0), "probs": probability(CELLS)},
    ),
    "Binomial(logits)": (
        dist.Binomial,
        lambda: {"total_count": torch.tensor(7.0), "logits": torch.randn(CELLS)},
    ),
    "Geometric(probs)": (dist.Geometric, lambda: {"probs": probability(CELLS)}),
    "Geometric(logits)": (dist.Geometric, lambda: {"logits": torch.randn(CELLS)}),
    "NegativeBinomial(probs)": (
        dist.NegativeBinomial,
        lambda: {"total_count": torch.tensor(2.5), "probs": probability(CELLS)},
    ),
    "NegativeBinomial(logits)": (
        dist.NegativeBinomial,
        lambda: {"total_count": torch.tensor(2.5), "logits": torch.randn(CELLS)},
    ),
    "Categorical(probs)": (dist.Categorical, lambda: {"probs": row(CELLS)}),
    "Categorical(logits)": (dist.Categorical, lambda: {"logits": torch.randn(CELLS, SIZE)}),
    "OneHotCategorical(probs)": (dist.OneHotCategorical, lambda: {"probs": row(CELLS)}),
    "OneHotCategorical(logits)": (dist.OneHotCategorical, lambda: {"logits": torch.randn(CELLS, SIZE)}),
    "Multinomial(probs)": (dist.Multinomial, lambda: {"probs": row(CELLS)}),
    "Multinomial(logits)": (dist.Multinomial, lambda: {"logits": torch.randn(CELLS, SIZE)}),
    "Poisson": (dist.Poisson, lambda: {"rate": positive(CELLS)}),
    "Exponential": (dist.Exponential, lambda: {"rate": positive(CELLS)}),
    "Gamma": (dist.Gamma, lambda: {"concentration": positive(CELLS) + 1, "rate": positive(CELLS)}),
    "InverseGamma": (
        dist.InverseGamma,
        lambda: {"concentration": positive(CELLS) + 1, "rate": positive(CELLS)},
    ),
    "Normal": (dist.Normal, lambda: {"loc": torch.randn(CELLS), "scale": positive(CELLS)}),
    "LogNormal": (dist.LogNormal, lambda: {"loc": torch.randn(CELLS), "scale": positive(CELLS)}),
    "HalfCauchy": (dist.HalfCauchy, lambda: {"scale": positive(CELLS)}),
    "Laplace": (dist.Laplace, lambda: {"loc": torch.randn(CELLS), "scale": positive(CELLS)}),
    "StudentT": (
        dist.StudentT,
        lambda: {"df": 1 + positive(CELLS), "loc": torch.randn(CELLS), "scale": positive(CELLS)},
    ),
    "Cauchy": (dist.Cauchy, lambda: {"loc": torch.randn(CELLS), "scale": positive(CELLS)}),
    "HalfNormal": (dist.HalfNormal, lambda: {"scale": positive(CELLS)}),
    "MultivariateNormal(covariance_matrix)": (
        dist.MultivariateNormal,
        lambda: {"loc": torch.randn(CELLS, SIZE), "covariance_matrix": spd(CELLS)},
    ),
    "MultivariateNormal(scale_tril)": (
        dist.MultivariateNormal,
        lambda: {"loc": torch.randn(CELLS, SIZE), "scale_tril": torch.linalg.cholesky(spd(CELLS))},
    ),
    "MultivariateNormal(precision_matrix)": (
        dist.MultivariateNormal,
        lambda: {"loc": torch.randn(CELLS, SIZE), "precision_matrix": spd(CELLS)},
    ),
    "Beta": (
        dist.Beta,
        lambda: {"concentration1": positive(CELLS) + 1, "concentration0": positive(CELLS) + 1},
    ),
    "Dirichlet": (dist.Dirichlet, lambda: {"concentration": positive(CELLS, SIZE) + 1}),
    "GammaPoisson": (dist.GammaPoisson, lambda: {"concentration": positive(CELLS), "rate": positive(CELLS)}),
    "BetaBinomial": (
        dist.BetaBinomial,
        lambda: {
            "concentration1": positive(CELLS),
            "concentration0": positive(CELLS),
            "total_count": torch.tensor(5.0),
        },
    ),
    "DirichletMultinomial": (dist.DirichletMultinomial, lambda: {"concentration": positive(CELLS, SIZE)}),
    "Uniform": (
        dist.Uniform,
        lambda: {"low": -positive(1).expand(CELLS), "high": 2 + positive(1).expand(CELLS)},
    ),
    "Weibull": (dist.Weibull, lambda: {"scale": positive(CELLS), "concentration": 1 + positive(CELLS)}),
    "InverseWishart": (InverseWishart, lambda: {"df": 5 + positive(CELLS), "scale_matrix": spd(CELLS)}),
    "Wishart(covariance_matrix)": (
        dist.Wishart,
        lambda: {"df": 5 + positive(CELLS), "covariance_matrix": spd(CELLS)},
    ),
    "Wishart(scale_tril)": (
        dist.Wishart,
        lambda: {"df": 5 + positive(CELLS), "scale_tril": torch.linalg.cholesky(spd(CELLS))},
    ),
    "Wishart(precision_matrix)": (
        dist.Wishart,
        lambda: {"df": 5 + positive(CELLS), "precision_matrix": spd(CELLS)},
    ),
}
CLOSED = [(name, a) for name, (cls, make) in CASES.items() for a in make() if a in FAMILIES[cls].closed]
VALUES = [name for name, (cls, _) in CASES.items() if cls in (
    dist.Exponential, dist.Gamma, dist.InverseGamma, dist.Normal, dist.HalfNormal, dist.MultivariateNormal,
    dist.Beta, dist.Dirichlet, dist.Uniform, InverseWishart, dist.Wishart,
    dist.LogNormal, dist.HalfCauchy, dist.Laplace, dist.StudentT, dist.Cauchy,
)]  # fmt: skip


def law(cls: type, args: Arguments) -> Any:
    extra = {"total_count": 4} if cls in (dist.Multinomial, dist.DirichletMultinomial) else {}
    return cls(**args, **extra)


def draw(cls: type, args: Arguments, rows: int = ROWS) -> Tensor:
    """Values (rows,) + event of the first cell's distribution."""
    if cls is dist.Wishart:  # torch's sampler warns of singular draws that are none
        return spd(rows)
    value: Tensor = law(cls, args).sample((rows,))
    return value[:, 0]


PER_CELL = {dist.Laplace}  # its statistic is the distance from the location


def moments(family: Family, weights: Tensor, value: Tensor, args: Arguments, center: Any) -> list[Tensor]:
    """S₀ (CELLS,) and Σ_n w_nc T(x_n), (CELLS,) + event, for weights (rows, CELLS)."""
    if family.distribution in PER_CELL:
        distances = [statistic.dense() for statistic in family.statistics(value[:, None], args, center)]
        return [weights.sum(0), *((weights * t).sum(0) for t in distances)]
    dense = [statistic.dense() for statistic in family.statistics(value, args, center)]
    return [weights.sum(0), *(torch.tensordot(weights, t, dims=([0], [0])) for t in dense)]


def objective(family: Family, weights: Tensor, value: Tensor, args: Arguments) -> Tensor:
    """Σ w log p, shape (CELLS,)."""
    rowwise = value.reshape(value.shape[0], 1, *value.shape[1:])
    return (weights * family.log_prob(args, rowwise)).sum(0)


def constraint_of(cls: type, args: Arguments, argument: str) -> Any:
    return law(cls, args).arg_constraints[argument]


def maximise(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """argmax over free coordinates: BFGS, then Newton steps down to rounding error."""

    def negative(u: Any) -> tuple[float, Any]:
        leaf = torch.tensor(u, requires_grad=True)
        value = -function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient.numpy()

    u = torch.tensor(minimize(negative, start.numpy(), jac=True, method="BFGS").x)
    for _ in range(3):
        gradient = torch.autograd.functional.jacobian(function, u)
        hessian = torch.autograd.functional.hessian(function, u)
        u = u - torch.linalg.pinv(hessian, rtol=1e-10) @ gradient
    return u


def problem(name: str) -> tuple[type, Family, Arguments, Tensor, Tensor, Any]:
    cls, make = CASES[name]
    args = make()
    value, weights = draw(cls, args), torch.rand(ROWS, CELLS)
    family = FAMILIES[cls]
    center = 0.3 + torch.rand(value.shape[1:]) if family.centered else None
    return cls, family, args, value, weights, center


# Responses with a state inside or with missing entries, whose statistics are none of the value alone: they have tests
# of their own.
ELSEWHERE = {"GaussianHMM", "LinearHMM", "GaussianChain", "IncompleteNormal", "GridNormal"}


def test_every_family_is_in_the_table_once() -> None:
    assert {cls for cls, _ in CASES.values()} == {cls for cls in FAMILIES if cls.__name__ not in ELSEWHERE}
    tested = {(CASES[name][0], argument) for name, argument in CLOSED}
    others = {cls: family for cls, family in FAMILIES.items() if cls.__name__ not in ELSEWHERE}
    assert tested == {(cls, argument) for cls, family in others.items() for argument in family.closed}
    for cls, family in FAMILIES.items():
        if cls.__name__ in ELSEWHERE:
            continue
        assert family_of(cls) is family
        assert family.closed <= set(family.arguments)
        assert family.event_dim == law(cls, next(m for c, m in CASES.values() if c is cls)()).event_dim
    assert family_of(dist.VonMises) is None


def test_families_without_a_value_kernel_say_so() -> None:
    for name, (cls, make) in CASES.items():
        assert (FAMILIES[cls].value_kernel(make()) is not None) == (name in VALUES), name


@pytest.mark.parametrize("name", CASES)
def test_log_prob_is_torchs_inside_the_support(name: str) -> None:
    cls, make = CASES[name]
    args = make()
    value = draw(cls, args)[:, None]
    expected = law(cls, args).log_prob(value)
    actual = FAMILIES[cls].log_prob(args, value)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_log_prob_is_differentiable_in_its_arguments(name: str) -> None:
    cls, make = CASES[name]
    args = make()
    value = draw(cls, args)[:, None]
    # Pyro's Binomial takes its coefficient for a constant when differentiated in the total count.
    names = [
        key for key in args if (cls, key) not in ((dist.Binomial, "total_count"), (dist.BetaBinomial, "total_count"))
    ]
    leaves = {key: args[key].clone().requires_grad_() for key in names}
    expected = torch.autograd.grad(law(cls, {**args, **leaves}).log_prob(value).sum(), list(leaves.values()))
    actual = torch.autograd.grad(FAMILIES[cls].log_prob({**args, **leaves}, value).sum(), list(leaves.values()))
    for key, mine, theirs in zip(names, actual, expected, strict=True):
        constraint = dist.constraints.real if cls is dist.Uniform else constraint_of(cls, args, key)
        own = chart(constraint, args[key])
        torch.testing.assert_close(
            own.pull_back(args[key], mine), own.pull_back(args[key], theirs), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize(("name", "argument"), CLOSED)
def test_kernel_is_the_weighted_log_likelihood_up_to_a_constant(name: str, argument: str) -> None:
    _, family, args, value, weights, center = problem(name)
    kernel = family.kernel(argument, moments(family, weights, value, args, center), args, center)
    assert kernel is not None
    canonical = family.link(argument).to_canonical
    other = CASES[name][1]()[argument]
    actual = kernel.value(canonical(other)) - kernel.value(canonical(args[argument]))
    expected = objective(family, weights, value, {**args, argument: other}) - objective(family, weights, value, args)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "argument"), CLOSED)
def test_kernel_gradient_is_the_score(name: str, argument: str) -> None:
    cls, family, args, value, weights, center = problem(name)
    kernel = family.kernel(argument, moments(family, weights, value, args, center), args, center)
    assert kernel is not None
    leaf = args[argument].clone().requires_grad_()
    canonical = family.link(argument).to_canonical(leaf)
    (actual,) = torch.autograd.grad(canonical, leaf, kernel.gradient(canonical.detach()))
    (expected,) = torch.autograd.grad(objective(family, weights, value, {**args, argument: leaf}).sum(), leaf)
    own = chart(constraint_of(cls, args, argument), args[argument])
    torch.testing.assert_close(
        own.pull_back(args[argument], actual), own.pull_back(args[argument], expected), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("name", "argument"), CLOSED)
def test_kernel_argmax_is_the_numerical_maximum(name: str, argument: str) -> None:
    cls, family, args, value, weights, center = problem(name)
    kernel = family.kernel(argument, moments(family, weights, value, args, center), args, center)
    assert kernel is not None
    own, link = chart(constraint_of(cls, args, argument), args[argument]), family.link(argument)

    def function(free: Tensor) -> Tensor:
        return objective(family, weights, value, {**args, argument: own.from_free(free)}).sum()

    best = own.from_free(maximise(function, own.to_free(args[argument])))
    closed = kernel.argmax()
    torch.testing.assert_close(closed, link.to_canonical(best), rtol=1e-8, atol=1e-8)
    back = link.to_canonical(link.from_canonical(closed))
    torch.testing.assert_close(back, closed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("argument", ["covariance_matrix", "scale_tril", "precision_matrix"])
def test_diagonal_kernel_is_the_likelihood_on_diagonal_matrices(argument: str) -> None:
    _, family, args, value, weights, center = problem("MultivariateNormal(covariance_matrix)")
    first, second = positive(CELLS, SIZE), positive(CELLS, SIZE)

    def at(diagonal: Tensor) -> Arguments:
        return {"loc": args["loc"], argument: torch.diag_embed(diagonal)}

    sums = moments(family, weights, value, args, center)
    kernel = family.diagonal_kernel(argument, sums, at(first), center)
    assert kernel is not None
    actual = (kernel.value(first) - kernel.value(second)).sum(-1)
    expected = objective(family, weights, value, at(first)) - objective(family, weights, value, at(second))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert family.diagonal_kernel("loc", sums, at(first), center) is None


@pytest.mark.parametrize("name", VALUES)
def test_value_kernel_is_the_density_up_to_a_constant(name: str) -> None:
    cls, make = CASES[name]
    family, args = FAMILIES[cls], make()
    kernel = family.value_kernel(args)
    assert kernel is not None
    # Uniform: two points inside both cells' bounds.
    first, second = (torch.full((CELLS,), v) for v in (2.2, 2.4)) if cls is dist.Uniform else draw(cls, args, 2)
    first, second = (v.expand(law(cls, args).shape()) for v in (first, second))
    actual = kernel.value(first) - kernel.value(second)
    expected = family.log_prob(args, first) - family.log_prob(args, second)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    leaf = first.clone().requires_grad_()
    # The sum with 0·leaf gives Uniform, which does not depend on its value inside, a derivative too.
    (score,) = torch.autograd.grad((family.log_prob(args, leaf) + 0 * leaf.sum()).sum(), leaf)
    own = chart(dist.constraints.real if cls is dist.Uniform else law(cls, args).support, first)
    torch.testing.assert_close(
        own.pull_back(first, kernel.gradient(first)), own.pull_back(first, score), rtol=1e-9, atol=1e-9
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
