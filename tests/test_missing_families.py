"""Whole values missing of every family: NaN, `obs_mask` and masks are as if the rows were not there.

The imputation of a row without anything observed is the fitted distribution's own mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_em
from tests.missing_data import NAN

N = 16
KNOWN = torch.arange(N) % 3 != 1
torch.manual_seed(0)
REAL, COUNT = torch.randn(N, dtype=torch.float64), torch.randint(0, 5, (N,)).double()
POSITIVE, UNIT = REAL.abs() + 0.1, REAL.sigmoid()
CODE = torch.arange(N).mul(5).remainder(3)
TABLE = torch.distributions.Multinomial(6, torch.ones(3).double()).sample((N,))
SHARES = (TABLE + 1) / 9
VECTOR = torch.randn(N, 3, dtype=torch.float64)
CHAIN = torch.randint(0, 2, (N, 4)).double()


def _three(a: Tensor) -> Tensor:
    return torch.stack([0 * a, a, -a], -1)


def _ones(a: Tensor) -> Tensor:
    return torch.stack([a, a, a], -1)


def _hidden(a: Tensor) -> Any:
    tables = torch.tensor([[0.7, 0.3], [0.4, 0.6]]).log()
    return dist.DiscreteHMM(tables[0], tables, dist.Bernoulli(logits=torch.stack([a, -a])), duration=4)


FAMILIES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "Normal": (lambda a: dist.Normal(a, 1.0), REAL),
    "LogNormal": (lambda a: dist.LogNormal(a, 1.0), POSITIVE),
    "Laplace": (lambda a: dist.Laplace(a, 1.0), REAL),
    "StudentT": (lambda a: dist.StudentT(4.0, a, 1.0), REAL),
    "VonMises": (lambda a: dist.VonMises(a, torch.tensor(1.0)), REAL),
    "Poisson": (lambda a: dist.Poisson(a.exp()), COUNT),
    "Geometric": (lambda a: dist.Geometric(logits=a), COUNT),
    "NegativeBinomial": (lambda a: dist.NegativeBinomial(3, logits=a), COUNT),
    "GammaPoisson": (lambda a: dist.GammaPoisson(2.0, a.exp()), COUNT),
    "Bernoulli": (lambda a: dist.Bernoulli(logits=a), (COUNT > 1).double()),
    "Binomial": (lambda a: dist.Binomial(5, logits=a), COUNT),
    "BetaBinomial": (lambda a: dist.BetaBinomial(a.exp(), torch.tensor(2.0), 5), COUNT),
    "Categorical": (lambda a: dist.Categorical(logits=_three(a)), CODE.double()),
    "Exponential": (lambda a: dist.Exponential(a.exp()), POSITIVE),
    "Gamma": (lambda a: dist.Gamma(2.0, a.exp()), POSITIVE),
    "InverseGamma": (lambda a: dist.InverseGamma(3.0, a.exp()), POSITIVE),
    "Weibull": (lambda a: dist.Weibull(a.exp(), 2.0), POSITIVE),
    "HalfNormal": (lambda a: dist.HalfNormal(a.exp()), POSITIVE),
    "Beta": (lambda a: dist.Beta(a.exp(), 2.0), UNIT),
    "OneHotCategorical": (
        lambda a: dist.OneHotCategorical(logits=_three(a)),
        torch.nn.functional.one_hot(CODE, 3).double(),
    ),
    "Multinomial": (lambda a: dist.Multinomial(6, logits=_three(a)), TABLE),
    "DirichletMultinomial": (lambda a: dist.DirichletMultinomial(_ones(a.exp()), 6), TABLE),
    "Dirichlet": (lambda a: dist.Dirichlet(_ones(a.exp())), SHARES),
    "MultivariateNormal": (lambda a: dist.MultivariateNormal(_ones(a), torch.eye(3)), VECTOR),
    "MultivariateStudentT": (lambda a: dist.MultivariateStudentT(4.0, _ones(a), torch.eye(3)), VECTOR),
    # Those whose latents become sites of their own:
    "LowRankMultivariateNormal": (
        lambda a: dist.LowRankMultivariateNormal(_ones(a), torch.ones(3, 1), torch.ones(3)),
        VECTOR,
    ),
    "ZeroInflatedPoisson": (lambda a: dist.ZeroInflatedPoisson(rate=a.exp(), gate=torch.tensor(0.3)), COUNT),
    "MixtureSameFamily": (
        lambda a: dist.MixtureSameFamily(dist.Categorical(torch.ones(2) / 2), dist.Normal(torch.stack([a, -a]), 1.0)),
        REAL,
    ),
    "DiscreteHMM": (_hidden, CHAIN),
}
WITHOUT_MOMENTS = ("Categorical", "OneHotCategorical", "DiscreteHMM", "ZeroInflatedPoisson")


def model(x: Tensor, make: Callable[[Tensor], Any], way: str = "") -> None:
    a = pyro.param("a", torch.tensor(0.1))
    with pyro.plate("rows", len(x)):
        if way == "obs_mask":
            pyro.sample("x", make(a), obs=x, obs_mask=KNOWN)
        elif way == "mask":
            with poutine.mask(mask=KNOWN):
                pyro.sample("x", make(a), obs=x)
        else:
            pyro.sample("x", make(a), obs=x)


@pytest.mark.filterwarnings("ignore::pyro_em.errors.SeparatedData")
@pytest.mark.parametrize("name", FAMILIES)
def test_missing_rows_count_nothing(name: str) -> None:
    make, x = FAMILIES[name]
    holes = torch.where(KNOWN.reshape(-1, *(1,) * (x.dim() - 1)), x, NAN)
    options: dict[str, Any] = {"max_iter": 2, "tol": 0}
    without = pyro_em.fit(model, x[KNOWN], make, **options)
    ways: dict[str, Any] = {"nan": pyro_em.fit(model, holes, make, missing="nan", **options)}
    if name != "DiscreteHMM":  # a loop over time has latents in it, which its own masks are for
        ways |= {way: pyro_em.fit(model, x, make, way, **options) for way in ("obs_mask", "mask")}
    for way, found in ways.items():
        assert found.log_likelihood == pytest.approx(without.log_likelihood, rel=1e-10), way
        torch.testing.assert_close(found.params["a"], without.params["a"], rtol=1e-7, atol=1e-8)
    if name in WITHOUT_MOMENTS:
        return
    filled, own = ways["nan"].impute()["x"], make(without.params["a"])
    assert torch.equal(filled.missing.reshape(N, -1).any(-1), ~KNOWN)
    torch.testing.assert_close(filled.mean[~KNOWN], own.mean.expand(filled.mean[~KNOWN].shape), rtol=1e-7, atol=1e-8)
    variance = filled.variance[~KNOWN]
    torch.testing.assert_close(variance, own.variance.expand(variance.shape), rtol=1e-7, atol=1e-8)
