"""Generalised linear models without latents (K = 1) are those of statsmodels and scikit-learn, to 1e-8.

One M-step is the whole fit. Peers iterate until their own score is at rounding, so that both sides are converged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import statsmodels.api as sm
import torch
from scipy.optimize import brentq, root
from scipy.special import digamma
from sklearn.linear_model import LogisticRegression
from statsmodels.discrete.count_model import ZeroInflatedPoisson
from statsmodels.discrete.discrete_model import NegativeBinomial
from statsmodels.discrete.truncated_model import TruncatedLFPoisson
from torch import Tensor

import pyro_em
from models import hurdle
from pyro_em.distributions import Truncated
from tests.zoo_regression import zero_inflated_regression

RNG = np.random.default_rng(7)
N, P = 120, 3
X = np.c_[np.ones(N), RNG.normal(size=(N, P - 1))]
ETA = X @ np.array([0.3, 0.8, -0.5])
T = torch.as_tensor


def _model(site: Callable[[Tensor], Any], y: Tensor, columns: int = P) -> Callable[[], None]:
    def model() -> None:
        b = pyro.param("b", torch.zeros(columns))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", site(T(X) @ b), obs=y)

    return model


COUNTS = RNG.poisson(np.exp(ETA)).astype(float)
TRIALS = RNG.binomial(8, 1 / (1 + np.exp(-ETA))).astype(float)
WAITS = RNG.gamma(2.5, np.exp(ETA) / 2.5)
GLMS: dict[str, tuple[Callable[[Tensor], Any], np.ndarray, Any, np.ndarray]] = {
    "poisson": (lambda e: dist.Poisson(e.exp()), COUNTS, sm.families.Poisson(), COUNTS),
    "bernoulli": (lambda e: dist.Bernoulli(logits=e), 1.0 * (TRIALS > 4), sm.families.Binomial(), 1.0 * (TRIALS > 4)),
    "binomial": (
        lambda e: dist.Binomial(8, e.sigmoid()),
        TRIALS,
        sm.families.Binomial(),
        np.c_[TRIALS, 8 - TRIALS],
    ),
    "gamma": (
        lambda e: dist.Gamma(2.5, 2.5 * (-e).exp()),
        WAITS,
        sm.families.Gamma(sm.families.links.Log()),
        WAITS,
    ),
    "exponential": (
        lambda e: dist.Exponential((-e).exp()),
        WAITS,
        sm.families.Gamma(sm.families.links.Log()),
        WAITS,
    ),
    "negative binomial": (
        lambda e: dist.NegativeBinomial(2.0, logits=e - np.log(2.0)),
        COUNTS,
        sm.families.NegativeBinomial(alpha=0.5),
        COUNTS,
    ),
}


@pytest.mark.parametrize("name", GLMS)
def test_statsmodels_glm(name: str) -> None:
    """K = 1: one M-step is the whole fit."""
    site, y, family, response = GLMS[name]
    expected = sm.GLM(response, X, family=family).fit(tol=1e-14, maxiter=200).params
    result = pyro_em.fit(_model(site, T(y)), max_iter=1, tol=0)
    assert result.plan.route("b") == "newton"
    np.testing.assert_allclose(result.params["b"].numpy(), expected, atol=1e-8)


def test_statsmodels_negative_binomial_with_its_dispersion() -> None:
    """Mean exp(X b) and size r = 1/alpha together, one M-step: r enters the logits by its logarithm."""
    peer = NegativeBinomial(COUNTS, X)
    start = peer.fit(method="newton", maxiter=200, disp=0).params
    expected = root(peer.score, start, tol=1e-15).x

    def model() -> None:
        r = pyro.param("r", torch.tensor(1.0), constraint=torch.distributions.constraints.positive)
        b = pyro.param("b", torch.zeros(P))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.NegativeBinomial(r, logits=T(X) @ b - r.log()), obs=T(COUNTS))

    result = pyro_em.fit(model, max_iter=1, tol=0)
    assert [result.plan.route(n) for n in ("r", "b")] == ["newton", "newton"]
    np.testing.assert_allclose(result.params["b"].numpy(), expected[:-1], atol=1e-8)
    assert 1 / float(result.params["r"]) == pytest.approx(expected[-1], abs=1e-8)


def test_statsmodels_gamma_with_its_shape() -> None:
    """Mean exp(X b) whatever the shape a; a solves log a - digamma(a) = mean deviance / 2."""
    family = sm.families.Gamma(sm.families.links.Log())
    expected = sm.GLM(WAITS, X, family=family).fit(tol=1e-14, maxiter=200)

    def model() -> None:
        a = pyro.param("a", torch.tensor(1.0), constraint=torch.distributions.constraints.positive)
        b = pyro.param("b", torch.zeros(P))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Gamma(a, a / (T(X) @ b).exp()), obs=T(WAITS))

    result = pyro_em.fit(model, max_iter=1, tol=0)
    np.testing.assert_allclose(result.params["b"].numpy(), expected.params, atol=1e-8)
    shape = brentq(lambda a: np.log(a) - digamma(a) - expected.deviance / (2 * N), 1e-2, 1e3, xtol=1e-14)
    assert float(result.params["a"]) == pytest.approx(shape, abs=1e-8)


def test_products_of_positive_parameters_are_a_log_linear_model() -> None:
    """Independence of rows and columns of a table: the fitted counts are products of its margins."""
    table = T(RNG.poisson(np.outer([2.0, 5.0, 9.0], [1.0, 3.0])).astype(float))

    def model() -> None:
        a = pyro.param("a", torch.ones(3), constraint=torch.distributions.constraints.positive)
        b = pyro.param("b", torch.tensor([1.0, 2.0]), constraint=torch.distributions.constraints.positive)
        with pyro.plate("i", 3, dim=-2), pyro.plate("j", 2, dim=-1):
            pyro.sample("y", dist.Poisson(a.unsqueeze(-1) * b), obs=table)

    result = pyro_em.fit(model, max_iter=1, tol=0)
    fitted = torch.outer(result.params["a"], result.params["b"])
    torch.testing.assert_close(fitted, torch.outer(table.sum(1), table.sum(0)) / table.sum(), rtol=1e-10, atol=0.0)
    assert result.plan.route("a") == "newton"


def test_scikit_learns_logistic_regression() -> None:
    """Three categories; with all of them free the logits are identified up to a constant."""
    logits = np.stack([0 * ETA, ETA, -0.5 * ETA + X[:, 2]], -1)
    y = np.array([RNG.choice(3, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    peer = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-14, max_iter=100).fit(X[:, 1:], y)

    def model(reference: bool) -> None:
        b = pyro.param("b", torch.zeros(P, 3 - reference))
        eta = T(X) @ b
        eta = torch.cat([torch.zeros(N, 1), eta], -1) if reference else eta
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Categorical(logits=eta), obs=T(y))

    expected = np.c_[peer.intercept_, peer.coef_].T
    first = pyro_em.fit(model, True, max_iter=1, tol=0).params["b"].numpy()
    np.testing.assert_allclose(first, expected[:, 1:] - expected[:, :1], atol=1e-8)
    pyro.clear_param_store()
    free = pyro_em.fit(model, False, max_iter=1, tol=0).params["b"].numpy()
    np.testing.assert_allclose(free[:, 1:] - free[:, :1], first, atol=1e-8)


def test_scikit_learns_two_classes() -> None:
    y = 1.0 * (TRIALS > 4)
    peer = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-14, max_iter=100).fit(X[:, 1:], y)
    result = pyro_em.fit(_model(lambda e: dist.Bernoulli(logits=e), T(y)), max_iter=1, tol=0)
    np.testing.assert_allclose(result.params["b"].numpy(), np.r_[peer.intercept_, peer.coef_[0]], atol=1e-8)


def test_statsmodels_zero_inflated_poisson() -> None:
    """Its fit is carried on to the root of its own score: its optimisers stop before."""
    y = COUNTS * (RNG.random(N) < 0.7)
    peer = ZeroInflatedPoisson(y, X, exog_infl=X, inflation="logit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = peer.fit(method="bfgs", maxiter=500, disp=0).params
    expected = root(peer.score, start, tol=1e-14).x
    assert np.abs(peer.score(expected)).max() <= 1e-11 * N
    result = pyro_em.fit(zero_inflated_regression, T(X), T(y), max_iter=5000, tol=1e-11, accelerate="squarem")
    assert result.converged
    there = torch.cat([result.params["zero"], result.params["b"]]).numpy()
    np.testing.assert_allclose(there, expected, atol=1e-8)
    assert result.log_likelihood == pytest.approx(peer.loglike(there), rel=1e-12)


def test_hurdle_models_are_two_regressions() -> None:
    """pscl gives -1605.31 on 12 parameters; the truncated counts may be written with `Truncated` as well."""
    x, c = hurdle.load()
    result = pyro_em.fit(hurdle.model, x, c)
    above = sm.Logit((x > 0).double().numpy(), c.numpy()).fit(method="newton", tol=1e-14, disp=0)
    counts = TruncatedLFPoisson(x[x > 0].numpy(), c[x > 0].numpy()).fit(method="newton", maxiter=100, disp=0)
    np.testing.assert_allclose(result.params["above_coef"].numpy(), above.params, atol=1e-8)
    np.testing.assert_allclose(result.params["count_coef"].numpy(), counts.params, atol=1e-8)
    assert result.log_likelihood == pytest.approx(above.llf + counts.llf, rel=1e-12)
    assert result.log_likelihood == pytest.approx(-1605.31, abs=0.005)

    def shipped(x: Tensor, c: Tensor) -> None:
        b = pyro.param("b", torch.tensor([x.mean().log(), *[0.0] * 5]))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", Truncated(dist.Poisson((c @ b).exp()), lower=1), obs=x)

    pyro.clear_param_store()
    other = pyro_em.fit(shipped, x[x > 0], c[x > 0], tol=1e-10)
    np.testing.assert_allclose(other.params["b"].numpy(), counts.params, atol=1e-8)
