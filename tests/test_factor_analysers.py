"""Mixtures of factor analysers against a direct maximisation of their density.

No fit with printed figures was found that the models here share, except in the plane (`mfa_faithful` in
test_reference_fits.py). The oracle knows nothing of latents: L-BFGS on the sum over the components of normal densities
with covariance W_k W_kᵀ + noise.
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
from pyro.ops.indexing import Vindex
from scipy.optimize import minimize
from torch import Tensor

import pyro_em
from models import factor_analysis

SPECIES = torch.arange(150) // 50


def own_noise(data: Tensor, start: Tensor) -> None:
    """Each component has noise scales of its own; `start` is a component of every row."""
    num_components = int(start.max()) + 1
    parts = [data[start == k] for k in range(num_components)]
    weights = pyro.param("weights", torch.full((num_components,), 1 / num_components), constraint=constraints.simplex)
    loading = pyro.param("loading", torch.stack([0.5 * part.std(0)[:, None] for part in parts]))
    mean = pyro.param("mean", torch.stack([part.mean(0) for part in parts]))
    scale = pyro.param("scale", torch.stack([0.8 * part.std(0) for part in parts]), constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        k = pyro.sample("k", dist.Categorical(weights))
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        location = (Vindex(loading)[k, :, :] @ z.unsqueeze(-1)).squeeze(-1) + Vindex(mean)[k, :]
        pyro.sample("x", dist.Normal(location, Vindex(scale)[k, :]).to_event(1), obs=data)


def _density(data: Tensor, weights: Tensor, loading: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    covariance = loading @ loading.mT + scale.square().diag_embed()
    rows = torch.distributions.MultivariateNormal(mean, covariance).log_prob(data[:, None])
    return (rows + weights.log()).logsumexp(-1).sum()


def _unpacked(u: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    parts = u.split([shape.numel() for shape in shapes.values()])
    v = {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
    return v | {"weights": v["weights"].softmax(-1), "scale": v["scale"].exp()}


@pytest.mark.parametrize(
    ("model", "arguments"),
    [(factor_analysis.mixture, (2, 1)), (factor_analysis.mixture, (3, 1)), (own_noise, (SPECIES,))],
    ids=["two of common noise", "three of common noise", "three of own noise"],
)
def test_a_direct_maximisation_ends_at_the_same_place(model: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    data = factor_analysis.load()
    found = pyro_em.fit(model, data, *arguments, accelerate="anderson", max_iter=2000, tol=1e-8)
    assert found.converged
    names = ("weights", "loading", "mean", "scale")
    v = {name: found.params[name] for name in names}
    assert float(_density(data, **v)) == pytest.approx(found.log_likelihood, rel=1e-12)

    shapes = {name: v[name].shape for name in names}
    free = v | {"weights": v["weights"].log(), "scale": v["scale"].log()}

    def negative(u: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(u).requires_grad_()
        value = -_density(data, **_unpacked(point, shapes))
        return float(value.detach()), torch.autograd.grad(value, point)[0].numpy()

    reached = torch.cat([free[name].reshape(-1) for name in names]).numpy()
    assert np.abs(negative(reached)[1]).max() < 1e-2
    near = reached + 0.1 * np.random.default_rng(0).normal(size=reached.shape)
    best = minimize(negative, near, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 9000, "ftol": 0.0})
    assert -best.fun == pytest.approx(found.log_likelihood, abs=1e-6)
    best = _unpacked(torch.from_numpy(best.x), shapes)
    torch.testing.assert_close(best["weights"], v["weights"], atol=1e-4, rtol=0)
    torch.testing.assert_close(best["mean"], v["mean"], atol=1e-3, rtol=0)
    expected, actual = (p["loading"] @ p["loading"].mT for p in (best, v))  # loadings have no sign
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
