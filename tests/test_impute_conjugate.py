"""`result.impute()` beside conjugate latents, whose atoms do not have their variance.

Means, variances and probabilities of missing cells against integrals and closed forms of predictive distributions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy import special
from torch import Tensor

import pyro_em
from tests.missing_data import NAN

positive, simplex = constraints.positive, constraints.simplex

POSITIVE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], tuple[Any, Any]]]] = {
    # a site given a rate z, and E(x | z), E(x² | z)
    "poisson": (lambda z: dist.Poisson(2.0 * z), lambda z: (2 * z, 2 * z + 4 * z * z)),
    "exponential": (dist.Exponential, lambda z: (1 / z, 2 / z**2)),
    "gamma": (lambda z: dist.Gamma(3.0, z), lambda z: (3 / z, 12 / z**2)),
    "precision": (lambda z: dist.Normal(0.4, z.rsqrt()), lambda z: (0.4 + 0 * z, 1 / z + 0.16)),
    "half normal": (lambda z: dist.HalfNormal(z.rsqrt()), lambda z: ((2 / np.pi / z) ** 0.5, 1 / z)),
    "weibull": (
        lambda z: dist.Weibull(z ** (-1 / 3), torch.tensor(3.0)),
        lambda z: (z ** (-1 / 3) * special.gamma(4 / 3), z ** (-2 / 3) * special.gamma(5 / 3)),
    ),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_cells_beside_a_rate(name: str) -> None:
    """One rate for three cells of a row, of which some are missing: the others inform it."""
    make, moments = POSITIVE[name]
    torch.manual_seed(0)
    x = make(torch.tensor([1.0, 2.0, 0.6, 1.4]).unsqueeze(-1).expand(4, 3)).sample().double()
    x[0, 1] = x[1] = x[3, 0] = NAN

    def model(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(3.2), constraint=positive)
        with pyro.plate("rows", 4, dim=-2):
            z = pyro.sample("z", dist.Gamma(a, 1.5))
            with pyro.plate("cells", 3, dim=-1):
                pyro.sample("x", make(z), obs=x)

    result = pyro_em.fit(model, x, missing="nan", max_iter=0)
    imputed, marginal = result.impute()["x"], result.posterior().marginal("z")
    u = np.linspace(-120, 6, 12_601)
    for row, cell in ((0, 1), (1, 0), (3, 0)):
        a, b = (float(getattr(marginal, n).reshape(-1)[row]) for n in ("concentration", "rate"))
        z = np.exp(u)
        weight = np.exp(a * u - b * z + a * np.log(b) - special.gammaln(a)) * (u[1] - u[0])
        first, second = (float((weight * moment).sum()) for moment in moments(z))
        assert float(imputed.mean[row, cell]) == pytest.approx(first, rel=1e-10)
        assert float(imputed.variance[row, cell]) == pytest.approx(second - first**2, rel=1e-9)


def test_variances_that_do_not_exist_are_infinite() -> None:
    """A cell of a Student distribution with 1.5 degrees of freedom has a mean, and no variance."""
    x = torch.tensor([0.3, NAN, -1.2, 0.8])

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor(0.2))
        with pyro.plate("rows", 4):
            w = pyro.sample("w", dist.Gamma(0.75, 0.75))
            pyro.sample("x", dist.Normal(mu, w.rsqrt()), obs=x)

    imputed = pyro_em.fit(model, x, missing="nan", max_iter=0).impute()["x"]
    assert float(imputed.mean[1]) == pytest.approx(0.2)
    assert float(imputed.variance[1]) == float("inf")


def test_counts_beside_a_probability() -> None:
    """The distribution of a missing count is beta-binomial, in every state of a class too."""
    x = torch.tensor([[3.0, NAN], [NAN, 6.0], [NAN, NAN], [1.0, 2.0]])

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=simplex)
        a = pyro.param("a", torch.tensor([1.5, 4.0]), constraint=positive)
        with pyro.plate("rows", 4):
            k = pyro.sample("k", dist.Categorical(w))
            p = pyro.sample("p", dist.Beta(a[k], 2.0))
            for j in range(2):
                pyro.sample(f"x{j}", dist.Binomial(6, p), obs=x[:, j])

    result = pyro_em.fit(model, x, missing="nan", max_iter=2, tol=0)
    a, r = result.params["a"], result.posterior().responsibilities("k")
    found, counts = result.impute()["x1"], torch.arange(7.0)
    for row, seen in ((0, 3.0), (2, None)):
        wins, losses = (0.0, 0.0) if seen is None else (seen, 6 - seen)
        pmf = dist.BetaBinomial(a + wins, torch.tensor(2.0 + losses), 6).log_prob(counts.unsqueeze(-1)).exp() @ r[row]
        assert found.probabilities is not None
        torch.testing.assert_close(found.probabilities[row], pmf, rtol=1e-10, atol=1e-12)
        mean = float(pmf @ counts)
        assert float(found.mean[row]) == pytest.approx(mean, rel=1e-10)
        assert float(found.variance[row]) == pytest.approx(float(pmf @ counts**2) - mean**2, rel=1e-9)


@pytest.mark.parametrize(("a", "refused"), [(0.2, False), (0.05, True), (0.01, True)])
def test_a_probability_near_0_or_1_is_averaged_to_rounding_or_refused(a: float, refused: bool) -> None:
    """The probabilities of a missing count are polynomials of degree six in p."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 2):
            p = pyro.sample("p", dist.Beta(a, a))
            pyro.sample("x", dist.Binomial(6, p), obs=x)

    result = pyro_em.fit(model, torch.tensor([2.0, NAN]), missing="nan", max_iter=0)
    if refused:
        with pytest.raises(pyro_em.Refusal, match=r"'x'.*given 'p', are not found by quadrature.*draw them"):
            result.impute()
        return
    found = result.impute()["x"].probabilities
    assert found is not None
    pmf = dist.BetaBinomial(torch.tensor(a), torch.tensor(a), 6).log_prob(torch.arange(7.0)).exp()
    torch.testing.assert_close(found[1], pmf, rtol=1e-10, atol=1e-12)


def test_categories_beside_their_probabilities() -> None:
    """A missing category has the posterior mean of its probabilities; a missing table is Dirichlet-multinomial."""
    document = torch.tensor([0, 0, 0, 1, 1])
    word = torch.tensor([0.0, 2.0, NAN, 1.0, NAN])
    table = torch.tensor([[2.0, 1.0, 1.0], [NAN, NAN, NAN]])

    def model(word: Tensor, table: Tensor) -> None:
        alpha = pyro.param("alpha", torch.tensor([0.8, 1.5, 2.0]), constraint=positive)
        with pyro.plate("documents", 2):
            theta = pyro.sample("theta", dist.Dirichlet(alpha))
            pyro.sample("table", dist.Multinomial(4, theta), obs=table)
        with pyro.plate("words", 5):
            pyro.sample("word", dist.Categorical(theta[document]), obs=word)

    result = pyro_em.fit(model, word, table, missing="nan", max_iter=1, tol=0)
    alpha = result.params["alpha"] + torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
    found = result.impute()
    mean = alpha / alpha.sum(-1, keepdim=True)
    assert found["word"].probabilities is not None
    torch.testing.assert_close(found["word"].probabilities[[2, 4]], mean, rtol=1e-11, atol=0)
    torch.testing.assert_close(found["table"].mean[1], 4 * mean[1], rtol=1e-11, atol=0)
    total = alpha[1].sum()
    variance = 4 * mean[1] * (1 - mean[1]) * (4 + total) / (1 + total)
    torch.testing.assert_close(found["table"].variance[1], variance, rtol=1e-10, atol=0)


def test_moments_that_are_not_known_are_refused() -> None:
    """Nobody's count of five trials was seen; its probabilities have degree five in a Dirichlet latent."""
    x, label = torch.full((3,), NAN), torch.tensor([0, 2, 1])

    def model(x: Tensor) -> None:
        alpha = pyro.param("alpha", torch.tensor([0.8, 1.5, 2.0]), constraint=positive)
        with pyro.plate("rows", 3):
            theta = pyro.sample("theta", dist.Dirichlet(alpha))
            pyro.sample("label", dist.Categorical(theta), obs=label)
            pyro.sample("x", dist.Binomial(5, theta[..., 0]), obs=x)

    result = pyro_em.fit(model, x, missing="nan", max_iter=0)
    share = result.params["alpha"] / result.params["alpha"].sum()
    assert result.log_likelihood == pytest.approx(float(share.log().sum()), rel=1e-12)
    with pytest.raises(pyro_em.Refusal, match=r"'x'.*'theta', are no polynomials.*draw them"):
        result.impute()
