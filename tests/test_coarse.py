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
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import pyro_em
from models import censored
from pyro_em.distributions import Censored, IntervalCensored, Truncated
from pyro_em.distributions.mass import log_mass, normal_log_mass, poisson_log_mass
from pyro_em.errors import InputError
from pyro_em.families import family_for
from pyro_em.families.moments import normal_moments
from tests import zoo_data
from tests.problems_data import censored_rows, durations, interval_rows

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


def _tobit(y: np.ndarray, lower: float, upper: np.ndarray, iterations: int) -> list[tuple[float, float]]:
    """The textbook EM of a censored normal sample: moments of truncated normals, by scipy."""
    mu, sd = 0.0, 1.0
    path = []
    for _ in range(iterations):
        first, second = y.copy(), y**2
        for n, (value, limit) in enumerate(zip(y, upper, strict=True)):
            if lower < value < limit:
                continue
            a, b = (-np.inf, lower) if value <= lower else (limit, np.inf)
            law = stats.truncnorm((a - mu) / sd, (b - mu) / sd, loc=mu, scale=sd)
            first[n], second[n] = law.mean(), law.moment(2)
        mu = first.mean()
        sd = math.sqrt((second - 2 * mu * first + mu**2).mean())
        path.append((mu, sd))
    return path


def test_iterates_are_those_of_textbook_tobit_em() -> None:
    y, lower, upper = censored_rows()

    def model(y: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor(0.0))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=torch.distributions.constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", Censored(dist.Normal(mu, sd), lower, upper), obs=y)

    for iterations, (mu, sd) in enumerate(_tobit(y.numpy(), lower, upper.numpy(), 3), start=1):
        result = pyro_em.fit(model, y, max_iter=iterations, tol=0)
        assert (float(result.params["mu"]), float(result.params["sd"])) == pytest.approx((mu, sd), rel=1e-10)
    assert [row.reason for row in result.plan.m_step] == [
        "precision-weighted mean (Censored Normal.loc)",
        "ratio of moments (Censored Normal.scale)",
    ]


def test_a_censored_response_without_expected_statistics_is_newtons() -> None:
    y, upper = durations()
    result = pyro_em.fit(zoo_data.censored_weibull, y, upper, tol=1e-10)
    seen = upper.numpy() == INF

    def loss(u: Any) -> float:
        law = stats.weibull_min(math.exp(u[1]), scale=math.exp(u[0]))
        return -float(law.logpdf(y.numpy()[seen]).sum() + law.logsf(y.numpy()[~seen]).sum())

    found = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    assert result.converged
    assert result.log_likelihood == pytest.approx(-found.fun, rel=1e-10)
    assert [float(result.params[n]) for n in ("scale", "shape")] == pytest.approx(np.exp(found.x), rel=1e-5)
    assert result.posterior().mode() == {}
    assert result.num_iterations == 1
    reasons = {row.name: row.reason for row in result.plan.m_step}
    assert reasons["shape"] == "Newton (Censored Weibull.concentration), jointly with 'scale'"


def test_writing_limits_as_intervals_changes_nothing() -> None:
    y, lower, upper = censored_rows()
    low, high = y <= lower, y >= upper
    pairs = torch.stack([torch.where(low, -INF, y), torch.where(high, INF, y)], -1)

    def as_intervals(pairs: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=torch.distributions.constraints.simplex)
        mu = pyro.param("mu", torch.tensor([-0.5, 1.5]))
        sd = pyro.param("sd", torch.tensor([1.0, 0.9]), constraint=torch.distributions.constraints.positive)
        with pyro.plate("rows", len(pairs)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", IntervalCensored(dist.Normal(mu[z], sd[z])), obs=pairs)

    start = {"w": [0.4, 0.6], "mu": [-0.5, 1.5], "sd": [1.0, 0.9]}
    first = pyro_em.fit(as_intervals, pairs, max_iter=5, tol=0)
    second = pyro_em.fit(zoo_data.censored_mixture, y, lower, upper, init=start, max_iter=5, tol=0)
    assert first.log_likelihood == pytest.approx(second.log_likelihood, rel=1e-12)
    drawn = pyro_em.fit(as_intervals, pairs, init="kmeans++", seed=0, max_iter=0)
    assert float(drawn.params["mu"].min()) == pytest.approx(-1.0, abs=0.8)  # infinite ends are no measurements


def test_the_way_of_plain_pyro_has_the_same_maximum() -> None:
    """models/censored.py writes the tails as factors, which have no closed form: the limit is the same."""
    y, design, side = censored.load_tobin()
    plain = pyro_em.fit(censored.regression, y, design, side, tol=1e-9)

    def model(y: Tensor) -> None:
        b = pyro.param("coefficients", torch.zeros(3))
        scale = pyro.param("scale", torch.tensor(5.0), constraint=torch.distributions.constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", Censored(dist.Normal(design @ b, scale), lower=0.0), obs=y)

    completed = pyro_em.fit(model, y, tol=1e-9)
    assert [row.reason.split(" (")[0] for row in completed.plan.m_step] == ["linear solve", "ratio of moments"]
    assert plain.log_likelihood == pytest.approx(completed.log_likelihood, rel=1e-10)
    for name, value in completed.params.items():
        torch.testing.assert_close(plain.params[name], value, rtol=1e-5, atol=1e-6)

    y, side = censored.simulate_mixture(60)
    first = pyro_em.fit(censored.mixture, y, side, max_iter=2, tol=0)
    start = {"w": first.params["weights"], "mu": first.params["loc"], "sd": first.params["scale"]}
    second = pyro_em.fit(zoo_data.censored_mixture, y, -2.5, torch.full((60,), 3.0), init=start, max_iter=0)
    assert second.log_likelihood == pytest.approx(first.log_likelihood, rel=1e-12)
    assert first.log_likelihood > first.history["log_likelihood"][0]


def _censored_at(value: float) -> Any:
    return lambda: pyro.sample("y", Censored(dist.Normal(0.0, 1.0), lower=0.0), obs=torch.tensor(value))


BAD: list[tuple[Any, str]] = [
    (_censored_at(-1.0), "'y'.*outside of the support of Censored"),
    (_censored_at(math.nan), "'y'.*NaN"),
    (lambda: zoo_data.zero_truncated_mixture(torch.tensor([1.0, 0.0, 2.0])), "'y'.*row 1.*Truncated"),
    (lambda: zoo_data.interval_mixture(torch.tensor([[1.0, 2.0], [3.0, 2.0]])), "'y'.*row 1.*a <= b"),
    (lambda: zoo_data.interval_mixture(torch.tensor([[1.0, 2.0], [INF, INF]])), "'y'.*row 1.*a <= b"),
]


@pytest.mark.parametrize(("model", "message"), BAD)
def test_values_that_cannot_be(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pyro_em.fit(model)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="not below the upper"):
        Censored(dist.Normal(0.0, 1.0), lower=1.0, upper=0.0)
    with pytest.raises(ValueError, match="univariate"):
        Truncated(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pytest.raises(NotImplementedError):
        log_mass(dist.StudentT(3.0), torch.tensor(0.0), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="hardly any probability"):
        Truncated(dist.Gamma(1.0, 1.0), lower=60.0).sample()


def test_a_derivative_that_is_no_number_is_an_error_and_no_convergence() -> None:
    def model() -> None:
        a = pyro.param("a", torch.tensor(0.0))
        risky = torch.where(a > 0, a.sqrt(), 1.0 + 0.0 * a)  # the derivative of the root at 0 gets into both branches
        pyro.sample("y", dist.Normal(risky, 1.0), obs=torch.tensor(2.0))

    with pytest.raises(pyro_em.NonFiniteError, match="'a': the derivative"):
        pyro_em.fit(model)


def test_interval_data_of_the_table_have_every_kind_of_row() -> None:
    pairs = interval_rows()
    exact, open_end = pairs[:, 0] == pairs[:, 1], pairs[:, 1] == INF
    assert min(int(exact.sum()), int(open_end.sum()), int((~exact & ~open_end).sum())) >= 3
