"""Newton's method with backtracking (m_step/objective.py) on functions that are written down, and on Q itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_em.e_step.interpreted import Interpreted
from pyro_em.m_step import auto
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.choose import certificate_bound
from pyro_em.m_step.kinks import Kinks
from pyro_em.m_step.objective import Objective
from pyro_em.problem import bind
from tests.problem import Problem
from tests.problems import PROBLEMS

DOUBLE = torch.float64


@dataclass
class _Function:
    """A function of one coordinate in place of the sites of a block, what was asked of it counted."""

    function: Callable[[Tensor], Tensor]
    calls: list[float] = field(default_factory=list)
    steps: int = 0

    def value(self, delta: Tensor) -> Tensor:
        self.calls.append(float(delta))
        return self.function(delta)

    def gradient(self, delta: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(lambda u: self.function(u).sum(), delta)

    def hessian(self, delta: Tensor) -> Tensor:
        self.steps += 1
        return -torch.autograd.functional.hessian(lambda u: self.function(u).sum(), delta)


def _climbed(function: _Function, start: float) -> float:
    sites: Any = [function]
    own = torch.tensor([start], dtype=DOUBLE)
    return start + float(Objective(own, sites, [], [], True).maximised(1e-12) - own)


def test_a_parabola_takes_one_whole_step() -> None:
    parabola = _Function(lambda u: -(u**2))
    assert _climbed(parabola, 0.0) == 0.0
    assert not parabola.calls  # it is at the top
    own = _Function(lambda u: -2 * (u - 3.0) ** 2)
    assert _climbed(own, 0.0) == 3.0
    assert own.calls == [0.0, 3.0]


def test_a_step_that_overshoots_is_halved() -> None:
    """−√(1 + u²) from u = 2: whole steps go to −u³, and away for ever."""
    own = _Function(lambda delta: -((1 + (2.0 + delta) ** 2).sqrt()))
    assert _climbed(own, 2.0) == pytest.approx(0.0, abs=1e-12)
    tried = [2.0 + delta for delta in own.calls]
    assert tried[:4] == pytest.approx([2.0, -8.0, -3.0, -0.5])  # the step, its half, its quarter
    assert len(tried) < 12


@pytest.mark.parametrize("factor", [-1.0, 1e6])
def test_a_rise_far_below_its_promise_is_not_taken(factor: float) -> None:
    """Of a slope that is wrong, in its sign or its size: the promise is checked, not believed."""

    class Wrong(_Function):
        def gradient(self, delta: Tensor) -> Tensor:
            return factor * super().gradient(delta)

        def hessian(self, delta: Tensor) -> Tensor:
            return torch.full((1, 1), abs(factor), dtype=DOUBLE)

    assert _climbed(Wrong(lambda delta: delta), 2.0) == pytest.approx(2.0, abs=1e-12)


def test_a_function_without_values_ends_where_it_began() -> None:
    own = _Function(lambda delta: torch.full_like(delta, torch.nan))
    own.hessian = lambda delta: torch.ones(1, 1, dtype=DOUBLE)  # type: ignore[method-assign]
    own.gradient = lambda delta: torch.ones_like(delta)  # type: ignore[method-assign]
    assert _climbed(own, 2.0) == 2.0
    assert 30 < len(own.calls) < 60


def test_a_kink_is_met_exactly_and_at_once() -> None:
    """θ + (m − θ) is not m in floats; a coefficient that a Laplace prior holds at its centre is exactly there."""
    centre, start = 0.1, 0.7
    assert start + (centre - start) != centre

    class Held(Objective):
        kinks = Kinks(torch.ones(1, dtype=DOUBLE), torch.tensor([centre], dtype=DOUBLE))  # type: ignore[assignment]

    own = _Function(lambda delta: -0.5 * (start + delta) ** 2 - (start + delta - centre).abs())
    sites: Any = [own]
    found = Held(torch.tensor([start], dtype=DOUBLE), sites, [], [], True).maximised(1e-12)
    assert float(found) == centre
    assert own.steps == 1


NEWTON = [p for p in PROBLEMS if not p.closed]


@pytest.mark.parametrize("problem", NEWTON, ids=lambda p: p.name)
def test_newton_needs_no_help(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks reach the certificate themselves: the general maximiser would hide a step that fails."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the general maximiser was asked")

    algorithm = "map-em" if problem.priors else "em"
    weights = problem.fit_options(algorithm).get("weights")
    bound = bind(problem.model, problem.args, {}, with_prior=problem.priors, weights=weights)
    m = MStep(bound, "auto", algorithm)
    assert m.reads.by_newton or m.numeric
    if not m.numeric:
        monkeypatch.setattr(auto, "maximise", never)
    engine, params = Interpreted(bound), problem.start()
    for _ in range(2):
        params, info = m.update(params, engine.e_step(params))
        assert info.certificate is not None and info.certificate <= certificate_bound(params)
