"""Loops by `pyro.markov(range(T))` whose parameters are updated by Newton's method or one linear solve are compiled.

The oracles: the interpreted engine, which runs the model and contracts its factors, to 1e-10 for every iterate; the
same model written with `pyro_em.markov`, which another engine evaluates, to 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from pyro_em.e_step.auto import chosen
from pyro_em.e_step.grouped import Grouped
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.errors import NonFiniteError
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem, bind
from tests import timed_models
from tests.timed_models import rows

simplex, positive = constraints.simplex, constraints.positive
STEPS, SERIES = 12, 3
GENERAL = (
    timed_models.counts,
    timed_models.deviations,
)  # no chains of single latents: contracted as the reference does


def _data(steps: int = STEPS, series: int = SERIES) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise, x = torch.randn(2, steps, series, generator=generator)
    y = 3.0 * (torch.arange(steps) // 4 % 2).unsqueeze(-1) + noise
    seen = torch.arange(steps).unsqueeze(-1) < torch.tensor([steps, steps - 4, steps - 1])[:series]
    return y, x, seen


def _unrolled(steps: int, history: int = 1) -> Any:
    return pyro.markov(range(steps), history=history)


def chain(emission: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> Callable[..., None]:
    """A model of (y, x, seen) with states that emit by `emission(z, y, x, name)`."""

    def model(y: Tensor, x: Tensor, seen: Tensor) -> None:
        A = pyro.param("A", rows(2, 2), constraint=simplex)
        with pyro.plate("series", y.shape[1], dim=-1):
            z = torch.tensor(0)
            for t in pyro_em.markov(len(y)):
                with poutine.mask(mask=seen[t]):
                    z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                    emission(z, y[t], x[t], t)

    model.__name__ = emission.__name__
    return model


@chain
def poisson(z: Tensor, y: Tensor, x: Tensor, t: Any) -> None:
    a, b = pyro.param("a", torch.tensor([0.0, 1.0])), pyro.param("b", torch.zeros(2))
    pyro.sample(f"y_{t}", dist.Poisson((a[z] + b[z] * x).exp()), obs=y.abs().round())


def logistic(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """One slope for all states, with a prior that map-em counts."""
    A, a = pyro.param("A", rows(2, 2), constraint=simplex), pyro.param("a", torch.tensor([-1.0, 1.0]))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("series", y.shape[1]):
        z = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            with poutine.mask(mask=seen[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                pyro.sample(f"y_{t}", dist.Bernoulli(logits=a[z] + b * x[t]), obs=(y[t] > 1.5).double())


@chain
def regression(z: Tensor, y: Tensor, x: Tensor, t: Any) -> None:
    """Two covariates, of which one is 0 in half of the steps; a linear solve, then the scales."""
    a, b = pyro.param("a", torch.tensor([0.0, 2.0])), pyro.param("b", torch.zeros(2, 2))
    sd = pyro.param("sd", torch.tensor([1.0, 1.3]), constraint=positive)
    both = torch.stack([x, x.clamp(min=0)], -1)
    pyro.sample(f"y_{t}", dist.Normal(a[z] + (b[z] * both).sum(-1), sd[z]), obs=y)


@chain
def shapes(z: Tensor, y: Tensor, x: Tensor, t: Any) -> None:
    """Newton's method without any predictor: both parameters of gamma emissions."""
    shape = pyro.param("shape", torch.tensor([1.0, 3.0]), constraint=positive)
    rate = pyro.param("rate", torch.tensor([1.0, 2.0]), constraint=positive)
    pyro.sample(f"y_{t}", dist.Gamma(shape[z], rate[z]), obs=y.abs() + 0.1)


@chain
def elements(z: Tensor, y: Tensor, x: Tensor, t: Any) -> None:
    """Two elements of an event with intercepts of their own, one of which no parameter reaches at times."""
    a, b = pyro.param("a", torch.tensor([[0.0, 0.5], [1.0, 0.2]])), pyro.param("b", torch.tensor(0.1))
    eta = a[z] + b * torch.stack([x, torch.zeros_like(x)], -1)
    counts = torch.stack([y, x], -1).abs().round()
    pyro.sample(f"y_{t}", dist.Poisson(eta.exp()).to_event(1), obs=counts)


MODELS = [*timed_models.MODELS, poisson, logistic, regression, shapes, elements]


def _interpreted(problem: Problem, algorithm: str) -> tuple[MStep, Interpreted]:
    return MStep(problem, "auto", algorithm), Interpreted(problem)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_equals_the_interpreted_engine(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged and weighted sequences; score, update, certificate, and the same posterior at other parameters."""
    monkeypatch.setattr(pyro_em, "markov", _unrolled)
    algorithm = "map-em" if model is logistic else "em"
    weights = {"series": torch.tensor([1.0, 2.5, 0.5])}
    problem = bind(model, _data(), {}, with_prior=model is logistic, weights=weights)
    _, m_step, engine = chosen(problem, "auto", algorithm)
    assert isinstance(engine, Grouped)
    assert len(engine._program.sites) < 12 < len(problem.sites)
    slow, reference = _interpreted(problem, algorithm)
    params = problem.start
    for _ in range(4):
        a, b = engine.e_step(params), reference.e_step(params)
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-12)
        assert a.log_prior == pytest.approx(b.log_prior, rel=1e-12, abs=1e-12)
        assert a.magnitude == pytest.approx(b.magnitude, rel=1e-12)
        assert m_step.score(params, a) == pytest.approx(slow.score(params, b), rel=1e-8, abs=1e-9)
        assert a.sufficient.at is not None
        elsewhere = m_step.closed_score(problem.start, a.sufficient.at(problem.start))
        expected = slow.closed_score(problem.start, slow._refreshed(problem.start, b))
        torch.testing.assert_close(elsewhere, expected, rtol=1e-8, atol=1e-9)
        (ours, info), (theirs, _) = m_step.update(params, a), slow.update(params, b)
        assert info.certificate is None or info.certificate < 1e-10
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10)
        params = theirs


@pytest.mark.filterwarnings("ignore::pyro_em.EMWarning")
@pytest.mark.parametrize("model", [m for m in MODELS if m not in GENERAL], ids=lambda m: m.__name__)
def test_equals_the_loop_of_pyro_em(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterates of whole fits, by recordings as soon as there are any, and what is read off the results."""
    algorithm = "map-em" if model is logistic else "em"
    found = {}
    for loop in (pyro_em.markov, _unrolled):
        monkeypatch.setattr(pyro_em, "markov", loop)
        found[loop] = pyro_em.fit(model, *_data(30, 2), algorithm=algorithm, max_iter=12, tol=0)
    ours, theirs = found.values()
    assert theirs.plan.engine.startswith("grouped")
    torch.testing.assert_close(theirs.history["objective"], ours.history["objective"], rtol=1e-10, atol=0)
    for name, value in ours.params.items():
        torch.testing.assert_close(theirs.params[name], value, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(theirs.log_prob(*_data(30, 2)), ours.log_prob(*_data(30, 2)), rtol=1e-8, atol=1e-8)


def test_starts_are_drawn_by_the_m_step_of_single_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference made of a draw is no statistics of groups."""
    monkeypatch.setattr(pyro_em, "markov", _unrolled)
    result = pyro_em.fit(poisson, *_data(20, 2), restarts=3, seed=1, max_iter=5)
    assert result.plan.engine.startswith("grouped")
    assert len({round(objective, 6) for objective, _ in result.restarts}) == 3


def test_impossible_data_are_named() -> None:
    """By the reference, with site and step."""
    steps = 12

    def model(y: Tensor, x: Tensor, start: Tensor) -> None:
        a, b = pyro.param("a", torch.zeros(2)), pyro.param("b", torch.zeros(2))
        B = pyro.param("B", start, constraint=simplex)
        z = torch.tensor(0)
        for t in pyro.markov(range(steps)):
            eta = a[z] + b[z] * x[t]
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=torch.stack([eta, torch.zeros_like(eta)], -1)))
            pyro.sample(f"y_{t}", dist.Categorical(B[z]), obs=y[t])

    x, never = torch.linspace(-1, 1, steps), torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])
    y = torch.tensor([0, 1] * 6)
    assert pyro_em.plan(model, y, x, never).engine.startswith("grouped")
    y[7] = 2
    with pytest.raises(NonFiniteError, match="y_7"):
        pyro_em.fit(model, y, x, never)
