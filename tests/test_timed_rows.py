"""Loops over time whose densities are evaluated row by row: the compiled engine equals the reference.

The models of timed_models.py; ragged, weighted, with holes and labels; by band solves, in blocks and in log-space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em
from pyro_em import evaluator
from pyro_em.e_step import chain_rows
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.chain_rows import RowProgram
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.timed_rows import TimedRows
from pyro_em.errors import NonFiniteError
from pyro_em.evidence import banded
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.choose import CERTIFICATE
from pyro_em.m_step.newton import Newton
from pyro_em.problem import Problem, bind
from tests.timed_models import GATED, MODELS, autoregression, deviations, gate_of_two, rows, second_order

simplex, positive = constraints.simplex, constraints.positive


def _data(steps: int, series: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise, x = torch.randn(2, steps, series, generator=generator)
    y = 3.0 * (torch.arange(steps) // 4 % 2).unsqueeze(-1) + noise
    return y, x, torch.ones(y.shape, dtype=torch.bool)


def _agree(problem: Problem, updates: int = 3, tolerance: float = 1e-11) -> TimedRows:
    m = MStep(problem, "auto", "em")
    engine, reference = choose_engine(problem, m), Interpreted(problem)
    assert isinstance(engine, TimedRows)
    params = problem.start
    for _ in range(updates):
        a, b = engine.e_step(params), reference.e_step(params)
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-12)
        assert a.magnitude == pytest.approx(b.magnitude, rel=1e-12)
        own, other = MStep(problem, "auto", "em"), MStep(problem, "auto", "em")
        assert own.score(params, a) == pytest.approx(other.score(params, b), rel=1e-8, abs=1e-10)
        ours, theirs = own.update(params, a)[0], other.update(params, b)[0]
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)
        params = theirs
    return engine


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("steps", "series", "most"), [(6, 1, 10**6), (75, 3, 10**6), (75, 3, 0)])
def test_equals_the_reference(
    model: Callable[..., Any], steps: int, series: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By band solves and in blocks, one chain and several."""
    monkeypatch.setattr(banded, "MOST", most)
    engine = _agree(bind(model, _data(steps, series), {}, with_prior=False))
    assert all(isinstance(program, RowProgram) == (model not in GATED) for program in engine.programs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("most", [0, 10**6])
def test_ragged_weighted_with_holes(model: Callable[..., Any], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "MOST", most)
    y, x, _ = _data(45, 4)
    seen = torch.arange(45).unsqueeze(-1) < torch.tensor([45, 23, 4, 39])
    seen[10:15, 0] = False
    weights = {"series": torch.tensor([1.0, 2.5, 0.5, 0.0])}
    _agree(bind(model, (y, x, seen), {}, with_prior=False, weights=weights))


def test_labels_and_a_mixture_together() -> None:
    """States known at some steps of a chain of order two whose emissions are mixtures; weights, ragged ends."""
    generator = torch.Generator().manual_seed(3)
    y, _, _ = _data(30, 3)
    labels, known = torch.randint(2, y.shape, generator=generator), torch.rand(y.shape, generator=generator) < 0.2
    seen = torch.arange(30).unsqueeze(-1) < torch.tensor([30, 12, 21])

    def model() -> None:
        C = pyro.param("C", rows(2, 2, 2, seed=2), constraint=simplex)
        share, mu = pyro.param("share", rows(2, 2), constraint=simplex), pyro.param("mu", torch.arange(4.0).view(2, 2))
        with pyro.plate("series", 3):
            before = z = torch.tensor(0)
            for t in pyro_em.markov(30, history=2):
                with poutine.mask(mask=seen[t]):
                    fn = dist.Categorical(Vindex(C)[before, z])
                    before, z = z, pyro.sample(f"z_{t}", fn, obs=labels[t], obs_mask=known[t])
                    c = pyro.sample(f"c_{t}", dist.Categorical(share[z]))
                    pyro.sample(f"y_{t}", dist.Normal(Vindex(mu)[z, c], 1.0), obs=y[t])

    _agree(bind(model, (), {}, with_prior=False, weights={"series": torch.tensor([2.0, 1.0, 0.5])}))


@pytest.mark.parametrize("model", [second_order, autoregression])
def test_log_space_where_scaled_numbers_run_out(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "MOST", 0)
    monkeypatch.setattr(chain_rows, "smooth_blocked", lambda *args: None)
    y, x, _ = _data(45, 2)
    seen = torch.arange(45).unsqueeze(-1) < torch.tensor([45, 23])
    _agree(bind(model, (y, x, seen), {}, with_prior=False, weights={"series": torch.tensor([1.0, 2.5])}))


def test_an_outlier_and_forbidden_transitions() -> None:
    """A point at 1e4 sigma leaves everything finite; zeros of a table of order two stay."""
    y, x, seen = _data(60, 1)
    y[30] = 1e4
    result = pyro_em.fit(deviations, y, x, seen, max_iter=5, tol=0)
    assert all(bool(value.isfinite().all()) for value in result.params.values())
    C = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.4, 0.6], [0.3, 0.7]]])
    start = {"C": C}
    with pytest.warns(pyro_em.BoundaryEstimate):
        result = pyro_em.fit(second_order, y.clamp(max=9), x, seen, init=start, max_iter=5, tol=0)
    assert result.plan.engine.startswith("scanned")
    assert float(result.params["C"][0, 1, 1]) == 0.0


def test_impossible_sequences_are_named() -> None:
    words = torch.zeros(20, 3, dtype=torch.long)
    words[11, 1] = 2

    def model() -> None:
        C = pyro.param("C", rows(2, 2, 2), constraint=simplex)
        B = pyro.param("B", torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]), constraint=simplex)
        with pyro.plate("series", 3):
            before = z = torch.tensor(0)
            for t in pyro_em.markov(20, history=2):
                before, z = z, pyro.sample(f"z_{t}", dist.Categorical(Vindex(C)[before, z]))
                pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=words[t])

    with pytest.raises(NonFiniteError, match=r"rows 1 of plate.*from step 11 on"):
        pyro_em.fit(model, max_iter=1)


def test_the_model_is_not_run_again() -> None:
    y, x, seen = _data(30, 2)
    runs = []

    def counted(*args: Tensor) -> None:
        runs.append(1)
        autoregression(*args)

    pyro_em.fit(counted, y, x, seen, max_iter=2, tol=0)
    first = len(runs)
    pyro.clear_param_store()
    result = pyro_em.fit(counted, y, x, seen, max_iter=20, tol=0)
    assert len(runs) == 2 * first
    objective = np.array(result.history["objective"])
    assert (np.diff(objective) >= -1e-12 * abs(objective[-1])).all()


@pytest.mark.parametrize("model", [second_order, autoregression, gate_of_two])
def test_replays_are_the_code(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded updates are the ordinary ones to the last bit."""
    replayed = pyro_em.fit(model, *_data(40, 2), max_iter=9, tol=0)
    monkeypatch.setattr(evaluator, "WARM", 10**6)
    ordinary = pyro_em.fit(model, *_data(40, 2), max_iter=9, tol=0)
    assert replayed.history["log_likelihood"] == ordinary.history["log_likelihood"]
    for name, value in ordinary.params.items():
        assert torch.equal(replayed.params[name], value)


def test_newton_ends_where_the_certificate_of_a_long_series_begins() -> None:
    """The steps of one series count as rows do: a bound for a single observation is below the rounding of thousands."""

    def model(y: Tensor) -> None:
        A = pyro.param("A", torch.tensor([[0.9, 0.1], [0.2, 0.8]]), constraint=constraints.simplex)
        shape = pyro.param("shape", torch.tensor([1.0, 3.0]), constraint=constraints.positive)
        z = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Gamma(shape[z], 1.0), obs=y[t])

    problem = bind(model, (torch.rand(500, generator=torch.Generator().manual_seed(0)) + 0.1,), {}, with_prior=False)
    (newton,) = (unit for unit in MStep(problem, "auto", "em").units if isinstance(unit, Newton))
    assert newton.tolerance == pytest.approx(0.1 * CERTIFICATE * 500)
