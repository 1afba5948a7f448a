"""Counts that vary more than a Poisson or a binomial: each row has a rate, or a probability, of its own.

    gamma_poisson   λ_n ~ Gamma(α, β),   y_n ~ Poisson(λ_n t_n)     y_n is negative binomial      y, t (N,)
    beta_binomial   p_n ~ Beta(a, b),    y_n ~ Binomial(m, p_n)     y_n is beta-binomial          y (N,)
    categories      θ_n ~ Dirichlet(α), y_n ~ Multinomial(m, θ_n)   the same with K categories    y (N, K)
    dirichlet_multinomial                     `categories`, θ_n integrated by the distribution

The posterior of λ_n, p_n and θ_n has the family of its prior, so that EM is exact and the empirical Bayes estimates of
the rows are its means.

Data: failures of ten power plant pumps (`load`), boys among the first twelve children of 6115 Saxon families
(`load_families`, with the number of families that have each count: row weights), satisfaction of the tenants of 24
kinds of housing (`load_satisfaction`); see data/README.md.
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
positive = constraints.positive


def load() -> tuple[Tensor, Tensor]:
    """Failures (10,), and operation time in thousands of hours (10,)."""
    table = torch.from_numpy(np.loadtxt(DATA / "pumps.csv", delimiter=",", skiprows=1))
    return table[:, 0], table[:, 1]


def load_families() -> tuple[Tensor, Tensor]:
    """Number of boys (13,), and the number of families with so many (13,)."""
    table = torch.from_numpy(np.loadtxt(DATA / "saxony_families.csv", delimiter=",", skiprows=1))
    return table[:, 0], table[:, 1]


def load_satisfaction() -> Tensor:
    """Tenants of each kind of housing whose satisfaction is low, medium, high. (24, 3)."""
    counts = np.loadtxt(DATA / "housing.csv", delimiter=",", skiprows=1, usecols=4)
    return torch.from_numpy(counts).reshape(-1, 3)


def simulate(num_rows: int = 60, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Counts of rates between 0 and 6 over times between 1 and 5: (N,), (N,)."""
    generator = torch.Generator().manual_seed(seed)
    time = 1.0 + 4.0 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    rate = -torch.rand(num_rows, 2, generator=generator, dtype=torch.float64).log().sum(-1)  # Gamma(2, 1)
    return torch.poisson(rate * time, generator=generator), time


def simulate_trials(num_rows: int = 60, num_trials: int = 12, *, seed: int = 0) -> Tensor:
    """Successes of probabilities that are the middle one of three uniform numbers. (N,)."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(num_rows, 3, generator=generator, dtype=torch.float64).median(-1).values
    return (
        (torch.rand(num_rows, num_trials, generator=generator, dtype=torch.float64) < p.unsqueeze(-1)).double().sum(-1)
    )


def simulate_categories(num_rows: int = 60, num_trials: int = 12, num_categories: int = 3, *, seed: int = 0) -> Tensor:
    """Counts of categories whose probabilities in a row are those of exponential numbers. (N, K)."""
    generator = torch.Generator().manual_seed(seed)
    p = -torch.rand(num_rows, num_categories, generator=generator, dtype=torch.float64).log()
    draws = torch.multinomial(p, num_trials, replacement=True, generator=generator)
    return torch.nn.functional.one_hot(draws, num_categories).sum(1).double()


def gamma_poisson(y: Tensor, time: Tensor) -> None:
    """Start: shape 1, and the rate at which the mean is that of the data."""
    alpha = pyro.param("alpha", torch.ones((), dtype=time.dtype), constraint=positive)
    beta = pyro.param("beta", lambda: time.sum() / y.sum(), constraint=positive)
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.Gamma(alpha, beta))
        pyro.sample("y", dist.Poisson(rate * time), obs=y)


def beta_binomial(y: Tensor, num_trials: int = 12) -> None:
    """Start: the uniform distribution."""
    a, b = (pyro.param(name, torch.ones((), dtype=torch.float64), constraint=positive) for name in ("a", "b"))
    with pyro.plate("rows", len(y)):
        p = pyro.sample("p", dist.Beta(a, b))
        pyro.sample("y", dist.Binomial(num_trials, p), obs=y)


def categories(y: Tensor) -> None:
    """Probabilities of each row's own; start: the uniform distribution."""
    concentration = pyro.param("concentration", torch.ones(y.shape[-1], dtype=y.dtype), constraint=positive)
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Dirichlet(concentration))
        pyro.sample("y", dist.Multinomial(int(y.sum(-1).max()), theta), obs=y)


def dirichlet_multinomial(y: Tensor) -> None:
    """The probabilities of a row are integrated by the distribution itself; start: the uniform distribution."""
    concentration = pyro.param(
        "concentration", torch.ones(y.shape[-1], dtype=torch.float64), constraint=constraints.positive
    )
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.DirichletMultinomial(concentration, y.sum(-1)), obs=y)
