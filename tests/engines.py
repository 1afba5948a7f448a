"""Engines against the interpreted reference: evidence, prior, score and updates along the reference's own path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem, bind
from tests.latent_problems import LatentProblem


def bound_with_m_step(problem: LatentProblem) -> tuple[Problem, MStep]:
    """A problem of the table, bound, and its M-step."""
    weights = problem.options.get("weights")
    bound = bind(problem.model, problem.args, {}, with_prior=problem.algorithm == "map-em", weights=weights)
    return bound, MStep(bound, "auto", problem.algorithm)


def same_as_reference(problem: LatentProblem, kind: type[Any], updates: int = 4, rtol: float = 1e-12) -> None:
    """The chosen engine is of this kind and equals the reference in every step."""
    bound, m = bound_with_m_step(problem)
    engine, reference = choose_engine(bound, m), Interpreted(bound)
    assert isinstance(engine, kind)
    own = MStep(bound, "auto", problem.algorithm)
    params = problem.start()
    for _ in range(updates):
        found, expected = engine.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=rtol, abs=rtol)
        assert found.log_prior == pytest.approx(expected.log_prior, rel=rtol, abs=rtol)
        assert m.score(params, found) == pytest.approx(own.score(params, expected), rel=1e4 * rtol)
        updated, info = m.update(params, found)
        params, other = own.update(params, expected)
        assert info.empty == other.empty
        for name, value in params.items():
            torch.testing.assert_close(updated[name], value, rtol=10 * rtol, atol=10 * rtol)
