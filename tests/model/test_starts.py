"""A start that violates its constraint is named as it was written, where Pyro would make another one of it."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.model.starts import violation

X = torch.tensor([-2.1, -1.9, -2.4, 0.9, 1.2, 1.4])
EDGE = torch.tensor([[1.0, 0.5], [0.0, 1.0]])

WRONG: dict[str, tuple[Any, Any, str]] = {
    "a vector of another sum": (constraints.simplex, torch.tensor([0.5, 0.6]), r"it sums to 1\.1, not to 1\. Divide"),
    "a row of another sum": (
        constraints.simplex, torch.tensor([[0.5, 0.5], [0.2, 0.9], [0.1, 0.1]]), r"row 1 \(and 1 more\) sums to 1\.1"
    ),
    "a negative probability": (constraints.simplex, torch.tensor([-0.2, 1.2]), r"entry 0 is -0\.2"),
    "a number for a vector": (constraints.simplex, torch.tensor(1.0), "a single number"),
    "a negative scale": (constraints.positive, torch.tensor([1.0, -2.0, -1.0]), r"entry 1 \(and 1 more\) is -2"),
    "a probability above 1": (constraints.unit_interval, torch.tensor(1.5), "entry .* is 1.5, which"),
    "below the bound": (constraints.greater_than(2.0), torch.tensor([1.0]), "entry 0 is 1, which .*2.0"),
    "half a matrix": (constraints.positive_definite, EDGE, "it is not symmetric"),
    "an indefinite matrix": (constraints.positive_definite, torch.tensor([[1.0, 2], [2, 1]]), "eigenvalue"),
    "no Cholesky factor": (constraints.lower_cholesky, EDGE, "not what LowerCholesky"),
    "not in order": (dist.constraints.ordered_vector, torch.tensor([2.0, 1.0]), "not what OrderedVector"),
    "inside of others": (constraints.independent(constraints.positive, 1), torch.tensor([-1.0]), "entry 0 is -1"),
    "NaN": (constraints.real, torch.tensor([0.0, torch.nan]), r"starts as NaN in entry 1\."),
    "integers": (constraints.real, torch.tensor([0, 1]), r"dtype torch\.int64"),
    "no tensor": (constraints.real, 1.0, r"starts as a float; give it a torch\.tensor"),
}  # fmt: skip


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("row", WRONG)
def test_a_start_outside_of_its_constraint_is_named(row: str, lazily: bool) -> None:
    constraint, start, message = WRONG[row]

    def model(x: Tensor) -> None:
        pyro.param("other", (lambda: start) if lazily else start, constraint=constraint)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    for algorithm in ("em", "svi"):
        with pytest.raises(pyro_em.InputError, match=f"Parameter 'other' .*{message}") as caught:
            pyro_em.fit(model, X, algorithm=algorithm)
        assert "Trace Shapes" not in str(caught.value)
    assert not list(pyro.get_param_store().keys())


def test_init_is_held_to_the_same() -> None:
    def model(x: Tensor) -> None:
        A = pyro.param("A", torch.full((2, 2), 0.5), constraint=constraints.simplex)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(A[0]))
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

    with pytest.raises(pyro_em.InputError, match=r"parameter 'A' violates its constraint: row 1 sums to 0\.9, not"):
        pyro_em.fit(model, X, init={"A": [[0.5, 0.5], [0.2, 0.7]]})


@pytest.mark.parametrize(
    ("constraint", "start"),
    [
        (constraints.simplex, torch.tensor([0.1, 0.2, 0.7])),
        (constraints.simplex, torch.tensor([0.5, 0.5, 0.0])),
        (constraints.simplex, torch.ones(10**5) / 10**5),
        (constraints.simplex, torch.softmax(torch.linspace(-9, 9, 10**4), 0).expand(2, -1)),
        (constraints.positive, torch.tensor([0.0, 1.0])),
        (constraints.unit_interval, torch.tensor([0.0, 1.0])),
        (constraints.positive_definite, torch.tensor([[1.0, 0.3], [0.3 + 1e-7, 1.0]])),
        (constraints.dependent, torch.tensor([-1.0])),
    ],
)
def test_rounding_structural_zeros_and_what_cannot_be_asked_are_no_violation(constraint: Any, start: Tensor) -> None:
    assert start.dtype == torch.float32
    assert violation(constraint, start) is None


def test_a_lazy_start_is_made_once_a_run_and_its_draws_are_those_of_the_model() -> None:
    made: list[Tensor] = []

    def model(x: Tensor) -> None:
        def start() -> Tensor:
            made.append(torch.randn(()))
            return made[-1]

        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", start), 1.0), obs=x)

    result = pyro_em.fit(model, X, seed=0, max_iter=0)
    assert float(result.params["loc"]) == made[0].item()
    assert len(made) == 1
