"""Mixture of Poissons: counts from several unseen sources of different intensity.

    z_n ~ Categorical(weights),    x_n | z_n = k ~ Poisson(rate_k)          x (N,), weights (K,), rate (K,)

The same model reads the counts one by one (`load`), or each distinct count once (`load_unique`), its
frequency then being the weight of the row: `weights={"rows": frequency}`. Both have the same likelihood.

Data: days by number of death notices of women aged 80 and over in The Times, 1910-1912 (Hasselblad 1969).
The likelihood is very flat: plain EM from rates 1 and 3 takes over 2000 iterations.
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


def load_unique() -> tuple[Tensor, Tensor]:
    """The distinct numbers of notices (10,) and on how many days each was seen (10,)."""
    table = np.loadtxt(DATA / "hasselblad_deaths.csv", delimiter=",", skiprows=1)
    deaths, frequency = torch.from_numpy(table).unbind(-1)
    return deaths, frequency


def load() -> Tensor:
    """The number of notices on each of the 1096 days, in increasing order. (1096,)."""
    deaths, frequency = load_unique()
    return deaths.repeat_interleave(frequency.long())


def simulate(num_rows: int = 500, *, seed: int = 0) -> Tensor:
    """Two sources, rates 1 and 8, three in ten from the first. (N,)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.multinomial(torch.tensor([0.3, 0.7]), num_rows, replacement=True, generator=generator)
    rate = torch.tensor([1.0, 8.0], dtype=torch.float64)
    return torch.poisson(rate[z], generator=generator)


def model(data: Tensor, num_components: int = 2) -> None:
    """Start: equal weights, rates evenly spaced around the mean count."""
    start = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
    weights = pyro.param("weights", start, constraint=constraints.simplex)
    spread = (2 * torch.arange(num_components, dtype=torch.float64) + 1) / num_components
    rate = pyro.param("rate", lambda: data.double().mean() * spread, constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Poisson(rate[z]), obs=data)
