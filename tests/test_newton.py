"""Generalised linear sites: Newton's M-step against other people's regressions, and what separation does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import statsmodels.api as sm
import torch
from scipy import stats
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from statsmodels.discrete.count_model import ZeroInflatedPoisson
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.charts import ElementwiseChart, chart
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.errors import SeparatedData
from pyro_em.families.base import IDENTITY, LOGIT
from pyro_em.kernels import BetaKernel, PowerKernel
from pyro_em.m_step import numeric
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.curves import _automatic, curve_of
from pyro_em.m_step.objective import chart_derivatives
from pyro_em.problem import bind
from tests.classics import positive
from tests.problems import BY_NAME
from tests.zoo_regression import zero_inflated_regression

RNG = np.random.default_rng(7)
N, P = 120, 3
X = np.c_[np.ones(N), RNG.normal(size=(N, P - 1))]
ETA = X @ np.array([0.3, 0.8, -0.5])
T = torch.as_tensor


def _model(site: Callable[[Tensor], Any], y: Tensor, columns: int = P) -> Callable[[], None]:
    def model() -> None:
        b = pyro.param("b", torch.zeros(columns))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", site(T(X) @ b), obs=y)

    return model


COUNTS = RNG.poisson(np.exp(ETA)).astype(float)
TRIALS = RNG.binomial(8, 1 / (1 + np.exp(-ETA))).astype(float)
WAITS = RNG.gamma(2.5, np.exp(ETA) / 2.5)
GLMS: dict[str, tuple[Callable[[Tensor], Any], np.ndarray, Any, np.ndarray]] = {
    "poisson": (lambda e: dist.Poisson(e.exp()), COUNTS, sm.families.Poisson(), COUNTS),
    "bernoulli": (lambda e: dist.Bernoulli(logits=e), 1.0 * (TRIALS > 4), sm.families.Binomial(), 1.0 * (TRIALS > 4)),
    "binomial": (
        lambda e: dist.Binomial(8, e.sigmoid()),
        TRIALS,
        sm.families.Binomial(),
        np.c_[TRIALS, 8 - TRIALS],
    ),
    "gamma": (
        lambda e: dist.Gamma(2.5, 2.5 * (-e).exp()),
        WAITS,
        sm.families.Gamma(sm.families.links.Log()),
        WAITS,
    ),
    "exponential": (
        lambda e: dist.Exponential((-e).exp()),
        WAITS,
        sm.families.Gamma(sm.families.links.Log()),
        WAITS,
    ),
    "negative binomial": (
        lambda e: dist.NegativeBinomial(2.0, logits=e - np.log(2.0)),
        COUNTS,
        sm.families.NegativeBinomial(alpha=0.5),
        COUNTS,
    ),
}


@pytest.mark.parametrize("name", GLMS)
def test_statsmodels_glm(name: str) -> None:
    """K = 1: one M-step is the whole fit."""
    site, y, family, response = GLMS[name]
    expected = sm.GLM(response, X, family=family).fit(tol=1e-14, maxiter=200).params
    result = pyro_em.fit(_model(site, T(y)), max_iter=1, tol=0)
    assert result.plan.route("b") == "newton"
    np.testing.assert_allclose(result.params["b"].numpy(), expected, atol=1e-8)


def test_scikit_learns_logistic_regression() -> None:
    """Three categories; with all of them free the logits are identified up to a constant."""
    logits = np.stack([0 * ETA, ETA, -0.5 * ETA + X[:, 2]], -1)
    y = np.array([RNG.choice(3, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(X[:, 1:], y)

    def model(reference: bool) -> None:
        b = pyro.param("b", torch.zeros(P, 3 - reference))
        eta = T(X) @ b
        eta = torch.cat([torch.zeros(N, 1), eta], -1) if reference else eta
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Categorical(logits=eta), obs=T(y))

    expected = np.c_[peer.intercept_, peer.coef_].T
    first = pyro_em.fit(model, True, max_iter=1, tol=0).params["b"].numpy()
    np.testing.assert_allclose(first, expected[:, 1:] - expected[:, :1], atol=1e-6)
    pyro.clear_param_store()
    free = pyro_em.fit(model, False, max_iter=1, tol=0).params["b"].numpy()
    np.testing.assert_allclose(free[:, 1:] - free[:, :1], first, atol=1e-8)


def test_statsmodels_zero_inflated_poisson() -> None:
    y = COUNTS * (RNG.random(N) < 0.7)
    peer = ZeroInflatedPoisson(y, X, exog_infl=X, inflation="logit")
    result = pyro_em.fit(zero_inflated_regression, T(X), T(y), max_iter=5000, tol=1e-11)
    assert result.converged
    there = torch.cat([result.params["zero"], result.params["b"]]).numpy()
    assert result.log_likelihood == pytest.approx(peer.loglike(there), rel=1e-12)
    assert np.abs(peer.score(there)).max() <= 1e-8 * N, "its own score function vanishes where ours does"


def test_concentrations_are_scipys() -> None:
    def model(y: Tensor) -> None:
        a = pyro.param("a", torch.tensor(1.0), constraint=positive)
        rate = pyro.param("rate", torch.tensor(1.0), constraint=positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Gamma(a, rate), obs=y)

    result = pyro_em.fit(model, T(WAITS), max_iter=1, tol=0)
    found = minimize(
        lambda u: -stats.gamma.logpdf(WAITS, np.exp(u[0]), scale=np.exp(-u[1])).sum(), [0.0, 0.0], method="BFGS",
        options={"gtol": 1e-9},
    )  # fmt: skip
    np.testing.assert_allclose([float(result.params["a"]), float(result.params["rate"])], np.exp(found.x), rtol=1e-6)
    reasons = {row.name: row.reason for row in result.plan.m_step}
    assert reasons["a"] == "Newton (Gamma.concentration), jointly with 'rate'"


RULES = [
    "poisson_regressions",
    "experts",
    "zero_inflated_regression",
    "negative_binomial_regressions",
    "gamma_free",
    "beta_mixture",
    "ridge_regressions",
    "parallel_regressions",
    "multivariate_regressions",
]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_equals_lbfgs_on_q(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same posterior: Newton and linear solves end where L-BFGS on Q, by the model itself, ends."""
    case = BY_NAME[name]
    weights = {} if case.weights is None else {case.plate: case.weights}
    problem = bind(case.model, case.args, {}, with_prior=case.priors, weights=weights)
    m_step = MStep(problem, "auto", "map-em" if case.priors else "em")
    assert not m_step.numeric
    params = {**problem.start, **case.start()}
    step = Interpreted(problem).e_step(params)
    updated, info = m_step.update(params, step)
    assert info.certificate is not None and info.certificate <= 1e-10
    monkeypatch.setattr(numeric, "NEWTON_LIMIT", 0)
    names = tuple(problem.parameters)
    block = numeric.Block.of_q(problem, updated, step.weights, names)
    far = {n: v + 1e-3 * (1 - v) if n == "w" else 0.999 * v for n, v in updated.items()}
    again = numeric.maximise(
        numeric.Block.of_q(problem, far | {"w": updated["w"]} if "w" in far else far, step.weights, names),
        tolerance=1e-9,
        max_iter=2000,
    )
    q = block.q(block.free())
    reached = numeric.Block.of_q(problem, again, step.weights, names)
    assert reached.q(reached.free()) <= q + 1e-10 * abs(q)
    for parameter, value in updated.items():
        torch.testing.assert_close(again[parameter], value, rtol=1e-6, atol=1e-6)


def _separable(scale: float, prior: bool = False) -> Callable[[], None]:
    x = torch.linspace(-1, 1, 20)

    def model() -> None:
        normal = dist.Normal(torch.zeros(2), 3.0).to_event(1)
        b = pyro.sample("b", normal) if prior else pyro.param("b", torch.zeros(2))
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Bernoulli(logits=b[0] + scale * b[1] * x), obs=(x > 0.1) * 1.0)

    return model


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_separation_is_named_and_nothing_is_lost(scale: float) -> None:
    with pytest.warns(SeparatedData, match=r"'b'.*map-em"):
        result = pyro_em.fit(_separable(scale))
    assert bool(result.params["b"].isfinite().all())
    assert -1e-4 < result.log_likelihood <= 0
    with_prior = pyro_em.fit(_separable(scale, prior=True), algorithm="map-em")
    assert with_prior.converged and not with_prior.warnings


def test_a_class_without_events_is_named() -> None:
    group = torch.arange(30) % 3
    y = torch.where(group == 2, 0.0, 2.0 + (torch.arange(30) % 2))

    def model() -> None:
        level = pyro.param("level", torch.zeros(()))
        effect = pyro.param("effect", torch.zeros(2))
        eta = level + torch.cat([torch.zeros(1), effect])[group]
        with pyro.plate("rows", 30):
            pyro.sample("y", dist.Poisson(eta.exp()), obs=y)

    with pytest.warns(SeparatedData, match="'effect'"):
        result = pyro_em.fit(model)
    assert float(result.params["level"]) == pytest.approx(np.log(2.5), abs=1e-7)
    assert all(bool(v.isfinite().all()) for v in result.params.values())


def test_curves_are_the_derivatives_of_their_kernels() -> None:
    eta = torch.linspace(-3, 3, 7)
    power = PowerKernel(torch.rand(7), torch.rand(7), torch.rand(7), exponent=2.0)
    beta = BetaKernel(torch.rand(7), torch.rand(7))
    for kernel, link, canonical, forward in (
        (power, "exp", IDENTITY, torch.exp),
        (beta, "identity", LOGIT, lambda e: e),
        (beta, "sigmoid", IDENTITY, torch.sigmoid),
    ):
        curve = curve_of(kernel, link, canonical, forward)
        plain = _automatic(lambda e, k=kernel, c=canonical, f=forward: k.value(c.to_canonical(f(e))))  # type: ignore[misc]
        for found, expected in zip(curve.derivatives(eta), plain.derivatives(eta), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(curve.value(eta), plain.value(eta))


def test_slopes_and_scales_are_fitted_together() -> None:
    """Normal.loc by a linear solve, Normal.scale behind exp by Newton, rounds until both hold."""
    y = T(ETA + np.exp(0.5 * X[:, 1]) * RNG.normal(size=N))

    def model() -> None:
        b = pyro.param("b", torch.zeros(P))
        g = pyro.param("g", torch.zeros(P))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(T(X) @ b, torch.exp(T(X) @ g)), obs=y)

    result = pyro_em.fit(model, max_iter=1, tol=0)

    def negative(u: np.ndarray) -> float:
        return -float(stats.norm.logpdf(y.numpy(), X @ u[:P], np.exp(X @ u[P:])).sum())

    found = minimize(negative, np.zeros(2 * P), method="BFGS", options={"gtol": 1e-8})
    assert [result.plan.route(n) for n in ("b", "g")] == ["closed", "newton"]
    np.testing.assert_allclose(torch.cat([result.params["b"], result.params["g"]]).numpy(), found.x, atol=1e-5)


def test_one_parameter_behind_several_cells_of_a_prior() -> None:
    """The rate of a prior over a vector: its slope is the sum over the vector's elements, once."""
    counts = torch.tensor([0.0, 1.0, 2.0, 7.0, 8.0])

    def model(counts: Tensor) -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        rate = pyro.sample("rate", dist.Gamma(torch.tensor([2.0, 3.0]), weight).to_event(1))
        with pyro.plate("days", len(counts)):
            z = pyro.sample("z", dist.Bernoulli(weight))
            pyro.sample("count", dist.Poisson(rate[z.long()]), obs=counts)

    def loss(u: np.ndarray) -> float:
        weight, rate = torch.sigmoid(torch.tensor(u[0])), torch.tensor(u[1:]).exp()
        prior = dist.Beta(2.0, 2.0).log_prob(weight) + dist.Gamma(torch.tensor([2.0, 3.0]), weight).log_prob(rate).sum()
        mass = dist.Poisson(rate[:, None]).log_prob(counts) + torch.stack([1 - weight, weight]).log()[:, None]
        return -float(prior + mass.logsumexp(0).sum())

    init = {"weight": torch.tensor(0.5), "rate": torch.tensor([1.0, 6.0])}
    roles = {"weight": "parameter", "rate": "parameter"}
    result = pyro_em.fit(model, counts, algorithm="map-em", init=init, roles=roles, tol=1e-10)
    found = minimize(loss, [0.0, 0.0, np.log(6.0)], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    assert result.converged
    assert result.log_posterior == pytest.approx(-found.fun, abs=1e-9)


@pytest.mark.parametrize(
    "constraint",
    [constraints.real, constraints.positive, constraints.less_than(2.0), constraints.interval(-1.0, 3.0)],
    ids=str,
)
def test_charts_are_differentiated_twice(constraint: Any) -> None:
    value = torch.tensor([0.2, 0.7, 1.9], dtype=torch.float64)
    own = chart(constraint, value)
    assert isinstance(own, ElementwiseChart)
    free = own.to_free(value).requires_grad_()
    (first,) = torch.autograd.grad(own.from_free(free).sum(), free, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.ones_like(free)).sum() + 0 * free.sum(), free)
    found = chart_derivatives(own, value)
    torch.testing.assert_close(found, (first.detach(), second), rtol=1e-12, atol=1e-14)
