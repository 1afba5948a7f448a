"""The unit of rounding, Σ|ll_n|, counts terms that cancel inside of log p(x_n), and each row as often as it counts.

The evidence of a conjugate latent is a difference of log-gammas, which may exceed it by orders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import overdispersed
from pyro_em.problem import bind
from tests import zoo_conjugate as z
from tests.conjugate_problems import CASES

KINDS: dict[str, tuple[Callable[..., Any], str, int]] = {  # model, plate of the weights, dim of the data's rows
    "gamma_poisson": (z.gamma_poisson, "rows", 0),
    "beta_binomial": (z.beta_binomial, "rows", 0),
    "group_variances": (z.group_variances, "groups", 1),
    "categories": (z.categories, "rows", 0),
    "mixed_counts": (z.mixed_counts, "rows", 0),
}


def _magnitude(model: Callable[..., Any], args: tuple[Tensor, ...], params: Any, weights: Any) -> float:
    problem = bind(model, args, {}, with_prior=False, weights=weights, params=params)
    return float(problem.evidence(params)[0].magnitude)


@pytest.mark.parametrize("name", KINDS)
def test_an_element_counts_as_often_as_its_weight_says(name: str) -> None:
    model, plate, dim = KINDS[name]
    case = CASES[name]
    size = case.args[0].shape[dim]
    weight = torch.arange(size) % 4
    repeated = tuple(x.repeat_interleave(weight, dim) for x in case.args)
    found = _magnitude(model, case.args, case.init, {plate: weight.double()})
    assert found == pytest.approx(_magnitude(model, repeated, case.init, None), rel=1e-12)
    assert found > float((case.evidence(case.init).abs() * weight).sum()) * (1 + 1e-9)


def ratings(y: Tensor, person: Tensor, item: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor(0.0))
    scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
    with pyro.plate("persons", 6):
        b = pyro.sample("b", dist.Normal(0.0, scale[0]))
    with pyro.plate("items", 3):
        c = pyro.sample("c", dist.Normal(0.0, scale[1]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu + b[..., person] + c[..., item], scale[2]), obs=y)


def test_units_at_which_the_log_likelihood_is_zero_do_not_make_it_exact() -> None:
    """Crossed effects have one evidence for all rows, and its terms do not vanish with it."""
    generator = torch.Generator().manual_seed(0)
    y, person, item = torch.randn(18, generator=generator), torch.arange(18) % 6, torch.arange(18) // 6
    unit = torch.tensor(1.0)
    for _ in range(2):
        params = {"mu": 0.1 * unit, "scale": torch.tensor([0.7, 0.5, 0.9]) * unit}
        problem = bind(ratings, (y * unit, person, item), {}, with_prior=False, params=params)
        evidence, _ = problem.evidence(params)
        unit = (evidence.log_likelihood / len(y)).exp()
    assert abs(float(evidence.log_likelihood)) < 1e-12
    assert float(evidence.magnitude) > len(y)


@pytest.mark.parametrize("accelerate", [None, "squarem", "anderson"])
def test_a_ridge_of_many_families_is_climbed_to_its_top(accelerate: str | None) -> None:
    """6115 families in 13 rows: log-gammas of 10⁶ in all cancel in a log-likelihood of 10⁴."""
    boys, families = overdispersed.load_families()
    result = pyro_em.fit(overdispersed.beta_binomial, boys, weights={"rows": families}, accelerate=accelerate, tol=1e-8)
    assert result.converged
    assert result.log_likelihood == pytest.approx(-12492.871359, abs=1e-6)
