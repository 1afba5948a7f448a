"""Generalised linear sites: Newton's M-step, its curves, and what separation does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import brentq, minimize
from scipy.special import digamma
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.charts import ElementwiseChart, chart
from pyro_em.errors import SeparatedData
from pyro_em.families.base import IDENTITY, LOGIT, NORMALISED, SOFTMAX, Link
from pyro_em.kernels import BetaKernel, PowerKernel, QuadraticKernel, SimplexKernel
from pyro_em.m_step import curves
from pyro_em.m_step.curves import _automatic
from pyro_em.m_step.objective import chart_derivatives
from pyro_em.vector_design import SoftmaxCurvature
from tests.classics import positive
from tests.laws import polished

RNG = np.random.default_rng(7)
N, P = 120, 3
X = np.c_[np.ones(N), RNG.normal(size=(N, P - 1))]
ETA = X @ np.array([0.3, 0.8, -0.5])
T = torch.as_tensor
WAITS = RNG.gamma(2.5, np.exp(ETA) / 2.5)


def test_concentrations_are_scipys() -> None:
    def model(y: Tensor) -> None:
        a = pyro.param("a", torch.tensor(1.0), constraint=positive)
        rate = pyro.param("rate", torch.tensor(1.0), constraint=positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Gamma(a, rate), obs=y)

    result = pyro_em.fit(model, T(WAITS), max_iter=1, tol=0)
    # At the maximum the rate is a over the mean, so that log a - digamma(a) is that of the data.
    target = np.log(WAITS.mean()) - np.log(WAITS).mean()
    a = brentq(lambda a: np.log(a) - digamma(a) - target, 1e-3, 1e3, xtol=1e-15, rtol=1e-15)
    np.testing.assert_allclose(
        [float(result.params["a"]), float(result.params["rate"])], [a, a / WAITS.mean()], rtol=1e-10
    )
    reasons = {row.name: row.reason for row in result.plan.m_step}
    assert reasons["a"] == "Newton (Gamma.concentration), jointly with 'rate'"


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


def test_separation_is_named_where_the_last_update_was_a_replay() -> None:
    with pytest.warns(SeparatedData, match="'b'"):
        pyro_em.fit(_separable(1.0), max_iter=12, tol=0)


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


CELLS = torch.rand(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
POWERS = [PowerKernel(CELLS[0], CELLS[1], falls, exponent=q) for falls in (CELLS[2], 0 * CELLS[2]) for q in (1.0, 2.0)]
BETA, SIMPLEX = BetaKernel(CELLS[0], CELLS[1]), SimplexKernel(CELLS.mT)
QUADRATIC = QuadraticKernel(CELLS[0], CELLS[1], CELLS[2])
WRITTEN_OUT = [
    *((power, "exp", IDENTITY, "_exponential") for power in POWERS),
    (BETA, "identity", LOGIT, "_logistic"),
    (BETA, "sigmoid", IDENTITY, "_logistic"),
    (SIMPLEX, "identity", SOFTMAX, "_categorical"),
    (SIMPLEX, "softmax", NORMALISED, "_categorical"),
    (QUADRATIC, "identity", IDENTITY, "_quadratic"),
]
FORWARD = {"identity": lambda e: e, "exp": torch.exp, "sigmoid": torch.sigmoid, "softmax": lambda e: e.softmax(-1)}


@pytest.mark.parametrize(("kernel", "link", "canonical", "name"), WRITTEN_OUT)
def test_curves_are_the_derivatives_of_their_kernels(
    kernel: Any, link: str, canonical: Link, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("automatic")

    monkeypatch.setattr(curves, "_automatic", never)
    curve = curves.curve_of(kernel, link, canonical, FORWARD[link])
    eta = torch.linspace(-3, 3, 21).reshape(7, 3) if kernel is SIMPLEX else torch.linspace(-3, 3, 7)

    def plain(e: Tensor) -> Tensor:
        value: Tensor = kernel.value(canonical.to_canonical(FORWARD[link](e)))
        return value

    expected = curves.rowwise_derivatives(plain, eta) if kernel is SIMPLEX else _automatic(plain).derivatives(eta)
    for found, own in zip(curve.derivatives(eta), expected, strict=True):
        if isinstance(found, SoftmaxCurvature):
            found = torch.diag_embed(found.diagonal) - found.root.unsqueeze(-1) * found.root.unsqueeze(-2)
        torch.testing.assert_close(found, own, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(curve.value(eta), plain(eta), rtol=1e-12, atol=1e-12)


OTHERS = [
    (POWERS[0], "identity", IDENTITY), (POWERS[0], "sigmoid", IDENTITY), (BETA, "identity", IDENTITY),
    (BETA, "sigmoid", LOGIT), (QUADRATIC, "exp", IDENTITY), (QUADRATIC, "sigmoid", IDENTITY),
    (SIMPLEX, "softmax", IDENTITY), (SIMPLEX, "identity", NORMALISED),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "link", "canonical"), OTHERS)
def test_a_kernel_behind_another_link_is_no_curve_that_is_written_out(kernel: Any, link: str, canonical: Link) -> None:
    curve = curves.curve_of(kernel, link, canonical, FORWARD[link])
    eta = torch.linspace(0.1, 0.9, 21).reshape(7, 3) if kernel is SIMPLEX else torch.linspace(0.1, 0.9, 7)
    torch.testing.assert_close(curve.value(eta), kernel.value(canonical.to_canonical(FORWARD[link](eta))))


def test_slopes_and_scales_are_fitted_together() -> None:
    """Normal.loc by a linear solve, Normal.scale behind exp by Newton, rounds until both hold."""
    y = T(ETA + np.exp(0.5 * X[:, 1]) * RNG.normal(size=N))

    def model() -> None:
        b = pyro.param("b", torch.zeros(P))
        g = pyro.param("g", torch.zeros(P))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(T(X) @ b, torch.exp(T(X) @ g)), obs=y)

    result = pyro_em.fit(model, max_iter=1, tol=0)

    def value(u: Tensor) -> Tensor:
        return dist.Normal(T(X) @ u[:P], torch.exp(T(X) @ u[P:])).log_prob(y).sum()

    found = minimize(lambda u: -value(torch.tensor(u)).item(), np.zeros(2 * P), method="BFGS")
    best = polished(value, torch.tensor(found.x))
    assert [result.plan.route(n) for n in ("b", "g")] == ["closed", "newton"]
    torch.testing.assert_close(torch.cat([result.params["b"], result.params["g"]]), best, rtol=0.0, atol=1e-9)


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
