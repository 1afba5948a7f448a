"""Laplace priors: the lasso, soft thresholds behind links and in mixtures, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

import pyro_em
from tests.test_priors import _auto_delta


def _coefficients(site: Callable[[Tensor], Any], scale: float) -> Callable[[Tensor, Tensor], None]:
    def model(X: Tensor, y: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.0))
        b = pyro.sample("b", dist.Laplace(torch.zeros(X.shape[-1]), scale).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", site(a + X @ b), obs=y)

    return model


def _sparse(seed: int = 3) -> tuple[Tensor, Tensor]:
    """Seven covariates, the second almost the first, of which two matter; and the linear predictor."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(150, 7))
    X[:, 1] = X[:, 0] + 0.05 * X[:, 1]
    return torch.as_tensor(X), torch.as_tensor(0.3 + 0.9 * X[:, 0] - 0.6 * X[:, 4])


def test_the_lasso_is_scikit_learns() -> None:
    X, eta = _sparse()
    y = eta + torch.as_tensor(np.random.default_rng(4).normal(size=150))
    peer = Lasso(alpha=20.0 / 150, tol=1e-14, max_iter=100_000).fit(X.numpy(), y.numpy())
    start = {"a": 1.0, "b": torch.ones(7)}
    result = pyro_em.fit(
        _coefficients(lambda e: dist.Normal(e, 1.0), 0.05), X, y, algorithm="map-em", init=start, max_iter=1, tol=0
    )
    assert 0 < int((result.params["b"] == 0).sum()) < 7
    np.testing.assert_allclose(result.params["b"].numpy(), peer.coef_, atol=1e-8)
    assert float(result.params["a"]) == pytest.approx(peer.intercept_, abs=1e-8)


def test_a_laplace_prior_of_coefficients_behind_a_link_and_in_a_mixture() -> None:
    """Slopes are ± the rate where a coefficient is not 0, and no larger where it is exactly 0."""
    X, eta = _sparse()
    counts = torch.as_tensor(np.random.default_rng(5).poisson(eta.exp()).astype(float))
    result = pyro_em.fit(
        _coefficients(lambda e: dist.Poisson(e.exp()), 0.04), X, counts, algorithm="map-em",
        init={"a": 0.0, "b": torch.full((7,), 0.1)}, tol=1e-10,
    )  # fmt: skip
    a, b = result.params["a"], result.params["b"]
    slope = X.mT @ (counts - (a + X @ b).exp())
    assert result.converged and 0 < int((b == 0).sum()) < 7
    assert [row.reason for row in result.plan.m_step][1] == (
        "Newton (Poisson.rate behind exp, prior Laplace), jointly with 'a'"
    )
    torch.testing.assert_close(slope[b != 0], 25.0 * b[b != 0].sign(), rtol=1e-7, atol=1e-7)
    assert float(slope[b == 0].abs().max()) < 25

    def mixture(X: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.full((2,), 2.0)))
        level = pyro.sample("level", dist.Normal(torch.tensor([-1.0, 2.0]), 3.0).to_event(1))
        sd = pyro.sample("sd", dist.Gamma(2.0, 2.0))
        slopes = pyro.sample("slopes", dist.Laplace(torch.zeros(2, 7), 0.1).to_event(2))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(level[z] + (X * slopes[z]).sum(-1), sd), obs=y)

    noise = torch.as_tensor(np.random.default_rng(6).normal(size=150))
    y = eta + 3.0 * (torch.arange(150) % 2) + 0.7 * noise
    fitted = pyro_em.fit(mixture, X, y, algorithm="map-em", init={"slopes": torch.zeros(2, 7) + 0.01}, tol=1e-9)
    assert fitted.converged
    objective = np.array(fitted.history["objective"])
    assert (np.diff(objective) >= -1e-12 * np.abs(objective).max()).all()
    zero = fitted.params["slopes"] == 0
    assert 0 < int(zero.sum()) < 14
    _, slopes = _auto_delta(mixture, (X, y), fitted.params)
    (found,) = (g for name, g in slopes.items() if "slopes" in name)  # of the loss; |x| has slope 0 at 0 for torch
    assert float(found[~zero].abs().max()) <= 1e-6
    assert float(found[zero].abs().max()) < 10


def test_a_laplace_prior_of_a_network_is_refused_with_a_remedy() -> None:
    X, eta = _sparse()

    def network(X: Tensor, y: Tensor) -> None:
        W = pyro.sample("W", dist.Laplace(torch.zeros(7, 20), 0.1).to_event(2))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(torch.tanh(X @ W).sum(-1), 1.0), obs=y)

    with pytest.raises(pyro_em.Refusal, match=r"'W'.*kink.*Normal or StudentT prior, or m_step"):
        pyro_em.fit(network, X, eta, algorithm="map-em")


def test_the_location_of_a_laplace_site_may_be_climbed() -> None:
    """Instead of its weighted medians (test_median.py), which end higher: a climb may end at any kink."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(30, generator=generator) + m for m in (-3.0, 3.0)])

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Laplace(loc[z], scale[z]), obs=x)

    found = pyro_em.fit(model, x, m_step={"loc": "gradient"}, max_iter=40, tol=0)
    assert np.diff(found.history["objective"]).min() > -1e-9
    closed = pyro_em.fit(model, x, max_iter=40, tol=0)
    assert found.history["log_likelihood"][0] + 50 < found.log_likelihood <= closed.log_likelihood
