"""Latents that a distribution integrates itself: the same fit as with the latents written out."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import factor_analysis, overdispersed


def test_low_rank_normal_is_factor_analysis() -> None:
    """The same iterates, in closed form, with the factors as a latent that the plan and the posterior name."""
    x = factor_analysis.simulate(150, 5, 1)
    start = pyro_em.fit(factor_analysis.model, x, max_iter=0).params
    init = {"loading": start["loading"], "mean": start["mean"], "variance": start["scale"] ** 2}
    marginal = pyro_em.fit(factor_analysis.low_rank, x, init=init, max_iter=15, tol=0)
    latent = pyro_em.fit(factor_analysis.model, x, init=start, max_iter=15, tol=0)
    assert marginal.plan.route("loading") == marginal.plan.route("variance") == "closed"
    assert marginal.plan.route("x_factor") == "Gaussian" and "pooled" in str(marginal.plan)
    np.testing.assert_allclose(marginal.history["log_likelihood"], latent.history["log_likelihood"], rtol=1e-12)
    torch.testing.assert_close(marginal.params["loading"], latent.params["loading"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(marginal.params["variance"], latent.params["scale"] ** 2, rtol=1e-10, atol=0)
    p = marginal.params
    density = dist.LowRankMultivariateNormal(p["mean"], p["loading"], p["variance"]).log_prob(x)
    torch.testing.assert_close(marginal.log_prob(), density, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        marginal.posterior().mean("x_factor"), latent.posterior().mean("z"), rtol=1e-9, atol=1e-9
    )


def test_low_rank_components_of_a_mixture() -> None:
    x = torch.cat([factor_analysis.simulate(40, 4, 1, seed=1), 3 - factor_analysis.simulate(50, 4, 1, seed=2)])

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([[0.0] * 4, [2.5] * 4]))
        loading = pyro.param("loading", torch.tensor([[[1.0], [0.5], [-0.5], [0.2]]] * 2))
        noise = pyro.param("noise", torch.ones(2, 4), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(w))
            pyro.sample("x", dist.LowRankMultivariateNormal(loc[k], loading[k], noise[k]), obs=x)

    found = pyro_em.fit(model, x, max_iter=25, tol=0)
    assert all(found.plan.route(name) == "closed" for name in found.params)
    assert (np.diff(found.history["log_likelihood"]) > 0).all()
    p = {name: value.clone().requires_grad_() for name, value in found.params.items()}
    components = dist.LowRankMultivariateNormal(p["loc"], p["loading"], p["noise"])
    value = (components.log_prob(x.unsqueeze(-2)) + p["w"].log()).logsumexp(-1)
    torch.testing.assert_close(found.log_prob(), value.detach(), rtol=1e-11, atol=1e-11)
    (slope,) = torch.autograd.grad(value.sum(), p["loading"])
    score = found.history["score"][-1] * len(x)
    assert float(slope.abs().max()) <= score * (1 + 1e-6)  # Fisher's identity, at one of the parameters


@pytest.mark.parametrize("noise", [1e-2, 1e-8, 1e-14])
def test_a_low_rank_density_near_zero_noise(noise: float) -> None:
    """Against fifty digits; torch's own density has lost all of its own at the last of them."""
    W, d, x = [0.9, -0.4, 0.7], [noise, 0.3, 0.5], [[0.3, -1.0, 0.2], [1.1, 0.4, -0.6]]

    def model(x: Tensor) -> None:
        loading = pyro.param("loading", torch.tensor(W).unsqueeze(-1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.LowRankMultivariateNormal(torch.zeros(3), loading, torch.tensor(d)), obs=x)

    found = pyro_em.fit(model, torch.tensor(x), max_iter=0)
    with mpmath.workdps(50):
        covariance = mpmath.matrix(3, 3)
        for i in range(3):
            for j in range(3):
                covariance[i, j] = mpmath.mpf(W[i]) * mpmath.mpf(W[j]) + (mpmath.mpf(d[i]) if i == j else 0)
        inverse, det = covariance**-1, mpmath.det(covariance)
        for row, own in zip(x, found.log_prob().tolist(), strict=True):
            y = mpmath.matrix(row)
            expected = -((y.T * inverse * y)[0] + mpmath.log(det) + 3 * mpmath.log(2 * mpmath.pi)) / 2
            assert own == pytest.approx(float(expected), rel=1e-12)


def test_a_low_rank_normal_in_a_loop_keeps_its_density() -> None:
    """Factors at every step would be as many sets of latents; the hidden states alone are summed over."""
    x = factor_analysis.simulate(6, 3, 1)

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([[0.0] * 3, [1.0] * 3]))
        z: Any = 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
            factors = torch.tensor([[0.5], [0.2], [0.1]])
            pyro.sample(f"x_{t}", dist.LowRankMultivariateNormal(loc[z], factors, torch.ones(3)), obs=x[t])

    found = pyro_em.fit(model, x, max_iter=2, tol=0)
    assert found.plan.route("loc") == "numeric" and np.isfinite(found.log_likelihood)


def test_two_categories_are_a_beta_binomial() -> None:
    boys, families = overdispersed.load_families()
    kept = families > 0
    boys, families = boys[kept], families[kept]
    weights = {"rows": families}
    latent = pyro_em.fit(overdispersed.beta_binomial, boys, weights=weights, accelerate="anderson", tol=1e-6)
    marginal = pyro_em.fit(
        overdispersed.dirichlet_multinomial, torch.stack([boys, 12 - boys], -1), weights=weights, tol=1e-9
    )
    assert marginal.log_likelihood == pytest.approx(latent.log_likelihood, abs=1e-8)
    expected = torch.stack([latent.params["a"], latent.params["b"]])
    torch.testing.assert_close(marginal.params["concentration"], expected, rtol=2e-5, atol=0.0)


def test_categories_are_a_dirichlet_multinomial() -> None:
    """EM with the probabilities as latents climbs to where Newton's method on their marginal ends in one step."""
    y = overdispersed.simulate_categories()
    latent = pyro_em.fit(overdispersed.categories, y, accelerate="anderson", tol=1e-8)
    marginal = pyro_em.fit(overdispersed.dirichlet_multinomial, y, tol=1e-9)
    assert latent.converged and latent.plan.route("theta") == "conjugate" and marginal.num_iterations <= 2
    assert latent.log_likelihood == pytest.approx(marginal.log_likelihood, rel=1e-12)
    torch.testing.assert_close(latent.params["concentration"], marginal.params["concentration"], rtol=1e-6, atol=0)
