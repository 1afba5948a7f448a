"""The compiled engine of `pyro_em.markov` loops: against the reference and hmmlearn, its kernel against chain.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.scanned import Scanned, compile_scanned
from pyro_em.evidence import banded, blocked
from pyro_em.evidence.blocked import Blocks, Scratch, smooth_blocked
from pyro_em.evidence.chain import smooth
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem, bind
from tests.problems import BY_NAME

simplex, positive = constraints.simplex, constraints.positive
Emission = Callable[[Tensor], Any]


def rows(*shape: int, seed: int = 0) -> Tensor:
    table = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    return table / table.sum(-1, keepdim=True)


def chain(data: Tensor, emission: Callable[[], Emission], K: int = 3, seen: Tensor | None = None) -> None:
    """One sequence (T, ...) or many (T, N, ...) in a plate."""
    pi = pyro.param("pi", rows(K), constraint=simplex)
    A = pyro.param("A", rows(K, K, seed=1), constraint=simplex)
    emit = emission()
    with pyro.plate("sequences", data.shape[1], dim=-1):
        z = None
        for t in pyro_em.markov(len(data)):
            with poutine.mask(mask=True if seen is None else seen[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"x_{t}", emit(z), obs=data[t])


def normal() -> Emission:
    mu, sd = pyro.param("mu", torch.tensor([-1.0, 0.5, 2.0])), pyro.param("sd", torch.tensor([0.8, 1.0, 1.3]))
    return lambda z: dist.Normal(mu[z], sd[z])


def diagonal() -> Emission:
    mu = pyro.param("mu", torch.tensor([[-1.0, 0.0], [0.5, 1.0], [2.0, -1.0]]))
    sd = pyro.param("sd", torch.ones(3, 2), constraint=positive)
    return lambda z: dist.Normal(mu[z], sd[z]).to_event(1)


def full() -> Emission:
    mu = pyro.param("mu", torch.tensor([[-1.0, 0.0], [0.5, 1.0], [2.0, -1.0]]))
    S = pyro.param("S", torch.eye(2).repeat(3, 1, 1) + 0.2, constraint=constraints.positive_definite)
    return lambda z: dist.MultivariateNormal(mu[z], S[z])


def poisson() -> Emission:
    rate = pyro.param("rate", torch.tensor([1.0, 3.0, 6.0]), constraint=positive)
    return lambda z: dist.Poisson(rate[z])


def categorical() -> Emission:
    B = pyro.param("B", rows(3, 4, seed=2), constraint=simplex)
    return lambda z: dist.Categorical(B[z])


def bernoulli() -> Emission:
    p = pyro.param("p", rows(3, 4, seed=3), constraint=constraints.unit_interval)
    return lambda z: dist.Bernoulli(p[z]).to_event(1)


def _data(emission: Callable[[], Emission], steps: int, sequences: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    z = (torch.arange(steps) // 7 % 3).reshape(-1, 1).expand(steps, sequences)
    noise = torch.randn(steps, sequences, 2, generator=generator)
    if emission is normal:
        return 2.0 * z + noise[..., 0]
    if emission in (diagonal, full):
        return 1.5 * z.unsqueeze(-1) + noise
    if emission is poisson:
        return torch.poisson(2.0 * z + 1.0, generator=generator)
    if emission is categorical:
        return (z + torch.randint(2, z.shape, generator=generator)) % 4
    return (torch.rand(steps, sequences, 4, generator=generator) < 0.3 + 0.2 * z.unsqueeze(-1)).double()


def _agree(problem: Problem, tolerance: float = 1e-11) -> None:
    """Two updates by the compiled engine and by the reference."""
    m = MStep(problem, "auto", "em")
    compiled, reference = compile_scanned(problem), Interpreted(problem)
    assert isinstance(choose_engine(problem, m), Scanned)
    params = problem.start
    for _ in range(2):
        a, b = compiled.e_step(params), reference.e_step(params)
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-12)
        assert m.score(params, a) == pytest.approx(m.score(params, b), rel=1e-8)
        ours, theirs = m.update(params, a)[0], m.update(params, b)[0]
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)
        params = theirs
    found, expected = compiled.spot_check(params)
    assert found == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("emission", [normal, diagonal, full, poisson, categorical, bernoulli])
@pytest.mark.parametrize(("steps", "sequences", "most"), [(12, 1, 10**6), (70, 1, 0), (133, 3, 10**6), (133, 3, 0)])
def test_families(
    emission: Callable[[], Emission], steps: int, sequences: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By band solves and in blocks."""
    monkeypatch.setattr(banded, "MOST", most)
    _agree(bind(chain, (_data(emission, steps, sequences), emission), {}, with_prior=False))


@pytest.mark.parametrize("most", [0, 10**6])
@pytest.mark.parametrize("emission", [normal, poisson])
def test_masks_and_weights(emission: Callable[[], Emission], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged lengths, holes, a sequence without data, weights of sequences; by band solves and in blocks."""
    monkeypatch.setattr(banded, "MOST", most)
    data = _data(emission, 90, 5)
    seen = torch.arange(90).unsqueeze(-1) < torch.tensor([90, 40, 0, 89, 1])
    seen[10:20, 3] = False
    for weights in (None, {"sequences": torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0])}):
        problem = bind(chain, (data, emission), {"seen": seen}, with_prior=False, weights=weights)
        _agree(problem)


@pytest.mark.parametrize("name", ["timed_ragged"])
def test_problems(name: str) -> None:
    problem = BY_NAME[name]
    _agree(bind(problem.model, problem.args, {}, with_prior=problem.priors, params=problem.start()))


def test_tied_and_plated_emissions() -> None:
    """Two observed sites, one of them over items in a plate of their own, which share a scale."""

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 1, generator=generator), torch.randn(40, 3, generator=generator)
    problem = bind(_items, (x.squeeze(-1), y), {}, with_prior=False)
    _agree(problem)


def _items(x: Tensor, y: Tensor) -> None:
    A = pyro.param("A", rows(2, 2), constraint=simplex)
    mu = pyro.param("mu", torch.tensor([[0.0, 1.0, 0.5], [2.0, -1.0, 1.5]]))
    sd = pyro.param("sd", torch.tensor(1.2), constraint=positive)
    items = pyro.plate("items", 3, dim=-1)
    z = torch.tensor(0)
    for t in pyro_em.markov(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        with items as item:
            pyro.sample(f"y_{t}", dist.Normal(pyro.ops.indexing.Vindex(mu)[z, item], sd), obs=y[t])
        pyro.sample(f"x_{t}", dist.Normal(pyro.ops.indexing.Vindex(mu)[z, 0], sd), obs=x[t].unsqueeze(-1))


def test_equal_to_hmmlearn_at_every_iteration() -> None:
    """Gaussian, diagonal, two sequences of unequal length: log-likelihoods and parameters (pure MLE)."""
    hmm = pytest.importorskip("hmmlearn.hmm")
    logging.getLogger("hmmlearn").setLevel(logging.ERROR)
    data = _data(diagonal, 120, 2)
    seen = torch.arange(120).unsqueeze(-1) < torch.tensor([120, 77])
    for updates in (1, 5, 25):
        result = pyro_em.fit(chain, data, diagonal, seen=seen, max_iter=updates, tol=0)
        peer = hmm.GaussianHMM(
            3, "diag", n_iter=updates, tol=-np.inf, init_params="", covars_prior=0, min_covar=0, implementation="log"
        )
        peer.startprob_, peer.transmat_ = rows(3).numpy(), rows(3, 3, seed=1).numpy()
        peer.means_, peer.covars_ = np.array([[-1.0, 0.0], [0.5, 1.0], [2.0, -1.0]]), np.ones((3, 2))
        peer.fit(np.concatenate([data[:, 0], data[:77, 1]]), [120, 77])
        assert result.history["log_likelihood"][:updates] == pytest.approx(list(peer.monitor_.history), rel=1e-11)
        np.testing.assert_allclose(result.params["A"].numpy(), peer.transmat_, rtol=0, atol=1e-8)
        np.testing.assert_allclose(result.params["pi"].numpy(), peer.startprob_, rtol=0, atol=1e-8)
        np.testing.assert_allclose(result.params["mu"].numpy(), peer.means_, rtol=0, atol=1e-8)
        covariance = np.stack([np.diag(c) for c in peer.covars_])
        np.testing.assert_allclose(result.params["sd"].numpy() ** 2, covariance, rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
def test_forbidden_transitions_and_an_outlier() -> None:
    """A left-right chain keeps its zeros; a point at 1e4 sigma leaves everything finite."""
    data = torch.cat([_data(normal, 60, 1), torch.full((1, 1), 1e4), _data(normal, 60, 1)])
    left_right = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]])
    start = {"A": left_right, "pi": torch.tensor([1.0, 0.0, 0.0])}
    problem = bind(chain, (data, normal), {}, with_prior=False, params=start)
    _agree(problem, tolerance=1e-9)
    result = pyro_em.fit(chain, data, normal, init={**start}, max_iter=10, tol=0)
    assert all(bool(value.isfinite().all()) for value in result.params.values())
    assert bool((result.params["A"][left_right == 0] == 0.0).all())


def test_impossible_data_are_named() -> None:
    data = torch.zeros(50, 2, dtype=torch.long)
    data[30, 1] = 3
    start = {"B": torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(3, 1), "pi": rows(3), "A": rows(3, 3)}
    with pytest.raises(pyro_em.NonFiniteError, match=r"rows 1 of plate.*from step 30 on"):
        pyro_em.fit(chain, data, categorical, init=start, max_iter=1)


def in_blocks(density: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Likelihoods (K, L, M) of log-densities (T, C, K), and where their rows lie (L, M), -1 for padding."""
    order, states = blocks.order(), density.shape[-1]
    flat = torch.cat([(density - density.amax(-1, keepdim=True)).exp().reshape(-1, states), torch.ones(1, states)])
    return flat[torch.where(order < 0, len(flat) - 1, order)].permute(2, 0, 1).contiguous(), order


@pytest.mark.parametrize("overlap", [48, 10**9])
@pytest.mark.parametrize(("steps", "chains", "states"), [(997, 2, 4), (4000, 1, 6), (300, 7, 3)])
def test_blocks(steps: int, chains: int, states: int, overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both routes to the boundary vectors, against chain.py; some transitions are forbidden."""
    monkeypatch.setattr(blocked, "WIDE", 0)
    A = rows(states, states)
    A[0, -1] = 0.0
    A = A / A.sum(-1, keepdim=True)
    generator = torch.Generator().manual_seed(1)
    density = 2.0 * torch.randn(steps, chains, states, generator=generator)
    pi = rows(states, seed=4)
    unary = density.clone()
    unary[0] += pi.log()
    expected = smooth(unary, A.log()[None, None])
    blocks, scratch = Blocks(steps, chains, 64, -(-steps // 64)), Scratch()
    scratch.overlap = overlap
    likelihood, order = in_blocks(density, blocks)
    found = smooth_blocked(pi.unsqueeze(-1), A, likelihood, blocks, scratch)
    assert found is not None
    assert scratch.overlap == overlap  # neither route failed
    log_evidence = found.log_scale + density.amax(-1).sum(0)
    torch.testing.assert_close(log_evidence, expected.log_evidence, rtol=1e-13, atol=0)
    states_of = torch.empty(steps * chains, states)
    states_of[order[order >= 0]] = found.states.permute(1, 2, 0)[order >= 0]
    torch.testing.assert_close(states_of.reshape(expected.unary.shape), expected.unary, rtol=0, atol=1e-12)
    inside = (order >= 0) & (torch.div(order, chains, rounding_mode="floor") < steps - 1)
    pairs = A * ((found.left * inside).flatten(1) @ found.right.flatten(1).mT)
    torch.testing.assert_close(pairs, expected.total_pairs(None), rtol=0, atol=1e-9)


def test_what_does_not_forget_takes_the_exact_route() -> None:
    """A nearly deterministic cycle: overlap is tried, found wanting and replaced."""
    K, steps = 8, 6000
    A = 0.9999 * torch.eye(K).roll(1, 1) + 0.0001 / K
    A = A / A.sum(-1, keepdim=True)
    blocks, scratch = Blocks(steps, 1, 60, steps // 60), Scratch()
    likelihood = torch.ones(K, blocks.length, blocks.columns)
    pi = torch.zeros(K, 1)
    pi[0] = 1.0
    found = smooth_blocked(pi, A, likelihood, blocks, scratch)
    assert found is not None and scratch.overlap > 48
    assert float(found.log_scale.abs().max()) < 1e-9  # nothing was seen: the evidence is 1


def test_a_million_steps() -> None:
    """The spot check replaces the reference, whose tables would be 20 times the data's size."""
    steps = 1_000_000
    data = _data(normal, steps, 1)
    result = pyro_em.fit(chain, data, normal, max_iter=1, tol=0)
    assert result.plan.engine.startswith("scanned")
    density = dist.Normal(result.params["mu"], result.params["sd"]).log_prob(data)
    density[0] += result.params["pi"].log()
    expected = smooth(density.unsqueeze(1), result.params["A"].log()[None, None]).log_evidence
    assert result.log_likelihood == pytest.approx(float(expected), rel=1e-12)  # 1e-9 was asked
