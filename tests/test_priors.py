"""map-em against textbook MAP in Pyro: AutoDelta on the same model has the same objective, and no slope at the fit.

Each prior in a mixture model; the latent is enumerated by TraceEnum_ELBO. `plan` tells which rule served it.
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
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.distributions import InverseWishart

Prior = Callable[[], Any]


def _normals(location: Prior, scale: Prior) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.full((2,), 2.0)))
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", location())
            sd = pyro.sample("sd", scale())
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(mu[z], sd[z]), obs=y)

    return model


def _counts(rate: Prior) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.full((2,), 2.0)))
        with pyro.plate("components", 2):
            rates = pyro.sample("rate", rate())
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Poisson(rates[z]), obs=y)

    return model


def _normal_inverse_wishart(y: Tensor) -> None:
    """A location whose prior has the covariance of the data, divided by a number of prior observations."""
    w = pyro.sample("w", dist.Dirichlet(torch.full((2,), 2.0)))
    with pyro.plate("components", 2):
        S = pyro.sample("S", InverseWishart(5.0, torch.eye(2)))
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), covariance_matrix=S / 0.1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.MultivariateNormal(mu[z], covariance_matrix=S[z]), obs=y)


def _ridge(y: Tensor) -> None:
    """Coefficients with a Normal prior, a half-Cauchy one of their scale's residual."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 0.5).to_event(1))
    sd = pyro.sample("sd", dist.HalfCauchy(1.0))
    design = torch.stack([torch.ones(len(y)), torch.linspace(-1.0, 1.0, len(y))], -1)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, sd), obs=y)


def _line() -> Tensor:
    rng = np.random.default_rng(0)
    return torch.as_tensor(np.concatenate([rng.normal(-1.5, 0.7, 30), rng.normal(2.0, 1.0, 20)]))


def _plane() -> Tensor:
    rng = np.random.default_rng(1)
    return torch.as_tensor(np.concatenate([rng.normal((-1.5, 0), 0.8, (25, 2)), rng.normal((1.5, 1), 1.1, (15, 2))]))


def _events() -> Tensor:
    rng = np.random.default_rng(2)
    return torch.as_tensor(np.concatenate([rng.poisson(2.0, 30), rng.poisson(7.0, 20)]).astype(float))


def _normal_prior() -> Any:
    return dist.Normal(0.0, 3.0)


def _half_normal() -> Any:
    return dist.HalfNormal(2.0)


# model, data, the parameter in question, the rule that serves it
CASES: dict[str, tuple[Callable[[Tensor], None], Callable[[], Tensor], str, str]] = {
    **{
        f"location {name}": (_normals(prior, _half_normal), _line, "mu", rule)
        for name, prior, rule in [
            ("normal", _normal_prior, "precision-weighted mean"),
            ("laplace", lambda: dist.Laplace(0.0, 0.5), "soft threshold"),
            ("student", lambda: dist.StudentT(3.0, 0.0, 1.0), "root of a cubic"),
            ("cauchy", lambda: dist.Cauchy(0.0, 1.0), "root of a cubic"),
        ]
    },
    **{
        f"scale {name}": (_normals(_normal_prior, prior), _line, "sd", rule)
        for name, prior, rule in [
            ("half cauchy", lambda: dist.HalfCauchy(0.5), "root of a concave slope"),
            ("half normal", lambda: dist.HalfNormal(1.0), "ratio of moments"),
            ("gamma", lambda: dist.Gamma(2.0, 1.0), "root of a concave slope"),
            ("log normal", lambda: dist.LogNormal(0.0, 1.0), "root of a concave slope"),
            ("exponential", lambda: dist.Exponential(1.0), "root of a concave slope"),
            ("inverse gamma", lambda: dist.InverseGamma(2.0, 1.0), "root of a concave slope"),
        ]
    },
    **{
        f"rate {name}": (_counts(prior), _events, "rate", rule)
        for name, prior, rule in [
            ("gamma", lambda: dist.Gamma(2.0, 1.0), "ratio of moments"),
            ("exponential", lambda: dist.Exponential(1.0), "ratio of moments"),
            ("half cauchy", lambda: dist.HalfCauchy(2.0), "root of a concave slope"),
            ("log normal", lambda: dist.LogNormal(0.0, 1.0), "root of a concave slope"),
        ]
    },
    "normal inverse Wishart": (_normal_inverse_wishart, _plane, "S", "weighted scatter matrix"),
    "ridge": (_ridge, _line, "beta", "linear solve"),
}


def _auto_delta(
    model: Any, data: Tensor | tuple[Tensor, ...], params: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Pyro's own MAP objective at given values, and its slope in AutoDelta's unconstrained parameters."""
    args = data if isinstance(data, tuple) else (data,)
    pyro.clear_param_store()
    guide = AutoDelta(poutine.block(model, hide=["z", "y"]), init_loc_fn=init_to_value(values=params))
    guide(*args)
    enumerated = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    loss = enumerated.differentiable_loss(config_enumerate(model), guide, *args)
    free = dict(guide.named_parameters())
    gradients = torch.autograd.grad(loss, list(free.values()))
    return -float(loss.detach()), dict(zip(free, gradients, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_equals_auto_delta(name: str) -> None:
    model, data, parameter, rule = CASES[name]
    y = data()
    result = pyro_em.fit(model, y, algorithm="map-em", seed=0, tol=1e-9, max_iter=400)
    assert result.converged
    row = next(row for row in result.plan.m_step if row.name == parameter)
    assert (row.route, row.reason.split(" (")[0]) == ("closed", rule)
    objective, slopes = _auto_delta(model, y, result.params)
    assert result.log_posterior == pytest.approx(objective, rel=1e-8)
    assert max(float(g.abs().max()) for g in slopes.values()) <= 1e-6


def test_a_laplace_prior_puts_small_locations_on_its_center() -> None:
    y = _line() - _line().mean()
    result = pyro_em.fit(
        _normals(lambda: dist.Laplace(0.0, 0.01), _half_normal), y, algorithm="map-em", seed=0, tol=1e-8, max_iter=500
    )
    assert result.converged
    assert (result.params["mu"] == 0).all()


def test_priors_are_read_by_map_em_only() -> None:
    model, y = CASES["scale half cauchy"][0], _line()
    start = {"w": [0.5, 0.5], "mu": [-1.0, 1.5], "sd": [1.0, 1.0]}
    plain = pyro_em.fit(model, y, algorithm="em", init=start, tol=1e-9)
    other = pyro_em.fit(_normals(_normal_prior, _half_normal), y, algorithm="em", init=start, tol=1e-9)
    assert all(torch.equal(plain.params[n], other.params[n]) for n in start)
    assert plain.log_posterior is None


class _Regression(PyroModule):
    """The Bayesian regression of Pyro's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 10.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


@pytest.mark.parametrize("seed", range(4))
def test_a_uniform_prior_holds_and_is_left_again(seed: int) -> None:
    """From a drawn bias far off the residuals ask for more than 10, where the prior of sigma ends."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(60, generator=generator)
    found = pyro_em.fit(_Regression(), x, y, algorithm="map-em", seed=seed)
    X = torch.cat([x, torch.ones(60, 1)], 1)
    sigma = found.params["sigma"]
    ridge = torch.linalg.solve(X.mT @ X + sigma**2 / 100 * torch.eye(4), X.mT @ y)
    assert found.converged
    assert "linear.weight  pyro.sample  closed  linear solve" in str(found.plan)
    torch.testing.assert_close(found.params["linear.weight"].squeeze(0), ridge[:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(sigma, (y - X @ ridge).square().mean().sqrt(), rtol=0, atol=1e-6)


def test_an_update_stops_below_the_upper_end_of_a_uniform_prior() -> None:
    """Pyro's Uniform has density zero at its upper end."""
    y = 3.0 * torch.randn(200, generator=torch.Generator().manual_seed(0))

    def model(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 1.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, sigma), obs=y)

    found = pyro_em.fit(model, y, algorithm="map-em", init={"sigma": torch.tensor(1.0)})
    assert 1.5 - 1e-9 < float(found.params["sigma"]) < 1.5
    assert found.log_posterior is not None and math.isfinite(found.log_posterior)


def _free_spread(prior: Callable[[Tensor], Any], levels: int) -> Callable[..., None]:
    """Levels with a prior around 0 whose spread is a parameter, and normal data."""

    def model(y: Tensor) -> None:
        tau = pyro.param("tau", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("levels", levels):
            mu = pyro.sample("mu", prior(tau), infer={"em": "parameter"})
        for i in range(levels):
            with pyro.plate(f"rows_{i}", len(y)):
                pyro.sample(f"y_{i}", dist.Normal(mu[i], 1.0), obs=y)

    return model


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(
    "prior",
    [
        lambda tau: dist.Normal(0.0, tau),
        lambda tau: dist.Normal(0.0, tau.rsqrt()),
        lambda tau: dist.Laplace(0.0, tau),
    ],
    ids=["scale", "precision", "laplace"],
)
def test_a_prior_with_a_free_spread_has_no_maximum(prior: Callable[[Tensor], Any], levels: int) -> None:
    """log N(μ; 0, τ) → ∞ as τ → 0 and μ → 0; the sentence says so, names the prior's site, and how to go on."""
    y = torch.tensor([-0.8, 0.5, 0.1, -0.2, 0.45])
    with pytest.raises(pyro_em.PyroEMError) as caught:
        pyro_em.fit(_free_spread(prior, levels), y, algorithm="map-em", max_iter=400)
    said = str(caught.value)
    assert "spread of the prior of 'mu' is a free parameter itself and has gone to 0" in said
    assert "roles={'mu': 'latent'}" in said
    assert "Dirichlet" not in said
