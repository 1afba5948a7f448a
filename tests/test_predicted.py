"""The engine for arguments that vary from row to row (e_step/predicted.py) equals the reference."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.predicted import Predicted
from pyro_em.errors import NonFiniteError
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem, bind
from tests.problems import BY_NAME
from tests.problems import Problem as Case
from tests.zoo_regression import zero_inflated_regression

SERVED = [
    BY_NAME[name]
    for name in (
        "regressions",
        "weighted_regressions",
        "parallel_regressions",
        "heteroscedastic",
        "multivariate_regressions",
        "ridge_regressions",
        "poisson_regressions",
        "experts",
        "zero_inflated_regression",
        "negative_binomial_regressions",
        "gamma_free",
        "overdispersed_means",
        "gamma_means",
        "additive",
        "beta_mixture",
        "censored_mixture",
        "censored_regressions",
        "weibull_lifetimes",
        "growth_classes",
        "answers_in_rows",
    )
]


def _bound(case: Case) -> Problem:
    weights = {} if case.weights is None else {case.plate: case.weights}
    return bind(case.model, case.args, {}, with_prior=case.priors, weights=weights)


@pytest.mark.parametrize("large", [False, True], ids=["", "as_a_large_one"])
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_equals_the_reference(case: Case, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:  # sums and softmax in place
        monkeypatch.setattr("pyro_em.e_step.predicted.LARGE", 1)
        monkeypatch.setattr("pyro_em.softmax.FEW", 1)
    problem = _bound(case)
    algorithm = "map-em" if case.priors else "em"
    engine, reference = choose_engine(problem, MStep(problem, "auto", algorithm)), Interpreted(problem)
    assert isinstance(engine, Predicted)
    params = {**problem.start, **case.start()}
    for _ in range(3):
        found, expected = engine.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12, abs=1e-12)
        assert found.log_prior == pytest.approx(expected.log_prior, rel=1e-12, abs=1e-12)
        assert found.magnitude == pytest.approx(expected.magnitude, rel=1e-12, abs=1e-12)
        ours, theirs = MStep(problem, "auto", algorithm), MStep(problem, "auto", algorithm)
        assert ours.score(params, found) == pytest.approx(theirs.score(params, expected), rel=1e-8, abs=1e-9)
        (moved, _), (expected_moved, _) = ours.update(params, found), theirs.update(params, expected)
        for name, value in moved.items():
            torch.testing.assert_close(value, expected_moved[name], rtol=1e-8, atol=1e-9)
        params = moved


def test_items_in_an_inner_plate_and_masks() -> None:
    """A rate for every person and item, some cells unseen; a latent covariate outside of the data's own plate."""
    x, y = torch.randn(25, 3), torch.poisson(torch.full((25, 3), 2.0))
    seen = torch.rand(25, 3) < 0.8

    def model() -> None:
        a = pyro.param("a", torch.tensor([0.0, 1.0]))
        b = pyro.param("b", torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.2, 0.0]]))
        with pyro.plate("people", 25, dim=-2):
            z = pyro.sample("z", dist.Bernoulli(0.4)).long()
            with pyro.plate("items", 3, dim=-1), pyro.poutine.mask(mask=seen):
                pyro.sample("y", dist.Poisson((a[z] + b[z, torch.arange(3)] * x).exp()), obs=y)

    problem = bind(model, (), {}, with_prior=False)
    engine = choose_engine(problem, MStep(problem, "auto", "em"))
    assert isinstance(engine, Predicted)
    found, expected = engine.e_step(problem.start), Interpreted(problem).e_step(problem.start)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-13)
    for (_, a), b in zip(sorted(found.weights.items()), [v for _, v in sorted(expected.weights.items())], strict=True):
        torch.testing.assert_close(a.expand(b.shape) if a.dim() == b.dim() else a.unsqueeze(-1).expand(b.shape), b)
    result = pyro_em.fit(model, max_iter=30, tol=1e-6)
    assert result.history["objective"][-1] > result.history["objective"][0]


def test_an_impossible_row_is_named() -> None:
    X = torch.ones(4, 1)

    def all_structural(X: Tensor, counts: Tensor) -> None:
        b = pyro.param("b", torch.zeros(1))
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(1.0)))
            pyro.sample("count", dist.Poisson(torch.where(z == 1, 0.0, (X @ b).exp())), obs=counts)

    problem = bind(all_structural, (X, torch.tensor([0.0, 0.0, 3.0, 0.0])), {}, with_prior=False)
    with pytest.raises(NonFiniteError, match=r"rows 2 of plate \['rows'\]"):
        Predicted(problem).e_step(problem.start)


def test_the_plan_names_the_engine_and_it_does_not_run_the_model() -> None:
    X, y = torch.randn(30, 2), torch.poisson(torch.full((30,), 1.0))
    assert "predicted" in str(pyro_em.plan(zero_inflated_regression, X, y))
    runs = []

    def counted(X: Tensor, y: Tensor) -> None:
        runs.append(1)
        zero_inflated_regression(X, y)

    pyro_em.fit(counted, X, y, max_iter=2, tol=0)
    first = len(runs)
    pyro.clear_param_store()
    pyro_em.fit(counted, X, y, max_iter=12, tol=0)
    assert len(runs) == 2 * first
