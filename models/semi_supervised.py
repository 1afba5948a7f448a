"""Gaussian mixture with the class of some rows known.

    z_n ~ Categorical(weights),  x_n | z_n = k ~ N(loc_k, diag(scale_k²)),  label_n = z_n where it is known
    x (N, D), labels (N,) in 0..K-1, or -1 for unknown

Three ways of saying that a class is known for some rows:

    model       z is latent on every row, and the label is a second, noiseless observation of it: a Categorical with
                all its mass on z, masked where the label is unknown
    masked      z is observed where `obs_mask` says so
    restricted  a row may have any class of a set of its own: a factor that is 0 there and -inf elsewhere

The mass of a known class enters as logits, log 1 = 0 and log 0 = -inf, because torch clamps `probs` and a known class
must be sure.

Unknown labels must be missing at random. Data: Fisher's iris with every tenth species known (`load`).
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


def load() -> tuple[Tensor, Tensor]:
    """Four measures of 150 irises in cm (150, 4); the species 0..2 of every tenth, -1 for the rest (150,)."""
    with open(DATA / "iris.csv", newline="") as file:
        _, *rows = csv.reader(file)
    species = sorted({row[-1] for row in rows})
    labels = torch.tensor([species.index(row[-1]) for row in rows])
    known = torch.arange(len(rows)) % 10 == 0
    measures = torch.tensor([[float(cell) for cell in row[:-1]] for row in rows], dtype=torch.float64)
    return measures, labels.where(known, -1)


def simulate(num_rows: int = 300, num_classes: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit Gaussians 4 apart in the plane; one label in ten known, and at least one a class. (N, 2), (N,)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(num_rows) % num_classes
    noise = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    known = torch.rand(num_rows, generator=generator) < 0.1
    known[:num_classes] = True
    return 4.0 * truth.unsqueeze(-1) + noise, truth.where(known, -1)


def _class_means(data: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean of the known rows of each class, with the overall mean counted as one more row. (K, D)."""
    data = data.double()
    overall = data.mean(0)
    sums = torch.stack([data[labels == k].sum(0) for k in range(num_classes)])
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes).unsqueeze(-1)
    return (sums + overall) / (counts + 1)


def load_restricted() -> tuple[Tensor, Tensor]:
    """The irises, and which of the three species each may be (150, 3): one was ruled out for every second row."""
    measures, labels = load()
    allowed = torch.nn.functional.one_hot(labels.clamp(min=0), 3).bool() | (labels < 0).unsqueeze(-1)
    rows = torch.arange(len(labels))
    excluded = (rows // 50 + 1) % 3
    allowed[(rows % 2 == 1) & (labels < 0), excluded[(rows % 2 == 1) & (labels < 0)]] = False
    return measures, allowed


def _parameters(data: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    start = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    weights = pyro.param("weights", start, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: _class_means(data, labels, num_classes))
    scale = pyro.param(
        "scale",
        lambda: data.double().std(0, correction=0).repeat(num_classes, 1),
        constraint=constraints.positive,
    )
    return weights, loc, scale


def model(data: Tensor, labels: Tensor, num_classes: int = 3) -> None:
    """Start: equal weights, means from the known rows, overall scales."""
    weights, loc, scale = _parameters(data, labels, num_classes)
    certain = torch.eye(num_classes, dtype=torch.float64).log()
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=data)
        with pyro.poutine.mask(mask=labels >= 0):
            # Masked labels are never scored, but the value must lie in the support.
            pyro.sample("label", dist.Categorical(logits=certain[z]), obs=labels.clamp(min=0))


def masked(data: Tensor, labels: Tensor, num_classes: int = 3) -> None:
    """The same model, the class observed in place where it is known."""
    weights, loc, scale = _parameters(data, labels, num_classes)
    with pyro.plate("rows", len(data)):
        # What stands in place of an unknown label is never scored, but must lie in the support.
        z = pyro.sample("z", dist.Categorical(weights), obs=labels.clamp(min=0), obs_mask=labels >= 0)
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=data)


def restricted(data: Tensor, allowed: Tensor) -> None:
    """Class in the set `allowed` (N, K) of the row; sets of one class are labels. Start as above, from these."""
    labels = allowed.long().argmax(-1).where(allowed.sum(-1) == 1, -1)
    weights, loc, scale = _parameters(data, labels, allowed.shape[-1])
    with pyro.plate("rows", len(data)) as row:
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.factor("allowed", allowed.double().log()[row, z])
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=data)
