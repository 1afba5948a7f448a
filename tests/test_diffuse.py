"""Flat starts of loops (exact diffuse initial states): against statsmodels, dense joint integrals, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from models import time_loops
from pyro_em import markov
from tests.dense import dense

pytestmark = pytest.mark.filterwarnings("default")  # what peers warn about is theirs
FLAT: dict[str, Callable[..., Any]] = {
    "improper": lambda: dist.ImproperUniform(constraints.real, (), ()),
    "masked": lambda: dist.Normal(3.0, 2.0).mask(False),
}


def level(y: Tensor, flat: Callable[..., Any] = FLAT["masked"]) -> None:
    q, r = (pyro.param(n, torch.tensor(s), constraint=constraints.positive) for n, s in (("q", 30.0), ("r", 100.0)))
    x = torch.tensor(0.0)
    for t in markov(len(y)):
        x = pyro.sample(f"x_{t}", flat() if t == 0 else dist.Normal(x, q))
        pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


def trend(y: Tensor) -> None:
    starts = {"q": 1.0, "s": 0.3, "r": 1.0}
    q, s, r = (pyro.param(n, torch.tensor(v), constraint=constraints.positive) for n, v in starts.items())
    for t in markov(len(y)):
        flat = dist.Normal(0.0, 1.0).mask(False)
        if t == 0:
            level, slope = pyro.sample(f"level_{t}", flat), pyro.sample(f"slope_{t}", flat)
        else:
            level, slope = (
                pyro.sample(f"level_{t}", dist.Normal(level + slope, q)),
                pyro.sample(f"slope_{t}", dist.Normal(slope, s)),
            )
        pyro.sample(f"y_{t}", dist.Normal(level, r), obs=y[t])


def partly(y: Tensor) -> None:
    """A flat level, on which the proper start of another state depends, for series in a plate; matrices free."""
    a, m = pyro.param("a", torch.tensor(0.5)), pyro.param("m", torch.tensor(0.3))
    q = pyro.param("q", torch.tensor([0.5, 1.0]), constraint=constraints.positive)
    r = pyro.param("r", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("series", y.shape[1]):
        for t in markov(len(y)):
            if t == 0:
                u = pyro.sample(f"u_{t}", dist.Normal(0.0, 1.0).mask(False))
                v = pyro.sample(f"v_{t}", dist.Normal(m + 0.5 * u, 2.0))
            else:
                u, v = pyro.sample(f"u_{t}", dist.Normal(u, q[0])), pyro.sample(f"v_{t}", dist.Normal(a * v, q[1]))
            pyro.sample(f"y_{t}", dist.Normal(u + v, r), obs=y[t])


def walk(T: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.cumsum(torch.randn(T, *shape, generator=torch.Generator().manual_seed(seed)), 0)


@pytest.mark.parametrize("flat", FLAT.values(), ids=FLAT)
def test_the_nile(flat: Callable[..., Any]) -> None:
    """Durbin and Koopman (2012, section 2.10): variances 15099 and 1469.1, diffuse log-likelihood -632.5456."""
    y = time_loops.load()
    result = pyro_em.fit(level, y, flat, accelerate="anderson", max_iter=300, tol=1e-9)
    assert result.converged
    assert result.log_likelihood == pytest.approx(-632.5456, abs=5e-5)
    assert float(result.params["r"]) ** 2 == pytest.approx(15099, rel=2e-4)
    assert float(result.params["q"]) ** 2 == pytest.approx(1469.1, rel=2e-4)


def test_statsmodels_local_level_and_trend() -> None:
    """Exact diffuse likelihoods of statsmodels are ours less ½ log 2π for every flat state; smoothed states agree."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    y = walk(40)
    for model, kind, states in ((level, "local level", 1), (trend, "local linear trend", 2)):
        result = pyro_em.fit(model, y, init={"q": torch.tensor(0.7), "r": torch.tensor(0.8)}, max_iter=0)
        scales = [result.params[n] for n in "rqs" if n in result.params]
        peer = UnobservedComponents(y.numpy(), kind, use_exact_diffuse=True)
        found = peer.smooth([float(s) ** 2 for s in scales])
        assert result.log_likelihood - 0.5 * states * math.log(2 * math.pi) == pytest.approx(found.llf, rel=1e-10)
        posterior = result.posterior()
        name = {1: "x", 2: "level"}[states]
        np.testing.assert_allclose(posterior.mean(name), found.smoothed_state[0], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(posterior.variance(name), found.smoothed_state_cov[0, 0], rtol=1e-9)


def test_statsmodels_seasonal() -> None:
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    y = walk(30) + torch.tensor([1.0, -2.0, 0.5, 0.5]).repeat(8)[:30]
    peer = UnobservedComponents(y.numpy(), "local linear trend", seasonal=4, use_exact_diffuse=True)
    result = pyro_em.fit(time_loops.diffuse_trend, y, max_iter=3, tol=0)
    names = ("noise", "level_scale", "slope_scale", "season_scale")
    truth = peer.loglike(np.array([float(result.params[n]) ** 2 for n in names]))
    assert result.log_likelihood - 2.5 * math.log(2 * math.pi) == pytest.approx(truth, rel=1e-10)
    assert (np.diff(result.history["objective"]) > 0).all()
    assert {row.route for row in result.plan.m_step} == {"closed"}


@pytest.mark.parametrize(
    ("model", "y"),
    [(level, walk(9)), (trend, walk(9)), (partly, walk(7, 3)), (time_loops.diffuse_trend, walk(12))],
    ids=["level", "trend", "partly", "seasonal"],
)
def test_flat_starts_are_the_dense_joint_integral(model: Any, y: Tensor) -> None:
    """G1 and G2: log ∫ p(y, z) dz from the log joint of the model in plain Pyro; its updates climb."""
    result = pyro_em.fit(model, y, max_iter=5, tol=0)
    objective = np.array(result.history["objective"])
    assert (np.diff(objective) >= -1e-12 * np.abs(objective).max()).all()
    joint = dense(model, (y,), result.params)
    assert result.log_likelihood == pytest.approx(float(joint.log_evidence.detach()), rel=1e-11)


def test_posteriors_of_flat_starts() -> None:
    """Draws have the smoothed moments; what the first steps alone do not determine is not given a number."""
    y = walk(12)
    result = pyro_em.fit(trend, y, max_iter=2, tol=0)
    posterior = result.posterior()
    draws = posterior.sample(4000)
    for name in ("level", "slope"):
        error = 4 * (posterior.variance(name) / 4000).sqrt()
        assert bool(((draws[name].mean(0) - posterior.mean(name)).abs() < error + 1e-9).all())
        torch.testing.assert_close(draws[name].var(0), posterior.variance(name), rtol=0.15, atol=0)
    assert math.isfinite(posterior.entropy())
    with pytest.raises(pyro_em.InputError, match="first 1 steps do not determine"):
        posterior.states("y").filtered()


def test_what_no_observation_determines_is_refused() -> None:
    with pytest.raises(pyro_em.Refusal, match="do not determine the flat"):
        pyro_em.fit(time_loops.diffuse_trend, walk(4))
    with pytest.raises(pyro_em.Refusal, match="prior is flat"):  # of the slope no observation speaks
        pyro_em.fit(trend, walk(1))

    def constant(y: Tensor) -> None:
        """Two levels a row, of which only the sum is seen."""
        with pyro.plate("rows", len(y)):
            z, u = (pyro.sample(n, dist.Normal(0.0, 1.0).mask(False)) for n in "zu")
            pyro.sample("y", dist.Normal(z + u, 1.0), obs=y)

    with pytest.raises(pyro_em.Refusal, match="prior is flat"):
        pyro_em.fit(constant, walk(4))
