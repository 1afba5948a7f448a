"""Fits to responses seen in part: textbook tobit, other ways of writing them, and values that cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize
from torch import Tensor

import pyro_em
from models import censored
from pyro_em.distributions import Censored, IntervalCensored, Truncated
from pyro_em.distributions.mass import log_mass
from pyro_em.errors import InputError
from tests import zoo_data
from tests.problems_data import censored_rows, durations, interval_rows
from tests.test_coarse import INF


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
