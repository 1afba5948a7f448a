"""Weights of crossing and nested effects: as the reference has them, and as the same data written down so often."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import linear_mixed
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.pooled import Pooled
from pyro_em.errors import Refusal
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem, bind

SCHOOLS, CLASSES, PUPILS = 5, 3, 4
WEIGHTS = torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0], dtype=torch.float64)


def _marks() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shapes = ((SCHOOLS, 1, 1), (SCHOOLS, CLASSES, 1), (SCHOOLS, CLASSES, PUPILS))
    return sum(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def _schools(y: Tensor, chained: bool = False) -> None:
    """Nested plates; `chained`: a class varies around its school, so that its mean is a latent."""
    mean = pyro.param("mean", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor([0.9, 0.7, 1.1]), constraint=constraints.positive)
    with pyro.plate("schools", len(y), dim=-3):
        a = pyro.sample("a", dist.Normal(0.0, scale[0]))
        with pyro.plate("classes", CLASSES, dim=-2):
            c = pyro.sample("c", dist.Normal(a if chained else 0.0, scale[1]))
            with pyro.plate("pupils", PUPILS, dim=-1):
                pyro.sample("y", dist.Normal(mean + (c if chained else a + c), scale[2]), obs=y)


def _agree(problem: Problem, updates: int = 3) -> None:
    """Engine and reference along a few updates."""
    m = MStep(problem, "auto", "em")
    engine, reference, params = choose_engine(problem, m), Interpreted(problem), problem.start
    assert isinstance(engine, Pooled)
    for _ in range(updates):
        found, expected = engine.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
        assert m.score(params, found) == pytest.approx(m.score(params, expected), rel=1e-9, abs=1e-10)
        moved = m.update(params, found)[0]
        params = m.update(params, expected)[0]
        for name, value in params.items():
            torch.testing.assert_close(moved[name], value, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS - 1, 0.3 * WEIGHTS], ids=["counts", "zeros", "fractions"])
def test_nested_plates(weights: Tensor, chained: bool) -> None:
    _agree(bind(_schools, (_marks(), chained), {}, with_prior=False, weights={"schools": weights}))


@pytest.mark.parametrize("chained", [False, True])
def test_weighted_schools_are_schools_repeated(chained: bool) -> None:
    y, options = _marks(), {"max_iter": 20, "tol": 0}
    found = pyro_em.fit(_schools, y, chained, weights={"schools": WEIGHTS}, **options)
    expected = pyro_em.fit(_schools, y.repeat_interleave(WEIGHTS.long(), 0), chained, **options)
    assert found.plan.engine.startswith("pooled") and expected.plan.engine.startswith("pooled")
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
    for name, value in expected.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-10, atol=1e-11)
    apart = torch.stack([_log_normal(school, found.params) for school in y])
    torch.testing.assert_close(found.log_prob().reshape(-1), apart, rtol=1e-10, atol=1e-10)
    assert float((WEIGHTS * apart).sum()) == pytest.approx(found.log_likelihood, rel=1e-11)


def _log_normal(school: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Of one school, as a dense normal."""
    first, second, within = params["scale"]
    one = torch.ones(PUPILS, PUPILS, dtype=torch.float64)
    blocks = torch.block_diag(*(one for _ in range(CLASSES)))
    size = CLASSES * PUPILS
    covariance = first**2 * torch.ones(size, size) + second**2 * blocks + within**2 * torch.eye(size)
    return dist.MultivariateNormal(params["mean"].expand(size), covariance).log_prob(school.reshape(-1))


@pytest.mark.parametrize("weighted", ["all rows", "an item without rows"])
def test_crossed_rows(weighted: str) -> None:
    first, second, y = linear_mixed.simulate_crossed()
    if weighted == "all rows":

        def model() -> None:
            with pyro.poutine.scale(scale=2.0):
                linear_mixed.crossed(first, second, y)

        result = pyro_em.fit(model, max_iter=30, tol=0)
        plain = pyro_em.fit(linear_mixed.crossed, first, second, y, max_iter=30, tol=0)
        assert result.plan.engine.startswith("pooled")
        assert result.log_likelihood == pytest.approx(2 * plain.log_likelihood, rel=1e-12)
        for name, value in plain.params.items():
            torch.testing.assert_close(result.params[name], value, rtol=1e-11, atol=1e-12)
        _agree(bind(model, (), {}, with_prior=False))
    else:
        used = second != 2  # there is no row of item 2 left, and its effect is that of its prior
        args = (first[used], second[used], y[used])
        _agree(bind(linear_mixed.crossed, args, {}, with_prior=False))


def _across(y: Tensor) -> None:
    """Classes read the effect of the school before theirs: the schools are not independent."""
    scale = pyro.param("scale", torch.tensor([0.9, 0.7, 1.1]), constraint=constraints.positive)
    with pyro.plate("schools", len(y), dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, scale[0]))
        with pyro.plate("classes", CLASSES, dim=-1):
            c = pyro.sample("c", dist.Normal(a.roll(1, -2), scale[1]))
            pyro.sample("y", dist.Normal(c, scale[2]), obs=y)


def test_schools_that_are_not_independent_have_no_weights() -> None:
    options: dict[str, Any] = {"weights": {"schools": WEIGHTS}}
    with pytest.raises(Refusal):
        pyro_em.fit(_across, _marks()[..., 0], **options)
