"""The grouped engine (e_step/grouped.py) equals the reference: evidence, statistics, updates; and when it is chosen.

Statistics are compared as the gradient of every parameter's Q at random points: for an exponential family
that determines the moments, whatever centre they were taken about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import transform_to

import pyro_em
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.base import Expectation, NotCompiled
from pyro_em.e_step.grouped import Grouped, compile_grouped
from pyro_em.e_step.inside import Inside
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.plated import Plated
from pyro_em.e_step.predicted import Predicted
from pyro_em.errors import NonFiniteError
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.separate import Separate
from pyro_em.problem import Problem, bind
from tests.graphs import random_graph
from tests.problems import PROBLEMS
from tests.zoo_chains import CASES, START3, hmm, normal, rows


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11, msg=lambda m: f"{what}: {m}")


def _gradients(problem: Problem, m_step: MStep, params: Mapping[str, Tensor], step: Expectation) -> dict[str, Tensor]:
    """∂Q/∂θ of every parameter at random points, the arguments of the others held at `params`."""
    found = {}
    for unit in m_step.units:
        if not isinstance(unit, Separate):
            continue  # blocks of locations have no kernel of their own; their updates are compared
        (name,) = unit.names
        theta = params[name].double()
        combined = unit.combined(theta, step.sufficient)
        inside = transform_to(problem.parameters[name].constraint)
        for i in range(3):
            u = 0.5 * normal(*inside.inverse_shape(theta.shape), seed=i)
            found[f"{name} {i}"] = combined.gradient(inside(u))
    return found


def _agree(problem: Problem, start: Mapping[str, Tensor], updates: int = 3) -> Grouped:
    """The engine and the reference from the same start; fails where they differ."""
    grouped, reference = compile_grouped(problem), Interpreted(problem)
    ours, theirs = MStep(problem, "auto", "em"), MStep(problem, "auto", "em")
    params = {name: value.clone() for name, value in start.items()}
    for _ in range(updates):
        found, expected = grouped.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12, abs=1e-12)
        assert found.log_prior == pytest.approx(expected.log_prior, rel=1e-12, abs=1e-12)
        assert found.magnitude == pytest.approx(expected.magnitude, rel=1e-12, abs=1e-12)
        for (name, a), b in zip(
            _gradients(problem, ours, params, found).items(),
            _gradients(problem, theirs, params, expected).values(),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * (1 + float(b.abs().max())), msg=name)
        ours_next, _ = ours.update(params, found)
        params, _ = theirs.update(params, expected)
        for name, value in params.items():
            _same(ours_next[name], value, name)
    return grouped


@pytest.mark.parametrize("name", CASES)
def test_chains(name: str) -> None:
    model, args, start, weights = CASES[name]
    grouped = _agree(bind(model, args, {}, with_prior=False, weights=weights), start)
    assert "0 of" in grouped.reason if name == "factorial" else "0 of" not in grouped.reason


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_problems(problem: Any) -> None:
    """Mixtures, latent classes, Dawid-Skene, blood groups, priors: whatever has closed forms."""
    weights = None if problem.weights is None else {problem.plate: problem.weights}
    bound = bind(problem.model, problem.args, {}, with_prior=problem.priors, weights=weights)
    m_step = MStep(bound, "auto", "em")
    if bound.graph.loops:
        return  # tests/test_scanned.py
    if problem.name == "censored_mixture":
        with pytest.raises(NotCompiled, match="constants of a shape of their own"):  # one limit per row
            compile_grouped(bound)
    elif m_step.separate:
        _agree(bound, problem.start())
    else:
        assert isinstance(choose_engine(bound, m_step), Interpreted | Predicted | Inside | Plated)


@pytest.mark.parametrize("seed", range(60))
def test_graphs(seed: int) -> None:
    """Random graphs: plates, nested plates, tied tables, structural zeros."""
    graph = random_graph(seed)
    torch.manual_seed(seed)
    _agree(bind(graph.model, (graph.simulate(),), {}, with_prior=False), graph.tables)


def test_a_chain_does_not_run_the_model_again() -> None:
    calls = []

    def counted(y: Tensor) -> None:
        calls.append(1)
        hmm(y)

    y = normal(30, 2)
    problem = bind(counted, (y,), {}, with_prior=False)
    m_step = MStep(problem, "auto", "em")
    engine = choose_engine(problem, m_step)
    assert engine.name == "grouped"
    assert engine.reason == "60 sites evaluated as 3, 1 of 1 components smoothed as chains"
    calls.clear()
    params: Any = START3
    for _ in range(5):
        params, _ = m_step.update(params, engine.e_step(params))
    assert not calls


@pytest.mark.filterwarnings("ignore::pyro_em.EMWarning")  # one sequence leaves no doubt about its first state
def test_fit_is_the_same_by_either_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, start, _ = CASES["hmm"]
    found = pyro_em.fit(model, *args, init=start, max_iter=25, tol=0)
    monkeypatch.setattr("pyro_em.e_step.auto.COMPILERS", ())
    expected = pyro_em.fit(model, *args, init=start, max_iter=25, tol=0)
    assert found.history["objective"] == pytest.approx(expected.history["objective"], rel=1e-12)
    assert found.history["score"] == pytest.approx(expected.history["score"], rel=1e-7)
    for name, value in expected.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-9, atol=1e-9)


def test_what_does_not_move_may_be_opaque() -> None:
    """A frozen parameter behind a softmax: the model is run again when its value is another."""

    def model(y: Tensor) -> None:
        rows = torch.softmax(pyro.param("logits", torch.zeros(2, 2)), -1)
        mu = pyro.param("mu", torch.zeros(2))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    problem = bind(model, (normal(12),), {}, with_prior=False)
    m_step = MStep(problem, {"logits": "fixed"}, "em")
    engine = choose_engine(problem, m_step)
    assert isinstance(engine, Grouped)
    for seed in range(2):
        params = {"logits": normal(2, 2, seed=seed), "mu": normal(2, seed=7)}
        expected = Interpreted(problem).e_step(params)
        assert engine.e_step(params).log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)


def test_what_it_cannot_run_is_left_to_the_reference() -> None:
    """A moving parameter behind a softmax has no closed form."""

    def model(y: Tensor) -> None:
        rows = torch.softmax(pyro.param("logits", torch.zeros(2, 2)), -1)
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(z * 1.0, 1.0), obs=y[t])

    for steps in (5, 9):
        problem = bind(model, (normal(steps),), {}, with_prior=False)
        engine = choose_engine(problem, MStep(problem, "auto", "em"))
        assert isinstance(engine, Interpreted)
        assert "'logits' has no closed form on sufficient statistics" in engine.reason
        assert ("write it as `for t in pyro_em.markov(T)`" in engine.reason) == (steps == 9)


def test_impossible_data_are_named_as_by_the_reference() -> None:
    model, args, _, _ = CASES["changing"]
    problem = bind(model, args, {}, with_prior=False)
    params = {"pi": rows(2), "A": rows(5, 2, 2), "B": torch.tensor([[1.0, 0, 0], [0, 1, 0]])}
    with pytest.raises(NonFiniteError) as found:
        compile_grouped(problem).e_step(params)
    with pytest.raises(NonFiniteError) as expected:
        Interpreted(problem).e_step(params)
    assert str(found.value) == str(expected.value)
