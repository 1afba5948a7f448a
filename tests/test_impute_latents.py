"""`result.impute()` beside Gaussian latents: means and variances of missing cells against one dense normal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from pyro_em.evidence import gaussian_recognition
from tests.dense import dense
from tests.missing_data import NAN

positive = constraints.positive
Model = Callable[..., None]


def _holes(x: Tensor, seed: int = 1, share: float = 0.25) -> Tensor:
    gone = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(gone, NAN, x.double())


RNG = np.random.default_rng(7)
TABLE = torch.tensor(RNG.normal(size=(10, 1)) + RNG.normal(size=(10, 4)))
GROUP = torch.arange(20) % 5
LONG = torch.tensor(RNG.normal(size=5)[GROUP.numpy()] + 0.5 * RNG.normal(size=20))


def intercepts(y: Tensor, position: bool = True) -> None:
    mu, t = pyro.param("mu", torch.tensor(0.1)), pyro.param("t", torch.tensor(1.0), constraint=positive)
    s = pyro.param("s", torch.tensor(0.7), constraint=positive)
    with pyro.plate("groups", 5):
        b = pyro.sample("b", dist.Normal(0.0, t))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu + (b[GROUP] if position else b[..., GROUP]), s), obs=y)


def crossed(y: Tensor) -> None:
    """All effects are one vector of the posterior."""
    t, s = (pyro.param(n, torch.tensor(v), constraint=positive) for n, v in (("t", 1.0), ("s", 0.7)))
    with pyro.plate("groups", 5):
        b = pyro.sample("b", dist.Normal(0.0, t))
    with pyro.plate("others", 3):
        c = pyro.sample("c", dist.Normal(0.0, 2 * t))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[GROUP] + c[torch.arange(20) % 3], s), obs=y)


def factors(x: Tensor) -> None:
    """Cells of a vector with a full covariance."""
    W = pyro.param("W", torch.tensor([[1.0, 0.2], [0.5, -1.0], [-0.3, 0.4], [0.8, 0.8]]))
    S = torch.tensor([[1.0, 0.3, 0, 0], [0.3, 0.8, 0.1, 0], [0, 0.1, 0.6, 0], [0, 0, 0, 0.9]]).double()
    S = pyro.param("S", S, constraint=constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.MultivariateNormal(z @ W.T, S), obs=x)


def cells(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([1.0, 0.5, -0.3, 0.8]))
    sd = pyro.param("sd", torch.tensor([1.0, 0.8, 0.6, 0.9]), constraint=positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * w, sd).to_event(1), obs=x)


def low_rank(x: Tensor) -> None:
    W = pyro.param("W", torch.tensor([[1.0], [0.5], [-0.3], [0.8]]))
    v = pyro.param("v", torch.tensor([1.0, 0.8, 0.6, 0.9]), constraint=positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.LowRankMultivariateNormal(torch.zeros(4), W, v), obs=x)


def _conditional(x: Tensor, mean: Tensor, S: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and variance of the missing cells of one long vector given its others, and log p of these."""
    o = ~x.isnan()
    gain = S[~o][:, o] @ torch.linalg.inv(S[o][:, o])
    found = mean[~o] + gain @ (x[o] - mean[o])
    variance = (S[~o][:, ~o] - gain @ S[o][:, ~o]).diagonal()
    return found, variance, float(dist.MultivariateNormal(mean[o], S[o][:, o]).log_prob(x[o]))


def _blocks(S: Tensor, count: int) -> Tensor:
    return torch.block_diag(*[S] * count)


def _same(index: Tensor) -> Tensor:
    return (index.unsqueeze(-1) == index).double()


NORMAL: dict[str, tuple[Model, Tensor, Callable[[dict[str, Tensor]], Tensor]]] = {
    "groups": (intercepts, _holes(LONG), lambda p: p["t"] ** 2 * _same(GROUP) + p["s"] ** 2 * torch.eye(20)),
    "batched": (
        lambda y: intercepts(y, False),
        _holes(LONG),
        lambda p: p["t"] ** 2 * _same(GROUP) + p["s"] ** 2 * torch.eye(20),
    ),
    "crossed": (
        crossed,
        _holes(LONG),
        lambda p: p["t"] ** 2 * (_same(GROUP) + 4 * _same(torch.arange(20) % 3)) + p["s"] ** 2 * torch.eye(20),
    ),
    "vectors": (factors, _holes(TABLE), lambda p: _blocks(p["W"] @ p["W"].T + p["S"], 10)),
    "cells": (cells, _holes(TABLE), lambda p: _blocks(torch.outer(p["w"], p["w"]) + p["sd"].square().diag(), 10)),
    "low rank": (low_rank, _holes(TABLE), lambda p: _blocks(p["W"] @ p["W"].T + p["v"].diag(), 10)),
}


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
@pytest.mark.parametrize("name", NORMAL)
def test_normal_cells_are_conditional_normals(name: str) -> None:
    """Evidence, means, variances, and moments of draws against one dense normal of all cells."""
    model, x, covariance = NORMAL[name]
    x = x.clone()
    if x.dim() == 2:
        x[3] = NAN  # a row of which nothing is seen
    result = pyro_em.fit(model, x, missing="nan", max_iter=3, tol=0)
    mean = result.params.get("mu", torch.tensor(0.0)).expand(x.numel())
    found, variance, value = _conditional(x.flatten(), mean, covariance(result.params))
    assert result.log_likelihood == pytest.approx(value, rel=1e-12)
    (imputed,) = result.impute().values()
    gone = x.isnan()
    torch.testing.assert_close(imputed.mean[gone], found, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(imputed.variance[gone], variance, rtol=1e-10, atol=1e-11)
    draws = imputed.sample(100, seed=0)[:, gone]
    assert float(((draws.mean(0) - found) / variance.sqrt()).abs().max()) < 4.5 / np.sqrt(100)


def test_the_limit_of_a_factor_model_with_holes_in_its_vectors() -> None:
    """The fit ends where the gradient of the dense likelihood of the cells that were seen is zero."""
    x = _holes(TABLE)

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([1.0, 0.5, 0.5, 1.0]))
        rho = torch.eye(4) + 0.3 * (torch.ones(4, 4) - torch.eye(4))
        s = pyro.param("s", torch.tensor(1.0), constraint=positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.MultivariateNormal(z.unsqueeze(-1) * w, s**2 * rho), obs=x)

    result = pyro_em.fit(model, x, missing="nan", tol=1e-8, max_iter=5000, accelerate="squarem")
    assert result.converged
    w, s = (result.params[n].clone().requires_grad_() for n in ("w", "s"))
    S = torch.outer(w, w) + s**2 * (torch.eye(4) + 0.3 * (torch.ones(4, 4) - torch.eye(4)))
    total = sum(
        dist.MultivariateNormal(torch.zeros(int(o.sum())), S[o][:, o]).log_prob(row[o])
        for row, o in zip(x, ~x.isnan(), strict=True)
        if bool(o.any())
    )
    for gradient in torch.autograd.grad(torch.as_tensor(total), (w, s)):
        assert float(gradient.abs().max()) < 1e-6


def test_effects_of_logarithms() -> None:
    """E x = E exp(m + s²/2) over the posterior of the location m, which no sigma points average."""
    y = _holes(LONG).exp()

    def model(y: Tensor) -> None:
        t, s = (pyro.param(n, torch.tensor(v), constraint=positive) for n, v in (("t", 1.0), ("s", 0.7)))
        with pyro.plate("groups", 5):
            b = pyro.sample("b", dist.Normal(0.0, t))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.LogNormal(b[..., GROUP], s), obs=y)

    result = pyro_em.fit(model, y, missing="nan", max_iter=2, tol=0)
    p, gone = result.params, y.isnan()
    S = p["t"] ** 2 * _same(GROUP) + p["s"] ** 2 * torch.eye(20)
    mean, variance, _ = _conditional(y.log(), torch.zeros(20), S)
    expected = dist.LogNormal(mean, variance.sqrt())
    torch.testing.assert_close(result.impute()["y"].mean[gone], expected.mean, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.impute()["y"].variance[gone], expected.variance, rtol=1e-10, atol=0)


def test_effects_of_a_large_design() -> None:
    """Where engines carry two atoms without moments, imputations are of all: against the dense posterior."""
    rng = np.random.default_rng(2)
    row, column = (torch.tensor(rng.integers(0, n, 300)) for n in (20, 15))
    y = torch.tensor(rng.normal(size=20)[row.numpy()] + rng.normal(size=15)[column.numpy()] + rng.normal(size=300))
    y[:5] = NAN

    def model(row: Tensor, column: Tensor, y: Tensor) -> None:
        t = pyro.param("t", torch.tensor(1.0), constraint=positive)
        with pyro.plate("rows", 20):
            a = pyro.sample("a", dist.Normal(0.0, t))
        with pyro.plate("columns", 15):
            c = pyro.sample("c", dist.Normal(0.0, t))
        with pyro.plate("cells", len(y)):
            pyro.sample("y", dist.Normal(a[row] + c[column], 1.0), obs=y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian_recognition, "FEW", 0)
        result = pyro_em.fit(model, row, column, y, missing="nan", max_iter=1, tol=0)
        imputed = result.impute()["y"]
    truth = dense(model, (row[5:], column[5:], y[5:]), result.params)
    joint = truth.joint
    pick = torch.zeros(5, 35).double()
    pick[torch.arange(5), row[:5]] = 1.0
    pick[torch.arange(5), 20 + column[:5]] = 1.0
    mean = pick @ torch.cat([truth.mean["a"], truth.mean["c"]])
    torch.testing.assert_close(imputed.mean[:5], mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(imputed.variance[:5], (pick @ joint @ pick.T).diagonal() + 1, rtol=1e-9, atol=1e-10)
