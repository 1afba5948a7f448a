"""The negative binomial over all sizes, and counts without overdispersion, whose size has no maximum."""

from __future__ import annotations

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_em
from pyro_em.errors import SeparatedData
from pyro_em.families import family_of
from tests.classics import positive


@pytest.mark.parametrize("size", [0.5, 29.9, 30.1, 1e3, 1e8, 1e16, 1e80])
def test_a_negative_binomial_of_a_large_size_is_poisson(size: float) -> None:
    """Mean 3 whatever the size, against 120 digits; the difference of two log-gammas is rounding alone at 1e16."""
    value, mean = torch.tensor([0.0, 1.0, 4.0, 60.0]), torch.tensor(3.0)
    leaf = torch.tensor(size, requires_grad=True)
    family = family_of(dist.NegativeBinomial)
    assert family is not None
    found = family.log_prob({"total_count": leaf, "logits": mean.log() - leaf.log()}, value)
    with mpmath.workdps(120):
        r, m = mpmath.mpf(size), mpmath.mpf(3)
        for own, x in zip(found.tolist(), value.tolist(), strict=True):
            exact = mpmath.loggamma(r + x) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
            exact += r * mpmath.log(r / (r + m)) + x * mpmath.log(m / (r + m))
            assert own == pytest.approx(float(exact), rel=1e-13, abs=1e-11)
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    assert abs(float(slope)) * size <= 5e3 / (1 + size) + 1e-11  # falls like 1/r, with no rounding to climb


def test_counts_without_overdispersion_end_at_poisson() -> None:
    counts = torch.tensor([2.0, 3.0, 3.0, 4.0, 2.0, 3.0, 4.0, 3.0])

    def model() -> None:
        r = pyro.param("r", torch.tensor(1.0), constraint=positive)
        level = pyro.param("level", torch.tensor(0.0))
        with pyro.plate("rows", len(counts)):
            pyro.sample("y", dist.NegativeBinomial(r, logits=level - r.log()), obs=counts)

    with pytest.warns(SeparatedData, match="'r'"):
        result = pyro_em.fit(model)
    poisson = float(dist.Poisson(counts.mean()).log_prob(counts).sum())
    assert result.log_likelihood == pytest.approx(poisson, rel=1e-6)
    assert result.log_likelihood < poisson
    assert float(result.params["level"]) == pytest.approx(float(counts.mean().log()), abs=1e-6)
