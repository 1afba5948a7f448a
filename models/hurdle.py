"""Hurdle model of counts: one regression for whether there is any, another for how many.

    [x_n > 0] ~ Bernoulli(logit⁻¹ c_nᵀ above_coef),    x_n | x_n > 0 ~ Poisson(exp c_nᵀ count_coef) given that it is > 0

Unlike in `zip.py` all zeros are of one kind, so nothing is latent. Counts x (N,), covariates c (N, P); the first
covariate is constant.

The truncated Poisson is written with what Pyro has, a Poisson of the rows above zero and a factor −log(1 − e^−λ).

Data: articles by 915 biochemists in the last three years of the PhD (Long 1997; in the R package pscl).
"""

from __future__ import annotations

import csv
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> tuple[Tensor, Tensor]:
    """Articles (915,), and constant, woman, married, young children, prestige, mentor's articles (915, 6)."""
    with open(DATA / "bioChemists.csv", newline="") as file:
        rows = [
            (row["art"], 1, row["fem"] == "Women", row["mar"] == "Married", row["kid5"], row["phd"], row["ment"])
            for row in csv.DictReader(file)
        ]
    table = torch.tensor([[float(cell) for cell in row] for row in rows], dtype=torch.float64)
    return table[:, 0], table[:, 1:]


def simulate(num_rows: int = 400, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two covariates, of which the first is constant; three in five rows are above zero. Counts (N,), (N, 2)."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.stack([torch.ones(num_rows), torch.randn(num_rows, generator=generator)], -1).double()
    above = torch.rand(num_rows, generator=generator, dtype=torch.float64) < torch.sigmoid(0.4 + 0.8 * c[:, 1])
    rate = (0.7 + 0.3 * c[:, 1]).exp()
    # The inverse of the distribution function, started above its value at 0.
    u = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    u = (-rate).exp() + u * -torch.expm1(-rate)
    counts = torch.arange(60, dtype=torch.float64)
    below = dist.Poisson(rate.unsqueeze(-1)).log_prob(counts).exp().cumsum(-1) < u.unsqueeze(-1)
    return below.sum(-1).double() * above, c


def _start(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """No covariate matters; the share of rows above zero, and the logarithm of the mean count of these."""
    rest = c.new_zeros(c.shape[-1] - 1)
    share, mean = (x > 0).double().mean(), x[x > 0].mean()
    return torch.cat([torch.logit(share).view(1), rest]), torch.cat([mean.log().view(1), rest])


def model(x: Tensor, covariates: Tensor) -> None:
    """Start: no covariate matters."""
    above_coef = pyro.param("above_coef", lambda: _start(x, covariates)[0])
    count_coef = pyro.param("count_coef", lambda: _start(x, covariates)[1])
    with pyro.plate("rows", len(x)):
        pyro.sample("above", dist.Bernoulli(logits=covariates @ above_coef), obs=(x > 0).double())
        rate = (covariates @ count_coef).exp()
        with pyro.poutine.mask(mask=x > 0):
            pyro.sample("x", dist.Poisson(rate), obs=x)
            pyro.factor("not_zero", -torch.log(-torch.expm1(-rate)))
