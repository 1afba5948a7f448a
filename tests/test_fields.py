"""Gaussian latents read along their event: fields under a plate of observations, effects spread over an event.

Against dense joint normals: y ~ N(μ, A K Aᵀ + σ² I), f | y by conditioning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em

N = 9
PLACES = torch.linspace(0, 1, N, dtype=torch.float64)
K = torch.exp(-0.5 * ((PLACES[:, None] - PLACES) / 0.3) ** 2) + 1e-3 * torch.eye(N, dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(0)
WHERE = torch.randint(N, (17,), generator=GENERATOR)
SLOPES = torch.randn(N, generator=GENERATOR, dtype=torch.float64)
PICK = torch.nn.functional.one_hot(WHERE, N).double()


def _noise() -> tuple[Tensor, Tensor]:
    sd = pyro.param("sd", torch.tensor(0.5, dtype=torch.float64), constraint=constraints.positive)
    return pyro.param("mu", torch.tensor(0.1, dtype=torch.float64)), sd


def _field() -> Tensor:
    f: Tensor = pyro.sample("f", dist.MultivariateNormal(torch.zeros(N, dtype=torch.float64), K))
    return f


def plate(y: Tensor) -> None:
    mu, sd = _noise()
    f = _field()
    with pyro.plate("places", N):
        pyro.sample("y", dist.Normal(mu + f, sd), obs=y)


def event(y: Tensor) -> None:
    mu, sd = _noise()
    pyro.sample("y", dist.Normal(mu + _field(), sd).to_event(1), obs=y)


def indexed(y: Tensor) -> None:
    mu, sd = _noise()
    f = _field()
    with pyro.plate("rows", len(WHERE)):
        pyro.sample("y", dist.Normal(mu + f[..., WHERE], sd), obs=y)


def positional(y: Tensor) -> None:
    mu, sd = _noise()
    f = _field()
    with pyro.plate("rows", len(WHERE)):
        pyro.sample("y", dist.Normal(mu + f[WHERE], sd), obs=y)


def scaled(y: Tensor) -> None:
    mu, sd = _noise()
    f = _field()
    with pyro.plate("places", N):
        pyro.sample("y", dist.Normal(mu + SLOPES * f, sd), obs=y)


def white(y: Tensor) -> None:
    """The field as a product with white noise."""
    mu, sd = _noise()
    root = torch.linalg.cholesky(K)
    f = pyro.sample("f", dist.Normal(torch.zeros(N, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("places", N):
        pyro.sample("y", dist.Normal(mu + (root @ f.unsqueeze(-1)).squeeze(-1), sd), obs=y)


EYE = torch.eye(N, dtype=torch.float64)
CASES: dict[Callable[[Tensor], None], Tensor] = {
    plate: EYE, event: EYE, indexed: PICK, positional: PICK, scaled: torch.diag(SLOPES), white: EYE
}  # fmt: skip


def _joint(params: Any, A: Tensor) -> Any:
    covariance = A @ K @ A.T + params["sd"] ** 2 * torch.eye(len(A), dtype=torch.float64)
    return dist.MultivariateNormal(params["mu"].expand(len(A)), covariance)


@pytest.mark.parametrize("model", CASES, ids=lambda m: m.__name__)
def test_a_field_under_a_plate_of_observations(model: Callable[[Tensor], None]) -> None:
    A = CASES[model]
    y = A @ torch.sin(6 * PLACES) + 0.2 * torch.randn(len(A), generator=GENERATOR, dtype=torch.float64)
    result = pyro_em.fit(model, y, roles={"f": "latent"}, tol=1e-9, accelerate="anderson")
    assert result.converged and result.plan.route("f") == "Gaussian"
    leaves = {name: value.clone().requires_grad_() for name, value in result.params.items()}
    value = _joint(leaves, A).log_prob(y)
    assert result.log_likelihood == pytest.approx(float(value.detach()), rel=1e-11)
    for gradient in torch.autograd.grad(value, list(leaves.values())):
        assert float(gradient.abs()) < 1e-6
    joint = _joint(result.params, A)
    gain = torch.linalg.solve(joint.covariance_matrix, A @ K).T
    mean, covariance = gain @ (y - result.params["mu"]), K - gain @ A @ K
    if model is white:
        root = torch.linalg.inv(torch.linalg.cholesky(K))
        mean, covariance = root @ mean, root @ covariance @ root.T
    posterior = result.posterior()
    torch.testing.assert_close(posterior.mean("f"), mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.variance("f"), covariance.diagonal(), rtol=1e-8, atol=1e-8)


def test_an_effect_spread_over_the_event_of_its_group() -> None:
    """b[g] stands once for a row and is read by all cells of the row's event."""
    rows, cells = 7, 4
    b = torch.randn(rows, generator=GENERATOR, dtype=torch.float64)
    y = 1.0 + b[:, None] + 0.5 * torch.randn(rows, cells, generator=GENERATOR, dtype=torch.float64)

    def model(y: Tensor) -> None:
        mu, sd = _noise()
        tau = pyro.param("tau", torch.tensor(0.8, dtype=torch.float64), constraint=constraints.positive)
        with pyro.plate("groups", rows):
            b = pyro.sample("b", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(b.unsqueeze(-1), sd.expand(cells)).to_event(1), obs=y)

    result = pyro_em.fit(model, y, tol=1e-9, accelerate="anderson")
    p = {name: value.clone().requires_grad_() for name, value in result.params.items()}
    covariance = p["tau"] ** 2 * torch.ones(cells, cells) + p["sd"] ** 2 * torch.eye(cells)
    value = dist.MultivariateNormal(p["mu"].expand(cells), covariance).log_prob(y)
    assert result.converged and "pooled" in str(result.plan)
    torch.testing.assert_close(result.log_prob(), value.detach(), rtol=1e-11, atol=1e-11)
    for gradient in torch.autograd.grad(value.sum(), list(p.values())):
        assert float(gradient.abs()) < 1e-6
    tau2, sd2 = (float(result.params[n]) ** 2 for n in ("tau", "sd"))
    precision = cells / sd2 + 1 / tau2
    mean = (y.sum(-1) / sd2 + result.params["mu"] / tau2) / precision
    torch.testing.assert_close(result.posterior().mean("b"), mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        result.posterior().variance("b"), torch.full((rows,), 1 / precision).double(), rtol=1e-10, atol=0
    )
