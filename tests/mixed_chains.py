"""Mixtures of linear-Gaussian systems for the laws: discrete latents choose the system that a sequence follows.

Loops over time (their oracle is a mixture of dense joint normals over every assignment of the discrete latents,
dense.py), so few sequences of few steps. Data have time as their first dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from pyro_em import markov
from tests.loop_chains import ENDS, LoopProblem, definite, positive
from tests.problem import Problem

simplex = constraints.simplex
INSIDE = "the states inside of the site are complete data too"


def levels(y: Tensor, loop: Callable[[int], Any] = markov) -> None:
    """Local levels: where they start and how they move depends on the class, the noise does not. y: (T, N)."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=simplex)
    m, a = pyro.param("m", torch.tensor([0.0, 1.0])), pyro.param("a", torch.tensor([0.9, 0.5]))
    q = pyro.param("q", torch.ones(2), constraint=positive)
    r = pyro.param("r", torch.tensor(1.0), constraint=positive)
    x = None
    with pyro.plate("sequences", y.shape[1]):
        k = pyro.sample("k", dist.Categorical(w))
        for t in loop(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(m[k], 1.0) if x is None else dist.Normal(a[k] * x, q[k]))
            pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


def step_by_step(y: Tensor) -> None:
    """The same, traced step by step."""
    levels(y, lambda T: pyro.markov(range(T)))


def systems(y: Tensor) -> None:
    """All matrices, offsets and noises by class: y (T, N, 2)."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=simplex)
    A, C = pyro.param("A", torch.eye(2).repeat(2, 1, 1)), pyro.param("C", torch.ones(2, 2, 2))
    b, d, m = (pyro.param(n, torch.zeros(2, 2)) for n in ("b", "d", "m"))
    Q, R, S = (pyro.param(n, torch.eye(2).repeat(2, 1, 1), constraint=definite) for n in ("Q", "R", "S"))
    x, fn = None, dist.MultivariateNormal
    with pyro.plate("sequences", y.shape[1]):
        k = pyro.sample("k", dist.Categorical(w))
        for t in markov(len(y)):
            move = None if x is None else (A[k] @ x.unsqueeze(-1)).squeeze(-1) + b[k]
            x = pyro.sample(f"x_{t}", fn(m[k], S[k]) if move is None else fn(move, Q[k]))
            pyro.sample(f"y_{t}", fn((C[k] @ x.unsqueeze(-1)).squeeze(-1) + d[k], R[k]), obs=y[t])


def noises(y: Tensor, seen: Tensor) -> None:
    """Only the noise of the observations depends on the class; sequences of several lengths, with gaps."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=simplex)
    a, q = pyro.param("a", torch.tensor(0.5)), pyro.param("q", torch.tensor(1.0), constraint=positive)
    r = pyro.param("r", torch.tensor([0.5, 1.5]), constraint=positive)
    with pyro.plate("sequences", y.shape[1]):
        k = pyro.sample("k", dist.Categorical(w))
        x = torch.tensor(0.0)
        for t in markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(a * x, q))
            with poutine.mask(mask=seen[t]):
                pyro.sample(f"y_{t}", dist.Normal(x, r[k]), obs=y[t])


def one_regime(y: Tensor) -> None:
    """One class for all sequences."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=simplex)
    a, q = pyro.param("a", torch.tensor([0.9, -0.3])), pyro.param("q", torch.ones(2), constraint=positive)
    k = pyro.sample("k", dist.Categorical(w))
    with pyro.plate("sequences", y.shape[1]):
        x = torch.tensor(0.0)
        for t in markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(a[k] * x, q[k]))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.7), obs=y[t])


def experts(y: Tensor, c: Tensor) -> None:
    """Covariates c (N, 2) say which system a sequence is likely to follow."""
    beta = pyro.param("beta", torch.zeros(2))
    a, q = pyro.param("a", torch.tensor([0.9, 0.0])), pyro.param("q", torch.tensor(1.0), constraint=positive)
    d = pyro.param("d", torch.zeros(2))
    with pyro.plate("sequences", y.shape[1]):
        k = pyro.sample("k", dist.Bernoulli(logits=c @ beta)).long()
        x = torch.tensor(0.0)
        for t in markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(a[k] * x, q))
            pyro.sample(f"y_{t}", dist.Normal(x + d[k], 0.8), obs=y[t])


def two_choosers(y: Tensor) -> None:
    """One latent chooses how the states move, another one, which depends on it, how they are seen: two series each."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=simplex)
    v = pyro.param("v", torch.tensor([[0.6, 0.4], [0.3, 0.7]]), constraint=simplex)
    a, r = pyro.param("a", torch.tensor([0.9, 0.1])), pyro.param("r", torch.tensor([0.5, 1.5]), constraint=positive)
    loadings = pyro.param("loadings", torch.ones(2))
    with pyro.plate("sequences", y.shape[-1]):
        k = pyro.sample("k", dist.Categorical(w))
        j = pyro.sample("j", dist.Categorical(v[k]))
        x = torch.tensor(0.0)
        for t in markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(a[k] * x, 1.0))
            with pyro.plate(f"series_{t}", y.shape[1], dim=-2):
                pyro.sample(f"y_{t}", dist.Normal(loadings.unsqueeze(-1) * x, r[j]), obs=y[t])


def autoregressions(y: Tensor) -> None:
    """AR(2) processes behind noise, with gamma priors on their precisions."""
    w = pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 2.0])))
    phi = pyro.param("phi", torch.tensor([[0.5, 0.1], [-0.5, 0.2]]))
    with pyro.plate("classes", 2):
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    with pyro.plate("sequences", y.shape[1]):
        k = pyro.sample("k", dist.Categorical(w))
        before = x = torch.tensor(0.0)
        for t in markov(len(y), history=2):
            mean = phi[k][..., 0] * x + phi[k][..., 1] * before
            before, x = x, pyro.sample(f"x_{t}", dist.Normal(mean, tau[k].rsqrt()))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])


def hmm(y: Tensor) -> None:
    """A `GaussianHMM` whose arguments the class chooses: y (N, T, 1)."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=simplex)
    a, q = pyro.param("a", torch.tensor([0.9, 0.5])), pyro.param("q", torch.ones(2), constraint=positive)
    r = pyro.param("r", torch.tensor(1.0), constraint=positive)
    with pyro.plate("sequences", len(y)):
        k = pyro.sample("k", dist.Categorical(w))
        noise = dist.Normal(torch.zeros(1), q[k][..., None, None]).to_event(1)
        start, seen = dist.Normal(torch.zeros(1), 1.0).to_event(1), dist.Normal(torch.zeros(1), r).to_event(1)
        chain = dist.GaussianHMM(start, a[k][..., None, None, None], noise, torch.eye(1), seen, duration=y.shape[1])
        pyro.sample("y", chain, obs=y)


def loop(y: Tensor) -> None:
    """`hmm` as a loop: y (T, N)."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=simplex)
    a, q = pyro.param("a", torch.tensor([0.9, 0.5])), pyro.param("q", torch.ones(2), constraint=positive)
    r = pyro.param("r", torch.tensor(1.0), constraint=positive)
    with pyro.plate("sequences", y.shape[1]):
        k = pyro.sample("k", dist.Categorical(w))
        x = pyro.sample("x_start", dist.Normal(0.0, 1.0))
        for t in markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(a[k] * x, q[k]))
            pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


def problems(problem: type[Problem]) -> list[Problem]:
    """For the table of enumerated problems, whose oracle knows the density of a `GaussianHMM`."""
    rng = np.random.default_rng(2)
    size = np.tile([0.3, 2.0], 5)[:, None, None]
    y = _t(np.cumsum(size * rng.normal(size=(10, 6, 1)), 1) + 0.5 * rng.normal(size=(10, 6, 1)))
    start = {"w": _t([0.4, 0.6]), "a": _t([0.8, 0.7]), "q": _t([0.5, 1.5]), "r": _t(0.7)}
    return [problem("gaussian_hmm_mixture", hmm, (y,), start, "sequences", completes=INSIDE)]


def _build() -> list[LoopProblem]:
    rng = np.random.default_rng(1)
    walks = _t(np.cumsum(rng.normal(size=(4, 3)), 0) + 0.5 * rng.normal(size=(4, 3)))
    planes = _t(np.cumsum(rng.normal(size=(3, 2, 2)), 0) + 0.5 * rng.normal(size=(3, 2, 2)))
    seen = torch.as_tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 0]]).bool()
    c = _t([[1.0, -1.0], [1.0, 0.5], [1.0, 2.0]])
    w, one = _t([0.4, 0.6]), _t(1.0)
    level = {"w": w, "m": _t([0.2, -0.4]), "a": _t([0.9, 0.3]), "q": _t([0.7, 1.1]), "r": _t(0.9)}
    twice, two = torch.eye(2).repeat(2, 1, 1), _t([[1.0, 0.2], [0.2, 0.8]])
    P = LoopProblem
    return [
        P("levels", levels, (walks,), level),
        P("levels_step_by_step", step_by_step, (walks[:3],), level),
        P("levels_weighted", levels, (walks,), level, options={"weights": {"sequences": _t([2.0, 0.5, 1.0])}}),
        P("systems", systems, (planes,),
          {"w": w, "A": _t([[[0.7, 0.1], [-0.2, 0.6]], [[0.2, 0.0], [0.3, -0.4]]]), "C": twice + 0.2,
           "b": _t([[0.1, 0.0], [0.0, 0.2]]), "d": _t([[0.0, 0.2], [0.1, 0.0]]), "m": _t([[0.1, -0.1], [0.5, 0.3]]),
           "Q": twice + 0.1, "R": torch.stack([two, 1.5 * two]), "S": twice}),
        P("noises", noises, (walks, seen), {"w": w, "a": _t(0.8), "q": one, "r": _t([0.6, 1.4])}, completes=ENDS),
        P("one_regime", one_regime, (walks[:, :2],), {"w": w, "a": _t([0.8, -0.2]), "q": _t([0.8, 1.2])}),
        P("experts", experts, (walks, c), {"beta": _t([0.1, 0.3]), "a": _t([0.8, 0.1]), "q": one, "d": _t([0.3, -0.2])},
          closed=False),
        P("two_choosers", two_choosers, (planes,),
          {"w": w, "v": _t([[0.6, 0.4], [0.3, 0.7]]), "a": _t([0.8, 0.2]), "r": _t([0.6, 1.4]),
           "loadings": _t([1.0, 0.5])}),
        P("autoregressions", autoregressions, (walks[:, :2],),
          {"w": w, "phi": _t([[0.4, 0.2], [-0.4, 0.1]]), "tau": _t([1.0, 0.7])}, "map-em"),
    ]  # fmt: skip


default_dtype = torch.get_default_dtype()
torch.set_default_dtype(torch.float64)  # the table is built on import, before any fixture runs
try:
    MIXED_PROBLEMS = _build()
finally:
    torch.set_default_dtype(default_dtype)
BY_NAME = {problem.name: problem for problem in MIXED_PROBLEMS}
