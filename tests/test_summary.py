"""The printed page: figures, table, notes; intervals that stay in the parameter's space."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.distributions import constraints

import pyro_em
from models import gmm, lca
from pyro_em.summary import QUANTILE, entry_bounds, interval, summary


@pytest.fixture(scope="module")
def em() -> pyro_em.FitResult:
    return pyro_em.fit(gmm.model, gmm.load(), restarts=3, seed=0)


def test_page_holds_the_figures_of_the_fit(em: pyro_em.FitResult) -> None:
    page = str(em)
    assert page.startswith("em: Converged")
    for figure in (em.log_likelihood, em.aic, em.bic):
        assert f"{figure:.9g}" in page
    assert f"{em.num_iterations} iterations, 272 observations, 11 free parameters" in page
    assert "3 starts: best objective" in page and "reached by 3" in page


def test_table_holds_estimate_standard_error_and_interval(em: pyro_em.FitResult) -> None:
    (row,) = [line.split() for line in str(em).split("\n") if "loc[1,0]" in line]
    error = float(em.standard_errors()["loc"][1, 0])
    value = float(em.params["loc"][1, 0])
    expected = (value, error, value - QUANTILE * error, value + QUANTILE * error)
    assert [float(cell) for cell in row[1:]] == pytest.approx(expected, rel=1e-4)


def test_covariances_are_listed_once(em: pyro_em.FitResult) -> None:
    page = str(em)
    assert "covariance[0,1,0]" in page and "covariance[0,0,1]" not in page


def test_long_tables_are_cut_and_say_so(em: pyro_em.FitResult) -> None:
    page = summary(em, max_rows=5)
    assert "loc[1,0]" in page and "loc[1,1]" not in page  # 2 weights, 3 of 4 means
    assert "... and 7 more entries" in page


def test_entries_on_a_boundary_are_called_fixed_and_do_not_warn() -> None:
    page = str(pyro_em.fit(lca.model, lca.load(), seed=0))
    assert " fixed\n" in page and "boundary" in page


def test_fit_by_a_bound_has_no_standard_errors_and_says_why() -> None:
    result = pyro_em.fit(gmm.bayesian, gmm.load(), algorithm="svi", max_iter=5, seed=0)
    page = str(result)
    assert page.startswith("svi: ") and "ELBO" in page and "gap 0" in page
    assert "No standard errors" in page and "std. error" not in page


def test_result_without_likelihood_prints(em: pyro_em.FitResult) -> None:
    bare = dataclasses.replace(em, exact=False, log_likelihood=None, problem=None, num_parameters=0)
    assert "AIC" not in str(bare) and "ELBO" in str(bare)


def test_result_without_its_model_prints_estimates(em: pyro_em.FitResult) -> None:
    page = str(dataclasses.replace(em, problem=None))
    assert "loc[1,0]" in page and "without its model" in page


def test_hessian_is_left_alone_where_it_is_large(em: pyro_em.FitResult) -> None:
    assert "large Hessian" in str(dataclasses.replace(em, num_parameters=10_000))


@pytest.mark.parametrize(
    ("constraint", "value"),
    [
        (constraints.real, 1.3),
        (constraints.positive, 0.02),
        (constraints.unit_interval, 0.97),
        (constraints.interval(-2.0, 3.0), 2.9),
        (constraints.less_than(4.0), 3.5),
        (constraints.greater_than(-1.0), -0.9),
    ],
)
def test_interval_is_the_normal_one_on_the_unbounded_scale(constraint: constraints.Constraint, value: float) -> None:
    error = 0.3
    low, high = (float(x) for x in interval(np.array(value), np.array(error), *entry_bounds(constraint, ())))
    assert low < value < high
    assert bool(constraint.check(torch.tensor([low, high])).all())
    transform = torch.distributions.transform_to(constraint)
    # delta method: the derivative of the transform at the value turns its scale's error into `error`
    x = torch.tensor(value)
    u = transform.inv(x).requires_grad_()
    slope = float(torch.autograd.grad(transform(u), u)[0].abs())
    ends = transform(u.detach() + torch.tensor([-1.0, 1.0]) * QUANTILE * error / slope)
    assert sorted([low, high]) == pytest.approx(sorted(ends.tolist()), rel=1e-9)


def test_interval_without_error_is_the_value() -> None:
    low, high = interval(np.array([0.0, 1.0]), np.zeros(2), np.zeros(2), np.ones(2))
    assert low.tolist() == high.tolist() == [0.0, 1.0]


def test_diagonal_of_a_covariance_stays_positive() -> None:
    lower, upper = entry_bounds(constraints.positive_definite, (2, 2))
    assert lower.tolist() == [[0.0, -np.inf], [-np.inf, 0.0]] and bool(np.isposinf(upper).all())
