"""Charts: round trips and derivatives over one table of constraints, then the boundary and the names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_em.charts import chart, free_dimension
from pyro_em.constraint_names import constraint_from_name, constraint_name
from pyro_em.errors import InputError

SIZE = 3


def spd(*shape: int) -> Tensor:
    root = torch.randn(*shape, SIZE, SIZE + 2)
    return root @ root.mT + 0.1 * torch.eye(SIZE)


def correlation() -> Tensor:
    sigma = spd()
    scale = sigma.diagonal().sqrt()
    return torch.linalg.cholesky(sigma / scale / scale[:, None])


def simplex(*shape: int) -> Tensor:
    return torch.distributions.Dirichlet(torch.ones(SIZE)).sample(shape)


# constraint, a random value inside, number of free coordinates
CHARTS: dict[str, tuple[Any, Callable[[], Tensor], int]] = {
    "real": (constraints.real, lambda: torch.randn(2, 3), 6),
    "scalar": (constraints.real, lambda: torch.randn(()), 1),
    "real vector": (constraints.real_vector, lambda: torch.randn(2, 3), 6),
    "positive": (constraints.positive, lambda: torch.rand(4), 4),
    "nonnegative": (constraints.nonnegative, lambda: torch.rand(4), 4),
    "greater_than": (constraints.greater_than(2.0), lambda: 2 + torch.rand(4), 4),
    "greater_than tensor": (constraints.greater_than(torch.arange(4.0)), lambda: torch.arange(4.0) + 0.5, 4),
    "less_than": (constraints.less_than(-1.0), lambda: -1 - torch.rand(4), 4),
    "unit_interval": (constraints.unit_interval, lambda: torch.rand(2, 2), 4),
    "interval": (constraints.interval(-2.0, 5.0), lambda: -2 + 7 * torch.rand(4), 4),
    "half_open_interval": (constraints.half_open_interval(0.0, 1.0), lambda: torch.rand(4), 4),
    "independent": (constraints.independent(constraints.positive, 1), lambda: torch.rand(4), 4),
    "softplus_positive": (constraints.softplus_positive, lambda: torch.rand(4), 4),
    "simplex": (constraints.simplex, lambda: simplex(2, 2), 8),
    "lower_cholesky": (constraints.lower_cholesky, lambda: torch.linalg.cholesky(spd(2)), 12),
    "unit_lower_cholesky": (
        constraints.unit_lower_cholesky,
        lambda: torch.randn(2, 3, 3).tril(-1) + torch.eye(3),
        6,
    ),
    "positive_definite": (constraints.positive_definite, lambda: spd(2), 12),
    "ordered_vector": (constraints.ordered_vector, lambda: torch.randn(2, 3).sort().values, 6),
    "corr_cholesky": (constraints.corr_cholesky, correlation, 3),
}
every_chart = pytest.mark.parametrize("name", CHARTS)


@every_chart
def test_coordinates_go_round(name: str) -> None:
    constraint, draw, size = CHARTS[name]
    value = draw()
    own = chart(constraint, value)
    free = own.to_free(value)
    assert own.size == size
    assert free.shape == (size,)
    torch.testing.assert_close(own.from_free(free), value, rtol=1e-12, atol=1e-12)
    elsewhere = free + torch.randn(size)
    moved = own.from_free(elsewhere)
    assert constraint.check(moved).all()
    torch.testing.assert_close(own.to_free(moved), elsewhere, rtol=1e-9, atol=1e-9)


@every_chart
def test_pull_back_is_the_chain_rule(name: str) -> None:
    constraint, draw, _ = CHARTS[name]
    value = draw()
    own, gradient = chart(constraint, value), torch.randn(value.shape)
    free = own.to_free(value).requires_grad_()
    (expected,) = torch.autograd.grad(own.from_free(free), free, gradient)
    torch.testing.assert_close(own.pull_back(value, gradient), expected, rtol=1e-9, atol=1e-9)


@every_chart
def test_coordinates_are_not_redundant(name: str) -> None:
    constraint, draw, size = CHARTS[name]
    value = draw()
    own = chart(constraint, value)
    jacobian = torch.autograd.functional.jacobian(own.from_free, own.to_free(value))
    assert torch.linalg.matrix_rank(jacobian.reshape(-1, size)) == size


@every_chart
def test_free_dimension_is_the_size_inside(name: str) -> None:
    constraint, draw, size = CHARTS[name]
    assert free_dimension(constraint, draw()) == size


def test_zeros_of_a_simplex_are_frozen() -> None:
    value = torch.tensor([[0.2, 0.0, 0.8], [0.0, 1.0, 0.0]])
    own = chart(constraints.simplex, value)
    assert own.size == 1
    assert free_dimension(constraints.simplex, value) == 4
    moved = own.from_free(torch.tensor([5.0]))
    assert (moved[value == 0] == 0).all()
    assert moved[1].tolist() == [0, 1, 0]
    assert moved[0, 0] > 0.9
    gradient = torch.tensor([[1.0, torch.inf, 2.0], [torch.nan, 3.0, torch.inf]])
    expected = 0.2 * (1.0 - (0.2 * 1.0 + 0.8 * 2.0))
    torch.testing.assert_close(own.pull_back(value, gradient), torch.tensor([expected]))


def test_zeros_of_a_simplex_do_not_spoil_derivatives() -> None:
    value = torch.tensor([0.2, 0.0, 0.8])
    own = chart(constraints.simplex, value)
    free = own.to_free(value).requires_grad_()
    (gradient,) = torch.autograd.grad(own.from_free(free)[0], free)
    torch.testing.assert_close(gradient, torch.tensor([0.16]))


@pytest.mark.parametrize(
    ("constraint", "value", "size"),
    [
        (constraints.unit_interval, [0.0, 0.5, 1.0], 1),
        (constraints.positive, [0.0, 2.0], 1),
        (constraints.interval(-1.0, 1.0), [-1.0, 1.0], 0),
        (constraints.real, [-torch.inf, 0.0], 1),
    ],
)
def test_entries_on_the_boundary_are_frozen(constraint: Any, value: list[float], size: int) -> None:
    point = torch.tensor(value)
    own = chart(constraint, point)
    assert own.size == size
    torch.testing.assert_close(own.from_free(own.to_free(point)), point)
    inside = (point == 0.5) | (point == 2.0) | ((point == 0.0) & (constraint is constraints.real))
    gradient = torch.where(inside, 1.0, torch.inf)
    assert own.pull_back(point, gradient).isfinite().all()
    assert free_dimension(constraint, point) == len(value)


def test_fixed_entries_have_no_coordinate() -> None:
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    own = chart(constraints.positive, value, fixed=torch.tensor([True, False]))
    assert own.size == 2
    moved = own.from_free(torch.zeros(2))
    torch.testing.assert_close(moved, torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
    assert own.pull_back(value, torch.ones(2, 2)).tolist() == [2, 4]


def test_a_chart_does_not_change_with_the_tensor_it_was_built_at() -> None:
    value = torch.tensor([1.0, 0.0])
    own = chart(constraints.positive, value)
    value.fill_(7.0)
    assert own.from_free(torch.zeros(1)).tolist() == [1, 0]


def test_bad_requests_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be fixed"):
        chart(constraints.simplex, torch.tensor([0.5, 0.5]), fixed=torch.tensor([True, False]))
    with pytest.raises(InputError, match="does not satisfy"):
        chart(constraints.positive, torch.tensor([1.0, -1.0]))
    with pytest.raises(InputError, match="does not satisfy"):
        chart(constraints.real, torch.tensor(torch.nan))
    with pytest.raises(InputError, match="probabilities"):
        chart(constraints.simplex, torch.tensor([1.5, -0.5]))
    with pytest.raises(InputError, match="no unconstrained coordinates"):
        chart(constraints.integer, torch.tensor([1.0]))


@pytest.mark.parametrize(
    "name",
    [
        "real",
        "positive",
        "softplus_positive",
        "unit_interval",
        "simplex",
        "positive_definite",
        "softplus_lower_cholesky",
        "corr_cholesky",
        "interval -0.1 2.5",
        "greater_than 1e-30",
        "less_than -3.0",
        "independent 2 real",
        "independent 1 interval 0.0 0.3",
    ],
)
def test_names_go_round(name: str) -> None:
    constraint = constraint_from_name(name)
    assert constraint_name(constraint) == name
    assert type(constraint_from_name(constraint_name(constraint))) is type(constraint)


def test_nested_independent_dims_add_up() -> None:
    nested = constraints.independent(constraints.independent(constraints.positive, 1), 2)
    assert constraint_name(nested) == "independent 3 positive"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "os.system",
        "__class__",
        "interval 1.0",
        "interval a b",
        "real 1.0",
        "independent real",
        "independent -1 real",
        "independent 1 independent 1 real",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="not the name"):
        constraint_from_name(name)


@pytest.mark.parametrize(
    "constraint", [constraints.integer, constraints.greater_than(torch.zeros(2)), constraints.sphere]
)
def test_constraints_outside_the_table_cannot_be_named(constraint: Any) -> None:
    with pytest.raises(InputError, match="cannot be saved"):
        constraint_name(constraint)
