"""Latent class analysis: items that are independent given an unseen class.

    z_n ~ Categorical(weights),    x_nj | z_n = k ~ Categorical(probs_kj)
    x (N, J) in 0..C-1, weights (K,), probs (K, J, C)

All items have the same number of categories C. `bayesian` is for binary items and adds priors:
weights ~ Dirichlet(2, ..., 2), P(x_nj = 1 | k) ~ Beta(2, 2) (White and Murphy 2014).

Data: carcinoma slides judged by seven pathologists (`load`; Landis and Koch 1977, in Agresti 2002), and
symptoms of Alzheimer patients (`load_alzheimer`; in BayesLCA); see data/README.md. Many maximum likelihood
estimates for the slides are exactly 0 or 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> Tensor:
    """Carcinoma seen (1) or not (0) on 118 slides by 7 pathologists. (118, 7)."""
    judged = np.loadtxt(DATA / "carcinoma.csv", delimiter=",", skiprows=1, dtype=np.int64)
    return torch.from_numpy(judged) - 1  # the file has 1 and 2


def load_alzheimer() -> Tensor:
    """Presence (1) or absence (0) of 6 symptoms in 240 patients. (240, 6)."""
    return torch.from_numpy(np.loadtxt(DATA / "alzheimer.csv", delimiter=",", skiprows=1, dtype=np.int64))


def simulate(num_rows: int = 400, num_items: int = 6, *, seed: int = 0) -> Tensor:
    """Two classes of binary items: a 1 has probability 0.2 in the first class, 0.8 in the second. (N, J)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.multinomial(torch.tensor([0.6, 0.4]), num_rows, replacement=True, generator=generator)
    success = torch.tensor([0.2, 0.8])[z].unsqueeze(-1).expand(num_rows, num_items)
    return torch.bernoulli(success, generator=generator).long()


def _tilted_shares(data: Tensor, num_classes: int, num_categories: int) -> Tensor:
    """Overall shares of the categories, tilted to low categories in the first class, to high in the last."""
    # One added to every count keeps a category that was never seen at a positive probability.
    counts = 1.0 + torch.nn.functional.one_hot(data, num_categories).sum(0)  # (J, C)
    tilt = (2 * torch.arange(num_classes, dtype=torch.float64) + 1) / num_classes - 1  # (K,), symmetric about 0
    category = torch.arange(num_categories, dtype=torch.float64)
    tilted = counts * torch.exp(2.0 * tilt[:, None, None] * category)
    return tilted / tilted.sum(-1, keepdim=True)


def model(data: Tensor, num_classes: int = 2, num_categories: int = 2) -> None:
    """Start: equal weights, tilted shares."""
    num_rows, num_items = data.shape
    start = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    weights = pyro.param("weights", start, constraint=constraints.simplex)
    probs = pyro.param(
        "probs", lambda: _tilted_shares(data, num_classes, num_categories), constraint=constraints.simplex
    )
    item = torch.arange(num_items)
    with pyro.plate("rows", num_rows, dim=-2):
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.plate("items", num_items, dim=-1):
            pyro.sample("x", dist.Categorical(Vindex(probs)[z, item]), obs=data)


def bayesian(data: Tensor, num_classes: int = 2) -> None:
    """Binary items with Dirichlet(2, ..., 2) and Beta(2, 2) priors; probs (K, J) = P(x_nj = 1 | z_n = k)."""
    num_rows, num_items = data.shape
    two = torch.tensor(2.0, dtype=torch.float64)
    weights = pyro.sample("weights", dist.Dirichlet(two.repeat(num_classes)))
    with pyro.plate("classes", num_classes):
        probs = pyro.sample("probs", dist.Beta(two, two).expand([num_items]).to_event(1))
    item = torch.arange(num_items)
    with pyro.plate("rows", num_rows, dim=-2):
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.plate("items", num_items, dim=-1):
            pyro.sample("x", dist.Bernoulli(Vindex(probs)[z, item]), obs=data.double())
