"""Continuous latents beside discrete ones in loops over time: each step by itself, or refused in a true sentence.

The oracle has them integrated out by hand (a wider normal, a negative binomial), or is two models for two chains that
do not meet; a `pyro_em.markov` loop must say what `pyro.markov(range(T))` says.
"""

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
from scipy.integrate import quad
from torch import Tensor

import pyro_em
from tests.dense import dense

simplex, positive = constraints.simplex, constraints.positive
Loop = Callable[[int], Any]
Y = torch.tensor([1.0, 0.0, 2.0, 4.0], dtype=torch.float64)


def one_by_one(steps: int) -> Any:
    return pyro.markov(range(steps))


LOOPS = pytest.mark.parametrize("loop", [pyro_em.markov, one_by_one], ids=["together", "one by one"])


def _table() -> Tensor:
    return pyro.param("A", torch.tensor([[0.7, 0.3], [0.2, 0.8]]), constraint=simplex)


def factors(y: Tensor, loop: Loop, integrated: bool = False) -> None:
    """A normal effect of every step beside the state."""
    A, mu, z = _table(), pyro.param("mu", torch.tensor([0.0, 2.0])), torch.tensor(0)
    loading = pyro.param("loading", torch.tensor(0.7))
    for t in loop(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        if integrated:
            pyro.sample(f"y_{t}", dist.Normal(mu[z], (loading**2 + 0.25).sqrt()), obs=y[t])
        else:
            e = pyro.sample(f"e_{t}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(mu[z] + loading * e, 0.5), obs=y[t])


def rates(y: Tensor, loop: Loop, integrated: bool = False) -> None:
    """A rate of every step whose distribution the state chooses."""
    A, a, z = _table(), pyro.param("a", torch.tensor([1.0, 3.0]), constraint=positive), torch.tensor(0)
    for t in loop(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        if integrated:
            pyro.sample(f"y_{t}", dist.GammaPoisson(a[z], 1.0), obs=y[t])
        else:
            e = pyro.sample(f"e_{t}", dist.Gamma(a[z], 1.0))
            pyro.sample(f"y_{t}", dist.Poisson(e), obs=y[t])


@pytest.mark.parametrize("model", [factors, rates])
@LOOPS
def test_an_effect_of_every_step(model: Callable[..., None], loop: Loop) -> None:
    result = pyro_em.fit(model, Y, loop, max_iter=2, tol=0)
    assert (np.diff(result.history["objective"]) >= -1e-12).all()
    by_hand = pyro_em.fit(model, Y, pyro_em.markov, True, init=result.params, max_iter=0)
    assert result.log_likelihood == pytest.approx(by_hand.log_likelihood, rel=1e-12)
    assert result.history["score"][-1] == pytest.approx(by_hand.history["score"][-1], rel=1e-7)  # Fisher's identity
    ours, expected = result.posterior(), by_hand.posterior()
    for t in range(len(Y)):
        probs = expected.marginal(f"z_{t}").probs
        torch.testing.assert_close(ours.marginal(f"z_{t}").probs, probs, rtol=0, atol=1e-12)


def test_many_steps_are_refused_with_the_density_to_write() -> None:
    with pytest.raises(pyro_em.Refusal, match=r"21 independent sets .*GammaPoisson"):
        pyro_em.fit(rates, torch.ones(21, dtype=torch.float64), pyro_em.markov)


@LOOPS
def test_conjugate_latents_in_a_loop_without_states(loop: Loop) -> None:
    """Every step a term of its own; run together, all but the first took values that were drawn."""

    def model(y: Tensor) -> None:
        a = pyro.param("a", torch.tensor(2.0), constraint=positive)
        for t in loop(len(y)):
            pyro.sample(f"y_{t}", dist.Poisson(pyro.sample(f"r_{t}", dist.Gamma(a, 1.0))), obs=y[t])

    found = pyro_em.fit(model, Y, max_iter=0)
    assert found.log_likelihood == pytest.approx(
        float(dist.GammaPoisson(torch.tensor(2.0), torch.tensor(1.0)).log_prob(Y).sum()), rel=1e-12
    )


@LOOPS
def test_two_chains_that_do_not_meet(loop: Loop) -> None:
    """One of them discrete, the other Gaussian, in one loop."""

    def model(y: Tensor, which: str) -> None:
        A, mu = _table(), pyro.param("mu", torch.tensor([0.0, 2.0]))
        q = pyro.param("q", torch.tensor(1.0), constraint=positive)
        z, x = torch.tensor(0), torch.tensor(0.0)
        for t in loop(len(y)):
            if "z" in which:
                z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 0.5), obs=y[t])
            if "x" in which:
                x = pyro.sample(f"x_{t}", dist.Normal(x, q))
                pyro.sample(f"w_{t}", dist.Normal(x, 0.5), obs=-y[t])

    fixed = {"xz": {}, "z": {"q": "fixed"}, "x": {"A": "fixed", "mu": "fixed"}}
    both, z, x = (pyro_em.fit(model, Y, w, max_iter=2, tol=0, m_step=m) for w, m in fixed.items())
    assert both.log_likelihood == pytest.approx(z.log_likelihood + x.log_likelihood, rel=1e-12)
    posterior = both.posterior()
    for t in (0, 3):
        torch.testing.assert_close(posterior.marginal(f"z_{t}").probs, z.posterior().marginal(f"z_{t}").probs)
        torch.testing.assert_close(posterior.mean(f"x_{t}"), x.posterior().mean(f"x_{t}"))


def shared(y: Tensor, loop: Loop) -> None:
    """An effect of the whole series shifts the means of its states."""
    A, mu, z = _table(), pyro.param("mu", torch.tensor([0.0, 2.0])), torch.tensor(0)
    s = pyro.param("s", torch.tensor(1.0), constraint=positive)
    b = pyro.sample("b", dist.Normal(0.0, s))
    for t in loop(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"y_{t}", dist.Normal(mu[z] + b, 0.5), obs=y[t])


@LOOPS
def test_an_effect_of_the_series_is_refused_with_ways_that_work(loop: Loop) -> None:
    with pytest.raises(pyro_em.Refusal, match=r"'b': .*several steps .* paths.*roles=.*for t in range\(T\)"):
        pyro_em.fit(shared, Y, loop, max_iter=1)
    result = pyro_em.fit(shared, Y, range, max_iter=2, tol=0)
    truth = float(dense(shared, (Y, range), result.params).log_evidence.detach())
    assert result.log_likelihood == pytest.approx(truth, rel=1e-12)
    with pytest.warns(pyro_em.CollinearDesign):
        assert pyro_em.fit(shared, Y, loop, roles={"b": "parameter"}, max_iter=1).log_likelihood < 0


def counts(y: Tensor, loop: Loop, walks: bool) -> None:
    q, x = pyro.param("q", torch.tensor(0.5), constraint=positive), torch.tensor(0.0)
    for t in loop(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(x if walks else torch.tensor(0.2), q))
        pyro.sample(f"y_{t}", dist.Poisson(x.exp()), obs=y[t])


@LOOPS
def test_quadrature_is_named_where_it_serves(loop: Loop) -> None:
    """Of a chain it would be joint in all steps; steps that are independent have a rule each."""
    with pytest.raises(pyro_em.Refusal) as refusal:
        pyro_em.fit(counts, Y.repeat(2), loop, True)
    assert "Quadrature" not in str(refusal.value)
    with pytest.raises(pyro_em.Refusal, match=r"'y_0'.*use e_step=pyro_em\.Quadrature"):
        pyro_em.fit(counts, Y, loop, False)
    rules = {f"x_{t}": pyro_em.Quadrature(num_nodes=21) for t in range(3)}
    result = pyro_em.fit(counts, Y[:3], loop, False, e_step=rules, max_iter=0)
    expected = 0.0
    for y in Y[:3].tolist():

        def density(u: float, y: float = y) -> float:
            normal = -0.5 * ((u - 0.2) / 0.5) ** 2 - math.log(0.5 * math.sqrt(2 * math.pi))
            return math.exp(-math.exp(u) + y * u - math.lgamma(y + 1) + normal)

        expected += math.log(quad(density, -5.0, 5.0, epsabs=1e-13)[0])
    assert result.log_likelihood == pytest.approx(expected, rel=1e-8)
