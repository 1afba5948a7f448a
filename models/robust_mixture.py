"""Gaussian mixture with a background of outliers, spread evenly over the range of the data.

    outlier_n ~ Bernoulli(share),   z_n ~ Categorical(weights)
    x_n | outlier_n = 0, z_n = k ~ N(loc_k, diag(scale_k²)),   x_n | outlier_n = 1 ~ Uniform(box)       x (N, D)

The background keeps far points from pulling locations and blowing up scales (Banfield and Raftery 1993). The data are
observed once by each of the two laws, and a mask on the latent says which of them counts.

The box is the range of the data, widened by a thousandth, since a Uniform excludes its upper bound.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def simulate(num_rows: int = 300, num_components: int = 2, *, seed: int = 0) -> Tensor:
    """Unit Gaussians 6 apart in the plane, and one row in five uniform on a square of side 40. (N, 2)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(num_rows) % num_components
    noise = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    inside = 6.0 * truth.unsqueeze(-1) - 3 * (num_components - 1) + noise
    outside = torch.rand(num_rows, 2, generator=generator, dtype=torch.float64) * 40 - 20
    stray = torch.rand(num_rows, 1, generator=generator) < 0.2
    return torch.where(stray, outside, inside)


def model(data: Tensor, num_components: int = 2) -> None:
    """Start: a tenth outliers, locations at central quantiles of each coordinate, scales from the quartiles."""
    share = pyro.param("share", torch.tensor(0.1, dtype=torch.float64), constraint=constraints.unit_interval)
    start = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
    weights = pyro.param("weights", start, constraint=constraints.simplex)
    levels = 0.25 + (torch.arange(num_components, dtype=torch.float64) + 0.5) / (2 * num_components)
    loc = pyro.param("loc", torch.quantile(data, levels, 0))
    quartiles = torch.quantile(data, torch.tensor([0.25, 0.75], dtype=torch.float64), 0)
    scale = pyro.param(
        "scale", ((quartiles[1] - quartiles[0]) / 2).repeat(num_components, 1), constraint=constraints.positive
    )
    low, high = data.amin(0), data.amax(0)
    margin = 0.001 * (high - low)
    with pyro.plate("rows", len(data)):
        outlier = pyro.sample("outlier", dist.Bernoulli(share))
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.poutine.mask(mask=outlier == 0):
            pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=data)
        with pyro.poutine.mask(mask=outlier == 1):
            pyro.sample("background", dist.Uniform(low - margin, high + margin).to_event(1), obs=data)
