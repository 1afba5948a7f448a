"""Covariances that are known up to a factor, s²·A: relationship matrices, kernels of Gaussian processes, tied states.

The factor has a closed form, the argmax of −A D log c − ½ tr(B C⁻¹)/c. Twins with equal rows and a little on the
diagonal make A nearly singular: Newton's method on the factor crept there for minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em

GENERATOR = torch.Generator().manual_seed(8)
GROUP = torch.arange(24) % 8
FORMS: dict[str, Callable[[Tensor, Tensor], dist.Distribution]] = {
    "covariance": lambda s, A: dist.MultivariateNormal(torch.zeros(len(A)), s**2 * A),
    "factor": lambda s, A: dist.MultivariateNormal(torch.zeros(len(A)), scale_tril=s * torch.linalg.cholesky(A)),
    "precision": lambda s, A: dist.MultivariateNormal(torch.zeros(len(A)), precision_matrix=torch.linalg.inv(A) / s**2),
}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def relationship(ridge: float) -> Tensor:
    """Two families of two pairs of twins."""
    pairs = 0.5 * torch.eye(4) + 0.5 * torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    return pairs.repeat_interleave(2, 0).repeat_interleave(2, 1) + ridge * torch.eye(8)


Y = torch.linalg.cholesky(relationship(1e-3).double()) @ _normal(8)
Y = 1.0 + Y[GROUP] + 0.7 * _normal(24)


def kinship(y: Tensor, A: Tensor, form: str) -> None:
    mean, s, noise = pyro.param("mean", torch.zeros(())), _positive("s"), _positive("noise")
    u = pyro.sample("u", FORMS[form](s, A))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean + u[..., GROUP], noise), obs=y)


def _positive(name: str, *shape: int) -> Tensor:
    return pyro.param(name, torch.ones(shape), constraint=constraints.positive)


@pytest.mark.parametrize("ridge", [1e-1, 1e-6, 1e-10])
@pytest.mark.parametrize("form", FORMS)
def test_effects_of_a_known_relationship(form: str, ridge: float) -> None:
    A, roles = relationship(ridge), {"u": "latent"}
    if form == "precision" and ridge < 1e-6:
        return  # its inverse is not known to enough digits
    result = pyro_em.fit(kinship, Y, A, form, roles=roles, max_iter=200, tol=1e-4)
    assert result.converged
    assert {row.name: row.route for row in result.plan.m_step}["s"] == "closed"
    mean, log_s, log_noise = result.params["mean"], result.params["s"].log(), result.params["noise"].log()
    u = [x.requires_grad_() for x in (mean, log_s, log_noise)]
    s, noise = log_s.exp(), log_noise.exp()
    dense = dist.MultivariateNormal(mean.expand(24), s**2 * A[GROUP][:, GROUP] + noise**2 * torch.eye(24)).log_prob(Y)
    assert result.log_likelihood == pytest.approx(dense.item(), rel=1e-9 if ridge < 1e-6 else 1e-11)
    slopes = torch.stack(torch.autograd.grad(dense, u))
    digits = 1e-4 if ridge >= 1e-6 else 1e-2  # of what the twins' directions leave of a double's
    assert 24 * result.history["score"][-1] == pytest.approx(float(slopes.abs().max()), rel=digits)


def test_many_effects_that_rows_take_one_by_one_are_interpreted() -> None:
    """Their products, one for every pair of an effect and a row's place, took seconds an update."""
    group, A = torch.arange(60) % 30, torch.eye(30) + 0.5

    def model(y: Tensor) -> None:
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(30), _positive("s") ** 2 * A))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal(u[..., group], _positive("noise")), obs=y)

    y = _normal(60)
    result = pyro_em.fit(model, y, roles={"u": "latent"}, max_iter=3, tol=0)
    assert "too many covariates" in result.plan.engine
    s, noise = result.params["s"], result.params["noise"]
    dense = dist.MultivariateNormal(torch.zeros(60), s**2 * A[group][:, group] + noise**2 * torch.eye(60)).log_prob(y)
    assert result.log_likelihood == pytest.approx(float(dense), rel=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_known_covariance_in_two_states(form: str) -> None:
    """One update: s_k² = Σ_n w_nk x_nᵀ A⁻¹ x_n / (D Σ_n w_nk), with A's zeros where rows are not related."""
    A, x = relationship(1e-2), _normal(12, 8) * torch.tensor([0.5] * 6 + [2.0] * 6).unsqueeze(-1)
    start = torch.tensor([0.8, 1.5])

    def model(x: Tensor) -> None:
        s = pyro.param("s", start, constraint=constraints.positive)
        with pyro.plate("rows", 12):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", FORMS[form](s[z].unsqueeze(-1).unsqueeze(-1), A), obs=x)

    result = pyro_em.fit(model, x, max_iter=1, tol=0)
    squares = (x @ torch.linalg.inv(A) * x).sum(-1)
    w = torch.softmax(torch.tensor([0.4, 0.6]).log() - 8 * start.log() - squares.unsqueeze(-1) / 2 / start**2, -1)
    expected = ((w * squares.unsqueeze(-1)).sum(0) / (8 * w.sum(0))).sqrt()
    torch.testing.assert_close(result.params["s"], expected, rtol=1e-10, atol=0.0)
    assert {row.name: row.route for row in result.plan.m_step}["s"] == "closed"
