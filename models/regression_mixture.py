"""Mixtures of regressions: several unseen groups, in each of which the response depends on covariates differently.

    z_n ~ Categorical(weights),    η_nk = intercept_k + x_nᵀ slope_k         x (N, P), intercept (K,), slope (K, P)

    `linear`    y_n | z_n = k ~ Normal(η_nk, scale_k)
    `poisson`   y_n | z_n = k ~ Poisson(exp η_nk)
    `logistic`  y_n | z_n = k ~ Binomial(trials_n, sigmoid η_nk)
    `parallel`  as `poisson`, with one slope (P,) for all groups
    `experts`   as `linear`, with the group's probability depending on x: softmax of [0, gate_intercept + xᵀ gate]
    `concomitant`  as `poisson`, with the group's probability depending on other covariates c (N, Q) in that way

Without covariates these are mixtures of one intercept each. Slopes and intercepts are parameters of their own.

Data: NO concentration in engine exhaust by equivalence ratio (Brinkman 1981), patents of 70 companies by their
spending on research (Wang, Cockburn and Puterman 1998), faults in rolls of fabric by their length (Aitkin 1996).
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


def _read(file: str, *columns: str) -> Tensor:
    with open(DATA / file, newline="") as lines:
        rows = [[float(row[column]) for column in columns] for row in csv.DictReader(lines)]
    return torch.tensor(rows, dtype=torch.float64)


def load() -> tuple[Tensor, Tensor]:
    """Equivalence ratio (88,), and concentration of nitric oxide (88, 1)."""
    table = _read("brinkman_no.csv", "Equivalence", "NO")
    return table[:, 0], table[:, 1:]


def load_patents() -> tuple[Tensor, Tensor, Tensor]:
    """Patents (70,), logarithm of the spending on research (70, 1), spending per sales (70, 1)."""
    table = _read("patents.csv", "Patents", "lgRD", "RDS")
    return table[:, 0], table[:, 1:2], table[:, 2:]


def load_fabric() -> tuple[Tensor, Tensor]:
    """Faults (32,), and logarithm of the length (32, 1) of each roll."""
    table = _read("fabric_faults.csv", "Faults", "Length")
    return table[:, 0], table[:, 1:].log()


def simulate(
    num_rows: int = 300, num_covariates: int = 2, *, family: str = "linear", seed: int = 0
) -> tuple[Tensor, ...]:
    """Two groups with slopes of opposite sign. Response (N,), covariates (N, P); trials (N,) for `logistic`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_covariates, generator=generator, dtype=torch.float64)
    z = torch.randint(2, (num_rows,), generator=generator)
    eta = torch.tensor([-0.5, 1.0], dtype=torch.float64)[z] + (1 - 2 * z) * x.sum(-1) / num_covariates
    if family == "linear":
        return eta + 0.3 * torch.randn(num_rows, generator=generator, dtype=torch.float64), x
    if family == "poisson":
        return torch.poisson(eta.exp(), generator=generator), x
    trials = torch.full((num_rows,), 10.0, dtype=torch.float64)
    return torch.binomial(trials, eta.sigmoid(), generator=generator), x, trials


def _weights(num_components: int) -> Tensor:
    start = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
    return pyro.param("weights", start, constraint=constraints.simplex)


def _lines(center: Tensor, spread: Tensor, num_components: int, num_covariates: int) -> tuple[Tensor, Tensor]:
    """Start: flat lines evenly spaced around the centre of the response, slopes of alternating sign."""
    sign = 1.0 - 2.0 * (torch.arange(num_components, dtype=torch.float64) % 2)
    slope = pyro.param("slope", lambda: 0.1 * spread * sign.unsqueeze(-1).repeat(1, num_covariates))
    return _levels(center, spread, num_components), slope


def _levels(center: Tensor, spread: Tensor, num_components: int) -> Tensor:
    steps = (2 * torch.arange(num_components, dtype=torch.float64) + 1) / num_components - 1
    return pyro.param("intercept", lambda: center + spread * steps)


def linear(y: Tensor, x: Tensor, num_components: int = 2) -> None:
    """Start: lines evenly spaced over the response, scales the spread of all responses."""
    weights = _weights(num_components)
    intercept, slope = _lines(y.mean(), y.std(), num_components, x.shape[-1])
    scale = pyro.param("scale", lambda: y.std().repeat(num_components), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(intercept[z] + (x * slope[z]).sum(-1), scale[z]), obs=y)


def poisson(y: Tensor, x: Tensor, num_components: int = 2) -> None:
    """Start: rates a factor of e around the mean count."""
    weights = _weights(num_components)
    intercept, slope = _lines(y.mean().log(), torch.ones(()).double(), num_components, x.shape[-1])
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Poisson((intercept[z] + (x * slope[z]).sum(-1)).exp()), obs=y)


def parallel(y: Tensor, x: Tensor, num_components: int = 2) -> None:
    """Start: as `poisson`, slopes zero."""
    weights = _weights(num_components)
    intercept = _levels(y.mean().log(), torch.ones(()).double(), num_components)
    slope = pyro.param("slope", lambda: x.new_zeros(x.shape[-1]))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Poisson((intercept[z] + x @ slope).exp()), obs=y)


def logistic(y: Tensor, x: Tensor, trials: Tensor, num_components: int = 2) -> None:
    """Start: odds a factor of e around those of all trials."""
    weights = _weights(num_components)
    odds = (y.sum() + 1) / (trials.sum() - y.sum() + 1)
    intercept, slope = _lines(odds.log(), torch.ones(()).double(), num_components, x.shape[-1])
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Binomial(trials, logits=intercept[z] + (x * slope[z]).sum(-1)), obs=y)


def _gate(covariates: Tensor, num_components: int) -> Tensor:
    """Logits (N, K) of the groups, the first one the reference."""
    base = pyro.param("gate_intercept", lambda: covariates.new_zeros(num_components - 1))
    gate = pyro.param("gate", lambda: covariates.new_zeros(covariates.shape[-1], num_components - 1))
    return torch.cat([covariates.new_zeros(len(covariates), 1), base + covariates @ gate], -1)


def experts(y: Tensor, x: Tensor, num_components: int = 2) -> None:
    """Start: as `linear`, a gate that does not depend on the covariates."""
    logits = _gate(x, num_components)
    intercept, slope = _lines(y.mean(), y.std(), num_components, x.shape[-1])
    scale = pyro.param("scale", lambda: y.std().repeat(num_components), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(logits=logits))
        pyro.sample("y", dist.Normal(intercept[z] + (x * slope[z]).sum(-1), scale[z]), obs=y)


def concomitant(y: Tensor, x: Tensor, c: Tensor, num_components: int = 3) -> None:
    """Start: as `poisson`, a gate that does not depend on the covariates."""
    logits = _gate(c, num_components)
    intercept, slope = _lines(y.mean().log(), torch.ones(()).double(), num_components, x.shape[-1])
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(logits=logits))
        pyro.sample("y", dist.Poisson((intercept[z] + (x * slope[z]).sum(-1)).exp()), obs=y)
