"""Latents from before a loop that all of its steps read (model/still.py), beyond the laws of test_loop_chains.py."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.errors import Refusal
from tests.classics import positive
from tests.dense import dense
from tests.loop_chains import BY_NAME


def test_latents_from_before_the_loop_stand_still() -> None:
    """In the plan, in draws, for longer data and in forecasts; the steps of both loops are the same."""
    problem = BY_NAME["intercepts"]
    other = BY_NAME["intercepts_by_step"]
    result, alone = (pyro_em.fit(p.model, *p.args, init=p.start(), max_iter=4, tol=0) for p in (problem, other))
    assert result.history["objective"] == pytest.approx(alone.history["objective"], rel=1e-13)
    assert {row.name: row.reason for row in result.plan.e_step}["w"].endswith("stands still: every step reads it")
    posterior = result.posterior()
    assert posterior.latents == ("w", "x")
    draws = posterior.sample(5)
    assert draws["w"].shape == (5, 3)
    assert draws["x"].shape == (5, 6, 3)
    torch.testing.assert_close(posterior.mode()["w"], posterior.mean("w"))
    powers = result.params["a"] ** torch.tensor([1.0, 2.0])
    expected = posterior.mean("w").unsqueeze(-1) + posterior.mean("x")[-1].unsqueeze(-1) * powers
    torch.testing.assert_close(posterior.states("y").forecast(2).mean[..., 0], expected)
    longer = torch.cat([problem.args[0], torch.ones(2, 3)])
    truth = dense(problem.model, (longer,), result.params)
    assert float(result.log_prob(longer).sum()) == pytest.approx(float(truth.log_evidence.detach()), rel=1e-12)
    torch.testing.assert_close(result.posterior(longer).mean("w"), truth.mean["w"])


def test_a_flat_latent_from_before_the_loop_is_the_limit_of_wide_ones() -> None:
    def model(y: Tensor, wide: float | None) -> None:
        a, q = pyro.param("a", torch.tensor(0.6)), pyro.param("q", torch.tensor(0.8), constraint=positive)
        flat = dist.ImproperUniform(torch.distributions.constraints.real, (), ())
        with pyro.plate("sequences", y.shape[1]):
            w, x = pyro.sample("w", flat if wide is None else dist.Normal(0.0, wide)), torch.tensor(0.0)
            for t in pyro_em.markov(len(y)):
                x = pyro.sample(f"x_{t}", dist.Normal(a * x, q))
                pyro.sample(f"y_{t}", dist.Normal(x + w, 0.5), obs=y[t])

    y, wide = BY_NAME["intercepts"].args[0], 1e5
    flat, limit = (pyro_em.fit(model, y, own, max_iter=5, tol=0) for own in (None, wide))
    density = y.shape[1] * (np.log(wide) + 0.5 * np.log(2 * np.pi))
    assert flat.log_likelihood == pytest.approx(limit.log_likelihood + density, rel=1e-8)
    torch.testing.assert_close(flat.params["a"], limit.params["a"], rtol=1e-7, atol=0)
    torch.testing.assert_close(flat.posterior().mean("w"), limit.posterior().mean("w"), rtol=1e-7, atol=1e-9)


def test_what_is_not_linear_in_a_latent_from_before_the_loop_is_refused() -> None:
    def scaled(y: Tensor) -> None:
        w, x = pyro.sample("w", dist.Normal(1.0, 1.0), infer={"em": "latent"}), torch.tensor(0.0)
        for t in pyro_em.markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(x, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(w * x, 1.0), obs=y[t])

    with pytest.raises(Refusal, match="not an affine function of the Gaussian latent"):
        pyro_em.fit(scaled, torch.randn(6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_classes_of_sequences_choose_where_their_intercepts_lie(dtype: torch.dtype) -> None:
    """Against the dense normal of every sequence in every class: mean μ_k, covariance τ² 11ᵀ + cov(x) + r² I."""

    def model(y: Tensor) -> None:
        one = torch.tensor(1.0, dtype=dtype)
        a, mu = pyro.param("a", 0.5 * one), pyro.param("mu", torch.tensor([-1.0, 1.5], dtype=dtype))
        q, r, tau = (pyro.param(n, one.clone(), constraint=positive) for n in ("q", "r", "tau"))
        pi = pyro.param("pi", torch.tensor([0.4, 0.6], dtype=dtype), constraint=torch.distributions.constraints.simplex)
        with pyro.plate("sequences", y.shape[1]):
            k = pyro.sample("k", dist.Categorical(pi))
            w, x = pyro.sample("w", dist.Normal(mu[k], tau)), 0.0 * one
            for t in pyro_em.markov(len(y)):
                x = pyro.sample(f"x_{t}", dist.Normal(a * x, q))
                pyro.sample(f"y_{t}", dist.Normal(x + w, r), obs=y[t])

    y = BY_NAME["intercepts"].args[0].to(dtype)
    result = pyro_em.fit(model, y, max_iter=6, tol=0)
    p = {name: value.double() for name, value in result.params.items()}
    lags = torch.tril(p["a"] ** (torch.arange(6.0).unsqueeze(-1) - torch.arange(6.0)).clamp(min=0))
    covariance = p["q"] ** 2 * lags @ lags.mT + p["tau"] ** 2 + p["r"] ** 2 * torch.eye(6)
    each = torch.stack(
        [
            weight.log() + dist.MultivariateNormal(mean.expand(6), covariance).log_prob(y.double().mT)
            for weight, mean in zip(p["pi"], p["mu"], strict=True)
        ]
    )
    tight = 1e-12 if dtype == torch.float64 else 1e-6
    assert result.log_likelihood == pytest.approx(float(each.logsumexp(0).sum()), rel=tight)
    assert (np.diff(result.history["objective"]) > -tight).all()
    probs = result.posterior().marginal("k").probs.double()
    torch.testing.assert_close(probs, each.softmax(0).mT, rtol=1e3 * tight, atol=1e2 * tight)
