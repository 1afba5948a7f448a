"""Regressions for the laws, each written as a Pyro user would write it; nothing here knows pyro_em.

Locations that are affine in the parameters, and generalised linear sites. Letters: N rows, P covariates, K components.
`problems` gives their rows of the table, with data drawn from fixed seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from tests.classics import positive, simplex, uniform


def _rows(count: int, K: int = 2) -> tuple[Any, Tensor]:
    return pyro.plate("rows", count), pyro.param("w", uniform(K), constraint=simplex)


def regressions(X: Tensor, y: Tensor, K: int = 2) -> None:
    """A mixture of linear regressions: intercepts and slopes are different parameters."""
    rows, w = _rows(len(y), K)
    a = pyro.param("a", torch.arange(K) * 1.0)
    b = pyro.param("b", torch.zeros(K, X.shape[-1]))
    s = pyro.param("s", torch.ones(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(a[z] + (X * b[z]).sum(-1), s[z]), obs=y)


def parallel_regressions(X: Tensor, y: Tensor, K: int = 2) -> None:
    """Common slopes, components of unequal precision: slopes and scales are coupled."""
    rows, w = _rows(len(y), K)
    a = pyro.param("a", torch.arange(K) * 1.0)
    b = pyro.param("b", torch.zeros(X.shape[-1]))
    s = pyro.param("s", torch.ones(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(a[z] + X @ b, s[z]), obs=y)


def heteroscedastic(X: Tensor, y: Tensor, known: Tensor, K: int = 2) -> None:
    """Scales known up to a factor of the component, in log y."""
    rows, w = _rows(len(y), K)
    b = pyro.param("b", torch.arange(K * X.shape[-1]).reshape(K, -1) * 0.3)
    s = pyro.param("s", torch.ones(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.LogNormal((X * b[z]).sum(-1), s[z] * known), obs=y)


def multivariate_regressions(X: Tensor, Y: Tensor, K: int = 2) -> None:
    """Responses (N, D) with coefficients (K, P, D) and full covariances."""
    rows, w = _rows(len(Y), K)
    D = Y.shape[-1]
    B = pyro.param("B", torch.arange(K)[:, None, None] * torch.ones(X.shape[-1], D))
    S = pyro.param("S", torch.eye(D).repeat(K, 1, 1), constraint=dist.constraints.positive_definite)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        loc = torch.einsum("np,...npd->...nd", X, B[z].expand(*z.shape[:-1], len(X), *B.shape[1:]))
        pyro.sample("Y", dist.MultivariateNormal(loc, S[z]), obs=Y)


def ridge_regressions(X: Tensor, y: Tensor, K: int = 2) -> None:
    """Ties, and Normal priors on all coefficients: the second component has the slopes of the first, reversed."""
    rows, w = _rows(len(y), K)
    with pyro.plate("components", K):
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(X.shape[-1]), 0.7).to_event(1))
    s = pyro.param("s", torch.ones(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        sign = torch.tensor([1.0, -1.0])[z]
        pyro.sample("y", dist.Normal(a[z] + sign * (X @ b), s[z]), obs=y)


def poisson_regressions(X: Tensor, counts: Tensor, exposure: Tensor, K: int = 2) -> None:
    """Counts with known exposure, a Normal prior on the coefficients."""
    rows, w = _rows(len(counts), K)
    with pyro.plate("components", K, dim=-2), pyro.plate("covariates", X.shape[-1], dim=-1):
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("count", dist.Poisson(exposure * torch.exp((X * b[z]).sum(-1))), obs=counts)


def experts(X: Tensor, y: Tensor, K: int = 2) -> None:
    """Mixture of experts: the first class is the reference of the gate."""
    gate = pyro.param("gate", torch.zeros(X.shape[-1], K - 1))
    b = pyro.param("b", torch.arange(K * X.shape[-1]).reshape(K, -1) * 0.2)
    s = pyro.param("s", torch.ones(K), constraint=positive)
    logits = torch.cat([torch.zeros(len(y), 1), X @ gate], -1)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(logits=logits))
        pyro.sample("y", dist.Normal((X * b[z]).sum(-1), s[z]), obs=y)


def zero_inflated_regression(X: Tensor, counts: Tensor) -> None:
    """Covariates of the zeros and of the counts."""
    zero = pyro.param("zero", torch.zeros(X.shape[-1]))
    b = pyro.param("b", torch.zeros(X.shape[-1]))
    with pyro.plate("rows", len(counts)):
        z = pyro.sample("z", dist.Bernoulli(logits=X @ zero))
        pyro.sample("count", dist.Poisson(torch.where(z == 1, 0.0, torch.exp(X @ b))), obs=counts)


def negative_binomial_regressions(X: Tensor, counts: Tensor, K: int = 2) -> None:
    """Dispersion of each class, slopes in common: total count and logits are moved together."""
    rows, w = _rows(len(counts), K)
    r = pyro.param("r", torch.ones(K), constraint=positive)
    a = pyro.param("a", torch.arange(K) * 1.0)
    b = pyro.param("b", torch.zeros(X.shape[-1]))
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("count", dist.NegativeBinomial(r[z], logits=a[z] + X @ b), obs=counts)


def gamma_free(y: Tensor, K: int = 2) -> None:
    """Shape and rate free: the rate alone would have a closed form."""
    rows, w = _rows(len(y), K)
    shape = pyro.param("shape", torch.ones(K), constraint=positive)
    rate = pyro.param("rate", torch.ones(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Gamma(shape[z], rate[z]), obs=y)


def overdispersed_means(X: Tensor, counts: Tensor, K: int = 2) -> None:
    """Means of counts behind exp, a size of each class with a prior: it enters the logits by its logarithm."""
    rows, w = _rows(len(counts), K)
    with pyro.plate("components", K):
        size = pyro.sample("size", dist.Gamma(2.0, 0.5))
    b = pyro.param("b", torch.arange(K)[:, None] * torch.ones(X.shape[-1]))
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        logits = (X * b[z]).sum(-1) - size[z].log()
        pyro.sample("count", dist.NegativeBinomial(size[z], logits=logits), obs=counts)


def gamma_means(X: Tensor, y: Tensor, K: int = 2) -> None:
    """Means of waiting times, a positive level of each class times exp of a covariate; one shape for all."""
    rows, w = _rows(len(y), K)
    shape = pyro.param("shape", torch.tensor(1.0), constraint=positive)
    level = pyro.param("level", 1.0 + torch.arange(K), constraint=positive)
    b = pyro.param("b", torch.zeros(X.shape[-1]))
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Gamma(shape, shape / (level[z] * torch.exp(X @ b))), obs=y)


def ordered_classes(y: Tensor) -> None:
    """Ordered answers (N, J) of two classes of people, of which the second answers higher."""
    N, J = y.shape
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
    shift = pyro.param("shift", torch.tensor(1.0))
    cut = pyro.param("cut", torch.tensor([-1.0, 1.0]).repeat(J, 1), constraint=constraints.ordered_vector)
    with pyro.plate("people", N, dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("items", J, dim=-1):
            pyro.sample("y", dist.OrderedLogistic(shift * z, cut), obs=y)


def problems(make: Callable[..., Any], t: Callable[[Any], Tensor]) -> list[Any]:
    """Rows of the table; `make` is `tests.problems.Problem`, `t` makes a float64 tensor."""
    rng = np.random.default_rng(11)
    N = 36
    X = rng.normal(size=(N, 2))
    kind = rng.integers(0, 2, N)
    slopes, levels = np.array([[1.0, -0.5], [-1.5, 1.0]]), np.array([0.0, 2.5])
    eta = levels[kind] + (X * slopes[kind]).sum(-1)
    y = t(eta + rng.normal(size=N) * np.array([0.4, 0.8])[kind])
    parallel = t(levels[kind] + X @ slopes[0] + rng.normal(size=N) * np.array([0.4, 1.2])[kind])
    tied = t(levels[kind] + np.where(kind == 0, 1, -1) * (X @ slopes[0]) + 0.5 * rng.normal(size=N))
    X1 = np.c_[np.ones(N), X]
    known = t(rng.uniform(0.5, 2.0, N))
    positive_y = t(np.exp(eta + 0.3 * rng.normal(size=N)))
    Y = t(np.stack([eta, -eta], -1) + 0.4 * rng.normal(size=(N, 2)))
    B = np.stack([np.c_[levels, slopes], -np.c_[levels, slopes]], -1)
    w, a, s = t([0.45, 0.55]), t([0.2, 2.0]), t([0.8, 1.1])
    b = t([[0.5, 0.0], [-0.5, 0.3]])
    weights = t(rng.integers(0, 4, N))
    exposure = rng.uniform(0.5, 3.0, N)
    signal = np.array([0.2, 2.0])[kind] + X1 @ np.array([0.0, 0.5, -0.3])
    counts, exposure = t(rng.poisson(exposure * np.exp(signal))), t(exposure)
    inflated = t(rng.poisson(2.0 * np.exp(0.4 * X1[:, 1])) * (rng.random(N) < 0.7))
    dispersed = t(rng.negative_binomial(np.array([1, 5])[kind], np.array([0.35, 0.1])[kind]))
    gammas = t(rng.gamma(np.array([2.0, 6.0])[kind], np.array([0.3, 1.5])[kind]))
    means = np.array([1.0, 25.0])[kind] * np.exp(0.3 * X[:, 0])
    dispersed_means = t(rng.negative_binomial(1, 1 / (1 + means)))
    gamma_waits = t(rng.gamma(4.0, means / 4.0))
    X, X1 = t(X), t(X1)
    logistic = 2.5 * kind[:, None] + rng.logistic(size=(N, 4))
    answers = torch.as_tensor(np.digitize(logistic, [0.0, 2.0]))
    return [
        make("regressions", regressions, (X, y), {"w": w, "a": a, "b": b, "s": s}, "rows"),
        make("weighted_regressions", regressions, (X, y), {"w": w, "a": a, "b": b, "s": s}, "rows", weights=weights),
        make("parallel_regressions", parallel_regressions, (X, parallel), {"w": w, "a": a, "b": b[0], "s": s}, "rows"),
        make(
            "heteroscedastic",
            heteroscedastic,
            (X1, positive_y, known),
            {"w": w, "b": t([[0.1, 0.6, 0.0], [1.8, -0.8, 0.4]]), "s": s},
            "rows",
        ),
        make(
            "multivariate_regressions",
            multivariate_regressions,
            (X1, Y),
            {"w": w, "B": t(B + 0.3 * rng.normal(size=(2, 3, 2))), "S": t(np.stack([np.eye(2), 1.5 * np.eye(2)]))},
            "rows",
        ),
        make(
            "ridge_regressions",
            ridge_regressions,
            (X, tied),
            {"w": w, "a": a, "b": b[0], "s": s},
            "rows",
            priors=True,
            weights=weights,
        ),
        make(
            "poisson_regressions",
            poisson_regressions,
            (X1, counts, exposure),
            {"w": w, "b": t([[0.0, 0.2, 0.0], [1.5, 0.2, 0.0]])},
            "rows",
            closed=False,
            priors=True,
        ),
        make(
            "experts",
            experts,
            (X1, y),
            {"gate": t([[0.1], [0.2], [-0.1]]), "b": t([[0.2, 0.6, 0.0], [2.0, -0.8, 0.4]]), "s": s},
            "rows",
            closed=False,
            weights=weights,
        ),
        make(
            "zero_inflated_regression",
            zero_inflated_regression,
            (X1, inflated),
            {"zero": t([-0.5, 0.0, 0.0]), "b": t([0.5, 0.1, 0.0])},
            "rows",
            closed=False,
        ),
        make(
            "negative_binomial_regressions",
            negative_binomial_regressions,
            (X, dispersed),
            {"w": w, "r": t([1.5, 4.0]), "a": t([0.5, 2.2]), "b": t([0.1, 0.0])},
            "rows",
            closed=False,
        ),
        make(
            "overdispersed_means",
            overdispersed_means,
            (X1, dispersed_means),
            {"w": w, "size": t([2.0, 4.0]), "b": t([[0.1, 0.0, 0.0], [3.0, 0.1, 0.0]])},
            "rows",
            closed=False,
            priors=True,
        ),
        make(
            "gamma_means",
            gamma_means,
            (X, gamma_waits),
            {"w": w, "shape": t(2.0), "level": t([1.2, 20.0]), "b": t([0.1, 0.0])},
            "rows",
            closed=False,
            weights=weights,
        ),
        make(
            "gamma_free",
            gamma_free,
            (gammas,),
            {"w": w, "shape": t([1.5, 5.0]), "rate": t([2.0, 0.6])},
            "rows",
            closed=False,
        ),
        make(
            "ordered_classes",
            ordered_classes,
            (answers,),
            {"w": w, "shift": t(1.0), "cut": t([[-1.0, 0.7], [-0.5, 0.9], [-0.2, 1.0], [-0.8, 1.5]])},
            "people",
            closed=False,
        ),
    ]
