"""Gaussian latents beside a discrete one, without the model: equal to the interpreted reference, and where it is used.

A mixture of factor analysers in many dresses: what depends on the state and what does not, noise of single cells or
of vectors, covariates, priors of the latents, weights. Evidence against the low-rank normals that the states are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.pooled_states import PooledStates
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from tests.latent_problems import BY_NAME

N, D, L, K = 40, 4, 2, 3
GENERATOR = torch.Generator().manual_seed(0)
DOUBLE = torch.float64
ZERO = torch.zeros(L, dtype=DOUBLE)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=DOUBLE)


X = _randn(N, L) @ _randn(L, D) + 3 * _randn(K, D).repeat_interleave(14, 0)[:N] + 0.5 * _randn(N, D)
AGE = _randn(N)
START = {
    "w": torch.tensor([0.3, 0.4, 0.3], dtype=DOUBLE),
    "W": _randn(K, D, L),
    "b": X[[3, 17, 33]],
    "sd": 0.5 + torch.rand(K, D, generator=GENERATOR, dtype=DOUBLE),
}


def _weights() -> Tensor:
    return pyro.param("w", START["w"].clone(), constraint=constraints.simplex)


def _positive(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value.clone(), constraint=constraints.positive)


def _product(W: Tensor, z: Tensor) -> Tensor:
    return (W @ z.unsqueeze(-1)).squeeze(-1)


def apart(x: Tensor) -> None:
    """Every state has loadings, means and noise of its own."""
    w, W, b = _weights(), pyro.param("W", START["W"].clone()), pyro.param("b", START["b"].clone())
    sd = _positive("sd", START["sd"])
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(w))
        z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
        loc = _product(Vindex(W)[k, :, :], z) + Vindex(b)[k, :]
        pyro.sample("x", dist.Normal(loc, Vindex(sd)[k, :]).to_event(1), obs=x)


def shared(x: Tensor) -> None:
    """Loadings and one noise scale are those of all states, as in a common-factor mixture."""
    w, W, b = _weights(), pyro.param("W", START["W"][0].clone()), pyro.param("b", START["b"].clone())
    sd = _positive("sd", torch.ones((), dtype=DOUBLE))
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(w))
        z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(_product(W, z) + Vindex(b)[k, :], sd).to_event(1), obs=x)


def in_latent_space(x: Tensor) -> None:
    """The mixture is one of the latents: mean and spread of z depend on the state, the loadings do not."""
    w, W = _weights(), pyro.param("W", START["W"][0].clone())
    m, tau = pyro.param("m", START["b"][:, :L].clone()), _positive("tau", torch.ones(K, L, dtype=DOUBLE))
    sd = _positive("sd", START["sd"][0])
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(w))
        z = pyro.sample("z", dist.Normal(Vindex(m)[k, :], Vindex(tau)[k, :]).to_event(1))
        pyro.sample("x", dist.Normal(_product(W, z), sd).to_event(1), obs=x)


def one_spread(x: Tensor) -> None:
    """One scale of the latents for all states, around means of their own."""
    w, m = _weights(), pyro.param("m", START["b"][:, 0].clone())
    tau, sd = _positive("tau", torch.ones((), dtype=DOUBLE)), _positive("sd", START["sd"][0])
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(w))
        z = pyro.sample("z", dist.Normal(m[k], tau))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), sd).to_event(1), obs=x)


def vectors(x: Tensor) -> None:
    """Noise with a covariance of each state, latents with one too."""
    w, b = _weights(), pyro.param("b", START["b"][:, :2].clone())
    eye = torch.eye(2, dtype=DOUBLE)
    S = pyro.param("S", eye.expand(K, 2, 2).clone(), constraint=constraints.positive_definite)
    T = pyro.param("T", 0.7 * eye, constraint=constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(w))
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=DOUBLE), T))
        pyro.sample("first", dist.MultivariateNormal(Vindex(b)[k, :] + z, Vindex(S)[k, :, :]), obs=x[:, :2])
        pyro.sample("second", dist.Normal(2.0 * z, 1.0).to_event(1), obs=x[:, 2:])


def covariates(x: Tensor) -> None:
    """A slope of each state on a covariate, which no latent meets, and a label that tells a little of the state."""
    w, W, b = _weights(), pyro.param("W", START["W"][..., 0].clone()), pyro.param("b", START["b"].clone())
    slope, sd = pyro.param("slope", 0.1 * START["b"]), _positive("sd", START["sd"][:, 0])
    odds = pyro.param("odds", torch.tensor([0.3, 0.6, 0.5], dtype=DOUBLE), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(w))
        pyro.sample("label", dist.Bernoulli(odds[k]), obs=(AGE > 0).double())
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        loc = Vindex(W)[k, :] * z.unsqueeze(-1) + Vindex(b)[k, :] + Vindex(slope)[k, :] * AGE.unsqueeze(-1)
        pyro.sample("x", dist.Normal(loc, sd[k].unsqueeze(-1)).to_event(1), obs=x)


def priors(x: Tensor) -> None:
    w = pyro.sample("w", dist.Dirichlet(2 * torch.ones(K, dtype=DOUBLE)))
    with pyro.plate("states", K):
        b = pyro.sample("b", dist.Normal(torch.zeros(D, dtype=DOUBLE), 5.0).to_event(1))
        v = pyro.sample("v", dist.InverseGamma(3.0, 2 * torch.ones((), dtype=DOUBLE)))
    W = pyro.param("W", START["W"][..., 0].clone())
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(w))
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        loc = Vindex(W)[k, :] * z.unsqueeze(-1) + Vindex(b)[k, :]
        pyro.sample("x", dist.Normal(loc, v[k].sqrt().unsqueeze(-1)).to_event(1), obs=x)


@dataclass(frozen=True)
class Case:
    model: Callable[[Tensor], None]
    algorithm: str = "em"
    options: dict[str, Any] = field(default_factory=dict)
    init: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.model.__name__ + ("_weighted" if self.options else "")


COUNTS = {"weights": {"rows": torch.arange(N, dtype=DOUBLE) % 3}}
MODES = {"w": START["w"], "b": START["b"], "v": torch.ones(K, dtype=DOUBLE)}
CASES = [
    Case(apart), Case(apart, options=COUNTS), Case(shared), Case(in_latent_space), Case(one_spread), Case(vectors),
    Case(covariates), Case(priors, "map-em", init=MODES),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(case: Case) -> None:
    """Evidence, score and updates, to the rounding of sums."""
    bound = bind(case.model, (X,), {}, with_prior=case.algorithm == "map-em", **case.options)
    m, own = (MStep(bound, "auto", case.algorithm) for _ in range(2))
    engine, reference = choose_engine(bound, m), Interpreted(bound)
    assert isinstance(engine, PooledStates)
    params = {**bound.start, **case.init}
    for _ in range(3):
        found, expected = engine.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
        assert found.log_prior == pytest.approx(expected.log_prior, rel=1e-12, abs=1e-12)
        assert m.score(params, found) == pytest.approx(own.score(params, expected), rel=1e-9)
        updated, info = m.update(params, found)
        params, other = own.update(params, expected)
        assert info.empty == other.empty
        for name, value in params.items():
            torch.testing.assert_close(updated[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weights", [None, COUNTS["weights"]], ids=["plain", "weighted"])
def test_the_unit_of_rounding(weights: dict[str, Tensor] | None) -> None:
    """Σ|ll_n|, and what cancels in the evidence of a row: norms, distance and |I + WᵀΨ⁻¹W|, in each state."""
    bound = bind(apart, (X,), {}, with_prior=False, weights=weights)
    found = choose_engine(bound, MStep(bound, "auto", "em")).e_step(bound.start)
    w, W, b, sd = (START[name] for name in ("w", "W", "b", "sd"))
    states = dist.LowRankMultivariateNormal(b, W, sd**2)
    density = states.log_prob(X.unsqueeze(-2))
    joint = density + w.log()
    half_log_det = 0.5 * torch.logdet(torch.eye(L, dtype=DOUBLE) + W.mT @ (W / sd.unsqueeze(-1) ** 2))
    half_2_pi = 0.5 * math.log(2 * math.pi)
    noise = sd.log().sum(-1)
    distance = -density - D * half_2_pi - noise - half_log_det
    terms = (noise + (D + L) * half_2_pi).abs() + distance + half_log_det + L * half_2_pi
    rows = joint.logsumexp(-1).abs() + (joint.softmax(-1) * terms).sum(-1)
    count = torch.ones(N, dtype=DOUBLE) if weights is None else weights["rows"]
    assert found.magnitude == pytest.approx(float(count @ rows), rel=1e-12)


def test_states_are_low_rank_normals() -> None:
    """G2, G4: the evidence and its slope, without any posterior, after updates that were recorded."""
    result = pyro_em.fit(apart, X, max_iter=25, tol=0)
    assert "Woodbury" in str(result.plan) and (np.diff(result.history["log_likelihood"]) > 0).all()
    p = {name: value.clone().requires_grad_() for name, value in result.params.items()}
    states = dist.LowRankMultivariateNormal(p["b"], p["W"], p["sd"] ** 2)
    value = (states.log_prob(X.unsqueeze(-2)) + p["w"].log()).logsumexp(-1)
    torch.testing.assert_close(result.log_prob(), value.detach(), rtol=1e-10, atol=1e-10)
    gradient = dict(zip(p, torch.autograd.grad(value.sum(), list(p.values())), strict=True))
    w = result.params["w"]
    largest = max(
        float(gradient["W"].abs().max()), float(gradient["b"].abs().max()),
        float((gradient["sd"] * result.params["sd"]).abs().max()),
        float((w * (gradient["w"] - w @ gradient["w"])).abs().max()),
    )  # fmt: skip
    assert result.history["score"][-1] * N == pytest.approx(largest, rel=1e-7)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
def test_a_state_without_rows_keeps_its_parameters() -> None:
    far = {**START, "b": torch.stack([START["b"][0], START["b"][1], torch.full((D,), 1e4, dtype=DOUBLE)])}
    with pytest.warns(pyro_em.UnidentifiedParameter, match="'W'"):
        result = pyro_em.fit(apart, X, init=far, max_iter=8, tol=0)
    assert torch.equal(result.params["b"][2], far["b"][2]) and float(result.params["w"][2]) == 0.0
    assert all(bool(value.isfinite().all()) for value in result.params.values())


def test_data_far_from_zero_keep_their_digits() -> None:
    near = pyro_em.fit(apart, X, init=START, max_iter=6, tol=0)
    far = pyro_em.fit(apart, X + 1e5, init={**START, "b": START["b"] + 1e5}, max_iter=6, tol=0)
    assert far.log_likelihood == pytest.approx(near.log_likelihood, rel=1e-8)


def test_all_starts_go_through_it() -> None:
    result = pyro_em.fit(apart, X, restarts=3, seed=1, max_iter=10, tol=0)
    assert "Woodbury" in str(result.plan) and len(result.restarts) == 3


def test_a_positive_scale_times_the_latent() -> None:
    """It takes part in the linear solve (m_step/positive.py), so that this engine serves it."""
    problem = BY_NAME["latent_first"]
    bound = bind(problem.model, problem.args, {}, with_prior=False)
    m, own = (MStep(bound, "auto", "em") for _ in range(2))
    engine, reference, params = choose_engine(bound, m), Interpreted(bound), problem.start()
    assert isinstance(engine, PooledStates)
    for _ in range(3):
        found, expected = engine.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
        (updated, _), (params, _) = m.update(params, found), own.update(params, expected)
        for name, value in params.items():
            torch.testing.assert_close(updated[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "reason"), [("mixture_of_groups", "loadings")])
def test_what_it_leaves_to_the_reference(name: str, reason: str) -> None:
    problem = BY_NAME[name]
    bound = bind(problem.model, problem.args, {}, with_prior=False)
    engine = choose_engine(bound, MStep(bound, "auto", "em"))
    assert isinstance(engine, Interpreted) and reason in engine.reason
