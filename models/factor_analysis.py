"""Factor analysis: many measurements that a few latent factors explain.

    z_n ~ N(0, I),    x_n | z_n ~ N(W z_n + b, noise)          x (N, D), z (L,), W (D, L), b (D,)

    model          noise scale of each measurement, scale (D,)      Lawley and Maxwell (1971)
    ppca           one noise scale for all, scale ()                probabilistic PCA, Tipping and Bishop (1999)
    confirmatory   each measurement loads on one given factor, factors are correlated
    low_rank       `model` with the factors integrated by the distribution
    mixture        K analysers, each with its own W_k, b_k           Ghahramani and Hinton (1996)

Loadings are identified up to a rotation of the factors (a sign in `confirmatory`); what the data determine is the
covariance W Wᵀ + noise. Given the parameters z_n | x_n is normal, so that EM is exact.

Data: Fisher's iris (`load`); see data/README.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> Tensor:
    """Sepal length and width, petal length and width of 150 irises, in cm. (150, 4)."""
    return torch.from_numpy(np.loadtxt(DATA / "iris.csv", delimiter=",", skiprows=1, usecols=range(4)))


def simulate(num_rows: int = 200, num_features: int = 6, num_factors: int = 2, *, seed: int = 0) -> Tensor:
    """Rows of standard normal factors with random loadings and noise of standard deviation ½. (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    loading = torch.randn(num_features, num_factors, generator=generator, dtype=torch.float64)
    factors = torch.randn(num_rows, num_factors, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64)
    return factors @ loading.T + 0.5 * noise


def _principal(data: Tensor, num_factors: int) -> Tensor:
    """Loadings (D, L) of the first principal components: they carry half of the variance along each."""
    centred = data - data.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(data))
    values, vectors = values.flip(0)[:num_factors], vectors.flip(1)[:, :num_factors]
    return vectors * vectors.sum(0).sign() * (values / 2).sqrt()


def _spread(data: Tensor) -> Tensor:
    return data.std(0, correction=0)


def model(data: Tensor, num_factors: int = 1) -> None:
    """A noise scale for each measurement."""
    loading = pyro.param("loading", lambda: _principal(data, num_factors))
    mean = pyro.param("mean", lambda: data.mean(0))
    scale = pyro.param("scale", lambda: _spread(data) / 2, constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Normal(torch.zeros(num_factors).to(data), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading.T + mean, scale).to_event(1), obs=data)


def ppca(data: Tensor, num_factors: int = 1) -> None:
    """One noise scale for all measurements."""
    loading = pyro.param("loading", lambda: _principal(data, num_factors))
    mean = pyro.param("mean", lambda: data.mean(0))
    scale = pyro.param("scale", lambda: _spread(data).mean() / 2, constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Normal(torch.zeros(num_factors).to(data), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading.T + mean, scale).to_event(1), obs=data)


def low_rank(data: Tensor, num_factors: int = 1) -> None:
    """`model` without its latents: x is normal with covariance W Wᵀ + noise, here with its `variance` (D,)."""
    loading = pyro.param("loading", lambda: _principal(data, num_factors))
    mean = pyro.param("mean", lambda: data.mean(0))
    variance = pyro.param("variance", lambda: _spread(data) ** 2 / 4, constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        pyro.sample("x", dist.LowRankMultivariateNormal(mean, loading, variance), obs=data)


def confirmatory(data: Tensor, factor: Tensor) -> None:
    """Measurement d loads on factor[d] only; factors have unit variance and any correlation.

    The covariance of the factors is free here and their scale is in it: loadings are identified by the first
    measurement of each factor, whose loading is 1 (marker parametrisation).
    """
    num_factors = int(factor.max()) + 1
    marker = torch.stack([(factor == k).nonzero()[0, 0] for k in range(num_factors)])
    free = torch.ones(len(factor), dtype=torch.bool).index_fill(0, marker, False)
    loading = pyro.param("loading", lambda: torch.ones(int(free.sum()), dtype=data.dtype))
    mean = pyro.param("mean", lambda: data.mean(0))
    scale = pyro.param("scale", lambda: _spread(data) / 2**0.5, constraint=constraints.positive)
    covariance = pyro.param(
        "covariance",
        lambda: torch.diag(_spread(data)[marker] ** 2 / 2),
        constraint=constraints.positive_definite,
    )
    weight = torch.ones(len(factor)).to(data).index_put((free.nonzero()[:, 0],), loading)
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(num_factors).to(data), covariance))
        pyro.sample("x", dist.Normal(z[..., factor] * weight + mean, scale).to_event(1), obs=data)


def mixture(data: Tensor, num_components: int = 2, num_factors: int = 1) -> None:
    """K factor analysers with a noise scale that they share; start: slices along the first principal component."""
    order = (data @ _principal(data, 1)[:, 0]).argsort()
    slices = [data[rows] for rows in order.tensor_split(num_components)]
    weights = pyro.param(
        "weights", torch.full((num_components,), 1 / num_components, dtype=data.dtype), constraint=constraints.simplex
    )
    loading = pyro.param("loading", lambda: torch.stack([_principal(rows, num_factors) for rows in slices]))
    mean = pyro.param("mean", lambda: torch.stack([rows.mean(0) for rows in slices]))
    scale = pyro.param("scale", lambda: _spread(data) / 2, constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        k = pyro.sample("k", dist.Categorical(weights))
        z = pyro.sample("z", dist.Normal(torch.zeros(num_factors).to(data), 1.0).to_event(1))
        location = (Vindex(loading)[k, :, :] @ z.unsqueeze(-1)).squeeze(-1) + Vindex(mean)[k, :]
        pyro.sample("x", dist.Normal(location, scale).to_event(1), obs=data)
