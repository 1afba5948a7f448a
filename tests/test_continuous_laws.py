"""The laws of EM over models with continuous latents, missing cells or quadrature (continuous_problems.py).

G1 monotone, G4 the score is the slope of the log-evidence, G6 the M-step is the argmax, G7 the limit is a maximum of
the log-evidence, G8 the order of rows does not matter, G9 the same bits twice. Evidences against closed forms, dense
normals and integrals are in the tests by kind (G2, G3, G5), refusals in test_latent_refusals.py (G12).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import pyro_em
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.information import log_objective
from pyro_em.m_step.auto import MStep
from pyro_em.model.missing import complete_cases
from pyro_em.options import checked_rules
from pyro_em.problem import Problem, bind
from tests.conjugate_problems import CASES
from tests.continuous_problems import CONTINUOUS, ContinuousProblem
from tests.latent_problems import LATENT_PROBLEMS
from tests.laws import largest_score, perturbed, to_constrained, to_free
from tests.oracles import log_prior

EPS = torch.finfo(torch.float64).eps
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
# test_gaussian.py and test_conjugate.py have G1 and G4 (and G6 of Gaussian latents) over their own tables.
LATENT = {p.name for p in LATENT_PROBLEMS}
REST = [p for p in CONTINUOUS if p.name not in LATENT and p.name not in CASES]
rest = pytest.mark.parametrize("problem", REST, ids=lambda p: p.name)


def _fit(problem: ContinuousProblem, args: tuple[Any, ...] | None = None, **options: Any) -> Any:
    given = problem.args if args is None else args
    return pyro_em.fit(
        problem.model, *given, init=problem.start(), algorithm=problem.algorithm, **problem.options, **options
    )


def _bound(problem: ContinuousProblem) -> Problem:
    options = problem.options
    return bind(
        complete_cases(problem.model, options.get("missing")), problem.args, {},
        with_prior=problem.algorithm == "map-em", weights=options.get("weights"),
        rules=checked_rules(options.get("e_step", "auto")),
    )  # fmt: skip


def _support(problem: ContinuousProblem, bound: Problem) -> dict[str, Any]:
    return {name: record.constraint for name, record in bound.parameters.items()}


@rest
def test_monotone_and_the_same_bits(problem: ContinuousProblem) -> None:
    """G1, G9."""
    result, again = (_fit(problem, max_iter=5, tol=0) for _ in range(2))
    objective = np.array(result.history["objective"])
    scale = float(result.log_prob().abs().sum()) + np.abs(objective).max()
    assert (np.diff(objective) >= -16 * EPS * scale - problem.loose).all()
    assert objective[-1] > objective[0]
    assert result.history["objective"] == again.history["objective"]
    assert all(torch.equal(again.params[name], value) for name, value in result.params.items())


@rest
def test_the_score_is_the_slope_of_the_evidence(problem: ContinuousProblem) -> None:
    """G4: the largest slope found by differences of the log-evidence, without any posterior."""
    bound = _bound(problem)
    support = _support(problem, bound)
    free = to_free(problem.start(), support)

    def objective(u: dict[str, Tensor]) -> float:
        params = to_constrained(u, support)
        return bound.objective(bound.evidence(params)[0])

    slopes, step = {}, 1e-5
    for name, u in free.items():
        found = torch.zeros(u.numel())
        for i in range(u.numel()):
            ends = []
            for far in (step, -step):
                moved = u.flatten().clone()
                moved[i] += far
                ends.append(objective({**free, name: moved.reshape(u.shape)}))
            found[i] = (ends[0] - ends[1]) / (2 * step)
        slopes[name] = found.reshape(u.shape)
    result = _fit(problem, max_iter=0)
    found = float(result.history["score"][0]) * bound.graph.num_observations
    assert found == pytest.approx(largest_score(slopes, problem.start(), support), rel=1e-5, abs=1e-6 + problem.loose)


@pytest.mark.parametrize(
    "problem", [p for p in CONTINUOUS if not p.completes and p.name not in LATENT], ids=lambda p: p.name
)
def test_m_step_is_the_argmax(problem: ContinuousProblem) -> None:
    """G6: no feasible neighbour of the update has a larger Q, whose gradient is zero there."""
    bound = _bound(problem)
    m, start = MStep(bound, "auto", problem.algorithm), problem.start()
    expectation = Interpreted(bound).e_step(start)
    at = expectation.sufficient.problem
    updated, _ = m.update(start, expectation)
    support = _support(problem, bound)
    free = {n: u.detach().requires_grad_() for n, u in to_free(updated, support).items()}
    best, _ = at.expected_log_joint(to_constrained(free, support), expectation.weights)
    gradient = dict(zip(free, torch.autograd.grad(best, list(free.values()), allow_unused=True), strict=True))
    known = {n: torch.zeros_like(free[n]) if g is None else g for n, g in gradient.items()}
    assert largest_score(known, updated, support) <= 1e-8 * bound.graph.num_observations
    rng = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(5):
            other, _ = at.expected_log_joint(perturbed(updated, support, scale, rng), expectation.weights)
            assert float(other.detach()) <= float(best.detach()) + 1e-10 * (1 + abs(float(best.detach())))


@pytest.mark.parametrize("problem", [p for p in CONTINUOUS if p.rows is not None], ids=lambda p: p.name)
def test_the_order_of_rows_does_not_matter(problem: ContinuousProblem) -> None:
    """G8."""
    assert problem.rows is not None
    order = torch.randperm(problem.num_rows, generator=torch.Generator().manual_seed(1))
    plain, turned = (
        _fit(problem, max_iter=3, tol=0),
        _fit(problem, problem.rows(problem.args, order), max_iter=3, tol=0),
    )
    assert turned.log_likelihood == pytest.approx(plain.log_likelihood, rel=1e-10)
    for name, value in plain.params.items():
        torch.testing.assert_close(turned.params[name], value, rtol=1e-7, atol=1e-8)


# test_conjugate.py and test_quadrature.py have G7 over theirs, by integrals of their own.
@pytest.mark.parametrize(
    "problem", [p for p in CONTINUOUS if not p.loose and p.name not in CASES], ids=lambda p: p.name
)
def test_the_limit_is_a_maximum_of_the_evidence(problem: ContinuousProblem) -> None:
    """G7: L-BFGS on the log-evidence from the same start (near one of several modes) ends where EM ends.

    The evidence is that which test_gaussian.py and test_missing.py find in dense normals; its gradient is by automatic
    differentiation, without a posterior.
    """
    bound = _bound(problem)
    support = _support(problem, bound)
    start = _fit(problem, max_iter=20, tol=0).params
    free = to_free(start, support)
    sizes = [u.numel() for u in free.values()]

    def loss(u: Any) -> tuple[float, Any]:
        leaf = torch.tensor(u, requires_grad=True)
        parts = {n: p.reshape(free[n].shape) for n, p in zip(free, leaf.split(sizes), strict=True)}
        value, _ = log_objective(bound, to_constrained(parts, support))
        (gradient,) = torch.autograd.grad(value, leaf)
        return -float(value.detach()), -gradient.numpy()

    first = torch.cat([u.flatten() for u in free.values()]).numpy()
    climbed = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 0, "gtol": 1e-6})
    limit = -float(climbed.fun)
    given = {"algorithm": problem.algorithm, "init": start, **problem.options}
    result = pyro_em.fit(problem.model, *problem.args, max_iter=150, tol=1e-7, accelerate="squarem", **given)
    reached = result.history["objective"][-1]
    if problem.attained:
        assert result.converged
        assert reached == pytest.approx(limit, rel=1e-8)
    else:  # some variance goes to 0 in both: EM creeps towards the limit from below
        assert limit - 1e-3 < reached < limit + 1e-6


def test_priors_are_those_of_the_model() -> None:
    """The objective of a map-em problem in the table is the log-evidence plus the log prior."""
    for problem in (p for p in CONTINUOUS if p.algorithm == "map-em"):
        bound = _bound(problem)
        evidence, _ = bound.evidence(problem.start())
        model = complete_cases(problem.model, problem.options.get("missing"))
        prior = float(log_prior(model, problem.args, problem.start()))
        assert bound.objective(evidence) == pytest.approx(float(evidence.log_likelihood) + prior, rel=1e-12)
