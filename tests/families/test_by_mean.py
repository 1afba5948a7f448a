"""Beta and beta-binomial densities by mean and precision: the same numbers, and derivatives without false ones."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from statsmodels.othermod.betareg import BetaModel
from torch import Tensor

import pyro_em
from pyro_em.families import FAMILIES
from pyro_em.families.by_mean import MARK, seen_so
from tests.classics import positive


def _concentrations(eta: Tensor, phi: Tensor) -> dict[str, Tensor]:
    mean = torch.sigmoid(eta)
    return {"concentration1": mean * phi, "concentration0": (1 - mean) * phi}


@pytest.mark.parametrize("law", [dist.Beta, dist.BetaBinomial])
def test_the_same_density_and_derivatives(law: Any) -> None:
    eta, phi = torch.linspace(-3, 3, 7).requires_grad_(), torch.linspace(0.5, 40, 7).requires_grad_()
    family = FAMILIES[law]
    rest = {} if law is dist.Beta else {"total_count": torch.tensor(9.0)}
    value = torch.linspace(0.1, 0.9, 7) if law is dist.Beta else torch.arange(7.0)

    def plain(eta: Tensor, phi: Tensor) -> Tensor:
        return family.log_prob({**_concentrations(eta, phi), **rest}, value)

    def other(eta: Tensor, phi: Tensor) -> Tensor:
        own, arguments = seen_so(family, {**_concentrations(eta, phi), **rest}, {MARK: frozenset()}, 0)
        assert own.arguments.keys() == arguments.keys()
        return own.log_prob(arguments, value)

    torch.testing.assert_close(other(eta, phi), plain(eta, phi), rtol=1e-12, atol=1e-12)
    for function in (lambda f: torch.autograd.functional.jacobian(f, (eta, phi)),
                     lambda f: torch.autograd.functional.hessian(lambda a, b: f(a, b).sum(), (eta, phi))):  # fmt: skip
        for mine, theirs in zip(function(other), function(plain), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    batched = torch.func.vmap(other)(torch.stack([eta, eta + 1]), torch.stack([phi, phi]))
    torch.testing.assert_close(batched[1], plain(eta + 1, phi), rtol=1e-12, atol=1e-12)


def test_what_does_not_reach_an_argument_has_no_derivative_in_it() -> None:
    """Tangents that cancel up to rounding are 0: of the mean in φ, of φ in the predictor of the mean."""
    eta, phi = (0.37 * torch.arange(1, 200) % 5 - 2.5).requires_grad_(), torch.tensor(7.3, requires_grad=True)
    raw = _concentrations(eta, phi)
    _, arguments = seen_so(FAMILIES[dist.Beta], raw, {MARK: frozenset({-1})}, 0)
    assert arguments["precision"].shape == ()
    for name, leaf in (("mean", phi), ("precision", eta)):
        cotangent = torch.ones_like(arguments[name], requires_grad=True)
        (pulled,) = torch.autograd.grad(arguments[name], leaf, cotangent, create_graph=True)
        (tangent,) = torch.autograd.grad(pulled, cotangent, torch.ones_like(leaf))
        assert not bool(tangent.any()), name


def test_beta_regression_against_statsmodels() -> None:
    """By Newton's method, as a predictor of the mean and one of the precision; also with a precision for each of two
    kinds of rows that start alike."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, generator=generator, dtype=torch.float64)
    noise = torch.randn(120, generator=generator, dtype=torch.float64)
    y = torch.sigmoid(0.3 + 0.6 * x + 0.5 * noise)
    design = torch.stack([torch.ones(120), x], -1)

    def model(X: Tensor, y: Tensor) -> None:
        b, c = pyro.param("b", torch.zeros(2)), pyro.param("c", torch.zeros(2))
        with pyro.plate("rows", len(y)):
            mean, phi = torch.sigmoid(X @ b), torch.exp(X @ c)
            pyro.sample("y", dist.Beta(mean * phi, (1 - mean) * phi), obs=y)

    result = pyro_em.fit(model, design, y)
    assert result.converged and "Newton (Beta.mean behind sigmoid)" in str(result.plan)
    peer = BetaModel(y.numpy(), design.numpy(), exog_precision=design.numpy()).fit(disp=0, gtol=1e-8)
    assert result.log_likelihood == pytest.approx(peer.llf, abs=1e-8)
    found = torch.cat([result.params["b"], result.params["c"]])
    torch.testing.assert_close(found, torch.as_tensor(peer.params), rtol=1e-4, atol=1e-5)
    errors = result.standard_errors()
    torch.testing.assert_close(torch.cat([errors["b"], errors["c"]]), torch.as_tensor(peer.bse), rtol=1e-3, atol=1e-4)

    def kinds(X: Tensor, y: Tensor) -> None:
        b = pyro.param("b", torch.zeros(2))
        phi = pyro.param("phi", torch.tensor([5.0, 5.0]), constraint=positive)[torch.arange(len(y)) % 2]
        with pyro.plate("rows", len(y)):
            mean = torch.sigmoid(X @ b)
            pyro.sample("y", dist.Beta(mean * phi, phi - mean * phi), obs=y)

    two = torch.nn.functional.one_hot(torch.arange(120) % 2).numpy()
    peer = BetaModel(y.numpy(), design.numpy(), exog_precision=two).fit(disp=0, gtol=1e-8)
    assert pyro_em.fit(kinds, design, y).log_likelihood == pytest.approx(peer.llf, abs=1e-8)
