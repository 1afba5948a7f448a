"""Negative binomial counts: more spread out than a Poisson of the same mean.

    x_n ~ NegativeBinomial(size, logits = intercept + c_nᵀ slope)          x (N,), c (N, P)

In torch's coding `size` failures end the count, so that the mean is size · exp(logits), the variance mean + mean²/size:
a Poisson whose rate is Gamma with concentration `size`. Without covariates (`model`) the logits are one intercept.

Data: European red mites on 150 apple leaves (Bliss and Fisher 1953), each count once with its frequency, which is the
weight of the row: `weights={"rows": leaves}`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> tuple[Tensor, Tensor]:
    """Numbers of mites (8,) and on how many leaves each was found (8,)."""
    table = np.loadtxt(DATA / "red_mites.csv", delimiter=",", skiprows=1)
    mites, leaves = torch.from_numpy(table).unbind(-1)
    return mites, leaves


def simulate(num_rows: int = 300, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Size 2; the mean doubles with every unit of one covariate. Counts (N,), covariate (N, 1)."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    # A Gamma(2) variable is the sum of two exponential ones.
    gamma = -torch.rand(num_rows, 2, generator=generator, dtype=torch.float64).log().sum(-1)
    return torch.poisson(gamma * 2 ** c[:, 0], generator=generator), c


def model(x: Tensor) -> None:
    """Start: size 1 and the mean count."""
    size = pyro.param("size", torch.ones((), dtype=torch.float64), constraint=constraints.positive)
    intercept = pyro.param("intercept", lambda: x.double().mean().log())
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.NegativeBinomial(size, logits=intercept), obs=x)


def regression(x: Tensor, covariates: Tensor) -> None:
    """Start: size 1, the mean count whatever the covariates."""
    size = pyro.param("size", torch.ones((), dtype=torch.float64), constraint=constraints.positive)
    intercept = pyro.param("intercept", lambda: x.double().mean().log())
    slope = pyro.param("slope", lambda: covariates.new_zeros(covariates.shape[-1]))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.NegativeBinomial(size, logits=intercept + covariates @ slope), obs=x)
