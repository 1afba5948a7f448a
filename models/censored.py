"""Normal responses of which some are only known to lie beyond a limit: tobit regression, and a mixture.

    y_n ~ N(x_nᵀ coefficients, scale²),   seen if side_n = 0,   Y > y_n if side_n = 1,   Y < y_n if side_n = -1

y (N,) holds the response or its limit, x (N, P) the covariates, the first of which is constant. A row beyond its limit
enters by the logarithm of a normal tail, P(Y > y) = Φ((loc - y) / scale), which `log_ndtr` keeps exact far out.
`mixture` has a location and scale per component instead of covariates.

This is the way of plain Pyro: a masked site for the rows that were seen, a factor for those that were not.

Data: motorettes on accelerated life tests, log10 hours against 1000 / kelvin (Schmee and Hahn 1979), and expenditure
on durable goods, which cannot be negative (Tobin 1958).
"""

from __future__ import annotations

import csv
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> tuple[Tensor, Tensor, Tensor]:
    """Motorettes: log10 hours (40,), constant and 1000 / kelvin (40, 2), side (40,): 1 for those that still ran."""
    with open(DATA / "motors.csv", newline="") as file:
        rows = [[float(row[name]) for name in ("temp", "time", "cens")] for row in csv.DictReader(file)]
    temperature, time, failed = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    design = torch.stack([torch.ones_like(time), 1000 / (temperature + 273.2)], -1)
    return time.log10(), design, 1 - failed


def load_tobin() -> tuple[Tensor, Tensor, Tensor]:
    """Durable goods: expenditure (20,), constant, age and liquidity (20, 3), side (20,): -1 where nothing was spent."""
    with open(DATA / "tobin.csv", newline="") as file:
        rows = [[float(row[name]) for name in ("durable", "age", "quant")] for row in csv.DictReader(file)]
    table = torch.tensor(rows, dtype=torch.float64)
    spent = table[:, 0]
    design = torch.cat([torch.ones(len(table), 1, dtype=torch.float64), table[:, 1:]], -1)
    return spent, design, -(spent == 0).double()


def simulate(num_rows: int = 200, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A line with unit noise, right-censored at limits of its own. (N,), (N, 2), (N,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num_rows, generator=generator, dtype=torch.float64) * 4 - 2
    y = 1 + 2 * x + torch.randn(num_rows, generator=generator, dtype=torch.float64)
    limit = 1 + 3 * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return torch.minimum(y, limit), torch.stack([torch.ones_like(x), x], -1), (y > limit).double()


def simulate_mixture(num_rows: int = 300, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two normals at -2 and 2, clamped to [-2.5, 3]. (N,), (N,)."""
    generator = torch.Generator().manual_seed(seed)
    location = 4.0 * (torch.arange(num_rows) % 2) - 2
    y = location + torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return y.clamp(-2.5, 3.0), (y > 3).double() - (y < -2.5).double()


def _beyond(loc: Tensor, scale: Tensor, limit: Tensor, side: Tensor) -> Tensor:
    """log P of the rows beyond their limit, 0 for those that were seen."""
    return torch.where(side == 0, 0.0, torch.special.log_ndtr(side * (loc - limit) / scale))


def regression(y: Tensor, design: Tensor, side: Tensor) -> None:
    """Start: the line of least squares through all values, limits included.

    Rounded, as the last digits of a solver depend on where the data lie in memory.
    """
    start = torch.linalg.lstsq(design, y.unsqueeze(-1)).solution.squeeze(-1).round(decimals=6)
    coefficients = pyro.param("coefficients", start)
    spread = (y - design @ start).std(correction=0).round(decimals=6)
    scale = pyro.param("scale", spread, constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        loc = design @ coefficients
        with pyro.poutine.mask(mask=side == 0):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)
        pyro.factor("beyond", _beyond(loc, scale, y, side))


def mixture(y: Tensor, side: Tensor, num_components: int = 2) -> None:
    """Start: equal weights, locations spread over the quantiles, the overall scale."""
    start = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
    weights = pyro.param("weights", start, constraint=constraints.simplex)
    levels = (torch.arange(num_components, dtype=torch.float64) + 0.5) / num_components
    loc = pyro.param("loc", torch.quantile(y, levels))
    scale = pyro.param("scale", y.std(correction=0).repeat(num_components), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.poutine.mask(mask=side == 0):
            pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)
        pyro.factor("beyond", _beyond(loc[z], scale[z], y, side))
