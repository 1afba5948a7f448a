"""Arguments that several parameters make together (diag(τ) L, σ² ρ^|i−j|, φ m and φ (1 − m)): Newton's method on the
function that was recorded of the model, against the numeric M-step, which runs the model, and against dense normals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from pyro_em.m_step import choose

positive = constraints.positive
Params = dict[str, Tensor]
LAGS = (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs().double()


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


def _param(name: str, value: Any, constraint: Any = constraints.real) -> Tensor:
    return pyro.param(name, _t(value), constraint=constraint)


def lkj_slopes(x: Tensor, group: Tensor, y: Tensor) -> None:
    """Standard deviations and a correlation, as brms writes them."""
    beta, s = _param("beta", [0, 0]), _param("s", 1, positive)
    tau, L = _param("tau", [1, 1], positive), _param("L", [[1, 0], [0, 1]], constraints.corr_cholesky)
    with pyro.plate("groups", 6):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=tau.unsqueeze(-1) * L))
    with pyro.plate("rows", len(y)):
        own = beta + b[group]
        pyro.sample("y", dist.Normal(own[..., 0] + own[..., 1] * x, s), obs=y)


def lkj_priors(x: Tensor, group: Tensor, y: Tensor) -> None:
    """The same with priors."""
    tau = pyro.sample("tau", dist.HalfNormal(_t([2, 2])).to_event(1))
    L = pyro.sample("L", dist.LKJCholesky(2, _t(2.0)))
    beta = pyro.sample("beta", dist.Normal(_t([0, 0]), _t(5.0)).to_event(1))
    with pyro.plate("groups", 6):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=tau.unsqueeze(-1) * L))
    with pyro.plate("rows", len(y)):
        own = beta + b[group]
        pyro.sample("y", dist.Normal(own[..., 0] + own[..., 1] * x, 0.5), obs=y)


def crossed(x: Tensor, group: Tensor, items: Tensor, y: Tensor) -> None:
    """Slopes of groups, crossed with items."""
    beta, s, v = _param("beta", [0, 0]), _param("s", 1, positive), _param("v", 1, positive)
    tau, L = _param("tau", [1, 1], positive), _param("L", [[1, 0], [0, 1]], constraints.corr_cholesky)
    with pyro.plate("groups", 6):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=tau.diag() @ L))
    with pyro.plate("items", 5):
        c = pyro.sample("c", dist.Normal(torch.zeros_like(v), v))
    with pyro.plate("rows", len(y)):
        own = beta + b[group]
        pyro.sample("y", dist.Normal(own[..., 0] + own[..., 1] * x + c[items], s), obs=y)


def factors(y: Tensor) -> None:
    """A mixture of factor analysers, whose second noise is a share of the first."""
    w, mean = _param("w", [0.4, 0.6], constraints.simplex), _param("mean", [[-1, -1, -1, -1], [1, 1, 1, 1]])
    load, s = _param("load", [1, 0.8, 0.5, 0.3]), _param("s", 1, positive)
    ratio = _param("ratio", 0.5, constraints.unit_interval)
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        u = pyro.sample("u", dist.Normal(torch.zeros_like(s), 1.0))
        loc, scale = mean[z] + u.unsqueeze(-1) * load, torch.stack([s, ratio * s])[z].unsqueeze(-1)
        pyro.sample("y", dist.Normal(loc, scale).to_event(1), obs=y)


def regressions(x: Tensor, y: Tensor) -> None:
    """Two lines, one of which has an error more than the other."""
    w, a, b = _param("w", [0.5, 0.5], constraints.simplex), _param("a", [-1, 2]), _param("b", [0.2, 0.5])
    s, more = _param("s", 1, positive), _param("more", 1.5, positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        scale = torch.stack([s, (s**2 + more**2).sqrt()])
        pyro.sample("y", dist.Normal(a[z] + b[z] * x, scale[z]), obs=y)


def intraclass(group: Tensor, y: Tensor) -> None:
    """Total variance, and the share of it that is between groups."""
    mean, v = _param("mean", 0), _param("v", 1, positive)
    share = _param("share", 0.5, constraints.unit_interval)
    with pyro.plate("groups", 6):
        b = pyro.sample("b", dist.Normal(torch.zeros_like(v), (share * v).sqrt()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean + b[group], ((1 - share) * v).sqrt()), obs=y)


def autocorrelated(y: Tensor) -> None:
    """Residuals of a group of rows in order."""
    mean, tau, s = _param("mean", 0), _param("tau", 1, positive), _param("s", 1, positive)
    rho = _param("rho", 0.3, constraints.unit_interval)
    with pyro.plate("groups", len(y)):
        b = pyro.sample("b", dist.Normal(torch.zeros_like(tau), tau))
        loc = (mean + b).unsqueeze(-1).expand(*b.shape, 4)
        pyro.sample("y", dist.MultivariateNormal(loc, s**2 * rho**LAGS), obs=y)


def proportions(x: Tensor, wins: Tensor) -> None:
    """Beta-binomial regression by mean and concentration."""
    beta, phi = _param("beta", [0, 0]), _param("phi", 3, positive)
    m = torch.sigmoid(beta[0] + beta[1] * x)
    with pyro.plate("rows", len(x)):
        p = pyro.sample("p", dist.Beta(phi * m, phi * (1 - m)))
        pyro.sample("wins", dist.Binomial(12, p), obs=wins)


def two_errors(x: Tensor, y: Tensor) -> None:
    """An error of its own, and one in proportion to a covariate; no latents."""
    beta, s, share = _param("beta", [0, 0]), _param("s", 1, positive), _param("share", 0.5, positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(beta[0] + beta[1] * x, (s**2 + (share * x) ** 2).sqrt()), obs=y)


def mixture(y: Tensor) -> None:
    """One component has an error more than the other."""
    w, loc = _param("w", [0.5, 0.5], constraints.simplex), _param("loc", [-1, 3])
    s, more = _param("s", 1, positive), _param("more", 1.5, positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(loc[z], torch.stack([s, (s**2 + more**2).sqrt()])[z]), obs=y)


@dataclass(frozen=True)
class Case:
    """`evidence` by an independent route (None: that of the numeric M-step is compared alone)."""

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    composed: tuple[str, ...]
    evidence: Callable[[Params], Tensor] | None
    algorithm: str = "em"
    engine: str = "pooled"


def _cases() -> dict[str, Case]:
    rng = np.random.default_rng(5)
    group, items = torch.as_tensor(np.arange(40) % 6), torch.as_tensor(np.arange(40) // 3 % 5)
    x, one = _t(rng.normal(size=40)), torch.nn.functional.one_hot(group, 6).double()
    effects = rng.normal(size=(6, 2))
    y = _t(1 + effects[group, 0] + (0.5 + effects[group, 1]) * x.numpy() + 0.5 * rng.normal(size=40))
    series = _t(2 * rng.normal(size=(25, 1)) + rng.multivariate_normal(np.zeros(4), 0.6 ** LAGS.numpy(), 25))
    lines = _t(np.where(group < 3, -1 + 0.2 * x, 2 + 0.5 * x) + np.where(group < 3, 0.3, 1.5) * rng.normal(size=40))
    wins = _t(rng.binomial(12, rng.beta(4, 3, 40)))
    spread = _t(1 + x.numpy() + 0.7 * np.hypot(0.3, x.numpy()) * rng.normal(size=40))
    both = _t(np.concatenate([rng.normal(size=30) - 2, 3 + 2 * rng.normal(size=30)]))

    def normal(p: Params, loc: Tensor, covariance: Tensor, value: Tensor) -> Tensor:
        found: Tensor = torch.distributions.MultivariateNormal(loc, covariance).log_prob(value).sum()
        return found

    def slopes(p: Params) -> Tensor:
        root = p["tau"].unsqueeze(-1) * p["L"]
        Z = torch.cat([one, one * x.unsqueeze(-1)], 1)
        V = Z @ torch.kron(root @ root.T, torch.eye(6).double()) @ Z.T + p["s"] ** 2 * torch.eye(40).double()
        return normal(p, p["beta"][0] + p["beta"][1] * x, V, y)

    def shares(p: Params) -> Tensor:
        V = p["share"] * p["v"] * one @ one.T + (1 - p["share"]) * p["v"] * torch.eye(40).double()
        return normal(p, p["mean"].expand(40), V, y)

    def lagged(p: Params) -> Tensor:
        return normal(p, p["mean"].expand(4), p["tau"] ** 2 + p["s"] ** 2 * p["rho"] ** LAGS, series)

    def binomial(p: Params) -> Tensor:
        m = torch.sigmoid(p["beta"][0] + p["beta"][1] * x)
        a, b = p["phi"] * m, p["phi"] * (1 - m)
        return (_beta(a + wins, b + 12 - wins) - _beta(a, b) - _beta(wins + 1, 13 - wins) - math.log(13)).sum()

    def both_errors(p: Params) -> Tensor:
        scale = (p["s"] ** 2 + (p["share"] * x) ** 2).sqrt()
        return torch.distributions.Normal(p["beta"][0] + p["beta"][1] * x, scale).log_prob(spread).sum()

    return {
        "lkj slopes": Case(lkj_slopes, (x, group, y), ("tau", "L"), slopes),
        "lkj priors": Case(lkj_priors, (x, group, y), ("tau", "L"), None, "map-em"),
        "intraclass": Case(intraclass, (group, y), ("v", "share"), shares),
        "autocorrelated": Case(autocorrelated, (series,), ("s", "rho"), lagged),
        "proportions": Case(proportions, (x, wins), ("beta", "phi"), binomial, engine="interpreted"),
        "two errors": Case(two_errors, (x, spread), ("s", "share"), both_errors, engine="interpreted"),
        "mixture": Case(mixture, (both,), ("s", "more"), None, engine="plated"),
        "crossed": Case(crossed, (x, group, items, y + _t([-2, -1, 0, 1, 2])[items]), ("tau", "L"), None),
        "factors": Case(factors, (series,), ("s", "ratio"), None),
        "regressions": Case(regressions, (x, lines), ("s", "more"), None, engine="predicted"),
    }


def _beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_of_the_numeric_m_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    options: dict[str, Any] = {"algorithm": case.algorithm, "max_iter": 3, "tol": 0}
    found = pyro_em.fit(case.model, *case.args, **options)
    assert f"E-steps run {case.engine}" in str(found.plan)
    assert [found.plan.route(n) for n in case.composed] == ["newton"] * len(case.composed)
    monkeypatch.setattr(choose, "composed_blocks", lambda *args: [])
    numeric = pyro_em.fit(case.model, *case.args, **options)
    assert [numeric.plan.route(n) for n in case.composed] == ["numeric"] * len(case.composed)
    for parameter, value in numeric.params.items():
        assert torch.allclose(found.params[parameter], value, rtol=1e-7, atol=1e-7), parameter


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.evidence is not None])
def test_the_limit_is_a_maximum_of_the_evidence(name: str) -> None:
    case = CASES[name]
    assert case.evidence is not None
    result = pyro_em.fit(case.model, *case.args, tol=1e-8, max_iter=3000, accelerate="anderson")
    assert result.converged
    leaves = {n: v.clone().requires_grad_(True) for n, v in result.params.items()}
    evidence = case.evidence(leaves)
    assert float(evidence.detach()) == pytest.approx(result.log_likelihood, rel=1e-11)
    gradients = torch.autograd.grad(evidence, list(leaves.values()))
    for parameter, gradient in zip(leaves, gradients, strict=True):
        if parameter == "L":  # of a unit row (r, √(1 − r²)) only r moves
            r, root = leaves["L"][1]
            gradient = gradient[1, 0] - gradient[1, 1] * r / root
        assert gradient.abs().max() < 1e-5 * len(case.args[0]), parameter


def in_place(group: Tensor, y: Tensor) -> None:
    """A covariance that is written entry by entry."""
    v, share = _param("v", 1, positive), _param("share", 0.5, constraints.unit_interval)
    root = torch.zeros(2).double()
    root[0], root[1] = (share * v).sqrt(), ((1 - share) * v).sqrt()
    with pyro.plate("groups", 6):
        b = pyro.sample("b", dist.Normal(torch.zeros_like(v), root[0]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[group], root[1]), obs=y)


def test_what_cannot_be_recorded_stays_numeric() -> None:
    group, y = CASES["intraclass"].args
    result = pyro_em.fit(in_place, group, y, max_iter=2, tol=0)
    assert result.plan.route("v") == "numeric"
    history = result.history["objective"]
    assert history == sorted(history)


def test_a_step_is_refused_where_an_argument_would_leave_its_space() -> None:
    """A scale a + b that Newton's method would take below 0 from here."""

    def model(y: Tensor) -> None:
        a, b = _param("a", 40.0), _param("b", 2.0)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(_t(0.0), a * b), obs=y)

    y = _t([0.1, -0.2, 0.15, 0.05])
    result = pyro_em.fit(model, y, max_iter=200)
    assert result.plan.route("a") == "newton"
    scale = result.params["a"] * result.params["b"]
    assert float(scale) == pytest.approx(float(y.square().mean().sqrt()), rel=1e-6)
