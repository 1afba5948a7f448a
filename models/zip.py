"""Zero-inflated Poisson: some zeros are counts that happened to be 0, others could not be anything else.

    z_n ~ Bernoulli(inflation),    x_n | z_n = 0 ~ Poisson(rate),    x_n | z_n = 1 is 0          x (N,)

`regression` lets both parts depend on covariates c_n (N, P), the first of which is constant:
logit inflation_n = c_nᵀ zero_coef, log rate_n = c_nᵀ count_coef; its M-step has no closed form.

A structural zero is a Poisson of rate 0, whose log-probability is exactly 0 at 0 and -inf elsewhere. The
rate is chosen by `torch.where`, not by the product `rate * (1 - z)`: the gradient of x log(rate) at x =
rate = 0 is NaN, and only `where` keeps it away from the parameter.

Data: articles by 915 biochemists in the last three years of the PhD (Long 1997; in the R package pscl).
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


def load() -> Tensor:
    """Number of articles of each biochemist. (915,)."""
    return load_regression()[0]


def load_regression() -> tuple[Tensor, Tensor]:
    """Articles (915,), and constant, woman, married, young children, prestige, mentor's articles (915, 6)."""
    with open(DATA / "bioChemists.csv", newline="") as file:
        rows = [
            (
                row["art"],
                1,
                row["fem"] == "Women",
                row["mar"] == "Married",
                row["kid5"],
                row["phd"],
                row["ment"],
            )
            for row in csv.DictReader(file)
        ]
    table = torch.tensor([[float(cell) for cell in row] for row in rows], dtype=torch.float64)
    return table[:, 0], table[:, 1:]


def simulate(num_rows: int = 500, *, seed: int = 0) -> Tensor:
    """Three in ten are structural zeros; the other counts have rate 3. (N,)."""
    generator = torch.Generator().manual_seed(seed)
    structural = torch.rand(num_rows, generator=generator) < 0.3
    counts = torch.poisson(torch.full((num_rows,), 3.0, dtype=torch.float64), generator=generator)
    return counts.masked_fill(structural, 0.0)


def model(data: Tensor) -> None:
    """Start: half of the observed zeros are structural; the rate is the mean of the counts above 0."""
    inflation = pyro.param(
        "inflation",
        # One added to each side keeps the start inside (0, 1).
        lambda: (0.5 * (data == 0).double().sum() + 1) / (len(data) + 2),
        constraint=constraints.unit_interval,
    )
    rate = pyro.param("rate", lambda: data[data > 0].double().mean(), constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Bernoulli(inflation))
        pyro.sample("x", dist.Poisson(torch.where(z == 1, 0.0, rate)), obs=data)


def regression(data: Tensor, covariates: Tensor) -> None:
    """Start: no covariate matters, half the rows are inflated, the rate is the mean count."""
    zero_coef = pyro.param("zero_coef", lambda: covariates.new_zeros(covariates.shape[-1]))
    count_coef = pyro.param(
        "count_coef",
        lambda: torch.cat([data.mean().log().view(1), covariates.new_zeros(covariates.shape[-1] - 1)]),
    )
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Bernoulli(logits=covariates @ zero_coef))
        pyro.sample("x", dist.Poisson(torch.where(z == 1, 0.0, (covariates @ count_coef).exp())), obs=data)
