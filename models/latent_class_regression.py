"""Latent class regression: classes answer items alike, and covariates say how likely each class is.

    z_n ~ Categorical(softmax of [0, intercept + c_nᵀ slope]),    item_nj | z_n = k ~ Categorical(probs_kj)

Items (N, J) are coded 0..C-1, covariates c (N, Q); intercept (K-1,), slope (Q, K-1), probs (K, J, C). The first class
is the reference. Data: twelve judgements of two candidates by party identification (poLCA's election data, NES 2000).
"""

from __future__ import annotations

import csv
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> tuple[Tensor, Tensor]:
    """Answers (1300, 12), and party identification from 1, Democrat, to 7, Republican, (1300, 1); complete rows."""
    with open(DATA / "election.csv", newline="") as lines:
        table = torch.tensor([[float(cell) for cell in row.values()] for row in csv.DictReader(lines)]).double()
    return table[:, :12].long() - 1, table[:, 12:]


def simulate(num_rows: int = 300, num_items: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes whose odds rise with one covariate. Answers (N, J), covariate (N, 1)."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    z = torch.rand(num_rows, generator=generator) < torch.sigmoid(c[:, 0])
    yes = torch.where(z, 0.8, 0.25).unsqueeze(-1).expand(num_rows, num_items)
    return torch.bernoulli(yes, generator=generator).long(), c


def model(items: Tensor, covariates: Tensor, num_classes: int = 2) -> None:
    """Start: covariates without influence; in class k the answers below the (k + 1/2)/K quantile are more likely."""
    num_rows, num_items = items.shape
    size = int(items.max()) + 1
    intercept = pyro.param("intercept", lambda: covariates.new_zeros(num_classes - 1))
    slope = pyro.param("slope", lambda: covariates.new_zeros(covariates.shape[-1], num_classes - 1))
    tilt = torch.linspace(-1, 1, num_classes, dtype=torch.float64).unsqueeze(-1)
    answers = torch.linspace(-1, 1, size, dtype=torch.float64)
    start = torch.softmax(tilt * answers, -1).unsqueeze(1).repeat(1, num_items, 1)  # (K, J, C)
    probs = pyro.param("probs", start, constraint=constraints.simplex)
    logits = torch.cat([covariates.new_zeros(num_rows, 1), intercept + covariates @ slope], -1)
    with pyro.plate("rows", num_rows, dim=-2):
        z = pyro.sample("z", dist.Categorical(logits=logits.unsqueeze(1)))
        with pyro.plate("items", num_items, dim=-1) as item:
            pyro.sample("item", dist.Categorical(Vindex(probs)[z, item]), obs=items)
