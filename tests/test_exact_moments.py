"""Moments and blocks that whole fits hardly see, against sums in more digits: truncated exponentials, SUR, wide starts.

Each was found by changing the line that makes it: a fit still converged, to a slightly other place or more slowly.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.distributions import IntervalCensored
from pyro_em.families.moments import EXPECTED
from pyro_em.m_step.location import total_moments
from pyro_em.problem import bind

LN_2PI = Decimal("1.8378770664093454835606594728112352797227949472755668")


def _t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("width", [1e-9, 1e-3, 0.049, 0.0499, 0.051, 2.0, 40.0, 600.0])
def test_the_mean_of_a_truncated_exponential_has_all_its_digits(width: float) -> None:
    rate, lower = 2.0, 0.25
    (found,) = EXPECTED["Exponential"]({"rate": _t(rate)}, _t(lower), _t(lower) + _t(width), None)
    with localcontext() as context:
        context.prec = 60
        w = Decimal(float(_t(lower) + _t(width))) - Decimal(lower)
        inside = 1 / Decimal(rate) - w / ((Decimal(rate) * w).exp() - 1)
        expected = float(Decimal(lower) + inside)
    assert float(found) == pytest.approx(expected, rel=2e-16, abs=0)
    (above,) = EXPECTED["Exponential"]({"rate": _t(rate)}, _t(0.0), _t(width), None)
    with localcontext() as context:
        context.prec = 60
        w = Decimal(width)
        share = float(1 / Decimal(rate) - w / ((Decimal(rate) * w).exp() - 1))
    assert float(above) == pytest.approx(share, rel=6e-15, abs=0)


def test_the_mean_of_an_exponential_without_an_upper_limit() -> None:
    (found,) = EXPECTED["Exponential"]({"rate": _t([0.5, 4.0])}, _t([1.0, -3.0]), _t([torch.inf, torch.inf]), None)
    assert found.tolist() == [3.0, 0.25]


S = _t([[2.0, 1.2, -0.3], [1.2, 1.5, 0.4], [-0.3, 0.4, 1.0]])


def test_regressions_whose_errors_correlate_are_one_generalised_least_squares_solve() -> None:
    """Zellner (1962): three equations with covariates of their own and a known covariance of their errors."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(3, 25, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(25, 3, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(S).mT + X[:, :, 0].mT

    def model(X: Tensor, y: Tensor) -> None:
        b = [pyro.param(f"b{j}", torch.zeros(2, dtype=torch.float64)) for j in range(3)]
        with pyro.plate("rows", len(y)):
            loc = torch.stack([x @ own for x, own in zip(X, b, strict=True)], -1)
            pyro.sample("y", dist.MultivariateNormal(loc, S), obs=y)

    found = pyro_em.fit(model, X, y, max_iter=1, tol=0)
    wide = torch.zeros(25, 3, 6, dtype=torch.float64)  # d loc / d (b0, b1, b2)
    for j in range(3):
        wide[:, j, 2 * j : 2 * j + 2] = X[j]
    P = torch.linalg.inv(S)
    left, right = torch.einsum("njp,jk,nkq->pq", wide, P, wide), torch.einsum("njp,jk,nk->p", wide, P, y)
    expected = torch.linalg.solve(left, right)
    assert torch.allclose(torch.cat([found.params[f"b{j}"] for j in range(3)]), expected, rtol=1e-11, atol=1e-12)


def test_what_a_collapse_is_judged_against_is_where_the_observations_lie() -> None:
    """Intervals that are open to both sides say nothing of it."""
    lower, upper = _t([0.0, 1.0, 2.0, -torch.inf, -torch.inf]), _t([1.0, 2.0, torch.inf, 0.5, torch.inf])

    def model(x: Tensor) -> None:
        loc, sd = pyro.param("loc", _t(0.5)), pyro.param("sd", _t(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", IntervalCensored(dist.Normal(loc, sd)), obs=x)

    problem = bind(model, (torch.stack([lower, upper], -1),), {}, with_prior=False)
    total = total_moments(problem.first.sites["x"], False)
    x = problem.first.sites["x"].family.location(torch.stack([lower, upper], -1))  # type: ignore[union-attr]
    x = x[x.isfinite()]
    assert len(x) >= 2
    expected = [float(len(x)), float((x - x.mean()).sum()), float((x - x.mean()).square().sum())]
    assert [float(m) for m in total.moments] == pytest.approx(expected, abs=1e-12)


def level(y: Tensor, start: float, shift: float = 0.0) -> None:
    q = pyro.param("q", _t(0.7), constraint=constraints.positive)
    r = pyro.param("r", _t(1.3), constraint=constraints.positive)
    x: Any = pyro.sample("x_0", dist.Normal(torch.zeros_like(q), start))
    pyro.sample("y_0", dist.Normal(x + shift, r), obs=y[0])
    for t in pyro.markov(range(1, len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, q))
        pyro.sample(f"y_{t}", dist.Normal(x + shift, r), obs=y[t])


def _log_evidence(y: Tensor, start: float, shift: float) -> float:
    """The Kalman filter of `level` in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        m, P, total = Decimal(0), Decimal(start) ** 2, Decimal(0)
        Q, R = (Decimal(scale) ** 2 for scale in (0.7, 1.3))
        for t, value in enumerate(y.tolist()):
            P = P + Q if t else P
            v, V = Decimal(value) - Decimal(shift) - m, P + R
            total -= (LN_2PI + V.ln() + v * v / V) / 2
            m, P = m + P / V * v, P - P * P / V
        return float(total)


def test_updates_do_not_see_how_wide_a_wide_start_is() -> None:
    """They differ by shares of the start's precision, 1e-10 and less, as long as no digits are lost to its variance."""
    y = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cumsum(0)
    wide, wider = (pyro_em.fit(level, y, start, max_iter=2, tol=0).params for start in (1e5, 1e8))
    assert all(float(wider[n]) == pytest.approx(float(value), rel=1e-8, abs=0) for n, value in wide.items())


@pytest.mark.parametrize(("start", "shift"), [(1.0, 0.0), (1.0, 2.5), (1e5, 0.0), (1e7, -4.0)])
def test_a_level_that_starts_anywhere_has_its_log_evidence_to_the_last_digits(start: float, shift: float) -> None:
    y = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cumsum(0) + shift
    found = pyro_em.fit(level, y, start, shift, max_iter=1, tol=0)
    assert found.history["log_likelihood"][0] == pytest.approx(_log_evidence(y, start, shift), rel=1e-12)
    one = pyro_em.fit(level, y[:1], start, shift, max_iter=0)
    assert one.log_likelihood == pytest.approx(_log_evidence(y[:1], start, shift), rel=1e-12)
