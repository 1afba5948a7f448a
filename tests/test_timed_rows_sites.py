"""Loops over time compiled by rows: hidden Markov sites, the table, and large data checked in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.chain_rows import RowProgram
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.timed_rows import TimedRows
from pyro_em.evidence import banded
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from tests.problems import BY_NAME
from tests.test_timed_rows import _data
from tests.timed_models import gated, rows, second_order


@pytest.mark.parametrize("most", [0, 10**6])
def test_hidden_markov_sites(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`DiscreteHMM`, whose state before the first step is a latent of its own."""
    monkeypatch.setattr(banded, "MOST", most)
    y, _, _ = _data(70, 3)

    def model() -> None:
        pi, A = pyro.param("pi", rows(2).log()), pyro.param("A", rows(2, 2, seed=1).log())
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        with pyro.plate("series", 3):
            pyro.sample("y", dist.DiscreteHMM(pi, A, dist.Normal(mu, 1.0)), obs=y.mT)

    problem = bind(model, (), {}, with_prior=False)
    engine, reference = TimedRows(problem), Interpreted(problem)
    assert isinstance(engine.programs[0], RowProgram)
    a, b = engine.e_step(problem.start), reference.e_step(problem.start)
    assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-12)
    for name in problem.graph.components[0].factors:
        cells = b.sufficient.moments(name).moments[0].reshape(-1)
        torch.testing.assert_close(a.sufficient.moments(name).moments[0].reshape(-1), cells, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["second_order", "switching", "autoregression", "kinds_map"])
def test_problems_of_the_table(name: str) -> None:
    """Those whose laws are checked by enumeration (test_laws.py)."""
    problem = BY_NAME[f"timed_{name}"]
    bound = bind(problem.model, problem.args, {}, with_prior=problem.priors, params=problem.start())
    algorithm = "map-em" if problem.priors else "em"
    assert isinstance(choose_engine(bound, MStep(bound, "auto", algorithm)), TimedRows)


@pytest.mark.parametrize("model", [second_order, gated])
def test_a_check_without_the_reference(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its tables would be large the chains are smoothed by another way."""
    monkeypatch.setattr(banded, "MOST", 0)
    y, x, _ = _data(75, 2)
    seen = torch.arange(75).unsqueeze(-1) < torch.tensor([75, 23])
    problem = bind(model, (y, x, seen), {}, with_prior=False, weights={"series": torch.tensor([1.0, 2.5])})
    engine = TimedRows(problem)
    expected = Interpreted(problem).e_step(problem.start).log_likelihood
    assert engine.spot_check(problem.start) == (pytest.approx(expected, rel=1e-12), pytest.approx(expected, rel=1e-12))
