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
    X, X1 = t(X), t(X1)
    w, a, s = t([0.45, 0.55]), t([0.2, 2.0]), t([0.8, 1.1])
    b = t([[0.5, 0.0], [-0.5, 0.3]])
    weights = t(rng.integers(0, 4, N))
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
    ]
