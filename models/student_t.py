"""Student-t regression: outliers are rows whose precision happened to be low.

    u_n ~ Gamma(ν/2, ν/2),    y_n | u_n ~ N(x_n·β, σ²/u_n),    that is y_n ~ t_ν(x_n·β, σ)       x (N, P), β (P,)

    model      ν is given (`dof`)
    estimated  ν is a parameter

Written as a scale mixture the weights u_n of the rows are conjugate latents: their posterior means are the weights of
robust regression. Source: Lange, Little and Taylor (1989).

Data: Brownlee's stack loss (`load`); see data/README.md.
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
    """A column of ones, air flow, water temperature and acid concentration (21, 4); stack loss (21,)."""
    table = torch.from_numpy(np.loadtxt(DATA / "stackloss.csv", delimiter=",", skiprows=1))
    return torch.cat([torch.ones_like(table[:, :1]), table[:, :3]], -1), table[:, 3]


def simulate(num_rows: int = 100, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """y = 1 + 2 x + t₃ noise of scale ½: (N, 2), (N,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    normal = torch.randn(num_rows, 4, generator=generator, dtype=torch.float64)
    noise = normal[:, 0] / normal[:, 1:].square().mean(-1).sqrt()
    return torch.stack([torch.ones_like(x), x], -1), 1.0 + 2.0 * x + 0.5 * noise


def _regression(x: Tensor, y: Tensor, dof: Tensor) -> None:
    beta = pyro.param("beta", lambda: torch.linalg.lstsq(x, y).solution.round(decimals=6))
    scale = pyro.param(
        "scale",
        lambda: (y - x @ torch.linalg.lstsq(x, y).solution).std().round(decimals=6),
        constraint=constraints.positive,
    )
    with pyro.plate("rows", len(y)):
        u = pyro.sample("u", dist.Gamma(dof / 2, dof / 2))
        pyro.sample("y", dist.Normal(x @ beta, scale / u.sqrt()), obs=y)


def model(x: Tensor, y: Tensor, dof: float = 4.0) -> None:
    """Given degrees of freedom; start: least squares."""
    _regression(x, y, torch.full_like(y[0], dof))


def estimated(x: Tensor, y: Tensor) -> None:
    """Degrees of freedom by maximum likelihood, from 4."""
    _regression(x, y, pyro.param("dof", torch.full_like(y[0], 4.0), constraint=constraints.positive))
