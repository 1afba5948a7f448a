"""G8 over every regression of the table: row order, repeats, zero weights, labels of components, units, coordinates.

Labels are exchanged where the model treats its components alike; units are those of the response of a normal site.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_em
from tests.problems import BY_NAME, Problem
from tests.zoo_regression import problems

REGRESSIONS = [p.name for p in problems(Problem, torch.as_tensor)] + ["censored_regressions", "weibull_lifetimes"]
# The first component is another than the second by the model: a reference of the gate, a sign, the zeros.
UNLIKE = {"experts", "ordered_classes", "ridge_regressions", "zero_inflated_regression"}
BY_COMPONENT = {"w", "a", "B", "S", "r", "size", "level", "shape", "rate", "sd", "s"}  # and b, if it is one for each
UPDATES = 4


def _fit(problem: Problem, args: tuple[Any, ...], weights: Tensor | None, init: dict[str, Tensor]) -> Any:
    algorithm = "map-em" if problem.priors else "em"
    own = {} if weights is None else {"weights": {problem.plate: weights}}
    return pyro_em.fit(problem.model, *args, init=init, algorithm=algorithm, max_iter=UPDATES, tol=0, **own)


def _rows(problem: Problem) -> int:
    return len(problem.args[1] if len(problem.args) > 1 else problem.args[0])


def _taken(problem: Problem, index: Tensor) -> tuple[Any, ...]:
    return tuple(x[index] if isinstance(x, Tensor) and len(x) == _rows(problem) else x for x in problem.args)


def _same(found: Any, expected: dict[str, Tensor], log_likelihood: float) -> None:
    assert found.log_likelihood == pytest.approx(log_likelihood, rel=1e-10)
    for name, value in expected.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_rows_and_repeats(name: str) -> None:
    """Another order of the rows, integer weights as repeats, and rows of weight 0 left out: the same iterates."""
    problem, generator = BY_NAME[name], torch.Generator().manual_seed(0)
    count = _rows(problem)
    weights = torch.arange(count) % 3
    weighted = _fit(problem, problem.args, weights.double(), problem.start())
    order = torch.randperm(count, generator=generator)
    shuffled = _fit(problem, _taken(problem, order), weights[order].double(), problem.start())
    _same(shuffled, weighted.params, weighted.log_likelihood)
    repeats = torch.arange(count).repeat_interleave(weights)
    repeated = _fit(problem, _taken(problem, repeats), None, problem.start())
    _same(repeated, weighted.params, weighted.log_likelihood)


@pytest.mark.parametrize("name", [n for n in REGRESSIONS if n not in UNLIKE])
def test_labels_of_components(name: str) -> None:
    problem = BY_NAME[name]

    def exchanged(params: dict[str, Tensor]) -> dict[str, Tensor]:
        alike = {n for n, v in params.items() if (n in BY_COMPONENT and v.dim() > 0) or (n == "b" and v.dim() == 2)}
        return {n: v.flip(0) if n in alike else v for n, v in params.items()}

    plain = _fit(problem, problem.args, problem.weights, problem.start())
    other = _fit(problem, problem.args, problem.weights, exchanged(problem.start()))
    _same(other, exchanged(plain.params), plain.log_likelihood)


@pytest.mark.parametrize("name", ["regressions", "weighted_regressions", "parallel_regressions", "experts"])
@pytest.mark.parametrize("unit", [1e3, -0.01])
def test_unit_of_the_response(name: str, unit: float) -> None:
    """y -> u y: coefficients and scales move with it, log p by -Σw log|u|, gates and weights stay."""
    problem = BY_NAME[name]
    X, y = problem.args
    moved = {"a": unit, "b": unit, "s": abs(unit)}
    start = {n: v * moved.get(n, 1.0) for n, v in problem.start().items()}
    plain = _fit(problem, (X, y), problem.weights, problem.start())
    other = _fit(problem, (X, unit * y), problem.weights, start)
    count = float(problem.weights.sum()) if problem.weights is not None else len(y)
    expected = {n: v * moved.get(n, 1.0) for n, v in plain.params.items()}
    assert other.log_likelihood == pytest.approx(plain.log_likelihood - count * math.log(abs(unit)), rel=1e-9)
    for site, value in expected.items():
        torch.testing.assert_close(other.params[site], value, rtol=1e-7, atol=1e-7 * abs(moved.get(site, 1.0)))


@pytest.mark.parametrize("name", ["poisson_regressions", "experts", "regressions", "negative_binomial_regressions"])
def test_coordinates_of_the_covariates(name: str) -> None:
    """X -> X M with b -> M⁻¹ b: the same predictors, so the same likelihood (where no prior is tied to coordinates)."""
    problem = BY_NAME[name]
    X, *rest = problem.args
    P = X.shape[-1]
    M = torch.eye(P) + 0.3 * torch.ones(P, P).triu(1)
    start = problem.start()
    inverse = torch.linalg.inv(M)
    moved = dict(start)
    moved["b"] = start["b"] @ inverse.mT
    if "gate" in start:
        moved["gate"] = inverse @ start["gate"]
    em: dict[str, Any] = {"algorithm": "em", "max_iter": UPDATES, "tol": 0}
    if problem.weights is not None:
        em["weights"] = {problem.plate: problem.weights}
    plain = pyro_em.fit(problem.model, X, *rest, init=start, **em)
    other = pyro_em.fit(problem.model, X @ M, *rest, init=moved, **em)
    assert other.log_likelihood == pytest.approx(plain.log_likelihood, rel=1e-10)
    torch.testing.assert_close(other.params["b"] @ M.mT, plain.params["b"], rtol=1e-7, atol=1e-8)
