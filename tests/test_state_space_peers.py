"""State-space models against other libraries at every iterate from the same start, and exact diffuse starts."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from benchmarks import state_space as peers
from models import time_loops
from tests.dense import dense
from tests.loop_chains import BY_NAME, system

pytestmark = pytest.mark.filterwarnings("default")  # what peers warn about is theirs
SAME = 1e-8


def test_pykalman_at_every_iterate() -> None:
    """All four matrices and the first state are free; a step is missing."""
    from pykalman import KalmanFilter

    problem = BY_NAME["system"]
    start = {name: value for name, value in problem.start().items() if name not in ("b", "d")}
    y = problem.args[0].permute(1, 0, 2).reshape(1, -1, 3).mT.mT.permute(1, 0, 2)  # one sequence, (12, 1, 3)
    y = y.clone()
    y[4] = torch.nan
    peer = KalmanFilter(
        start["A"].numpy(), start["C"].numpy(), start["Q"].numpy(), start["R"].numpy(), None, None, start["m"].numpy(),
        start["S"].numpy(), random_state=0,
        em_vars=["transition_matrices", "observation_matrices", "transition_covariance", "observation_covariance",
                 "initial_state_mean", "initial_state_covariance"],
    )  # fmt: skip
    masked = np.ma.masked_invalid(y[:, 0].numpy())
    zero = {"b": torch.zeros(2), "d": torch.zeros(3)}
    for updates in range(1, 5):
        peer = peer.em(masked, n_iter=1)
        result = pyro_em.fit(
            system, y, init={**start, **zero}, missing="nan", max_iter=updates, tol=0,
            m_step={"b": "fixed", "d": "fixed"},
        )  # fmt: skip
        assert result.log_likelihood == pytest.approx(float(peer.loglikelihood(masked)), rel=SAME)
        expected = (
            peer.transition_matrices, peer.observation_matrices, peer.transition_covariance,
            peer.observation_covariance, peer.initial_state_mean, peer.initial_state_covariance,
        )  # fmt: skip
        for name, value in zip("ACQRmS", expected, strict=True):
            np.testing.assert_allclose(result.params[name].numpy(), value, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("peer", ["statsmodels", "dynamax"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_log_likelihoods_at_every_iterate(peer: str, sequences: int) -> None:
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    problem = peers.systems(sequences, 40, 2)
    other = {"statsmodels": peers.smoothed_by_statsmodels, "dynamax": peers.dynamax_system}[peer](problem)
    start = problem.start
    init = {"A": start["F"].mT.clone(), "C": start["H"].mT.clone(), "Q": start["Q"], "R": start["R"]}
    result = pyro_em.fit(peers.loop, problem.data.transpose(0, 1), 2, init=init, max_iter=5, tol=0)
    expected = [other(updates)() for updates in range(6)]
    assert result.history["log_likelihood"] == pytest.approx(expected, rel=SAME)


def _diffuse(y: Tensor, states: int, wide: float) -> None:
    """Local level (1 state) or trend (2 states) whose start is N(0, wide)."""
    q = pyro.param("q", torch.ones(states), constraint=dist.constraints.positive)
    r = pyro.param("r", torch.tensor(1.0), constraint=dist.constraints.positive)
    x = None
    for t in pyro_em.markov(len(y)):
        if x is None:
            x = pyro.sample(f"x_{t}", dist.Normal(torch.zeros(states), math.sqrt(wide)).to_event(1))
        else:
            moved = x if states == 1 else torch.stack([x[..., 0] + x[..., 1], x[..., 1]], -1)
            x = pyro.sample(f"x_{t}", dist.Normal(moved, q).to_event(1))
        pyro.sample(f"y_{t}", dist.Normal(x[..., 0], r), obs=y[t])


@pytest.mark.parametrize("states", [1, 2])
def test_a_wide_start_is_the_exact_diffuse_likelihood(states: int) -> None:
    """log p(y) + (d/2) log κ of a start N(0, κ) in d states tends to the diffuse log-likelihood of Durbin and Koopman
    (2012, section 7.2), at rate 1/κ, before digits are lost: its constant counts the 2π of all observations."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    y = torch.cumsum(torch.randn(30, generator=torch.Generator().manual_seed(0)), 0)
    q, r = torch.tensor([0.7, 0.2])[:states], torch.tensor(0.8)
    kind = {1: "local level", 2: "local linear trend"}[states]
    peer = UnobservedComponents(y.numpy(), kind, use_exact_diffuse=True)
    truth = peer.loglike(np.array([float(r) ** 2, *(q**2).tolist()]))
    for wide, error in ((1e4, 1e-2), (1e8, 1e-6)):
        result = pyro_em.fit(_diffuse, y, states, wide, init={"q": q, "r": r}, max_iter=0)
        assert result.log_likelihood + 0.5 * states * math.log(wide) == pytest.approx(truth, abs=error)
    result = pyro_em.fit(_diffuse, y, states, 1e8, init={"q": q, "r": r}, max_iter=30, tol=0)
    assert (np.diff(result.history["objective"]) >= -1e-9).all()


def test_long_data_at_an_offset_keep_their_digits() -> None:
    """G8: what a shift by 1e6 of states and data does to the log-likelihood and the noises is rounding."""
    y = torch.cumsum(torch.randn(1, 200, 1, generator=torch.Generator().manual_seed(1)), 1)

    def model(y: Tensor, at: float) -> None:
        q = pyro.param("q", torch.tensor([1.0]), constraint=dist.constraints.positive)
        r = pyro.param("r", torch.tensor([1.0]), constraint=dist.constraints.positive)
        start, move, noise = (
            dist.Normal(torch.full((1,), at), 3.0).to_event(1), dist.Normal(torch.zeros(1), q).to_event(1),
            dist.Normal(torch.zeros(1), r).to_event(1),
        )  # fmt: skip
        one = torch.eye(1)
        pyro.sample("y", dist.GaussianHMM(start, one, move, one, noise, duration=y.shape[1]), obs=y[0])

    here, there = (pyro_em.fit(model, y + at, at, max_iter=20, tol=0) for at in (0.0, 1e6))
    assert there.log_likelihood == pytest.approx(here.log_likelihood, rel=1e-9)
    for name in ("q", "r"):
        torch.testing.assert_close(there.params[name], here.params[name], rtol=1e-7, atol=0)


def test_sequences_in_another_order_are_the_same() -> None:
    problem: Any = BY_NAME["system"]
    results = [
        pyro_em.fit(problem.model, y, init=problem.start(), max_iter=4, tol=0)
        for y in (problem.args[0], problem.args[0][:, [2, 0, 1]])
    ]
    assert results[0].log_likelihood == pytest.approx(results[1].log_likelihood, rel=1e-12)
    torch.testing.assert_close(results[0].log_prob()[[2, 0, 1]], results[1].log_prob(), rtol=1e-9, atol=1e-9)


SHORT = (
    (time_loops.local_level, time_loops.simulate(6)),
    (time_loops.trend_and_seasonal, time_loops.simulate(7)),
    (time_loops.dynamic_factor, time_loops.simulate(6, num_observed=3)),
    (time_loops.lds, time_loops.simulate(5, num_observed=3)),
    (time_loops.autoregression, time_loops.simulate_gaps(13)),
)


@pytest.mark.parametrize(("model", "data"), SHORT, ids=lambda x: getattr(x, "__name__", ""))
def test_models_as_loops(model: Any, data: Tensor) -> None:
    """G1 and G2 of the models, against the joint normal; every update in closed form."""
    result = pyro_em.fit(model, data, max_iter=6, tol=0)
    objective = np.array(result.history["objective"])
    assert (np.diff(objective) >= -1e-13 * np.abs(objective).max()).all()
    truth = float(dense(model, (data,), result.params).log_evidence.detach())
    assert result.log_likelihood == pytest.approx(truth, rel=1e-11)
    assert {row.route for row in result.plan.m_step} == {"closed"}


def test_an_autoregression_with_gaps_is_that_of_statsmodels() -> None:
    from statsmodels.tsa.statespace.sarimax import SARIMAX

    y = time_loops.simulate_gaps()
    result = pyro_em.fit(time_loops.autoregression, y, max_iter=300, tol=1e-9)
    assert result.converged
    c, phi, s = (float(result.params[name]) for name in ("c", "phi", "s"))
    peer = SARIMAX(y[1:].numpy(), order=(1, 0, 0), trend="c")
    peer.ssm.initialize_known(np.array([c + phi * float(y[0])]), np.array([[s**2]]))
    assert result.log_likelihood == pytest.approx(float(peer.loglike([c, phi, s**2])), rel=1e-10)
