"""Models beside mixtures of linear-Gaussian systems: more plates, latents, data of the class; what is refused.

Against a mixture of dense joint normals over every assignment of the discrete latents (dense.py).
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
from torch import Tensor

import pyro_em
from pyro_em.errors import InputError, Refusal
from tests.dense import dense
from tests.mixed_chains import levels, positive, simplex


def _class() -> tuple[Tensor, Tensor]:
    return pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex), pyro.param("a", torch.tensor([0.9, 0.2]))


def _walk(y: Tensor, a: Tensor, shift: Any = 0.0, loop: Callable[[int], Any] = pyro_em.markov) -> None:
    x = torch.tensor(0.0)
    for t in loop(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(a * x, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(x + shift, 0.5), obs=y[t])


def grouped(y: Tensor) -> None:
    """A class for every group of sequences: y (T, groups, sequences)."""
    w, a = _class()
    with pyro.plate("groups", y.shape[1], dim=-2):
        k = pyro.sample("k", dist.Categorical(w))
        with pyro.plate("sequences", y.shape[2], dim=-1):
            _walk(y, a[k])


def beside(y: Tensor) -> None:
    """The class also moves a normal latent with data of its own, and labels: y (T + 2, N)."""
    w, a = _class()
    mu, p = pyro.param("mu", torch.tensor([0.0, 1.0])), pyro.param("p", torch.tensor([0.3, 0.6]))
    with pyro.plate("sequences", y.shape[1]):
        k = pyro.sample("k", dist.Categorical(w))
        b = pyro.sample("b", dist.Normal(mu[k], 1.0))
        pyro.sample("c", dist.Normal(b, 0.5), obs=y[-1])
        pyro.sample("label", dist.Bernoulli(p[k]), obs=(y[-2] > 0).to(y.dtype))
        _walk(y[:-2], a[k])


def shifted(y: Tensor, loop: Callable[[int], Any] = pyro_em.markov) -> None:
    """A normal latent of the sequence enters at every step, beside a class of the dynamics."""
    w, a = _class()
    s = pyro.param("s", torch.tensor(1.0), constraint=positive)
    with pyro.plate("sequences", y.shape[1]):
        k = pyro.sample("k", dist.Categorical(w))
        _walk(y, a[k], pyro.sample("b", dist.Normal(0.0, s)), loop)


def shifted_by_step(y: Tensor) -> None:
    """The same as a loop of Pyro's."""
    shifted(y, lambda T: pyro.markov(range(T)))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(grouped, (3, 2, 2)), (beside, (5, 2)), (shifted, (3, 2)), (shifted, (8, 2)), (shifted_by_step, (3, 2))],
)
def test_against_every_assignment(model: Callable[[Tensor], None], shape: tuple[int, ...]) -> None:
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = pyro_em.fit(model, y, max_iter=3, tol=0)
    assert (np.diff(result.history["log_likelihood"]) > 0).all()
    assert {row.route for row in result.plan.m_step} == {"closed"}
    truth, posterior = dense(model, (y,), result.params), result.posterior()
    assert result.log_likelihood == pytest.approx(float(truth.log_evidence.detach()), rel=1e-12)
    draws, mode = posterior.sample(2), posterior.mode()
    for site, mean in truth.mean.items():
        torch.testing.assert_close(posterior.mean(site).reshape(mean.shape), mean.detach(), rtol=1e-9, atol=1e-10)
        variance = posterior.variance(site).reshape(mean.shape)
        torch.testing.assert_close(variance, truth.variance[site].detach(), rtol=1e-9, atol=1e-10)
        assert draws[site].shape == (2, *mode[site].shape)


def test_a_class_of_parts_of_a_chain_is_refused() -> None:
    """Series share one factor, and each has a class of its own: its states mix over the classes of all series."""

    def model(y: Tensor) -> None:
        w, loadings = _class()
        with pyro.plate("series", y.shape[1]):
            k = pyro.sample("k", dist.Categorical(w))
        x = torch.tensor(0.0)
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(0.8 * x, 1.0))
            with pyro.plate(f"series_{t}", y.shape[1]):
                pyro.sample(f"y_{t}", dist.Normal(loadings[k] * x, 0.5), obs=y[t])

    with pytest.raises(Refusal, match=r"'x_0'.*exponential.*let the discrete latent share the plate"):
        pyro_em.fit(model, torch.randn(3, 3))


def test_flat_starts_are_the_limit_of_wide_ones() -> None:
    """The exact diffuse likelihood in every class: errors of wide starts go with their precision."""

    def model(y: Tensor, wide: float | None) -> None:
        w, q = _class()[0], pyro.param("q", torch.tensor([0.5, 1.2]), constraint=positive)
        start = dist.Normal(0.0, 1.0).mask(False) if wide is None else dist.Normal(0.0, wide)
        with pyro.plate("sequences", y.shape[1]):
            k = pyro.sample("k", dist.Categorical(w))
            x = None
            for t in pyro_em.markov(len(y)):
                x = pyro.sample(f"x_{t}", start if x is None else dist.Normal(x, q[k]))
                pyro.sample(f"y_{t}", dist.Normal(x, 0.6), obs=y[t])

    y = 5 + torch.cumsum(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 0)
    flat = pyro_em.fit(model, y, None, max_iter=3, tol=0)
    wide = pyro_em.fit(model, y, 1e5, max_iter=3, tol=0)
    shift = y.shape[1] * math.log(1e5 * math.sqrt(2 * math.pi))
    expected = [value + shift for value in wide.history["log_likelihood"]]
    assert flat.history["log_likelihood"] == pytest.approx(expected, abs=1e-7)
    one, other = flat.posterior(), wide.posterior()
    torch.testing.assert_close(one.mean("x"), other.mean("x"), rtol=0, atol=1e-8)
    torch.testing.assert_close(one.responsibilities("k"), other.responsibilities("k"), rtol=0, atol=1e-8)
    assert torch.equal(one.mode()["k"], other.mode()["k"])
    torch.testing.assert_close(one.mode()["x"], other.mode()["x"], rtol=0, atol=1e-8)


def test_bad_input_is_named() -> None:
    """NaN, an impossible noise, a single step, a sequence of which nothing is seen."""
    y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    gaps = y.clone()
    gaps[1:, 0] = torch.nan
    with pytest.raises(InputError, match=r"'y_1': the observation in row 0 is NaN"):
        pyro_em.fit(levels, gaps)
    with pytest.raises(InputError, match="q"):
        pyro_em.fit(levels, y, init={"q": torch.tensor([1.0, -1.0])})
    one = pyro_em.fit(levels, y[:1], max_iter=2, tol=0)
    truth = dense(levels, (y[:1],), one.params).log_evidence
    assert one.log_likelihood == pytest.approx(float(truth.detach()), rel=1e-12)
    gaps[0, 0] = torch.nan
    options: dict[str, Any] = {"missing": "nan", "max_iter": 3, "tol": 0}
    with_empty, without = pyro_em.fit(levels, gaps, **options), pyro_em.fit(levels, gaps[:, 1:], **options)
    assert with_empty.history["log_likelihood"][0] == pytest.approx(without.history["log_likelihood"][0], rel=1e-12)
    assert float(with_empty.log_prob()[0]) == pytest.approx(0.0, abs=1e-12)
    shares = with_empty.posterior().responsibilities("k")[0]
    torch.testing.assert_close(shares, with_empty.params["w"], rtol=1e-10, atol=1e-12)
