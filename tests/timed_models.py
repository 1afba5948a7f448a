"""Loops over time whose densities are evaluated row by row, as models of (y, x, seen): data, covariate, mask, (T, N).

Longer histories, covariates in emissions and transitions, autoregression, sites that look back at earlier states,
families without a natural form, latents outside of the loop.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em

simplex, positive = constraints.simplex, constraints.positive


def rows(*shape: int, seed: int = 0) -> Tensor:
    table = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    return table / table.sum(-1, keepdim=True)


def second_order(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """The state looks two steps back; Student's t with known shape, which is no natural family."""
    pi, A = pyro.param("pi", rows(2), constraint=simplex), pyro.param("A", rows(2, 2, seed=1), constraint=simplex)
    C = pyro.param("C", rows(2, 2, 2, seed=2), constraint=simplex)
    p = pyro.param("p", torch.tensor([0.3, 0.6]), constraint=constraints.unit_interval)
    with pyro.plate("series", y.shape[1]):
        before = z = None
        for t in pyro_em.markov(len(y), history=2):
            table = pi if z is None else A[z] if before is None else Vindex(C)[before, z]
            with poutine.mask(mask=seen[t]):
                before, z = z, pyro.sample(f"z_{t}", dist.Categorical(table))
                pyro.sample(f"y_{t}", dist.NegativeBinomial(4.0, probs=p[z]), obs=y[t].abs().round())


def third_order_mixture(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """Three steps back, and a component that no later step reads."""
    A = pyro.param("A", rows(2, 2, 2, 2, seed=1), constraint=simplex)
    share, mu = pyro.param("share", rows(2, 2), constraint=simplex), pyro.param("mu", torch.tensor([[-1.0, 1], [3, 6]]))
    with pyro.plate("series", y.shape[1]):
        z = [torch.tensor(0)] * 3
        for t in pyro_em.markov(len(y), history=3):
            z = [*z[1:], pyro.sample(f"z_{t}", dist.Categorical(Vindex(A)[z[0], z[1], z[2]]))]
            with poutine.mask(mask=seen[t]):
                c = pyro.sample(f"c_{t}", dist.Categorical(share[z[-1]]))
                pyro.sample(f"y_{t}", dist.Normal(Vindex(mu)[z[-1], c], 1.0), obs=y[t])


def autoregression(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """Intercepts, coefficients and scales switch; covariates in the mean."""
    A = pyro.param("A", rows(2, 2), constraint=simplex)
    a, b = pyro.param("a", torch.tensor([0.0, 2.0])), pyro.param("b", torch.tensor([0.1, 0.3]))
    slope = pyro.param("slope", torch.tensor([0.1, -0.1]))
    sd = pyro.param("sd", torch.tensor([1.0, 1.3]), constraint=positive)
    past = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
    with pyro.plate("series", y.shape[1]):
        z = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            with poutine.mask(mask=seen[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                pyro.sample(f"y_{t}", dist.Normal(a[z] + b[z] * past[t] + slope[z] * x[t], sd[z]), obs=y[t])


def deviations(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """Hamilton's form of order two: what the mean of each earlier state was is carried over."""
    pi, A = pyro.param("pi", rows(2), constraint=simplex), pyro.param("A", rows(2, 2, seed=1), constraint=simplex)
    mu, sd = pyro.param("mu", torch.tensor([0.0, 3.0])), pyro.param("sd", torch.tensor(1.2), constraint=positive)
    with pyro.plate("series", y.shape[1]):
        z: list[Any] = []
        for t in pyro_em.markov(len(y), history=2):
            z.append(pyro.sample(f"z_{t}", dist.Categorical(A[z[-1]] if z else pi)))
            if len(z) > 2:
                past = 0.5 * (y[t - 1] - mu[z[-2]]) - 0.2 * (y[t - 2] - mu[z[-3]])
                pyro.sample(f"y_{t}", dist.Normal(mu[z[-1]] + past, sd), obs=y[t])


def counts(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """Poisson regressions of two coupled chains, one rate each; each chain has two observed sites of its own kind."""
    A = pyro.param("A", rows(2, 2), constraint=simplex)
    B = pyro.param("B", rows(2, 2, 2, seed=1), constraint=simplex)
    a, b = pyro.param("a", torch.tensor([0.0, 1.0])), pyro.param("b", torch.tensor([0.1, -0.1]))
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    with pyro.plate("series", y.shape[1]):
        u = v = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            u = pyro.sample(f"u_{t}", dist.Categorical(A[u]))
            v = pyro.sample(f"v_{t}", dist.Categorical(Vindex(B)[v, u]))
            with poutine.mask(mask=seen[t]):
                pyro.sample(f"n_{t}", dist.Poisson((a[u] + b[u] * x[t]).exp()), obs=y[t].abs().round())
                pyro.sample(f"y_{t}", dist.Normal(mu[v], 1.0), obs=y[t])


def gated(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """Transitions depend on a covariate: a table for every step; three states."""
    offset, slope = pyro.param("offset", torch.eye(3)), pyro.param("slope", 0.1 * torch.eye(3))
    mu, sd = pyro.param("mu", torch.tensor([0.0, 1.5, 3.0])), pyro.param("sd", torch.ones(3), constraint=positive)
    with pyro.plate("series", y.shape[1]):
        z = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            with poutine.mask(mask=seen[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=offset[z] + slope[z] * x[t].unsqueeze(-1)))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], sd[z]), obs=y[t])


def gate_of_two(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """(1 - sigmoid, sigmoid) is a softmax, and Newton's."""
    offset, slope = pyro.param("offset", torch.tensor([-1.0, 1.0])), pyro.param("slope", torch.zeros(2))
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    with pyro.plate("series", y.shape[1]):
        z = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            high = torch.sigmoid(offset[z] + slope[z] * x[t])
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.stack([1 - high, high], -1)))
            with poutine.mask(mask=seen[t]):
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])


def outside(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """The state before the first one and a kind of each series stand outside of the loop; the kind has data of its own,
    chooses the transitions and shifts the means."""
    w, pi = pyro.param("w", rows(3), constraint=simplex), pyro.param("pi", rows(3, 2), constraint=simplex)
    A = pyro.param("A", rows(3, 2, 2, seed=1), constraint=simplex)
    mu, by_kind = pyro.param("mu", torch.tensor([0.0, 3.0])), pyro.param("by_kind", torch.tensor([-0.5, 0.0, 0.4]))
    items = pyro.plate("items", 2, dim=-1)
    with pyro.plate("series", y.shape[1], dim=-2):
        c = pyro.sample("c", dist.Categorical(w))
        with items:
            pyro.sample("age", dist.Normal(by_kind[c], 1.0), obs=x[:2].mT)
        z = pyro.sample("z_before", dist.Categorical(pi[c]))
        for t in pyro_em.markov(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(A)[c, z]))
            with poutine.mask(mask=seen[t].unsqueeze(-1)):
                pyro.sample(f"y_{t}", dist.Normal(mu[z] + by_kind[c], 1.0), obs=y[t].unsqueeze(-1))


def kinds(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """A kind of each series that only its transitions read; two steps back."""
    w, C = pyro.param("w", rows(2), constraint=simplex), pyro.param("C", rows(2, 2, 2, 2, seed=2), constraint=simplex)
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    with pyro.plate("series", y.shape[1]):
        c = pyro.sample("c", dist.Categorical(w))
        before = z = torch.tensor(0)
        for t in pyro_em.markov(len(y), history=2):
            before, z = z, pyro.sample(f"z_{t}", dist.Categorical(Vindex(C)[c, before, z]))
            with poutine.mask(mask=seen[t]):
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])


MODELS = [outside, kinds, second_order, third_order_mixture, autoregression, deviations, counts, gated, gate_of_two]
GATED = (gated, gate_of_two)
