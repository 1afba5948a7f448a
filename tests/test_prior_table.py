"""Every prior that map-em is asked for, on the parameter that it is written for: the rule, and the mode it finds.

Without latents one update is the whole fit: there the gradient of log p(x | θ) + log p(θ) in free coordinates is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_em
from pyro_em.charts import chart
from pyro_em.distributions import InverseWishart

RNG = np.random.default_rng(31)
X = np.c_[np.ones(25), RNG.normal(size=(25, 2))]
Y = X @ np.array([0.5, 1.0, -0.7]) + 0.8 * RNG.normal(size=25)
COUNTS = RNG.poisson(np.exp(0.5 * X[:, 1])).astype(float)
PAIRS = RNG.normal(size=(25, 2)) @ np.array([[1.0, 0.4], [0.0, 0.7]])
KINDS = RNG.integers(0, 3, 25)
T = torch.as_tensor


def _scale(prior: Callable[[], Any]) -> Callable[[], None]:
    def model() -> None:
        sd = pyro.sample("theta", prior())
        with pyro.plate("rows", 25):
            pyro.sample("y", dist.Normal(0.3, sd), obs=T(Y))

    return model


def _on(prior: Callable[[], Any], site: Callable[[Tensor], Any], data: Any) -> Callable[[], None]:
    def model() -> None:
        theta = pyro.sample("theta", prior())
        with pyro.plate("rows", 25):
            pyro.sample("y", site(theta), obs=T(data))

    return model


def _niw() -> None:
    """Normal-inverse-Wishart: the prior of the location takes the covariance with it."""
    S = pyro.sample("S", InverseWishart(torch.tensor(6.0), 2 * torch.eye(2)))
    mu = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(2), covariance_matrix=S / 3.0))
    with pyro.plate("rows", 25):
        pyro.sample("y", dist.MultivariateNormal(mu, covariance_matrix=S), obs=T(PAIRS))


def _lkj() -> None:
    """Scales and correlations apart: no closed form, Newton on the matrix as the model makes it of both."""
    L = pyro.sample("theta", dist.LKJCholesky(2, 2.0))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("rows", 25):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=sd.unsqueeze(-1) * L), obs=T(PAIRS))


CASES: dict[str, tuple[Callable[[], None], str]] = {
    "Normal, ridge": (
        _on(lambda: dist.Normal(torch.zeros(3), 0.5).to_event(1), lambda b: dist.Normal(T(X) @ b, 0.8), Y),
        "closed",
    ),
    "Normal, log-linear": (
        _on(lambda: dist.Normal(torch.zeros(3), 0.5).to_event(1), lambda b: dist.Poisson((T(X) @ b).exp()), COUNTS),
        "newton",
    ),
    "Normal, logistic": (
        _on(
            lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1),
            lambda b: dist.Bernoulli(logits=T(X) @ b),
            1.0 * (Y > 0),
        ),
        "newton",
    ),
    "Gamma, rate": (_on(lambda: dist.Gamma(2.0, 1.0), dist.Poisson, COUNTS), "closed"),
    "Exponential, rate": (_on(lambda: dist.Exponential(0.5), dist.Poisson, COUNTS), "closed"),
    "HalfNormal, rate": (_on(lambda: dist.HalfNormal(2.0), dist.Poisson, COUNTS), "closed"),
    "LogNormal, rate": (_on(lambda: dist.LogNormal(0.0, 0.5), dist.Poisson, COUNTS), "closed"),
    "HalfCauchy, scale": (_scale(lambda: dist.HalfCauchy(1.0)), "closed"),
    "HalfNormal, scale": (_scale(lambda: dist.HalfNormal(1.0)), "closed"),
    "Exponential, scale": (_scale(lambda: dist.Exponential(2.0)), "closed"),
    "InverseGamma, scale": (_scale(lambda: dist.InverseGamma(3.0, 2.0)), "closed"),
    "Gamma, scale": (_scale(lambda: dist.Gamma(2.0, 2.0)), "closed"),
    "LogNormal, scale": (_scale(lambda: dist.LogNormal(0.0, 0.5)), "closed"),
    "InverseGamma, variance": (
        _on(lambda: dist.InverseGamma(3.0, 2.0), lambda v: dist.Normal(0.3, v.sqrt()), Y),
        "closed",
    ),
    "Gamma, precision": (_on(lambda: dist.Gamma(2.0, 1.0), lambda t: dist.Normal(0.3, t**-0.5), Y), "closed"),
    "Beta, probability": (_on(lambda: dist.Beta(2.0, 3.0), dist.Bernoulli, 1.0 * (Y > 0)), "closed"),
    "Dirichlet, probabilities": (
        _on(lambda: dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])), dist.Categorical, KINDS),
        "closed",
    ),
    "HalfCauchy, size": (
        _on(lambda: dist.HalfCauchy(1.0), lambda r: dist.NegativeBinomial(r, logits=torch.zeros(())), COUNTS),
        "newton",
    ),
    "Gamma, concentration": (_on(lambda: dist.Gamma(2.0, 1.0), lambda a: dist.Gamma(a, 1.5), np.exp(Y)), "newton"),
    "normal-inverse-Wishart": (_niw, "closed"),
    "LKJ": (_lkj, "newton"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mode_of_every_prior(name: str) -> None:
    model, route = CASES[name]
    # A prior that reads a parameter would make its site a latent one.
    result = pyro_em.fit(model, algorithm="map-em", roles={"theta": "parameter"}, max_iter=1, tol=0)
    assert result.plan.route("theta") == route
    sites = poutine.trace(model).get_trace().nodes
    charts = {n: chart(sites[n]["fn"].support, v) for n, v in result.params.items()}
    free = {n: charts[n].to_free(v).requires_grad_() for n, v in result.params.items()}
    values = {n: charts[n].from_free(u) for n, u in free.items()}
    density = poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum()
    gradient = torch.autograd.grad(density, list(free.values()))
    assert max(float(g.abs().max()) for g in gradient) <= 1e-8 * 25
    assert result.log_posterior == pytest.approx(float(density.detach()), rel=1e-12)
