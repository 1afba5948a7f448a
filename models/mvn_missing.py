"""Multivariate normal with missing cells.

    x_n ~ N(loc, covariance)          x (N, D), NaN where a cell is missing

The model is that of complete data; which cells are missing must say nothing beyond what was observed (missing at
random). In plain Pyro it takes complete rows only. With `fit(..., missing="nan")` the missing cells are integrated
out and their expected sums enter the M-step (Dempster, Laird & Rubin 1977; Little & Rubin, Statistical Analysis with
Missing Data, section 11.2).

Data: oxygen intake, run time and run pulse of 31 men, the example of the MI procedure of SAS/STAT (`load`).
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> Tensor:
    """Oxygen intake (ml/kg/min), run time (min) and run pulse (1/min), NaN where missing. (31, 3)."""
    with open(DATA / "fitness1.csv", newline="") as file:
        _, *rows = csv.reader(file)
    return torch.tensor([[float(cell) if cell else math.nan for cell in row] for row in rows], dtype=torch.float64)


def load_complete() -> Tensor:
    """The 21 rows without a missing cell. (21, 3)."""
    return _complete(load())


def simulate(num_rows: int = 200, num_cells: int = 4, share: float = 0.25, *, seed: int = 0) -> Tensor:
    """Equicorrelated cells around 0, 1, 2, ...; a `share` of the cells is missing completely at random. (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(num_rows, num_cells, generator=generator, dtype=torch.float64)
    x = torch.arange(num_cells) + common + own
    return x.masked_fill(torch.rand(num_rows, num_cells, generator=generator) < share, math.nan)


def _complete(data: Tensor) -> Tensor:
    return data[~data.isnan().any(-1)]


def _variances(data: Tensor) -> Tensor:
    """Sample variance of the cells of each column that were observed. (D,)."""
    columns = [column[~column.isnan()].double() for column in data.T]
    return torch.stack([column.var() for column in columns])


def model(data: Tensor) -> None:
    """Start: means and variances of the observed cells, no correlation."""
    loc = pyro.param("loc", lambda: data.double().nanmean(0))
    covariance = pyro.param(
        "covariance", lambda: torch.diag(_variances(data)), constraint=constraints.positive_definite
    )
    with pyro.plate("rows", len(data)):
        pyro.sample("x", dist.MultivariateNormal(loc, covariance_matrix=covariance), obs=data)
