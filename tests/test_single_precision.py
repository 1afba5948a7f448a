"""Models with continuous latents in float32: accepted like those in float64, with the same log-likelihood.

Loops over linear-Gaussian states too, whose locations are affine up to the rounding of float32.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from tests.conjugate_problems import CASES
from tests.continuous_problems import CONTINUOUS, ContinuousProblem
from tests.latent_problems import BY_NAME
from tests.loop_chains import LOOP_PROBLEMS
from tests.problem import Fitted

NAMES = (*CASES, "factor_analysis", "random_slopes", "crossed", "mixture_of_factors", "eight_schools")
PROBLEMS = [p for p in CONTINUOUS if p.name in NAMES]


def _single(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_single, x))
    if isinstance(x, dict):
        return {name: _single(value) for name, value in x.items()}
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("data", ["single", "double"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
def test_the_fit_in_single_precision(problem: ContinuousProblem, data: str) -> None:
    """All in float32, or parameters and constants in float32 beside data in float64."""
    _compare(problem, data)


@pytest.mark.parametrize(
    ("problem", "data"),
    [  # torch itself has no product of controls and coefficients of two dtypes
        pytest.param(problem, data, id=f"{problem.name}-{data}")
        for problem in LOOP_PROBLEMS
        for data in ("single", "double")
        if (problem.name, data) != ("controlled", "double")
    ],
)
def test_loops_in_single_precision(problem: Fitted, data: str) -> None:
    _compare(problem, data)


def _compare(problem: Fitted, data: str) -> None:
    options = {"algorithm": problem.algorithm, "max_iter": 3, "tol": 0}
    double = pyro_em.fit(problem.model, *problem.args, init=problem.start(), **problem.options, **options)
    torch.set_default_dtype(torch.float32)  # of the models' own constants; every test starts in float64
    args = _single(problem.args) if data == "single" else problem.args
    start, own = _single(problem.start()), _single(problem.options)
    single = pyro_em.fit(problem.model, *args, init=start, **own, **options)
    assert all(value.dtype == torch.float32 for value in single.params.values())
    assert single.log_likelihood == pytest.approx(double.log_likelihood, rel=2e-6, abs=1e-5)
    assert single.plan.engine.split(" ")[0] == double.plan.engine.split(" ")[0], str(single.plan)
    for name, value in double.params.items():
        torch.testing.assert_close(single.params[name].double(), value, rtol=2e-3, atol=2e-3)


def test_the_table_is_complete() -> None:
    assert len(PROBLEMS) == len(NAMES) and "factor_analysis" in BY_NAME


def test_a_loop_whose_constants_are_in_single_precision() -> None:
    """A scalar of the data beside them is computed with in float32, the rows of all steps together in float64."""
    x = torch.linspace(-3.0, 3.0, 12).double() ** 3 / 9

    def chain(x: Tensor) -> None:
        A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]).double(), constraint=constraints.simplex)
        z: Any = 0
        for t in pyro_em.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(2.0 * z - 1.0, 1.0), obs=x[t])

    double = pyro_em.fit(chain, x, max_iter=3, tol=0)
    torch.set_default_dtype(torch.float32)
    single = pyro_em.fit(chain, x, max_iter=3, tol=0)
    assert single.log_likelihood == pytest.approx(double.log_likelihood, rel=1e-7)
    torch.testing.assert_close(single.params["A"], double.params["A"], rtol=1e-5, atol=1e-6)
