"""Responses seen only in part: probabilities in the tails, moments, draws, and the textbook EM that they make.

Oracles: mpmath with 50 digits, quadrature by scipy, NumPy EM for the tobit model, and plain Pyro sums.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_em.distributions import Censored, IntervalCensored, Truncated
from pyro_em.distributions.mass import normal_log_mass, poisson_log_mass
from pyro_em.families import family_for
from pyro_em.families.moments import normal_moments

INF, EPS = math.inf, torch.finfo(torch.float64).eps
NORMAL_INTERVALS = [
    (-1, 2), (0.1, 0.2), (5, 6), (30, 31), (-40, -39), (30, INF), (-INF, -50), (3, 3.0001), (-1e-9, 1e-9), (-3, 8),
    (0, 40), (100, 100.0001), (-0.5, 0.4), (9, 10.5), (1000, 1001), (-INF, 1), (-INF, INF),
]  # fmt: skip
POISSON_INTERVALS = [
    (1.0, 1, INF), (1e-3, 1, INF), (2.0, 3, 5), (1.0, 200, INF), (1000.0, 2500, INF), (1000.0, -1, 100), (3.0, 2, 2),
    (50.0, 40, 200), (30.0, -1, 29), (4.0, 0, INF),
]  # fmt: skip


def _t(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(float(v), requires_grad=True) for v in values)


def _close(found: Tensor, expected: Any, rel: float) -> None:
    assert float(found.detach()) == pytest.approx(float(expected), rel=rel, abs=1e-300)


@pytest.mark.parametrize(("lower", "upper"), NORMAL_INTERVALS)
def test_normal_probability_moments_and_derivatives(lower: float, upper: float) -> None:
    with mpmath.workdps(50):
        a, b = mpmath.mpf(lower), mpmath.mpf(upper)
        left, right = (-b, -a) if a > 0 else (a, b)  # where Φ keeps its digits
        mass = mpmath.ncdf(right) - mpmath.ncdf(left)
        at_a, at_b = (mpmath.npdf(x) / mass if mpmath.isfinite(x) else mpmath.mpf(0) for x in (a, b))
        second = 1 + (a * at_a if mpmath.isfinite(a) else 0) - (b * at_b if mpmath.isfinite(b) else 0)
        first = at_a - at_b
        log = mpmath.log(mass)
    x, y = _t(lower, upper)
    value = normal_log_mass(x, y)
    by_lower, by_upper = torch.autograd.grad(value, (x, y), create_graph=True)
    assert float(value.detach()) == pytest.approx(float(log), rel=1e-14, abs=1e-16)
    # Both are exponentials of differences of logarithms as large as half the square of the nearer limit.
    nearest = 0.0 if lower < 0 < upper else min(abs(lower), abs(upper))
    rounding = 8 * EPS * (1 + nearest**2)
    _close(by_lower, -at_a, rounding + 1e-14)
    _close(by_upper, at_b, rounding + 1e-14)
    mean, square = normal_moments(x.detach(), y.detach())
    assert float(mean) == pytest.approx(float(first), rel=rounding, abs=1e-14)
    assert float(square) == pytest.approx(float(second), rel=(2 + nearest) * rounding, abs=1e-14)
    for gradient in torch.autograd.grad(by_lower + by_upper, (x, y)):
        assert bool(gradient.isfinite())


@pytest.mark.parametrize(("rate", "lower", "upper"), POISSON_INTERVALS)
def test_poisson_probability_and_derivative(rate: float, lower: float, upper: float) -> None:
    with mpmath.workdps(50):
        first, last = max(int(lower), 0), int(upper) if upper < INF else int(max(lower, rate) + 60 * rate**0.5 + 400)

        def pmf(k: int) -> Any:
            return mpmath.exp(-rate + k * mpmath.log(rate) - mpmath.loggamma(k + 1)) if k >= 0 else mpmath.mpf(0)

        mass = mpmath.fsum(pmf(k) for k in range(first, last + 1))
        slope = (pmf(int(lower) - 1) - (pmf(int(upper)) if upper < INF else 0)) / mass
        log = mpmath.log(mass)
    (r,) = _t(rate)
    value = poisson_log_mass(r, torch.tensor(float(lower)), torch.tensor(float(upper)))
    (gradient,) = torch.autograd.grad(value, r)
    assert float(value.detach()) == pytest.approx(float(log), rel=1e-13, abs=1e-15)
    assert float(gradient) == pytest.approx(float(slope), rel=1e-11, abs=1e-15)


def test_second_derivatives() -> None:
    """Standard errors need them; by finite differences, in tails and narrow intervals too."""
    a, b = (torch.tensor(x, requires_grad=True) for x in ([-1.0, 3.0, -9.0, 0.2], [2.0, 4.0, -8.5, 0.3]))
    assert gradcheck(normal_log_mass, (a, b))
    assert gradgradcheck(normal_log_mass, (a, b))
    rate = torch.tensor([0.5, 3.0, 40.0], requires_grad=True)
    limits = torch.tensor([1.0, 2.0, 70.0]), torch.tensor([INF, 5.0, INF])
    assert gradcheck(lambda r: poisson_log_mass(r, *limits), (rate,))
    assert gradgradcheck(lambda r: poisson_log_mass(r, *limits), (rate,))


BASES: list[tuple[str, Any, Any]] = [
    ("normal", lambda: dist.Normal(0.5, 1.3), stats.norm(0.5, 1.3)),
    ("lognormal", lambda: dist.LogNormal(0.2, 0.7), stats.lognorm(0.7, scale=math.exp(0.2))),
    ("exponential", lambda: dist.Exponential(0.8), stats.expon(scale=1.25)),
    ("weibull", lambda: dist.Weibull(1.5, 2.2), stats.weibull_min(2.2, scale=1.5)),
    ("gamma", lambda: dist.Gamma(2.0, 1.5), stats.gamma(2.0, scale=1 / 1.5)),
    ("laplace", lambda: dist.Laplace(0.3, 1.0), stats.laplace(0.3, 1.0)),
]


@pytest.mark.parametrize(("base", "truth"), [b[1:] for b in BASES], ids=[b[0] for b in BASES])
def test_log_densities(base: Any, truth: Any) -> None:
    """Exact rows, both limits, intervals, truncation; of every base with a distribution function."""
    base = base()
    values = torch.tensor([0.4, 0.9, 1.7])
    censored = Censored(base, lower=0.4, upper=torch.tensor([5.0, 5.0, 1.7])).log_prob(values)
    expected = [truth.logcdf(0.4), truth.logpdf(0.9), truth.logsf(1.7)]
    np.testing.assert_allclose(censored.numpy(), expected, rtol=1e-10)
    pairs = torch.tensor([[0.4, 0.9], [0.9, 0.9], [-INF, 1.7], [1.7, INF]])
    expected = [
        np.log(truth.cdf(0.9) - truth.cdf(0.4)), truth.logpdf(0.9), truth.logcdf(1.7), truth.logsf(1.7),
    ]  # fmt: skip
    np.testing.assert_allclose(IntervalCensored(base).log_prob(pairs).numpy(), expected, rtol=1e-10)
    law = Truncated(base, lower=0.4, upper=1.7, validate_args=False)
    total, _ = integrate.quad(lambda x: float(law.log_prob(torch.tensor(x)).exp()), 0.4, 1.7, epsabs=1e-11)
    assert total == pytest.approx(1.0, rel=1e-9)
    assert float(law.log_prob(torch.tensor(1.8))) == -INF


@pytest.mark.parametrize("base", [b[1] for b in BASES[:4]], ids=[b[0] for b in BASES[:4]])
def test_gradients_of_rows_that_do_not_need_a_limit_are_no_nan(base: Any) -> None:
    """An infinite limit, or none, next to one that is reached."""
    base = base()
    names = list(base.arg_constraints) if not isinstance(base, dist.LogNormal) else ["loc", "scale"]
    raw = [torch.as_tensor(getattr(base, n)).clone().requires_grad_() for n in names]
    law = Censored(type(base)(*raw), upper=torch.tensor([INF, 1.7]))
    gradients = torch.autograd.grad(law.log_prob(torch.tensor([0.9, 1.7])).sum(), raw, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in gradients), raw)
    assert all(bool(g.isfinite()) for g in (*gradients, *second))


def test_draws_lie_where_they_should_and_have_the_right_mean() -> None:
    pyro.set_rng_seed(0)
    for base, truth in [(make(), truth) for _, make, truth in BASES] + [(dist.Poisson(1.2), None)]:
        x = Truncated(base, lower=1.0, upper=3.0).sample((4000,))
        assert float(x.min()) >= 1.0
        assert float(x.max()) <= 3.0
        expected = (
            truth.expect(lambda y: y, lb=1.0, ub=3.0, conditional=True)
            if truth is not None
            else np.average([1, 2, 3], weights=stats.poisson(1.2).pmf([1, 2, 3]))
        )
        assert abs(float(x.mean()) - expected) < 5 * float(x.std()) / 4000**0.5
    far = Truncated(dist.Normal(0.0, 1.0), lower=30.0).sample((1000,))
    assert float((far - 30).mean()) == pytest.approx(1 / 30, rel=0.2)
    clamped = Censored(dist.Normal(0.0, 1.0), lower=0.0).sample((4000,))
    assert float((clamped == 0).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert Censored(dist.Normal(torch.zeros(3), 1.0), upper=torch.ones(2, 1)).expand([4, 2, 3]).sample().shape == (
        4,
        2,
        3,
    )


def _laws() -> list[Any]:
    lower, upper = 0.4, torch.tensor([2.0, 3.0, 1.6, 2.5])
    normal, log_normal = dist.Normal(0.5, 1.3), dist.LogNormal(0.2, 0.7)
    return [
        *(Censored(base, lower, upper) for base in (normal, log_normal, dist.Exponential(0.8))),
        *(Truncated(base, lower, upper) for base in (normal, log_normal, dist.Exponential(0.8))),
        Censored(dist.Poisson(1.7), 1.0, 4.0),
        Truncated(dist.Poisson(1.7), 1.0),
        Truncated(dist.Poisson(1.7), 1.0, 4.0),
        *(IntervalCensored(base) for base in (normal, log_normal, dist.Exponential(0.8))),
        IntervalCensored(dist.Poisson(1.7)),
    ]


@pytest.mark.parametrize("index", range(len(_laws())))
def test_kernels_have_the_gradient_of_the_log_density(index: int) -> None:
    """Fisher's identity: the expected complete-data score at the current arguments is the score."""
    law = _laws()[index]  # made here, in double precision
    counts = isinstance(law.base, dist.Poisson)
    value = torch.tensor([1.0, 2.0, 1.0, 4.0]) if counts else torch.tensor([0.4, 1.0, 1.6, 2.5])
    if isinstance(law, IntervalCensored):
        value = torch.stack(
            [value, torch.tensor([1.0, 3.0, INF, 4.0]) if counts else value + torch.tensor([0.0, 0.5, INF, 1e-4])], -1
        )
    family = family_for(law)
    assert family is not None
    names = list(family.arguments)
    limits = {} if isinstance(law, IntervalCensored) else {"lower": law.lower, "upper": law.upper}
    args = {n: torch.as_tensor(getattr(law.base, n)).reshape(-1)[:1].double().requires_grad_() for n in names}
    log_prob = family.log_prob({**args, **limits}, value)
    torch.testing.assert_close(log_prob, law.log_prob(value), rtol=1e-13, atol=0.0)
    expected = torch.autograd.grad(log_prob.sum(), list(args.values()))
    fixed = {n: a.detach() for n, a in args.items()}
    for center in (None, torch.tensor(0.7)) if family.centered else (None,):
        statistics = family.statistics(value, {**fixed, **limits}, center)
        count = torch.as_tensor(family.complete_count({**fixed, **limits})).expand(4)
        moments = [count.sum().reshape(1), *((count * s.dense()).sum().reshape(1) for s in statistics)]
        for name, gradient in zip(names, expected, strict=True):
            kernel = family.kernel(name, moments, fixed, center)
            assert kernel is not None
            torch.testing.assert_close(kernel.gradient(fixed[name]), gradient, rtol=1e-9, atol=1e-10)
