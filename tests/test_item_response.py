"""Abilities on a fixed grid: EM as Bock & Aitkin (1981) write it, by matrix products on the patterns of answers.

The oracle is that EM in NumPy: posteriors on the nodes, expected counts, Newton on each item's two parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from models import irt
from pyro_em import Quadrature
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.plated import Plated
from pyro_em.evidence.grids import REACH
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind

GRID = Quadrature(61, adaptive=False)
Array = np.ndarray[Any, Any]


def _by_hand(y: Array, updates: int) -> tuple[Array, Array, float]:
    """Intercepts, slopes and log-likelihood after some updates from the start of `irt.model`."""
    x = np.linspace(-REACH, REACH, GRID.num_nodes)
    prior = -0.5 * x * x - 0.5 * np.log(2 * np.pi) + np.log(x[1] - x[0])
    share = (y.sum(0) + 1) / (len(y) + 2)
    d, a = np.log(share / (1 - share)), np.ones(y.shape[1])

    def joint() -> Array:
        eta = d + a * x[:, None]
        found: Array = y @ eta.T + prior - np.logaddexp(0, eta).sum(1)
        return found

    for _ in range(updates):
        r = np.exp(joint() - np.logaddexp.reduce(joint(), 1, keepdims=True))
        count, right = r.sum(0)[:, None], r.T @ y
        for _ in range(50):
            p = 1 / (1 + np.exp(-(d + a * x[:, None])))
            g, w = right - count * p, count * p * (1 - p)
            h = np.array([[w.sum(0), x @ w], [x @ w, (x * x) @ w]]).transpose(2, 0, 1)
            step = np.linalg.solve(h, np.stack([g.sum(0), x @ g], -1)[..., None])[..., 0]
            d, a = d + step[:, 0], a + step[:, 1]
    return d, a, float(np.logaddexp.reduce(joint(), 1).sum())


def test_iterates_equal_those_of_an_em_written_for_this_model() -> None:
    y = irt.simulate(200, 5)
    result = pyro_em.fit(irt.model, y, e_step={"theta": GRID}, max_iter=6, tol=0)
    assert "plated" in str(result.plan)
    d, a, value = _by_hand(y.numpy(), 6)
    np.testing.assert_allclose(result.params["intercept"].numpy(), d, atol=1e-9)
    np.testing.assert_allclose(result.params["slope"].numpy(), a, atol=1e-9)
    # The grid's weights are normalised, those above are not: 61 nodes leave a difference below rounding.
    assert result.log_likelihood == pytest.approx(value, rel=1e-12)


def shared(y: Tensor) -> None:
    """One intercept and one slope for all items, which then have no dim in the argument."""
    d, a = pyro.param("d", torch.tensor(0.3)), pyro.param("a", torch.tensor(0.8))
    with pyro.plate("people", len(y), dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("items", y.shape[1], dim=-1):
            pyro.sample("answer", dist.Bernoulli(logits=d + a * theta), obs=y)


def counted(y: Tensor) -> None:
    """Counts behind an exponential, and an answer of three categories, both of the same ability."""
    b = pyro.param("b", torch.tensor([0.1, 0.2]))
    s = pyro.param("s", torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, 0.6]]))
    with pyro.plate("people", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("count", dist.Poisson((b[0] + b[1] * theta).exp()), obs=y[:, 0])
        logits = s[0] + s[1] * theta.unsqueeze(-1)
        pyro.sample("choice", dist.Categorical(logits=logits), obs=y[:, 1])


def _problem(model: Callable[..., Any], y: Tensor) -> Any:
    return bind(model, (y,), {}, with_prior=False, rules={"theta": GRID})


CASES: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "two parameters": (irt.model, irt.simulate(30, 4)),
    "common slope": (irt.common_slope, irt.simulate(30, 4)),
    "all shared": (shared, irt.simulate(30, 4)),
    "other links": (counted, torch.tensor(np.random.default_rng(0).integers(0, 3, (30, 2)).astype(float))),
}


@pytest.mark.parametrize("name", CASES)
def test_the_engine_equals_the_reference(name: str) -> None:
    problem = _problem(*CASES[name])
    m = MStep(problem, "auto", "em")
    engine, reference = choose_engine(problem, m), Interpreted(problem)
    assert isinstance(engine, Plated), engine.reason
    params = problem.start
    for _ in range(3):
        found, expected = engine.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
        theirs = MStep(problem, "auto", "em")
        assert m.score(params, found) == pytest.approx(theirs.score(params, expected), rel=1e-8, abs=1e-9)
        updated, _ = m.update(params, found)
        other, _ = theirs.update(params, expected)
        for key, value in other.items():
            torch.testing.assert_close(updated[key], value, atol=1e-9, rtol=1e-9)
        params = updated


def test_equal_patterns_are_one_row() -> None:
    y = irt.simulate(500, 4)
    problem = _problem(irt.model, y)
    engine = choose_engine(problem, MStep(problem, "auto", "em"))
    assert isinstance(engine, Plated)
    assert engine.programs[0].product.features.num_rows == len(y.unique(dim=0))
    kinds, counts = y.unique(dim=0, return_counts=True)
    options: dict[str, Any] = {"e_step": {"theta": GRID}, "max_iter": 3, "tol": 0, "init": problem.start}
    once = pyro_em.fit(irt.model, kinds, weights={"people": counts.double()}, **options)
    every = pyro_em.fit(irt.model, y, **options)
    assert once.log_likelihood == pytest.approx(every.log_likelihood, rel=1e-12)
    for key, value in every.params.items():
        torch.testing.assert_close(once.params[key], value, atol=1e-9, rtol=0)


def test_starts_advance_together() -> None:
    """Several starts share the products, and each ends where it ends alone."""
    y = irt.simulate(60, 3)
    start = {"intercept": torch.tensor([0.2, -0.3, 0.1]), "slope": torch.tensor([0.6, 1.2, 0.9])}
    options: dict[str, Any] = {"e_step": {"theta": GRID}, "max_iter": 25, "tol": 0, "seed": 0}
    several = pyro_em.fit(irt.model, y, init=start, restarts=3, **options)
    alone = pyro_em.fit(irt.model, y, init=start, **options)
    assert several.restarts[0][0] == pytest.approx(alone.log_likelihood, rel=1e-12)


def behind_exp(y: Tensor) -> None:
    """Counts of every person and site, whose log rate an ability multiplies; the baselines are gathered."""
    b, s = pyro.param("b", torch.tensor([0.2, 0.5, -0.1])), pyro.param("s", torch.tensor([0.3, 0.5, 0.4]))
    with pyro.plate("people", len(y), dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 3, dim=-1):
            pyro.sample("answer", dist.Poisson((b + s * theta).exp()), obs=y)


def graded(y: Tensor) -> None:
    """Answers of three categories (Bock 1972): a vector argument that the ability multiplies."""
    c = pyro.param("c", torch.tensor([0.1, -0.2]))
    a = pyro.param("a", torch.tensor([0.5, 1.0]))
    with pyro.plate("people", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        own = c + a * theta.unsqueeze(-1)
        logits = torch.cat([torch.zeros_like(own[..., :1]), own], -1)
        pyro.sample("answer", dist.Categorical(logits=logits), obs=y)


def slope_alone(y: Tensor) -> None:
    a = pyro.param("a", torch.tensor([0.5, 1.0, 0.8]))
    with pyro.plate("people", len(y), dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 3, dim=-1):
            pyro.sample("answer", dist.Bernoulli(logits=a * theta), obs=y)


COUNTS = torch.tensor(np.random.default_rng(1).integers(0, 3, (25, 3)).astype(float))
ADAPTIVE: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "two parameters": (irt.model, irt.simulate(25, 4)),
    "behind exp": (behind_exp, COUNTS),
    "categories": (graded, COUNTS[:, 0]),
    "slope alone": (slope_alone, (COUNTS > 0).double()),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_nodes_with_newton_steps(name: str) -> None:
    """Slopes that multiply a latent: the M-step is Newton's, and its argmax that of the numeric one."""
    model, y = ADAPTIVE[name]
    problem = bind(model, (y,), {}, with_prior=False, rules={"theta": Quadrature(15)})
    m = MStep(problem, "auto", "em")
    assert {choice.route for choice in m.choices.values()} == {"newton"}
    expectation = Interpreted(problem).e_step(problem.start)
    at = expectation.sufficient.problem
    params, _ = m.update(problem.start, expectation)
    leaves = {n: v.detach().clone().requires_grad_() for n, v in params.items()}
    value, _ = at.expected_log_joint(leaves, expectation.weights)
    for gradient in torch.autograd.grad(value, list(leaves.values())):
        assert float(gradient.abs().max()) < 1e-9 * len(y)


def test_products_of_parameters_and_latents_that_are_not_affine_stay_numeric() -> None:
    def curved(y: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.5))
        with pyro.plate("people", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("answer", dist.Poisson((a * theta + (a * theta).sin()).exp()), obs=y)

    problem = bind(curved, (COUNTS[:, 0],), {}, with_prior=False, rules={"theta": Quadrature(15)})
    m = MStep(problem, "auto", "em")
    assert m.choices["a"].route == "numeric"
