"""Logistic regression with a random intercept for every group (a generalised linear mixed model).

    b_g ~ N(0, scale²),    r_n ~ Binomial(total_n, logits = x_nᵀ coef + b_g(n))          x (N, P), g (N,) in 0..G-1

`model` has one row per group, `grouped` any number. The posterior of an intercept is not Gaussian, but
one-dimensional: use `fit(..., e_step={"b": pyro_em.Quadrature(num_nodes=21)})`.

Data: germination of seeds on 21 plates, by type of seed and root extract (Crowder 1978; `load`).
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
    """Germinated and sown seeds (21,), (21,), and constant, type, extract, type x extract (21, 4)."""
    with open(DATA / "seeds.csv", newline="") as file:
        rows = [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    germinated, sown, kind, extract = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    return germinated, sown, torch.stack([torch.ones_like(kind), kind, extract, kind * extract], -1)


def simulate(num_groups: int = 30, rows: int = 4, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Intercepts of scale 0.8, coefficients (-0.5, 1). r (N,), total (N,), x (N, 2), g (N,)."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(num_groups).repeat_interleave(rows)
    x = torch.stack([torch.ones(len(group)), torch.randn(len(group), generator=generator)], -1).double()
    b = 0.8 * torch.randn(num_groups, generator=generator, dtype=torch.float64)
    p = torch.sigmoid(x @ torch.tensor([-0.5, 1.0], dtype=torch.float64) + b[group])
    total = torch.full((len(group),), 3.0, dtype=torch.float64)
    right = (torch.rand(3, len(group), generator=generator, dtype=torch.float64) < p).double().sum(0)
    return right, total, x, group


def _parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    coef = pyro.param("coef", lambda: x.new_zeros(x.shape[-1]))
    scale = pyro.param("scale", lambda: x.new_tensor(0.5), constraint=constraints.positive)
    return coef, scale


def model(count: Tensor, total: Tensor, x: Tensor) -> None:
    """Start: no covariate matters, intercepts of scale 0.5."""
    coef, scale = _parameters(x)
    with pyro.plate("groups", len(count)):
        b = pyro.sample("b", dist.Normal(0.0, scale))
        pyro.sample("count", dist.Binomial(total, logits=x @ coef + b), obs=count)


def grouped(count: Tensor, total: Tensor, x: Tensor, group: Tensor) -> None:
    """Start as `model`."""
    coef, scale = _parameters(x)
    with pyro.plate("groups", int(group.max()) + 1):
        b = pyro.sample("b", dist.Normal(0.0, scale))
    with pyro.plate("rows", len(count)):
        pyro.sample("count", dist.Binomial(total, logits=x @ coef + b[..., group]), obs=count)
