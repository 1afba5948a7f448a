"""Student's density over all degrees of freedom, and a mixture whose degrees of freedom have no maximum."""

from __future__ import annotations

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.families import family_of


@pytest.mark.parametrize("df", [0.5, 10.0, 59.9, 60.1, 1e3, 1e6, 1e12, 1e80])
def test_a_student_with_many_degrees_of_freedom_is_normal(df: float) -> None:
    """Against 40 digits; torch's own density is 1e-4 off at 1e12 and rounding alone at 1e80."""
    value = torch.tensor([-2.0, 0.0, 0.7, 9.0])
    leaf = torch.tensor(df, requires_grad=True)
    family = family_of(dist.StudentT)
    assert family is not None
    found = family.log_prob({"df": leaf, "loc": 0.1, "scale": 1.3}, value)
    with mpmath.workdps(120):
        v, s = mpmath.mpf(df), mpmath.mpf(1.3)
        for own, x in zip(found.tolist(), value.tolist(), strict=True):
            z = (mpmath.mpf(x) - mpmath.mpf(0.1)) / s
            exact = mpmath.loggamma((v + 1) / 2) - mpmath.loggamma(v / 2) - mpmath.log(mpmath.pi * v) / 2
            exact -= mpmath.log(s) + (v + 1) / 2 * mpmath.log1p(z * z / v)
            assert own == pytest.approx(float(exact), rel=1e-13, abs=1e-13)
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    assert abs(float(slope)) * df <= 1e3 / (1 + df)  # falls like 1/ν, with no rounding to climb


def test_data_without_heavy_tails_end_at_the_normal() -> None:
    """ν rises for ever; the log-likelihood is the normal mixture's, and nothing is made of rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(40, generator=generator).clamp(-2, 2) * 0.5 + m for m in (-3, 3)])

    def model(x: Tensor, heavy: bool = True) -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        df = pyro.param("df", torch.tensor(4.0), constraint=constraints.positive) if heavy else None
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.StudentT(df, loc[z], scale[z]) if heavy else dist.Normal(loc[z], scale[z]), obs=x)

    with pytest.warns(pyro_em.SeparatedData, match="no maximum in 'df': it rises for ever"):
        found = pyro_em.fit(model, x)
    normal = pyro_em.fit(model, x, heavy=False)
    assert found.converged and float(found.params["df"]) > 1e4
    assert found.log_likelihood == pytest.approx(normal.log_likelihood, abs=1e-3)
    assert found.log_likelihood < normal.log_likelihood + 1e-9
