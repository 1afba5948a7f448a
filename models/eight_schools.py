"""Eight schools: effects measured with known standard errors, drawn from one population.

    θ_j ~ N(μ, τ²),    y_j | θ_j ~ N(θ_j, σ_j²)            y, σ (J,)

    model      μ and τ by maximum likelihood; for these data τ goes to 0, the boundary of its space
    bayesian   flat μ and τ ~ Gamma(2, 10⁻⁶): the penalty log τ of Chung et al. (2013) keeps τ off 0 (for MAP)

The textbook example of partial pooling: Rubin (1981); Gelman et al., Bayesian Data Analysis, section 5.5.

Data: coaching effects on the SAT in eight schools (`load`); see data/README.md.
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
    """Effect (8,) and its standard error (8,), in points of the SAT."""
    table = torch.from_numpy(np.loadtxt(DATA / "eight_schools.csv", delimiter=",", skiprows=1, usecols=(1, 2)))
    return table[:, 0], table[:, 1]


def simulate(num_schools: int = 12, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Effects around 5 of standard deviation 8, with standard errors between 8 and 16: (J,), (J,)."""
    generator = torch.Generator().manual_seed(seed)
    sigma = 8.0 + 8.0 * torch.rand(num_schools, generator=generator, dtype=torch.float64)
    theta = 5.0 + 8.0 * torch.randn(num_schools, generator=generator, dtype=torch.float64)
    return theta + sigma * torch.randn(num_schools, generator=generator, dtype=torch.float64), sigma


def model(y: Tensor, sigma: Tensor) -> None:
    """Start: mean and standard deviation of the measured effects."""
    mu = pyro.param("mu", lambda: y.mean())
    tau = pyro.param("tau", lambda: y.std(), constraint=constraints.positive)
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def bayesian(y: Tensor, sigma: Tensor) -> None:
    """With a prior on τ that vanishes at 0 and is otherwise flat; that of μ is flat in all but name."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(y[0]), 1e6))
    tau = pyro.sample("tau", dist.Gamma(torch.full_like(y[0], 2.0), 1e-6))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)
