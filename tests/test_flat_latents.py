"""Coefficients with a flat prior beside random effects: the restricted likelihood (REML), by integrating them out.

With y ~ N(X β, V) and p(β) = 1 (Harville 1974)

    ∫ p(y|β) dβ = (2π)^(-(n-p)/2) |V|^(-1/2) |Xᵀ V⁻¹ X|^(-1/2) exp(-½ rᵀ V⁻¹ r),     r = y - X β̂

and β | y ~ N(β̂, (Xᵀ V⁻¹ X)⁻¹) with β̂ by generalised least squares. lme4's fit of sleepstudy is in published_mixed.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from models import linear_mixed

RNG = np.random.default_rng(4)
GROUP = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4])
X = torch.stack([torch.ones(14).double(), torch.tensor(RNG.normal(size=14))], -1)
Y = torch.tensor(RNG.normal(size=5)[GROUP.numpy()] + X.numpy() @ [2.0, -1.0] + 0.5 * RNG.normal(size=14))
FLAT: dict[str, Callable[[], Any]] = {
    "improper": lambda: dist.ImproperUniform(constraints.real_vector, (), (2,)),
    "independent": lambda: dist.ImproperUniform(constraints.independent(constraints.real, 1), (), (2,)),
    "masked": lambda: dist.Normal(torch.tensor([3.0, -5.0]), 0.1).to_event(1).mask(False),
}


def mixed(x: Tensor, y: Tensor, flat: Callable[[], Any]) -> None:
    t, s = (pyro.param(n, torch.tensor(v), constraint=constraints.positive) for n, v in (("t", 1.0), ("s", 0.7)))
    beta = pyro.sample("beta", flat())
    with pyro.plate("groups", 5):
        b = pyro.sample("b", dist.Normal(0.0, t))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta + b[GROUP], s), obs=y)


def _restricted(V: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formula above, β̂ and its covariance."""
    information = X.T @ torch.linalg.solve(V, X)
    beta = torch.linalg.solve(information, X.T @ torch.linalg.solve(V, y))
    r = y - X @ beta
    value = -0.5 * ((len(y) - X.shape[1]) * math.log(2 * math.pi) + torch.logdet(V) + torch.logdet(information))
    return value - 0.5 * r @ torch.linalg.solve(V, r), beta, torch.linalg.inv(information)


@pytest.mark.parametrize("name", FLAT)
def test_the_restricted_likelihood(name: str) -> None:
    """Evidence along the fit, its maximum, and the posterior of the coefficients."""
    result = pyro_em.fit(mixed, X, Y, FLAT[name], roles={"beta": "latent"}, tol=1e-9, max_iter=3000)
    assert result.converged and (np.diff(result.history["log_likelihood"]) > -1e-11).all()
    assert {row.route for row in result.plan.m_step} == {"closed"} and result.plan.route("beta") == "Gaussian"
    t, s = (result.params[n].clone().requires_grad_() for n in ("t", "s"))
    V = t**2 * (GROUP.unsqueeze(-1) == GROUP).double() + s**2 * torch.eye(14)
    value, beta, covariance = _restricted(V, X, Y)
    assert result.log_likelihood == pytest.approx(float(value.detach()), rel=1e-12)
    for gradient in torch.autograd.grad(value, (t, s)):
        assert float(gradient.abs()) < 1e-6
    posterior = result.posterior()
    torch.testing.assert_close(posterior.mean("beta"), beta.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.variance("beta"), covariance.detach().diagonal(), rtol=1e-9, atol=0)
    assert result.num_parameters == 2
    with pytest.raises(pyro_em.InputError, match=r"flat \(improper\) prior of 'beta'"):
        result.predictive(num_samples=2)


def test_flat_latents_are_the_limit_of_wide_ones() -> None:
    def wide() -> Any:
        return dist.Normal(torch.zeros(2), 1e5).to_event(1)

    options: dict[str, Any] = {"roles": {"beta": "latent"}, "max_iter": 3, "tol": 0}
    flat, other = (pyro_em.fit(mixed, X, Y, prior, **options) for prior in (FLAT["masked"], wide))
    expected = [value + 2 * math.log(1e5 * math.sqrt(2 * math.pi)) for value in other.history["log_likelihood"]]
    assert flat.history["log_likelihood"] == pytest.approx(expected, abs=1e-8)
    assert torch.equal(pyro_em.fit(mixed, X, Y, FLAT["masked"], **options).params["t"], flat.params["t"])


def test_as_parameters_they_are_estimated() -> None:
    """Without a role they stay what a fixed prior is: parameters, by maximum likelihood."""
    result = pyro_em.fit(mixed, X, Y, FLAT["masked"], tol=1e-9, max_iter=3000)
    t, s = (result.params[n] for n in ("t", "s"))
    V = t**2 * (GROUP.unsqueeze(-1) == GROUP).double() + s**2 * torch.eye(14)
    beta = torch.linalg.solve(X.T @ torch.linalg.solve(V, X), X.T @ torch.linalg.solve(V, Y))
    torch.testing.assert_close(result.params["beta"], beta, rtol=1e-7, atol=1e-8)


def test_files_remember_what_was_integrated(tmp_path: Path) -> None:
    """Latents that only `roles=` made latents are latents again where the model is given to a file."""
    result = pyro_em.fit(mixed, X, Y, FLAT["masked"], roles={"beta": "latent"}, max_iter=2, tol=0)
    result.save(tmp_path / "fit.em")
    again = pyro_em.load(tmp_path / "fit.em", model=mixed, args=(X, Y, FLAT["masked"]))
    assert torch.equal(again.posterior().mean("beta"), result.posterior().mean("beta"))
    assert again.posterior().latents == result.posterior().latents


def test_what_the_data_do_not_determine_is_refused() -> None:
    """Covariates that repeat each other; an entry that nothing reads; a flat effect beside a flat mean."""
    twice = torch.stack([X[:, 1], 2 * X[:, 1]], -1)
    unread = torch.stack([X[:, 0], 0 * X[:, 1]], -1)
    for x in (twice, unread):
        with pytest.raises(pyro_em.Refusal, match=r"'beta'.*flat \(improper\), and the data do not determine it"):
            pyro_em.fit(mixed, x, Y, FLAT["masked"], roles={"beta": "latent"})

    def effects(y: Tensor) -> None:
        s = pyro.param("s", torch.tensor(0.7), constraint=constraints.positive)
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("groups", 5):
            b = pyro.sample("b", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean + b[GROUP], s), obs=y)

    with pytest.raises(pyro_em.Refusal, match="do not determine it given the other latents"):
        pyro_em.fit(effects, Y, roles={"mean": "latent", "b": "latent"})


def test_penicillin() -> None:
    """diameter ~ 1 + (1|plate) + (1|sample), by REML, lmer's default: a maximum of the dense restricted likelihood, the
    mean by generalised least squares, effects by the best linear unbiased predictions G Zᵀ V⁻¹ (y - μ̂), of which the
    covariance is G - G Zᵀ (V⁻¹ - V⁻¹ 1 Var[μ̂] 1ᵀ V⁻¹) Z G. That is the test.

    The numbers at its end are those that lme4 1.1-31 prints (and Bates et al. 2015), to the digits given.
    """

    def model(plate: Tensor, sample: Tensor, y: Tensor) -> None:
        starts = {"plate": 0.8, "sample": 1.8, "within": 0.5}
        scales = [pyro.param(n, torch.tensor(v), constraint=constraints.positive) for n, v in starts.items()]
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("plates", 24):
            a = pyro.sample("a", dist.Normal(0.0, scales[0]))
        with pyro.plate("samples", 6):
            c = pyro.sample("c", dist.Normal(0.0, scales[1]))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean + a[plate] + c[sample], scales[2]), obs=y)

    data = linear_mixed.load_penicillin()
    options: dict[str, Any] = {"roles": {"mean": "latent"}, "tol": 1e-8, "max_iter": 5000, "accelerate": "squarem"}
    result = pyro_em.fit(model, *data, **options)
    posterior = result.posterior()
    assert result.converged

    scales = [result.params[n].clone().requires_grad_() for n in ("plate", "sample", "within")]
    Z = torch.cat([torch.eye(size).double()[index] for size, index in zip((24, 6), data[:2], strict=True)], -1)
    G = torch.diag(torch.cat([s.pow(2).expand(size) for s, size in zip(scales, (24, 6), strict=False)]))
    y, one = data[2].double(), torch.ones(len(Z), 1, dtype=torch.float64)
    V = Z @ G @ Z.T + scales[2] ** 2 * torch.eye(len(y)).double()
    value, mean, variance = _restricted(V, one, y)
    assert result.log_likelihood == pytest.approx(float(value.detach()), rel=1e-11)
    assert all(float(g.abs()) < 1e-5 for g in torch.autograd.grad(value, scales, retain_graph=True))
    gain, back = G @ Z.T @ torch.linalg.inv(V), torch.linalg.solve(V, one)
    covariance = G - gain @ Z @ G + G @ Z.T @ back @ variance @ back.T @ Z @ G
    for moment, of_mean, of_effects in (
        ("mean", mean, gain @ (y - mean)),
        ("variance", variance, covariance.diagonal()),
    ):
        found = torch.cat([getattr(posterior, moment)(site).reshape(-1) for site in ("mean", "a", "c")])
        torch.testing.assert_close(found, torch.cat([of_mean.reshape(-1), of_effects]).detach(), rtol=1e-8, atol=1e-8)

    assert -2 * result.log_likelihood == pytest.approx(330.8606, abs=1e-4)
    assert [float(s.detach()) for s in scales] == pytest.approx([0.8467, 1.9316, 0.5499], abs=1e-4)
    assert float(posterior.mean("mean")) == pytest.approx(22.9722, abs=1e-4)
    assert float(posterior.variance("mean").sqrt()) == pytest.approx(0.8086, abs=1e-4)
    samples = [2.18706, -1.01048, 1.93790, -0.09689, -0.01384, -3.00374]
    assert posterior.mean("c").tolist() == pytest.approx(samples, abs=1e-4)
    assert posterior.mean("a")[:4].tolist() == pytest.approx([0.80454, 0.80454, 0.18167, 0.33739], abs=1e-4)
