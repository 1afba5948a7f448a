"""Chains by `pyro.markov`, with data and a start each, for the grouped engine.

`CASES` has, by name: the model, its arguments, a start, and weights of the sequences.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

simplex, positive = constraints.simplex, constraints.positive


def uniform(*shape: int) -> Tensor:
    return torch.full(shape, 1.0 / shape[-1])


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2
    return table / table.sum(-1, keepdim=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def digits(*shape: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def hmm(y: Tensor, K: int = 3) -> None:
    """One sequence (T, D) without any plate."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K, y.shape[-1]))
    L = pyro.param("L", torch.eye(y.shape[-1]).repeat(K, 1, 1), constraint=constraints.lower_cholesky)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"y_{t}", dist.MultivariateNormal(mu[z], scale_tril=L[z]), obs=y[t])


def poisson_hmm(y: Tensor, exposure: Tensor, K: int = 2) -> None:
    """Rates scaled by an exposure that changes with time."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    rate = pyro.param("rate", 1.0 + torch.arange(K), constraint=positive)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"y_{t}", dist.Poisson(exposure[t] * rate[z]), obs=y[t])


def changing(words: Tensor, K: int = 2, V: int = 3) -> None:
    """Sequences (N, T); every step has a transition table of its own."""
    N, T = words.shape
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(T - 1, K, K), constraint=simplex)
    B = pyro.param("B", uniform(K, V), constraint=simplex)
    z = None
    with pyro.plate("sequences", N):
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[t - 1][z]))
            pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=words[:, t])


def autoregressive(y: Tensor, K: int = 2) -> None:
    """The data of a step depend on two neighbouring states."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K, K))
    with pyro.plate("sequences", len(y)):
        z = pyro.sample("z_0", dist.Categorical(pi))
        for t in pyro.markov(range(1, y.shape[1])):
            before, z = z, pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(mu)[before, z], 1.0), obs=y[:, t])


def tones(on: Tensor, K: int = 2) -> None:
    """Sequences (N, T, M) of M binary tones, in a plate inside of the sequences."""
    N, T, M = on.shape
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    p = pyro.param("p", torch.full((K, M), 0.5), constraint=constraints.unit_interval)
    tone = pyro.plate("tones", M, dim=-1)
    z = None
    with pyro.plate("sequences", N, dim=-2):
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            with tone as m:
                pyro.sample(f"x_{t}", dist.Bernoulli(Vindex(p)[z, m]), obs=on[:, t])


def one_by_one(y: Tensor, K: int = 2) -> None:
    """Sequences in a Python loop: every one is a component of its own."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K))
    for i in range(len(y)):
        z = None
        for t in pyro.markov(range(y.shape[1] - i % 2)):
            z = pyro.sample(f"z_{i}_{t}", dist.Categorical(pi if z is None else A[z]))
            pyro.sample(f"y_{i}_{t}", dist.Normal(mu[z], 1.0), obs=y[i, t])


def ragged(y: Tensor, lengths: Tensor, K: int = 2) -> None:
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K))
    z = None
    with pyro.plate("sequences", len(y)):
        for t in pyro.markov(range(y.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):  # type: ignore[call-overload]
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[:, t])


def factorial(y: Tensor) -> None:
    """Two chains that share the data: no chain, so the general path."""
    A = pyro.param("A", uniform(2, 2), constraint=simplex)
    B = pyro.param("B", uniform(2, 2), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(2, 2))
    a = b = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        a = pyro.sample(f"a_{t}", dist.Categorical(A[a]))
        b = pyro.sample(f"b_{t}", dist.Categorical(B[b]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(mu)[a, b], 1.0), obs=y[t])


def scaled(y: Tensor) -> None:
    """Scaled, with a hidden family whose factor cannot move, and data that no latent reaches."""
    A = pyro.param("A", uniform(2, 2), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(2))
    level = pyro.param("level", torch.zeros(()))
    z = torch.tensor(0)
    with pyro.poutine.scale(scale=2.5):
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])
            pyro.sample(f"s_{t}", dist.Gumbel(z * 1.0, 1.0), obs=y[t].remainder(3.0))
            pyro.sample(f"c_{t}", dist.Normal(level, 1.0), obs=y[t])


LEFT_RIGHT = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64)
START3 = {
    "pi": rows(3),
    "A": rows(3, 3),
    "mu": normal(3, 2),
    "L": torch.eye(2, dtype=torch.float64).repeat(3, 1, 1),
}
_start2 = {"pi": rows(2), "A": rows(2, 2, seed=1)}
_series = normal(6, 7, seed=2)
_lengths = torch.tensor([7, 1, 4, 0, 6, 7])
_means = {"mu": torch.tensor([-0.5, 1.0], dtype=torch.float64)}

CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Tensor], dict[str, Tensor] | None]] = {
    "hmm": (hmm, (normal(40, 2),), START3, None),
    "two steps": (
        poisson_hmm,
        (torch.tensor([2.0, 6.0]), torch.ones(2)),
        {**_start2, "rate": torch.tensor([2.0, 5.0], dtype=torch.float64)},
        None,
    ),
    "left-right": (
        hmm,
        (normal(30, 2) + 3.0 * (torch.arange(30) // 10 - 1.0).unsqueeze(-1),),
        {
            **START3,
            "A": LEFT_RIGHT,
            "pi": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
            "mu": torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], dtype=torch.float64),
        },
        None,
    ),
    "poisson": (
        poisson_hmm,
        (digits(50, below=9).double(), 0.5 + rows(50) * 50),
        {**_start2, "rate": torch.tensor([2.0, 5.0], dtype=torch.float64)},
        None,
    ),
    "changing": (
        changing,
        (digits(5, 6, below=3),),
        {"pi": rows(2), "A": rows(5, 2, 2), "B": rows(2, 3, seed=3)},
        None,
    ),
    "autoregressive": (autoregressive, (_series,), {**_start2, "mu": normal(2, 2, seed=5)}, None),
    "tones": (
        tones,
        (digits(4, 5, 3, below=2).double(),),
        {**_start2, "p": 0.2 + 0.6 * rows(2, 3)},
        {"sequences": torch.tensor([1.0, 0.0, 2.5, 1.0])},
    ),
    "one by one": (one_by_one, (_series,), {**_start2, **_means}, None),
    "ragged": (
        ragged,
        (torch.where(torch.arange(7) < _lengths[:, None], _series, torch.nan), _lengths),
        {**_start2, **_means},
        {"sequences": torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 3.0])},
    ),
    "factorial": (factorial, (normal(6),), {"A": rows(2, 2), "B": rows(2, 2, seed=1), "mu": normal(2, 2)}, None),
    "scaled": (
        scaled,
        (normal(9),),
        {"A": rows(2, 2), **_means, "level": torch.tensor(0.3, dtype=torch.float64)},
        None,
    ),
}
