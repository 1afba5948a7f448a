"""Models with a `pyro_em.markov` loop for the table of problems; time is the first dim of their data.

In plain Pyro, where the oracles run them, the loop is `pyro.markov(range(T))`.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_em import markov

simplex, positive = constraints.simplex, constraints.positive


def uniform(*shape: int) -> Tensor:
    return torch.full(shape, 1.0 / shape[-1])


def ragged(y: Tensor, seen: Tensor, K: int = 2) -> None:
    """Normal emissions of sequences (T, N), some of them shorter: `seen` (T, N) is true up to their end."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K))
    sd = pyro.param("sd", torch.ones(K), constraint=positive)
    with pyro.plate("sequences", y.shape[1]):
        z = None
        for t in markov(len(y)):
            with poutine.mask(mask=seen[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], sd[z]), obs=y[t])


def factorial(y: Tensor, K: int = 2) -> None:
    """Two chains behind one series (Ghahramani and Jordan 1997)."""
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    B = pyro.param("B", uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K, K))
    with pyro.plate("sequences", y.shape[1]):
        u, v = torch.tensor(0), torch.tensor(1)
        for t in markov(len(y)):
            u = pyro.sample(f"u_{t}", dist.Categorical(A[u]))
            v = pyro.sample(f"v_{t}", dist.Categorical(B[v]))
            pyro.sample(f"y_{t}", dist.Normal(mu[u, v], 1.0), obs=y[t])


def mixture(y: Tensor, K: int = 2) -> None:
    """Emissions are mixtures of two normals; which of them is a latent that no later step reads."""
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    share = pyro.param("share", uniform(K, 2), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K, 2))
    with pyro.plate("sequences", y.shape[1]):
        z = torch.tensor(0)
        for t in markov(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            c = pyro.sample(f"c_{t}", dist.Categorical(share[z]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(mu)[z, c], 0.7), obs=y[t])


def second_order(words: Tensor, K: int = 2, V: int = 3) -> None:
    """Symbols (T, N); the state depends on the two before it."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    C = pyro.param("C", uniform(K, K, K), constraint=simplex)
    B = pyro.param("B", uniform(K, V), constraint=simplex)
    with pyro.plate("sequences", words.shape[1]):
        before, z = None, None
        for t in markov(len(words), history=2):
            probs = pi if z is None else A[z] if before is None else Vindex(C)[before, z]
            before, z = z, pyro.sample(f"z_{t}", dist.Categorical(probs))
            pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=words[t])


def switching(y: Tensor, x: Tensor) -> None:
    """Markov-switching autoregression around state means (Hamilton 1989), gated by a covariate x (T, 1)."""
    stay = pyro.param("stay", torch.zeros(2))
    mu = pyro.param("mu", torch.zeros(2))
    with pyro.plate("sequences", y.shape[1]):
        before, z = None, None
        for t in markov(range(len(y))):
            if z is None:
                z = pyro.sample(f"z_{t}", dist.Categorical(uniform(2)))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])
            else:
                high = torch.sigmoid(stay[z] + x[t])
                probs = torch.stack([1 - high, high], -1)
                before, z = z, pyro.sample(f"z_{t}", dist.Categorical(probs))
                pyro.sample(f"y_{t}", dist.Normal(mu[z] + 0.4 * (y[t - 1] - mu[before]), 1.0), obs=y[t])


def autoregression(y: Tensor) -> None:
    """The weight of the value before is that of the state before; one scale."""
    A = pyro.param("A", uniform(2, 2), constraint=simplex)
    a, phi = pyro.param("a", torch.zeros(2)), pyro.param("phi", torch.zeros(2))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("sequences", y.shape[1]):
        before, z = None, None
        for t in markov(len(y)):
            if z is None:
                z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([0.6, 0.4])))
                pyro.sample(f"y_{t}", dist.Normal(a[z], sd), obs=y[t])
            else:
                before, z = z, pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                pyro.sample(f"y_{t}", dist.Normal(a[z] + phi[before] * y[t - 1], sd), obs=y[t])


def kinds_of_chains(y: Tensor, K: int = 2) -> None:
    """Every sequence is of one of two kinds, which keep to a state or change it."""
    w = pyro.sample("w", dist.Dirichlet(2.0 * torch.ones(2)))
    A = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.2, 0.8], [0.8, 0.2]]])
    mu = pyro.param("mu", torch.zeros(K))
    with pyro.plate("sequences", y.shape[1]):
        kind = pyro.sample("kind", dist.Categorical(w))
        z = torch.zeros_like(kind)
        for t in markov(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(A)[kind, z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])
