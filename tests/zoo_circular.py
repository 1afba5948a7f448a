"""Models of angles for the table of problems: a mixture, and animals whose steps and turns tell what they are doing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import markov

SHORT = "short chains are smoothed by LAPACK's band solver, which only the CPU has"
simplex, positive = constraints.simplex, constraints.positive


def uniform(*shape: int) -> Tensor:
    return torch.full(shape, 1.0 / shape[-1])


def angle_mixture(y: Tensor, K: int = 2) -> None:
    w = pyro.param("w", uniform(K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K))
    kappa = pyro.param("kappa", torch.ones(K), constraint=positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.VonMises(mu[z], kappa[z]), obs=y)


def angles_map(y: Tensor, K: int = 2) -> None:
    """Directions with a von Mises prior, and one concentration."""
    w = pyro.param("w", uniform(K), constraint=simplex)
    kappa = pyro.param("kappa", torch.tensor(1.0), constraint=positive)
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.VonMises(torch.tensor(1.0), torch.tensor(2.0)))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.VonMises(mu[z], kappa), obs=y)


def movement(step: Tensor, angle: Tensor, K: int = 2) -> None:
    """Animals (T, N) rest or travel: lengths of their steps, and angles by which they turn."""
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    shape = pyro.param("shape", torch.ones(K), constraint=positive)
    rate = pyro.param("rate", torch.ones(K), constraint=positive)
    mu = pyro.param("mu", torch.zeros(K))
    kappa = pyro.param("kappa", torch.ones(K), constraint=positive)
    with pyro.plate("sequences", step.shape[1]):
        z = torch.tensor(0)
        for t in markov(len(step)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"step_{t}", dist.Gamma(shape[z], rate[z]), obs=step[t])
            pyro.sample(f"angle_{t}", dist.VonMises(mu[z], kappa[z]), obs=angle[t])


def problems(problem: Callable[..., Any], t: Callable[[Any], Tensor]) -> list[Any]:
    """Rows of the table."""
    rng = np.random.default_rng(21)
    angles = t(np.concatenate([rng.vonmises(3.0, 4.0, 25), rng.vonmises(0.5, 2.0, 20)]))
    travels = rng.random((3, 8)) < 0.5
    step = t(rng.gamma(2.0, np.where(travels, 2.0, 0.3)))
    turn = t(np.where(travels, rng.vonmises(0.0, 3.0, (3, 8)), rng.vonmises(np.pi, 1.0, (3, 8))))
    w, mu, kappa = t([0.4, 0.6]), t([2.5, 0.8]), t([1.5, 2.0])
    moving = {"A": t([[0.7, 0.3], [0.4, 0.6]]), "shape": t([1.5, 2.0]), "rate": t([2.0, 0.6])}
    return [
        problem("angle_mixture", angle_mixture, (angles,), {"w": w, "mu": mu, "kappa": kappa}, "rows"),
        problem(
            "movement",
            movement,
            (step, turn),
            {**moving, "mu": mu, "kappa": kappa},
            "sequences",
            closed=False,
            rounds=SHORT,
        ),
    ]
