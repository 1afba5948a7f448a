"""Mixed models as lme4 reports them: estimates, standard errors, posterior means and variances of the effects (BLUPs).

The oracle is generalised least squares with the dense marginal covariance, y ~ N(X β, V), V = Z G Zᵀ + σ² I:

    β̂ = (Xᵀ V⁻¹ X)⁻¹ Xᵀ V⁻¹ y,     E[b|y] = G Zᵀ V⁻¹ (y − X β̂),     Var[b|y] = G − G Zᵀ V⁻¹ Z G,

and statsmodels where it fits the same model. Published likelihoods, estimates, standard errors, modes and variances of
effects of both data sets are in test_reference_fits.py (published_mixed.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
import torch

import pyro_em
from models import linear_mixed

Array = np.ndarray[Any, Any]


def sleepstudy() -> tuple[Any, ...]:
    """Days, subject and reaction time of each row."""
    days, subject, y = linear_mixed.load_sleepstudy()
    return days, subject, y


def penicillin() -> tuple[Any, ...]:
    return linear_mixed.load_penicillin()


@dataclass(frozen=True)
class Marginal:
    """y ~ N(X β, V(θ)): θ are the variances in the order of `names`, G and the noise variance functions of it."""

    X: Array
    Z: Array
    y: Array
    G: Callable[[Array], Array]

    def covariance(self, theta: Array) -> Array:
        found: Array = self.Z @ self.G(theta) @ self.Z.T + theta[-1] ** 2 * np.eye(len(self.y))
        return found

    def log_likelihood(self, beta: Array, theta: Array) -> float:
        root = np.linalg.cholesky(self.covariance(theta))
        white = np.linalg.solve(root, self.y - self.X @ beta)
        return float(-0.5 * white @ white - np.log(np.diag(root)).sum() - 0.5 * len(self.y) * np.log(2 * np.pi))

    def gls(self, theta: Array) -> tuple[Array, Array, Array]:
        """β̂, E[b|y] and Var[b|y]."""
        inverse, G = np.linalg.inv(self.covariance(theta)), self.G(theta)
        beta = np.linalg.solve(self.X.T @ inverse @ self.X, self.X.T @ inverse @ self.y)
        gain = G @ self.Z.T @ inverse
        return beta, gain @ (self.y - self.X @ beta), G - gain @ self.Z @ G

    def standard_errors(self, beta: Array, theta: Array) -> Array:
        """From the Hessian in (β, θ), by differences."""
        at, size = np.concatenate([beta, theta]), len(beta) + len(theta)
        h = 1e-4 * np.maximum(np.abs(at), 1e-2)

        def value(move: Array) -> float:
            moved = at + move
            return self.log_likelihood(moved[: len(beta)], moved[len(beta) :])

        hessian = np.zeros((size, size))
        for i in range(size):
            for j in range(i + 1):
                e, f = np.eye(size)[i] * h[i], np.eye(size)[j] * h[j]
                own = value(e + f) - value(e - f) - value(f - e) + value(-e - f)
                hessian[i, j] = hessian[j, i] = own / (4 * h[i] * h[j])
        found: Array = np.sqrt(np.diag(np.linalg.inv(-hessian)))
        return found


@cache
def _fit(name: str) -> Any:
    model, args = {
        "sleepstudy": (linear_mixed.slopes, sleepstudy()),
        "penicillin": (linear_mixed.crossed, penicillin()),
    }[name]
    return pyro_em.fit(model, *args, tol=1e-9, max_iter=20_000, accelerate="squarem")


def _sleep_marginal() -> Marginal:
    days, subject, y = (x.numpy() for x in sleepstudy())
    X = np.stack([np.ones_like(days), days], -1)
    groups = int(subject.max()) + 1
    Z = np.zeros((len(y), 2 * groups))
    for n, g in enumerate(subject):
        Z[n, 2 * g : 2 * g + 2] = X[n]

    def G(theta: Array) -> Array:
        a, c, b = theta[0], theta[1], theta[2]
        return np.kron(np.eye(groups), np.array([[a, c], [c, b]]))

    return Marginal(X, Z, y, G)


def test_sleepstudy_effects() -> None:
    result, oracle = _fit("sleepstudy"), _sleep_marginal()
    v = result.params
    D = v["D"].numpy()
    theta = np.array([D[0, 0], D[0, 1], D[1, 1], float(v["within"])])
    beta, mean, covariance = oracle.gls(theta)
    assert result.converged
    np.testing.assert_allclose(v["beta"].numpy(), beta, rtol=1e-7)
    assert result.log_likelihood == pytest.approx(oracle.log_likelihood(v["beta"].numpy(), theta), rel=1e-11)
    posterior = result.posterior()
    np.testing.assert_allclose(posterior.mean("b").numpy().ravel(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(posterior.variance("b").numpy().ravel(), np.diag(covariance), rtol=1e-8)
    blocks = posterior.marginal("b").covariance_matrix.numpy()
    for g, block in enumerate(blocks):
        np.testing.assert_allclose(block, covariance[2 * g : 2 * g + 2, 2 * g : 2 * g + 2], rtol=1e-7, atol=1e-8)


def test_sleepstudy_standard_errors() -> None:
    result, oracle = _fit("sleepstudy"), _sleep_marginal()
    v, errors = result.params, result.standard_errors()
    D = v["D"].numpy()
    theta = np.array([D[0, 0], D[0, 1], D[1, 1], float(v["within"])])
    expected = oracle.standard_errors(v["beta"].numpy(), theta)
    own = errors["D"].numpy()
    found = np.array([*errors["beta"].numpy(), own[0, 0], own[0, 1], own[1, 1], float(errors["within"])])
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_sleepstudy_against_statsmodels() -> None:
    days, subject, y = (x.numpy() for x in sleepstudy())
    X = np.stack([np.ones_like(days), days], -1)
    peer = sm.MixedLM(y, X, groups=subject, exog_re=X).fit(reml=False)
    result = _fit("sleepstudy")
    assert result.log_likelihood == pytest.approx(peer.llf, abs=1e-5)
    np.testing.assert_allclose(result.params["beta"].numpy(), peer.fe_params, rtol=1e-5)
    effects = np.stack([np.asarray(peer.random_effects[g]) for g in range(len(peer.random_effects))])
    np.testing.assert_allclose(result.posterior().mean("b").numpy(), effects, rtol=5e-3, atol=5e-2)
    spread = np.stack([np.asarray(peer.random_effects_cov[g]) for g in range(len(effects))])
    found = result.posterior().marginal("b").covariance_matrix.numpy()
    np.testing.assert_allclose(found, spread, rtol=2e-2, atol=0.2)


def _penicillin_marginal() -> Marginal:
    plate, sample, y = (x.numpy() for x in penicillin())
    a, c = np.eye(int(plate.max()) + 1)[plate], np.eye(int(sample.max()) + 1)[sample]

    def G(theta: Array) -> Array:
        return np.diag(np.repeat(theta[:2] ** 2, [a.shape[1], c.shape[1]]))

    return Marginal(np.ones((len(y), 1)), np.concatenate([a, c], 1), y, G)


def test_penicillin_effects_and_standard_errors() -> None:
    """Crossed: the posterior of all 30 effects is one normal."""
    result, oracle = _fit("penicillin"), _penicillin_marginal()
    v = result.params
    theta = np.array([float(v[name]) for name in ("first", "second", "within")])
    beta, mean, covariance = oracle.gls(theta)
    assert float(v["mean"]) == pytest.approx(beta[0], rel=1e-8)
    assert result.log_likelihood == pytest.approx(oracle.log_likelihood(beta, theta), rel=1e-11)
    posterior = result.posterior()
    for moment, truth in (("mean", mean), ("variance", np.diag(covariance))):
        found = torch.cat([getattr(posterior, moment)(site).ravel() for site in ("a", "c")]).numpy()
        np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-7)
    torch.manual_seed(0)
    draws = posterior.sample(20_000)
    both = torch.cat([draws["a"], draws["c"]], -1).numpy()
    np.testing.assert_allclose(np.cov(both.T), covariance, atol=0.05 * covariance.max())
    errors = result.standard_errors()
    expected = oracle.standard_errors(beta, theta)
    found = np.array([float(errors[name]) for name in ("mean", "first", "second", "within")])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
