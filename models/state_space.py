"""Linear-Gaussian state-space models: local level, trend and seasonal, dynamic factors, linear dynamical system.

    z_t = z_{t-1} F + N(0, Q),      y_t = z_t H + N(0, R),      t = 1..T

written with Pyro's `GaussianHMM`, whose initial state z_0 comes before the first transition. The states are
integrated out by the distribution, so that series of any length are one sample site. `data` is one series: (T,)
for the structural models, (T, P) for the others, or S series (S, T, P) for `lds`.

Data: annual flow of the Nile at Aswan, 1871-1970 (Cobb 1978; Durbin and Koopman 2012, chapter 2).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> Tensor:
    """Annual flow of the Nile, 10⁸ m³. (100,)."""
    return torch.from_numpy(np.loadtxt(DATA / "nile.csv", delimiter=",", skiprows=1, usecols=1))


def simulate(num_steps: int = 60, num_series: int | None = None, *, num_observed: int = 1, seed: int = 0) -> Tensor:
    """A slowly rotating state seen through noise: (T,), (T, P) if `num_observed` > 1, (S, T, P) if `num_series`."""
    g = torch.Generator().manual_seed(seed)
    S = num_series or 1
    turn = 0.95 * torch.tensor([[math.cos(0.3), math.sin(0.3)], [-math.sin(0.3), math.cos(0.3)]], dtype=torch.float64)
    H = torch.randn(2, num_observed, generator=g, dtype=torch.float64)
    z = torch.randn(S, 2, generator=g, dtype=torch.float64)
    steps = []
    for _ in range(num_steps):
        z = z @ turn + 0.5 * torch.randn(S, 2, generator=g, dtype=torch.float64)
        steps.append(z @ H + 0.5 * torch.randn(S, num_observed, generator=g, dtype=torch.float64))
    data = torch.stack(steps, 1)
    if num_series is None:
        return data[0, :, 0] if num_observed == 1 else data[0]
    return data


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64)


def _spread(data: Tensor) -> Tensor:
    return data.double().std(correction=0)


def _scale(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value.clone(), constraint=constraints.positive)


def local_level(data: Tensor) -> None:
    """A random walk seen through noise; the first observation is conditioned on, which is the exact diffuse start."""
    level, noise = _scale("level", 0.5 * _spread(data)), _scale("noise", 0.5 * _spread(data))
    # A flat prior on the first level and the first observation leave N(y_1, noise²) for the state before y_2.
    first = dist.Normal(data[:1].double(), noise).to_event(1)
    step, error = (dist.Normal(_zeros(1), scale).to_event(1) for scale in (level, noise))
    rest = data[1:].unsqueeze(-1)
    pyro.sample("y", dist.GaussianHMM(first, _eye(1), step, _eye(1), error, duration=len(rest)), obs=rest)


def structural(data: Tensor, period: int = 4, harmonics: int = 1) -> None:
    """Local linear trend and a trigonometric seasonal (Harvey 1989, section 2.3), in all 2 + 2·harmonics states.

    The level moves by the slope, each harmonic j turns by 2πj/period; both states of a harmonic, and all
    harmonics, share one scale.
    """
    n = 2 + 2 * harmonics
    start = 0.3 * _spread(data)
    level, slope, season = _scale("level", start), _scale("slope", 0.1 * start), _scale("season", 0.3 * start)
    noise = _scale("noise", start)
    F, H = _eye(n), torch.zeros(n, 1, dtype=torch.float64)
    F[1, 0], H[0, 0] = 1.0, 1.0
    for j in range(harmonics):
        angle, at = 2 * math.pi * (j + 1) / period, 2 + 2 * j
        F[at, at], F[at, at + 1], F[at + 1, at], F[at + 1, at + 1] = (
            math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle),
        )  # fmt: skip
        H[at, 0] = 1.0
    scales = torch.cat([level.reshape(1), slope.reshape(1), season.expand(2 * harmonics)])
    mean = torch.cat([data[:1].double(), _zeros(n - 1)])
    first = dist.Normal(mean, 10 * _spread(data) * torch.ones(n, dtype=torch.float64)).to_event(1)
    step, error = dist.Normal(_zeros(n), scales).to_event(1), dist.Normal(_zeros(1), noise).to_event(1)
    pyro.sample("y", dist.GaussianHMM(first, F, step, H, error, duration=len(data)), obs=data.unsqueeze(-1))


def dynamic_factor(data: Tensor, num_factors: int = 1) -> None:
    """P series driven by K autoregressive factors with innovations of variance 1; their own noises are independent.

    The loadings are free: factors are determined up to their signs and (if they move alike) rotations.
    """
    P, K = data.shape[-1], num_factors
    spread = data.double().std(0, correction=0)
    tilt = 1 + torch.arange(K, dtype=torch.float64).unsqueeze(-1) * torch.linspace(-1, 1, P, dtype=torch.float64)
    loadings = pyro.param("loadings", 0.5 * spread * tilt)
    persistence = pyro.param("persistence", torch.linspace(0.5, 0.3, K, dtype=torch.float64))
    noise = _scale("noise", 0.7 * spread)
    first, step = (dist.Normal(_zeros(K), 1.0).to_event(1) for _ in range(2))
    error = dist.Normal(_zeros(P), noise).to_event(1)
    fn = dist.GaussianHMM(first, torch.diag(persistence), step, loadings, error, duration=len(data))
    pyro.sample("y", fn, obs=data)


def lds(data: Tensor, num_states: int = 2) -> None:
    """Linear dynamical system with every matrix free; the states are determined up to a linear map."""
    D, P = num_states, data.shape[-1]
    variance = data.double().reshape(-1, P).var(0, correction=0)
    F = pyro.param("F", 0.9 * _eye(D) + 0.1 * torch.triu(torch.ones(D, D, dtype=torch.float64), 1))
    H = pyro.param("H", variance.sqrt() * torch.cos(torch.outer(1.0 + torch.arange(D), 1.0 + torch.arange(P)).double()))
    Q = pyro.param("Q", 0.5 * _eye(D), constraint=constraints.positive_definite)
    R = pyro.param("R", 0.5 * torch.diag(variance), constraint=constraints.positive_definite)
    first = dist.Normal(_zeros(D), 1.0).to_event(1)
    step, error = dist.MultivariateNormal(_zeros(D), Q), dist.MultivariateNormal(_zeros(P), R)
    with pyro.plate("series", len(data)) if data.dim() == 3 else nullcontext():
        pyro.sample("y", dist.GaussianHMM(first, F, step, H, error, duration=data.shape[-2]), obs=data)
