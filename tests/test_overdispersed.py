"""Counts whose rate or probabilities a distribution integrates itself: densities, Newton's method, limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import overdispersed
from pyro_em.families.overdispersed import log_rising

positive = constraints.positive


@pytest.mark.parametrize("a", [1e-8, 0.3, 29.9, 30.1, 1e4, 1e9, 1e14])
@pytest.mark.parametrize("x", [0.0, 1.0, 7.0, 2500.0])
def test_rising_factorials_keep_their_digits(a: float, x: float) -> None:
    with mpmath.workdps(50):
        expected = float(mpmath.loggamma(mpmath.mpf(a) + mpmath.mpf(x)) - mpmath.loggamma(mpmath.mpf(a)))
    found = log_rising(torch.tensor(a), torch.tensor(x))
    assert float(found) == pytest.approx(expected, rel=1e-13, abs=2e-13)
    leaf = torch.tensor(a, requires_grad=True)
    (slope,) = torch.autograd.grad(log_rising(leaf, torch.tensor(x)), leaf)
    with mpmath.workdps(50):
        expected = float(mpmath.digamma(mpmath.mpf(a) + mpmath.mpf(x)) - mpmath.digamma(mpmath.mpf(a)))
    assert float(slope) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def _positive(name: str, value: Any) -> Tensor:
    return pyro.param(name, torch.as_tensor(value), constraint=positive)


def gamma_poisson(y: Tensor) -> None:
    a, b = _positive("a", 1.0), _positive("b", 1.0)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.GammaPoisson(a, b), obs=y)


def beta_binomial(y: Tensor) -> None:
    a, b = _positive("a", 1.0), _positive("b", 1.0)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.BetaBinomial(a, b, 12), obs=y)


def dirichlet(theta: Tensor) -> None:
    alpha = _positive("alpha", torch.ones(3))
    with pyro.plate("rows", len(theta)):
        pyro.sample("theta", dist.Dirichlet(alpha), obs=theta)


def symmetric(theta: Tensor) -> None:
    alpha = _positive("alpha", 1.0)
    with pyro.plate("rows", len(theta)):
        pyro.sample("theta", dist.Dirichlet(alpha * torch.ones(3)), obs=theta)


def regression(y: Tensor) -> None:
    """Concentrations behind an exponential: columns of coefficients for each category."""
    x = torch.stack([torch.ones(len(y)), torch.linspace(-1, 1, len(y))], -1)
    beta = pyro.param("beta", torch.zeros(2, 3))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.DirichletMultinomial((x @ beta).exp(), y.sum(-1)), obs=y)


def kinds(y: Tensor) -> None:
    """Two kinds of rows."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    alpha = _positive("alpha", torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0]]))
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Categorical(w))
        pyro.sample("y", dist.DirichletMultinomial(alpha[k], y.sum(-1)), obs=y)


def _rows() -> Tensor:
    torch.manual_seed(0)
    return dist.Dirichlet(torch.tensor([2.0, 0.7, 1.2])).sample((40,))


def _votes() -> Tensor:
    y = overdispersed.simulate_categories(50, 12, 3)
    y[:20, 0] += torch.arange(20.0)
    return y


COUNTS = overdispersed.simulate()[0]
TRIALS = overdispersed.simulate_trials(60, 12)
# model -> (data, route of its concentration, the log-density of a row as torch has it)
CASES: dict[Callable[[Tensor], None], tuple[Tensor, str, Callable[[Any, Tensor], Tensor]]] = {
    gamma_poisson: (COUNTS, "newton", lambda p, y: dist.GammaPoisson(p["a"], p["b"]).log_prob(y)),
    beta_binomial: (TRIALS, "newton", lambda p, y: dist.BetaBinomial(p["a"], p["b"], 12).log_prob(y)),
    dirichlet: (_rows(), "closed", lambda p, y: dist.Dirichlet(p["alpha"]).log_prob(y)),
    symmetric: (_rows(), "newton", lambda p, y: dist.Dirichlet(p["alpha"] * torch.ones(3)).log_prob(y)),
    regression: (
        _votes(),
        "newton",
        lambda p, y: dist.DirichletMultinomial(
            (torch.stack([torch.ones(len(y)), torch.linspace(-1, 1, len(y))], -1) @ p["beta"]).exp(), y.sum(-1)
        ).log_prob(y),
    ),
}


@pytest.mark.parametrize("model", CASES, ids=lambda m: m.__name__)
def test_one_update_is_the_maximum(model: Callable[[Tensor], None]) -> None:
    """No latents: Q is the log-likelihood, and its argmax has no slope by torch's own density."""
    data, route, density = CASES[model]
    found = pyro_em.fit(model, data, tol=1e-9)
    assert found.converged and found.num_iterations <= 2
    assert all(found.plan.route(name) == route for name in found.params)
    leaves = {name: value.clone().requires_grad_() for name, value in found.params.items()}
    own = density(leaves, data).sum()
    assert found.log_likelihood == pytest.approx(float(own.detach()), rel=1e-11)
    for gradient in torch.autograd.grad(own, list(leaves.values())):
        assert float(gradient.abs().max()) < 1e-7 * len(data)


def test_a_mixture_of_kinds() -> None:
    data = torch.cat([_votes()[20:], 2 * _votes()[20:].flip(-1) + torch.tensor([0.0, 0.0, 9.0])])
    found = pyro_em.fit(kinds, data, tol=0, max_iter=4)
    assert found.plan.route("alpha") == "newton"
    leaves = {name: value.clone().requires_grad_() for name, value in found.params.items()}
    own = dist.DirichletMultinomial(leaves["alpha"], data.sum(-1, keepdim=True)).log_prob(data.unsqueeze(-2))
    value = (own + leaves["w"].log()).logsumexp(-1).sum()
    assert found.log_likelihood == pytest.approx(float(value.detach()), rel=1e-11)
    assert (torch.tensor(found.history["log_likelihood"]).diff() > 0).all()
    slope, weights = torch.autograd.grad(value, (leaves["alpha"], leaves["w"]))
    w = leaves["w"].detach()
    largest = max(
        float((slope * leaves["alpha"].detach()).abs().max()), float((w * (weights - w @ weights)).abs().max())
    )
    assert found.history["score"][-1] * len(data) == pytest.approx(largest, rel=1e-7)  # Fisher's identity


def test_rows_that_are_all_alike_have_no_finite_concentration() -> None:
    with pytest.raises(pyro_em.DegenerateLikelihoodError) as caught:
        pyro_em.fit(dirichlet, torch.tensor([0.2, 0.3, 0.5]).expand(9, 3))
    assert "theta" in str(caught.value)


def test_counts_no_more_spread_than_poisson() -> None:
    """The maximum lies at the limit: the fit ends there with a sentence, its likelihood that of the limit."""
    y = torch.tensor([3.0, 4.0, 3.0, 4.0, 3.0, 3.0])
    with pytest.warns(pyro_em.SeparatedData, match="concentrations"):
        found = pyro_em.fit(gamma_poisson, y)
    limit = float(dist.Poisson(y.mean()).log_prob(y).sum())
    assert found.log_likelihood is not None and limit - 1e-3 < found.log_likelihood <= limit + 1e-9
