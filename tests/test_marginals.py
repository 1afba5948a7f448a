"""Latents that a distribution integrates itself: the same fit as with the latents written out."""

from __future__ import annotations

import pytest
import torch

import pyro_em
from models import factor_analysis, overdispersed


def test_low_rank_normal_is_factor_analysis() -> None:
    # Not the irises: a noise variance goes to 0 there, where torch's density of the low-rank form cancels.
    x = factor_analysis.simulate(150, 5, 1)
    marginal = pyro_em.fit(factor_analysis.low_rank, x, tol=1e-7)
    assert marginal.plan.route("loading") == marginal.plan.route("variance") == "numeric"
    assert "LowRankMultivariateNormal hides its arguments" in str(marginal.plan)
    latent = pyro_em.fit(
        factor_analysis.model,
        x,
        init={
            "loading": marginal.params["loading"],
            "mean": marginal.params["mean"],
            "scale": marginal.params["variance"].sqrt(),
        },
        max_iter=0,
    )
    assert latent.log_likelihood == pytest.approx(marginal.log_likelihood, rel=1e-12)
    assert latent.history["score"][0] < 1e-5  # Fisher's identity: the gradient by way of the latents vanishes too
    climbed = pyro_em.fit(factor_analysis.model, x, accelerate="anderson", tol=1e-7)
    assert climbed.log_likelihood is not None and marginal.log_likelihood is not None
    assert marginal.log_likelihood >= climbed.log_likelihood - 1e-3


def test_two_categories_are_a_beta_binomial() -> None:
    boys, families = overdispersed.load_families()
    kept = families > 0
    boys, families = boys[kept], families[kept]
    weights = {"rows": families}
    latent = pyro_em.fit(overdispersed.beta_binomial, boys, weights=weights, accelerate="anderson", tol=1e-6)
    marginal = pyro_em.fit(
        overdispersed.dirichlet_multinomial, torch.stack([boys, 12 - boys], -1), weights=weights, tol=1e-9
    )
    assert marginal.log_likelihood == pytest.approx(latent.log_likelihood, abs=1e-5)
    expected = torch.stack([latent.params["a"], latent.params["b"]])
    torch.testing.assert_close(marginal.params["concentration"], expected, rtol=1e-3, atol=0.0)
