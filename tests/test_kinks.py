"""Steps onto kinks (m_step/kinks.py): the conditions of the maximum, necessary and sufficient, on random models.

max_y  g·(y − x) − ½ (y − x)ᵀH(y − x) − Σ r |y|        y = θ − m
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em.m_step.kinks import Kinks, _maximum, kinked, soft
from pyro_em.problem import bind

DOUBLE = torch.float64
P = 6


def _model(seed: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slope, curvature of this rank, place with some entries on their kinks, rates of which one is 0."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(P, rank, generator=generator, dtype=DOUBLE)
    H = root @ root.mT
    g = H @ torch.randn(P, generator=generator, dtype=DOUBLE)
    x = torch.randn(P, generator=generator, dtype=DOUBLE) * (torch.rand(P, generator=generator) < 0.7)
    rate = 0.2 + torch.rand(P, generator=generator, dtype=DOUBLE)
    rate[0] = 0.0
    return g, H, x, rate


def _check(y: Tensor, g: Tensor, H: Tensor, x: Tensor, rate: Tensor, tolerance: float) -> None:
    left = g - H @ (y - x)
    on = y == 0
    assert float((left - rate * y.sign())[~on].abs().max() if bool((~on).any()) else 0.0) <= tolerance
    assert bool((left.abs() <= rate + tolerance)[on].all())


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("rank", [P, P - 2, 1])
def test_the_conditions_of_the_maximum(seed: int, rank: int) -> None:
    g, H, x, rate = _model(seed, rank)
    y = _maximum(g, H, x, rate)
    _check(y, g, H, x, rate, 1e-10 * (1 + float(g.abs().max())))


@pytest.mark.parametrize("seed", range(20))
def test_a_step_and_what_it_promises(seed: int) -> None:
    """The target is the maximum of the model, the gain its rise; a held entry is exactly at its centre."""
    smooth, H, x, rate = _model(seed, P)
    center = torch.linspace(0.1, 0.7, P, dtype=DOUBLE)
    x = torch.where(rate > 0, x, 0.0)
    theta = torch.where(rate > 0, center + x, 0.3)
    on = theta == center
    x = torch.where(rate > 0, theta - center, 0.0)
    kinks = Kinks(rate, center)
    slope = smooth - rate * x.sign()
    target, gain = kinks.target(theta, slope, H)
    y = torch.where(rate > 0, target - center, target - theta)
    assert bool((rate[target == center] > 0).all())
    _check(y, smooth, H, x, rate, 1e-10 * (1 + float(smooth.abs().max())))
    step = y - x

    def model(z: Tensor, move: Tensor) -> Tensor:
        return smooth @ move - 0.5 * move @ H @ move - (rate * z.abs()).sum()

    promised = smooth @ step - (rate * (y.abs() - x.abs())).sum()
    assert float(gain) == pytest.approx(float(promised), rel=1e-12)
    assert float(gain) >= float(model(y, step) - model(x, 0 * step)) >= -1e-12
    nearest = kinks.nearest(theta, slope)
    torch.testing.assert_close(nearest[on], soft(smooth, rate)[on])
    assert torch.equal(nearest[~on], slope[~on])


def test_soft_moves_towards_zero() -> None:
    x = torch.tensor([3.0, 0.5, -0.5, -3.0, 0.0])
    assert soft(x, torch.tensor(1.0)).tolist() == [2.0, 0.0, 0.0, -2.0, 0.0]


@pytest.mark.parametrize("unit", [1e-9, 1e9])
@pytest.mark.parametrize("rank", [P, P - 2])
def test_the_unit_of_the_function_does_not_matter(rank: int, unit: float) -> None:
    """What counts as rounding of slopes is relative to their size."""
    for seed in range(20):
        g, H, x, rate = _model(seed, rank)
        y = _maximum(unit * g, unit * H, x, unit * rate)
        torch.testing.assert_close(y, _maximum(g, H, x, rate), rtol=1e-8, atol=1e-10)


def test_which_parameters_have_kinks() -> None:
    """Those with a Laplace prior; not the location of a Laplace response, nor what has another prior."""

    def model(y: Tensor) -> None:
        lasso = pyro.sample("lasso", dist.Laplace(0.0, 1.0))
        ridge = pyro.sample("ridge", dist.Normal(0.0, 1.0))
        middle = pyro.param("middle", torch.zeros(()))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(lasso + ridge, 1.0), obs=y)
            pyro.sample("z", dist.Laplace(middle, 1.0), obs=y)

    problem = bind(model, (torch.arange(3.0),), {}, with_prior=True)
    assert kinked(problem.uses, problem.first.sites) == {"lasso"}
