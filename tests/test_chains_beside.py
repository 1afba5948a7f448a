"""Linear-Gaussian chains beside continuous latents that none of their sites reads, against dense joint normals.

Among them loops of one step: the slope of a trend is then a latent of its own, which no observation reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from tests.dense import dense

Y = torch.tensor([[0.4, 1.1, -0.2], [0.9, 1.3, 0.1], [1.5, 1.2, -0.6]], dtype=torch.float64)
LOOPS: dict[str, Callable[[int], Iterable[int]]] = {"pyro": lambda T: pyro.markov(range(T)), "ours": pyro_em.markov}


def _scales(**starts: float) -> list[Tensor]:
    return [pyro.param(n, torch.tensor(v), constraint=constraints.positive) for n, v in starts.items()]


def trend(y: Tensor, loop: Callable[[int], Iterable[int]], first: Callable[[], Any] | None = None) -> None:
    """A local linear trend; its first states may have a distribution of their own."""
    q, s, r = _scales(q=0.5, s=0.3, r=0.7)
    level = slope = torch.tensor(0.0)
    for t in loop(len(y)):
        own = first() if t == 0 and first is not None else None
        level, slope = (
            pyro.sample(f"level_{t}", own or dist.Normal(level + slope, q)),
            pyro.sample(f"slope_{t}", own or dist.Normal(slope, s)),
        )
        pyro.sample(f"y_{t}", dist.Normal(level, r), obs=y[t])


def effects(y: Tensor, loop: Callable[[int], Iterable[int]]) -> None:
    """Effects of groups with data of their own, which share a parameter with the chains of a plate."""
    q, r, b = _scales(q=0.5, r=0.7, b=0.6)
    with pyro.plate("groups", 3):
        u = pyro.sample("u", dist.Normal(0.0, b))
        with pyro.plate("repeats", 2):
            pyro.sample("w", dist.Normal(u, r), obs=Y[:2] - 0.5)
    with pyro.plate("series", y.shape[1]):
        x = torch.zeros(y.shape[1])
        for t in loop(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(0.8 * x, q))
            pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


FLAT: tuple[Callable[[], Any], ...] = (
    lambda: dist.ImproperUniform(constraints.real, (), ()),
    lambda: dist.Normal(0.0, 1.0).mask(False),  # which the oracle can draw
)


def flat_effect(y: Tensor, loop: Callable[[int], Iterable[int]], flat: Callable[[], Any]) -> None:
    """A flat mean of other data."""
    q, r = _scales(q=0.5, r=0.7)
    mean = pyro.sample("mean", flat())
    with pyro.plate("rows", 3):
        pyro.sample("w", dist.Normal(mean, r), obs=Y[0])
    x = torch.tensor(0.0)
    for t in loop(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, q))
        pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_maximum_beside_chains(steps: int, loop: Any) -> None:
    """The dense evidence has no slope where the fit ends."""
    result = pyro_em.fit(effects, Y[:steps], loop, max_iter=4000, tol=1e-9, accelerate="anderson")
    assert result.converged and {row.route for row in result.plan.m_step} == {"closed"}
    params = {n: v.clone().requires_grad_() for n, v in result.params.items()}
    evidence = dense(effects, (Y[:steps], loop), params).log_evidence
    assert result.log_likelihood == pytest.approx(float(evidence.detach()), rel=1e-11)
    assert all(float(g.abs()) < 1e-6 for g in torch.autograd.grad(evidence, list(params.values())))


CASES: list[tuple[Any, tuple[Any, ...]]] = [
    (effects, ()),
    (trend, ()),
    (trend, (lambda: dist.Normal(0.5, 1.0),)),
    (flat_effect, FLAT[:1]),
]


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.filterwarnings("ignore::pyro_em.errors.UnidentifiedParameter")  # one step tells nothing of a slope
@pytest.mark.filterwarnings("ignore::pyro_em.errors.BoundaryEstimate")  # one observation is likeliest without a noise
@pytest.mark.parametrize(("model", "more"), CASES, ids=["effects", "trend", "first", "flat"])
def test_evidence_and_moments(model: Any, more: tuple[Any, ...], steps: int, loop: Any) -> None:
    y = Y[:steps] if model is effects else Y[:steps, 0]
    roles = {"mean": "latent"} if model is flat_effect else None
    result = pyro_em.fit(model, y, loop, *more, max_iter=5, tol=0, roles=roles)
    objective = np.array(result.history["objective"])
    assert (np.diff(objective) >= -1e-12 * np.abs(objective).max()).all()
    expected = dense(model, (y, loop, *(FLAT[1:] if more == FLAT[:1] else more)), result.params)
    assert result.log_likelihood == pytest.approx(float(expected.log_evidence.detach()), rel=1e-11)
    posterior = result.posterior()
    for name, mean in expected.mean.items():
        torch.testing.assert_close(posterior.mean(name), mean.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(posterior.variance(name), expected.variance[name].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_flat_states_that_nothing_reads_are_refused(loop: Any) -> None:
    """A flat slope is seen from the second step on: in one step the data say nothing about it."""
    with pytest.raises(pyro_em.Refusal, match=r"'slope_0'.*flat.*no other site reads it.*longer sequence"):
        pyro_em.fit(trend, Y[:1, 0], loop, FLAT[0])
    result = pyro_em.fit(trend, Y[:, 0], loop, FLAT[0], max_iter=2, tol=0)
    expected = dense(trend, (Y[:, 0], loop, FLAT[1]), result.params).log_evidence
    assert result.log_likelihood == pytest.approx(float(expected.detach()), rel=1e-11)
    with pytest.raises(pyro_em.InputError, match=r"drawn from the flat \(improper\) start of the chain of 'level_0'"):
        result.predictive(num_samples=2)
