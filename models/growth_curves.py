"""Clusters of growth curves: every curve follows one of K linear-Gaussian systems, which its class chooses.

    k_n ~ Categorical(weights)
    drifting     x_0 ~ N(start[k], spread[k]),  x_t ~ N(x_{t-1} + drift[k], q[k]),       y_t ~ N(x_t, r)
    reverting    x_0 ~ N(0, q[k]),              x_t ~ N(a[k] x_{t-1}, q[k]),             y_t ~ N(level[k] + x_t, r)

The level of a curve is a random walk, or an autoregression around a level of its class, so that curves of one class
need not look alike; classic mixtures of curves have a fixed mean curve instead. `data` is (N, T): N curves at T times.
`experts` has covariates of the curves, (N, C), that say which class is likely.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def simulate(num_curves: int = 24, num_steps: int = 12, seed: int = 0) -> Tensor:
    """Curves of three classes that rise, stay and fall, (N, T)."""
    return simulate_with_covariates(num_curves, num_steps, seed)[0]


def simulate_with_covariates(num_curves: int = 24, num_steps: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same with a constant and a covariate that is larger for curves that rise, (N, T) and (N, 2)."""
    g = torch.Generator().manual_seed(seed)
    k = torch.arange(num_curves) % 3
    drift = torch.tensor([0.8, 0.0, -0.5], dtype=torch.float64)[k]
    q = torch.tensor([0.3, 0.6, 0.2], dtype=torch.float64)[k]
    x = 1.0 + 0.5 * torch.randn(num_curves, generator=g, dtype=torch.float64)
    rows = []
    for _ in range(num_steps):
        rows.append(x + 0.4 * torch.randn(num_curves, generator=g, dtype=torch.float64))
        x = x + drift + q * torch.randn(num_curves, generator=g, dtype=torch.float64)
    covariate = drift + 0.5 * torch.randn(num_curves, generator=g, dtype=torch.float64)
    return torch.stack(rows, 1), torch.stack([torch.ones_like(covariate), covariate], 1)


def simulate_reverting(num_curves: int = 24, num_steps: int = 12, seed: int = 0) -> Tensor:
    """Curves that return to one of three levels, slowly, fast, or swinging around it, (N, T)."""
    g = torch.Generator().manual_seed(seed)
    k = torch.arange(num_curves) % 3
    level = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)[k]
    a = torch.tensor([0.9, 0.4, -0.6], dtype=torch.float64)[k]
    x, rows = torch.zeros(num_curves, dtype=torch.float64), []
    for _ in range(num_steps):
        x = a * x + 0.5 * torch.randn(num_curves, generator=g, dtype=torch.float64)
        rows.append(level + x + 0.3 * torch.randn(num_curves, generator=g, dtype=torch.float64))
    return torch.stack(rows, 1)


def _scale(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value.clone(), constraint=constraints.positive)


def _between(values: Tensor, num: int) -> Tensor:
    """Quantiles that lie in the middle of `num` parts."""
    return torch.quantile(values, (torch.arange(num, dtype=values.dtype) + 0.5) / num)


def drifting(data: Tensor, num_classes: int = 3) -> None:
    """Random walks whose drift, noise and start depend on the class."""
    weights = pyro.param(
        "weights", torch.full((num_classes,), 1 / num_classes).double(), constraint=constraints.simplex
    )
    _walks(data, num_classes, dist.Categorical(weights))


def experts(data: Tensor, covariates: Tensor, num_classes: int = 3) -> None:
    """The same, with classes by covariates."""
    beta = pyro.param("beta", covariates.new_zeros(covariates.shape[1], num_classes - 1))
    logits = torch.cat([covariates.new_zeros(len(covariates), 1), covariates @ beta], -1)
    _walks(data, num_classes, dist.Categorical(logits=logits))


def _walks(data: Tensor, num_classes: int, classes: dist.Categorical) -> None:
    steps = data.diff(dim=1)
    start = pyro.param("start", data[:, 0].mean().expand(num_classes).clone())
    drift = pyro.param("drift", _between(steps.mean(1), num_classes))
    spread = _scale("spread", data[:, 0].std().expand(num_classes))
    q, r = _scale("q", steps.std().expand(num_classes) / 2), _scale("r", steps.std() / 2)
    with pyro.plate("curves", len(data)):
        k = pyro.sample("k", classes)
        x = pyro.sample("x_0", dist.Normal(start[k], spread[k]))
        pyro.sample("y_0", dist.Normal(x, r), obs=data[:, 0])
        for t in pyro.markov(range(1, data.shape[1])):
            x = pyro.sample(f"x_{t}", dist.Normal(x + drift[k], q[k]))
            pyro.sample(f"y_{t}", dist.Normal(x, r), obs=data[:, t])


def reverting(data: Tensor, num_classes: int = 3) -> None:
    """Autoregressions around levels."""
    weights = pyro.param(
        "weights", torch.full((num_classes,), 1 / num_classes).double(), constraint=constraints.simplex
    )
    level = pyro.param("level", _between(data.mean(1), num_classes))
    a = pyro.param("a", torch.full((num_classes,), 0.8).double())
    q, r = _scale("q", data.diff(dim=1).std().expand(num_classes) / 2), _scale("r", data.diff(dim=1).std() / 2)
    with pyro.plate("curves", len(data)):
        k = pyro.sample("k", dist.Categorical(weights))
        x = torch.zeros(())
        for t in pyro.markov(range(data.shape[1])):
            x = pyro.sample(f"x_{t}", dist.Normal(a[k] * x, q[k]))
            pyro.sample(f"y_{t}", dist.Normal(level[k] + x, r), obs=data[:, t])
