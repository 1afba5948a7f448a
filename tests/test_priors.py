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
from sklearn.linear_model import Lasso
from torch import Tensor

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
    result = pyro_em.fit(model, y, algorithm="map-em", seed=0, tol=1e-9, max_iter=3000)
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


def _coefficients(site: Callable[[Tensor], Any], scale: float) -> Callable[[Tensor, Tensor], None]:
    def model(X: Tensor, y: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.0))
        b = pyro.sample("b", dist.Laplace(torch.zeros(X.shape[-1]), scale).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", site(a + X @ b), obs=y)

    return model


def _sparse(seed: int = 3) -> tuple[Tensor, Tensor]:
    """Seven covariates, the second almost the first, of which two matter; and the linear predictor."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(150, 7))
    X[:, 1] = X[:, 0] + 0.05 * X[:, 1]
    return torch.as_tensor(X), torch.as_tensor(0.3 + 0.9 * X[:, 0] - 0.6 * X[:, 4])


def test_the_lasso_is_scikit_learns() -> None:
    X, eta = _sparse()
    y = eta + torch.as_tensor(np.random.default_rng(4).normal(size=150))
    peer = Lasso(alpha=20.0 / 150, tol=1e-14, max_iter=100_000).fit(X.numpy(), y.numpy())
    start = {"a": 1.0, "b": torch.ones(7)}
    result = pyro_em.fit(
        _coefficients(lambda e: dist.Normal(e, 1.0), 0.05), X, y, algorithm="map-em", init=start, max_iter=1, tol=0
    )
    assert 0 < int((result.params["b"] == 0).sum()) < 7
    np.testing.assert_allclose(result.params["b"].numpy(), peer.coef_, atol=1e-8)
    assert float(result.params["a"]) == pytest.approx(peer.intercept_, abs=1e-8)


def test_a_laplace_prior_of_coefficients_behind_a_link_and_in_a_mixture() -> None:
    """Slopes are ± the rate where a coefficient is not 0, and no larger where it is exactly 0."""
    X, eta = _sparse()
    counts = torch.as_tensor(np.random.default_rng(5).poisson(eta.exp()).astype(float))
    result = pyro_em.fit(
        _coefficients(lambda e: dist.Poisson(e.exp()), 0.04), X, counts, algorithm="map-em",
        init={"a": 0.0, "b": torch.full((7,), 0.1)}, tol=1e-10,
    )  # fmt: skip
    a, b = result.params["a"], result.params["b"]
    slope = X.mT @ (counts - (a + X @ b).exp())
    assert result.converged and 0 < int((b == 0).sum()) < 7
    assert [row.reason for row in result.plan.m_step][1] == (
        "Newton (Poisson.rate behind exp, prior Laplace), jointly with 'a'"
    )
    torch.testing.assert_close(slope[b != 0], 25.0 * b[b != 0].sign(), rtol=1e-7, atol=1e-7)
    assert float(slope[b == 0].abs().max()) < 25

    def mixture(X: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.full((2,), 2.0)))
        level = pyro.sample("level", dist.Normal(torch.tensor([-1.0, 2.0]), 3.0).to_event(1))
        sd = pyro.sample("sd", dist.Gamma(2.0, 2.0))
        slopes = pyro.sample("slopes", dist.Laplace(torch.zeros(2, 7), 0.1).to_event(2))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(level[z] + (X * slopes[z]).sum(-1), sd), obs=y)

    noise = torch.as_tensor(np.random.default_rng(6).normal(size=150))
    y = eta + 3.0 * (torch.arange(150) % 2) + 0.7 * noise
    fitted = pyro_em.fit(mixture, X, y, algorithm="map-em", init={"slopes": torch.zeros(2, 7) + 0.01}, tol=1e-9)
    assert fitted.converged
    objective = np.array(fitted.history["objective"])
    assert (np.diff(objective) >= -1e-12 * np.abs(objective).max()).all()
    zero = fitted.params["slopes"] == 0
    assert 0 < int(zero.sum()) < 14
    _, slopes = _auto_delta(mixture, (X, y), fitted.params)
    (found,) = (g for name, g in slopes.items() if "slopes" in name)  # of the loss; |x| has slope 0 at 0 for torch
    assert float(found[~zero].abs().max()) <= 1e-6
    assert float(found[zero].abs().max()) < 10


def test_a_laplace_prior_of_a_network_is_refused_with_a_remedy() -> None:
    X, eta = _sparse()

    def network(X: Tensor, y: Tensor) -> None:
        W = pyro.sample("W", dist.Laplace(torch.zeros(7, 20), 0.1).to_event(2))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(torch.tanh(X @ W).sum(-1), 1.0), obs=y)

    with pytest.raises(pyro_em.Refusal, match=r"'W'.*kink.*Normal or StudentT prior, or m_step"):
        pyro_em.fit(network, X, eta, algorithm="map-em")


def test_the_location_of_a_laplace_site_may_be_climbed() -> None:
    """Instead of its weighted medians (test_median.py)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(30, generator=generator) + m for m in (-3.0, 3.0)])

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Laplace(loc[z], scale[z]), obs=x)

    found = pyro_em.fit(model, x, m_step={"loc": "gradient"}, max_iter=40, tol=0)
    assert np.diff(found.history["objective"]).min() > -1e-9
    medians = torch.stack([x[:30].median(), x[30:].median()])
    torch.testing.assert_close(found.params["loc"], medians, rtol=0, atol=0.3)
