"""Several latents in a step of a `pyro_em.markov` loop as one joint state: the scanned engine equals the reference.

Factorial and coupled chains, hidden semi-Markov states, mixtures of emissions; ragged, weighted, with holes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.scanned import Scanned, compile_scanned
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem, bind
from tests.problems import BY_NAME

simplex, positive = constraints.simplex, constraints.positive


def rows(*shape: int, seed: int = 0) -> Tensor:
    table = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    return table / table.sum(-1, keepdim=True)


def factorial(y: Tensor, seen: Tensor) -> None:
    """Three chains of 2, 3 and 2 states behind one series each; the means are of joint states."""
    sizes = {"A": 2, "B": 3, "C": 2}
    tables = [pyro.param(n, rows(k, k, seed=ord(n)), constraint=simplex) for n, k in sizes.items()]
    mu = pyro.param("mu", torch.arange(12.0).reshape(2, 3, 2))
    sd = pyro.param("sd", torch.tensor(1.5), constraint=positive)
    with pyro.plate("series", y.shape[1]):
        u = v = w = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            with poutine.mask(mask=seen[t]):
                u = pyro.sample(f"u_{t}", dist.Categorical(tables[0][u]))
                v = pyro.sample(f"v_{t}", dist.Categorical(tables[1][v]))
                w = pyro.sample(f"w_{t}", dist.Categorical(tables[2][w]))
                pyro.sample(f"y_{t}", dist.Normal(Vindex(mu)[u, v, w], sd), obs=y[t])


def coupled(y: Tensor, seen: Tensor) -> None:
    """The second chain reads the first, now and a step before; each has data of its own."""
    A = pyro.param("A", rows(2, 2), constraint=simplex)
    B = pyro.param("B", rows(2, 2, 3, 3, seed=1), constraint=simplex)
    mu, rate = pyro.param("mu", torch.tensor([0.0, 3.0])), pyro.param("rate", torch.tensor([1.0, 4.0, 8.0]))
    with pyro.plate("series", y.shape[1]):
        u = v = before = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            with poutine.mask(mask=seen[t]):
                before, u = u, pyro.sample(f"u_{t}", dist.Categorical(A[u]))
                v = pyro.sample(f"v_{t}", dist.Categorical(Vindex(B)[before, u, v]))
                pyro.sample(f"x_{t}", dist.Normal(mu[u], 1.0), obs=y[t])
                pyro.sample(f"n_{t}", dist.Poisson(rate[v]), obs=y[t].abs().round())


def mixture(y: Tensor, seen: Tensor) -> None:
    """Emissions are mixtures of two normals of their state."""
    pi, A = pyro.param("pi", rows(2), constraint=simplex), pyro.param("A", rows(2, 2, seed=1), constraint=simplex)
    share = pyro.param("share", rows(2, 2, seed=2), constraint=simplex)
    mu = pyro.param("mu", torch.tensor([[-1.0, 1.0], [3.0, 6.0]]))
    sd = pyro.param("sd", torch.tensor([[1.0, 0.8], [1.1, 1.5]]), constraint=positive)
    with pyro.plate("series", y.shape[1]):
        z = None
        for t in pyro_em.markov(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            with poutine.mask(mask=seen[t]):
                c = pyro.sample(f"c_{t}", dist.Categorical(share[z]))
                pyro.sample(f"y_{t}", dist.Normal(Vindex(mu)[z, c], Vindex(sd)[z, c]), obs=y[t])


def semi_markov(y: Tensor, seen: Tensor, K: int = 2, D: int = 3) -> None:
    """A state and the steps that are left of it (models/hsmm.py, several series)."""
    initial = pyro.param("initial", rows(K), constraint=simplex)
    transition = pyro.param("transition", 1.0 - torch.eye(K), constraint=simplex)
    duration = pyro.param("duration", rows(K, D, seed=3), constraint=simplex)
    loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
    stays, one_less = torch.eye(K), torch.eye(D)[[0, *range(D - 1)]]
    with pyro.plate("series", y.shape[1]):
        z = left = None
        for t in pyro_em.markov(len(y)):
            if z is None or left is None:
                z = pyro.sample(f"z_{t}", dist.Categorical(initial))
                left = pyro.sample(f"left_{t}", dist.Categorical(duration[z]))
            else:
                ended = (left == 0).unsqueeze(-1)
                z = pyro.sample(f"z_{t}", dist.Categorical(torch.where(ended, transition[z], stays[z])))
                left = pyro.sample(f"left_{t}", dist.Categorical(torch.where(ended, duration[z], one_less[left])))
            with poutine.mask(mask=seen[t]):
                pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def _series(steps: int, series: int) -> Tensor:
    noise = torch.randn(steps, series, generator=torch.Generator().manual_seed(0))
    return 3.0 * (torch.arange(steps) // 4 % 2).unsqueeze(-1) + noise


def _agree(problem: Problem, updates: int = 3) -> None:
    m = MStep(problem, "auto", "em")
    compiled, reference = compile_scanned(problem), Interpreted(problem)
    assert isinstance(choose_engine(problem, m), Scanned)
    params = problem.start
    for _ in range(updates):
        a, b = compiled.e_step(params), reference.e_step(params)
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-12)
        assert m.score(params, a) == pytest.approx(m.score(params, b), rel=1e-9)
        ours, theirs = m.update(params, a)[0], m.update(params, b)[0]
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12, msg=lambda s, n=name: f"{n}: {s}")
        params = theirs


MODELS = [factorial, coupled, mixture, semi_markov]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("steps", "series"), [(6, 1), (70, 3)])
def test_joint_states(model: Callable[..., Any], steps: int, series: int) -> None:
    y = _series(steps, series)
    _agree(bind(model, (y, torch.ones(y.shape, dtype=torch.bool)), {}, with_prior=False))


@pytest.mark.parametrize("model", MODELS)
def test_ragged_weighted_with_holes(model: Callable[..., Any]) -> None:
    y = _series(40, 4)
    seen = torch.arange(40).unsqueeze(-1) < torch.tensor([40, 23, 1, 39])
    seen[10:15, 0] = False
    weights = {"series": torch.tensor([1.0, 2.5, 0.5, 0.0])}
    _agree(bind(model, (y, seen), {}, with_prior=False, weights=weights))


@pytest.mark.parametrize("name", ["timed_factorial", "timed_mixture"])
def test_problems_of_the_table(name: str) -> None:
    problem = BY_NAME[name]
    _agree(bind(problem.model, problem.args, {}, with_prior=False, params=problem.start()))


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")  # certain moves
def test_certain_moves_stay_certain() -> None:
    y = _series(60, 1)
    result = pyro_em.fit(semi_markov, y, torch.ones(y.shape, dtype=torch.bool), max_iter=15, tol=0)
    assert result.plan.engine.startswith("scanned")
    assert torch.equal(result.params["transition"], 1.0 - torch.eye(2))
    path = result.posterior().mode()
    z, left = path["z"].squeeze(-1), path["left"].squeeze(-1)
    stays = left[:-1] > 0
    assert torch.equal(z[1:][stays], z[:-1][stays]) and torch.equal(left[1:][stays], left[:-1][stays] - 1)
    assert bool((z[1:][~stays] != z[:-1][~stays]).all())
