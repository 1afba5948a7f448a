"""States of `pyro.markov` loops as sequences: filtered, smoothed, forecast, one step at a time.

The oracles: explicit enumeration of all paths of states, and the same model by `pyro_em.markov`, whose sequences are
computed in another way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em
from pyro_em.errors import InputError
from tests import timed_models
from tests.timed_models import rows

K, T, N = 2, 5, 2


def _unrolled(steps: int, history: int = 1) -> Any:
    return pyro.markov(range(steps), history=history)


def _data(steps: int, series: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    y, x = torch.randn(2, steps, series, generator=generator) + 1.0
    seen = torch.arange(steps).unsqueeze(-1) < torch.tensor([steps, steps - 2, steps - 1])[:series]
    return y, x, seen


def order_two(y: Tensor, first: int = 0) -> None:
    """A chain of order two whose steps are numbered from `first` on; two data a step, in a plate of their own."""
    pi, A, C = rows(K), rows(K, K, seed=1), rows(K, K, K, seed=2)
    mu = pyro.param("mu", torch.tensor([0.0, 2.0]))
    items = pyro.plate("items", 2, dim=-2)
    with pyro.plate("series", y.shape[1], dim=-1):
        before = z = None
        for t in pyro.markov(range(first, first + len(y)), history=2):
            probs = pi if z is None else A[z] if before is None else Vindex(C)[before, z]
            before, z = z, pyro.sample(f"z_{t}", dist.Categorical(probs))
            with items:
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t - first])


def _paths(y: Tensor) -> tuple[Any, Any]:
    """All paths (P, T), and log p(z_0..z_t, x_0..x_t) of each up to every step (P, T, N)."""
    pi, A, C = (x.log().numpy() for x in (rows(K), rows(K, K, seed=1), rows(K, K, K, seed=2)))
    mu, paths = np.array([0.0, 2.0]), np.array(list(itertools.product(range(K), repeat=len(y))))
    terms = np.zeros((*paths.shape, y.shape[1]))
    for p, z in enumerate(paths):
        for t in range(len(y)):
            move = pi[z[0]] if t == 0 else A[z[0], z[1]] if t == 1 else C[z[t - 2], z[t - 1], z[t]]
            density = -0.5 * (y[t].numpy() - mu[z[t]]) ** 2 - 0.5 * np.log(2 * np.pi)
            terms[p, t] = move + 2 * density
    return paths, terms.cumsum(1)


@pytest.mark.parametrize("first", [0, 3])
def test_order_two_by_enumeration(first: int) -> None:
    y = _data(T, N)[0]
    posterior = pyro_em.fit(order_two, y, first, max_iter=0).posterior(y, first)
    found = posterior.sequence("z")
    paths, joint = _paths(y)
    likelihood = np.exp(joint)
    for t in range(T):
        expected = np.stack([likelihood[paths[:, t] == k, t].sum(0) for k in range(K)], -1)
        # Paths that differ after step t only have been counted as often as there are such.
        torch.testing.assert_close(found.filter()[t], torch.tensor(expected / expected.sum(-1, keepdims=True)))
        smooth = np.stack([likelihood[paths[:, t] == k, -1].sum(0) for k in range(K)], -1)
        torch.testing.assert_close(found.smooth()[t], torch.tensor(smooth / smooth.sum(-1, keepdims=True)))
    evidence = np.log([likelihood[:, t].sum(0) / K ** (T - 1 - t) for t in range(T)])
    torch.testing.assert_close(found.one_step(), torch.tensor(np.diff(evidence, axis=0, prepend=0.0)))
    assert float(found.one_step().sum()) == pytest.approx(posterior.log_evidence, rel=1e-12)
    best = paths[joint[:, -1].argmax(0)].T
    assert torch.equal(torch.stack([posterior.mode()[f"z_{first + t}"] for t in range(T)]), torch.tensor(best))


def test_forecast_of_order_two_by_enumeration() -> None:
    y, C = _data(T, N)[0], rows(K, K, K, seed=2).numpy()
    found = pyro_em.fit(order_two, y, max_iter=0).posterior(y).sequence("z").forecast(3)
    paths, joint = _paths(y)
    weight = np.exp(joint[:, -1])
    pair = np.stack([weight[(paths[:, -2:] == p).all(1)].sum(0) for p in itertools.product(range(K), repeat=2)])
    pair = (pair / pair.sum(0)).reshape(K, K, N)
    for step in range(3):
        pair = np.einsum("ijn,ijk->jkn", pair, C)
        torch.testing.assert_close(found[step], torch.tensor(pair.sum(0).T))


MODELS = [m for m in timed_models.MODELS if m is not timed_models.outside]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("steps", [4, 9])
def test_equals_the_loop_of_pyro_em(model: Callable[..., Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coupled chains, classes of chains, emissions that look back, gates; ragged."""
    args, latent = _data(steps, 3), "u" if model is timed_models.counts else "z"
    init = {"slope": torch.tensor([0.3, -0.4])} if model is timed_models.gate_of_two else None
    found: list[Any] = []
    for loop in (pyro_em.markov, _unrolled):
        monkeypatch.setattr(pyro_em, "markov", loop)
        found.append(pyro_em.fit(model, *args, init=init, max_iter=0).posterior(*args).sequence(latent))
    ours, theirs = found
    for reading in ("filter", "smooth", "one_step"):
        torch.testing.assert_close(getattr(theirs, reading)(), getattr(ours, reading)(), rtol=1e-9, atol=1e-11)
    if model in timed_models.GATED:
        with pytest.raises(InputError, match="vary with time"):
            theirs.forecast(2)
    elif model is timed_models.third_order_mixture and steps == 4:
        with pytest.raises(InputError, match="before the last one reads as many steps back"):
            theirs.forecast(2)
    else:
        torch.testing.assert_close(theirs.forecast(3), ours.forecast(3), rtol=1e-9, atol=1e-11)


def test_a_long_sequence_and_a_short_one() -> None:
    """One step after the other, in linear time; two steps are a sequence, one is none."""

    def model(y: Tensor) -> None:
        A, mu = rows(2, 2), pyro.param("mu", torch.tensor([0.0, 2.0]))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    y = _data(150, 1)[0][:, 0]
    y[100] = 1e3  # filtered states are 0 and 1 from there on, not NaN
    posterior = pyro_em.fit(model, y, max_iter=0).posterior(y)
    states = posterior.sequence("z")
    torch.testing.assert_close(states.filter()[-1], states.smooth()[-1])
    assert bool(states.filter().isfinite().all())
    assert float(states.one_step().sum()) == pytest.approx(posterior.log_evidence, rel=1e-12)
    assert pyro_em.fit(model, y[:2], max_iter=0).posterior(y[:2]).sequence("z").filter().shape == (2, 2)
    with pytest.raises(InputError, match="sites named by the steps of a loop over time, at least two"):
        pyro_em.fit(model, y[:1], max_iter=0).posterior(y[:1]).sequence("z")


def test_what_has_no_sequence_says_so() -> None:
    """Latents of steps in plates of their own, independent steps, and what is no latent of a loop."""

    def model(y: Tensor, linked: bool) -> None:
        A, mu = rows(2, 2), pyro.param("mu", torch.tensor([0.0, 2.0]))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z] if linked else A[0]))
            with pyro.plate(f"rows_{t}", y.shape[1]):
                c = pyro.sample(f"c_{t}", dist.Categorical(A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[c], 1.0), obs=y[t])

    y = _data(4, 2)[0]
    posterior = pyro_em.fit(model, y, True, max_iter=0).posterior(y, True)
    with pytest.raises(InputError, match="latents beside 'z' lie in plates of their own"):
        posterior.sequence("z")
    with pytest.raises(InputError, match="'y' is no sequence of discrete states"):
        posterior.sequence("y")
    posterior = pyro_em.fit(model, y, False, max_iter=0).posterior(y, False)
    with pytest.raises(InputError, match="the steps of 'z' are independent"):
        posterior.sequence("z")
