"""What few rows say of a model with many (pyro_em/model/bind_rows.py) is what all rows say, or is not believed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from models import gmm, regression_mixture
from pyro_em import problem
from pyro_em.model.bind_rows import bound_by_rows
from pyro_em.model.few_rows import MANY, Rows
from pyro_em.problem import Problem, bind

N = MANY + 100


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = _normal(N, 3), _normal(N, seed=1)
COUNT = Y.abs().round()
GROUP = torch.randint(7, (N,), generator=torch.Generator().manual_seed(2))


def _param(name: str, value: list[float], constraint: Any = constraints.real) -> Tensor:
    return pyro.param(name, torch.tensor(value, dtype=torch.float64), constraint=constraint)


def exposure(y: Tensor, time: Tensor) -> None:
    """A scaled gather whose coefficient is data."""
    rate = _param("rate", [1.0, 2.0], constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("y", dist.Poisson(time * rate[z]), obs=y)


def groups(y: Tensor, group: Tensor, x: Tensor) -> None:
    """An index that is data, covariates that the model makes, an offset."""
    level, slope = _param("level", [0.1 * i for i in range(7)]), _param("slope", [0.3, -0.2])
    made = torch.stack([x**2, x.sin()], -1)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level[group] + made @ slope - x, _param("scale", [1.0]).exp()), obs=y)


def standardised(y: Tensor, x: Tensor) -> None:
    """What all rows together say enters each."""
    slope = _param("slope", [0.1, 0.2, 0.3])
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((x - x.mean(0)) / x.std(0) @ slope, 1.0), obs=y)


def keyword(*, data: dict[str, Tensor]) -> None:
    """Data within a dict."""
    slope = _param("slope", [0.1, 0.2, 0.3])
    with pyro.plate("rows", len(data["y"])):
        pyro.sample("y", dist.Normal(data["x"] @ slope, 1.0), obs=data["y"])


CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]] = {
    "linear": (regression_mixture.linear, (Y, X), {}),
    "poisson": (regression_mixture.poisson, (COUNT, X, 3), {}),
    "parallel": (regression_mixture.parallel, (COUNT, X), {}),
    "logistic": (regression_mixture.logistic, (COUNT, X, COUNT + 1), {}),
    "experts": (regression_mixture.experts, (Y, X, 3), {}),
    "concomitant": (regression_mixture.concomitant, (COUNT, X, X[:, :2]), {}),
    "exposure": (exposure, (COUNT, Y.abs() + 1), {}),
    "groups": (groups, (Y, GROUP, X[:, 0]), {}),
    "standardised": (standardised, (Y, X), {}),
    "keyword": (keyword, (), {"data": {"y": Y, "x": X}}),
}


def _bound(
    monkeypatch: pytest.MonkeyPatch, model: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, Problem, Problem]:
    """Whether few rows told, the problem so, and from all rows."""
    told: list[bool] = []

    def spied(*given: Any) -> Any:
        found = bound_by_rows(*given)
        told.append(found is not None)
        return found

    monkeypatch.setattr(problem, "bound_by_rows", spied)
    by_few = bind(model, args, kwargs, with_prior=False)
    monkeypatch.setattr(problem, "bound_by_rows", lambda *given: None)
    return told[0], by_few, bind(model, args, kwargs, with_prior=False)


def _assert_equal(a: Problem, b: Problem) -> None:
    assert a.uses.keys() == b.uses.keys()
    for name in b.uses:
        for use, other in zip(a.uses[name], b.uses[name], strict=True):
            plain = ("site", "slot", "power", "exponential", "reason")
            assert [getattr(use, x) for x in plain] == [getattr(other, x) for x in plain]
            _same(use.index, other.index)
            _same(use.coefficient, other.coefficient)
            assert (use.predictor is None) == (other.predictor is None)
            if use.predictor is None or other.predictor is None:
                continue
            assert use.predictor.link is other.predictor.link
            _same(use.predictor.offset, other.predictor.offset)
            for term, own in zip(use.predictor.terms, other.predictor.terms, strict=True):
                assert term.parameter == own.parameter
                _same(term.index, own.index)
                _same(term.coefficient, own.coefficient)


def _same(a: Tensor | None, b: Tensor | None) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b) if not a.is_floating_point() else torch.allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_few_rows_say_what_all_rows_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told, by_few, whole = _bound(monkeypatch, *CASES[name])
    assert told
    _assert_equal(by_few, whole)


def _hidden(changed: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., None]:
    """A regression one row of which, none of the few, is of another kind."""

    def model(y: Tensor, x: Tensor) -> None:
        slope, other = _param("slope", [0.4]), _param("other", [0.7])
        mean = x * slope
        if len(y) == N:
            mean = torch.where(torch.arange(N) == 5, changed(x, slope) + other, mean)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return model


@pytest.mark.parametrize(
    "changed", [lambda x, slope: x * slope, lambda x, slope: slope**2 * x, lambda x, slope: (slope * x).sin()]
)
def test_a_row_of_another_kind_is_seen(
    changed: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, by_few, whole = _bound(monkeypatch, _hidden(changed), (Y, X[:, 0]), {})
    assert not told
    _assert_equal(by_few, whole)


def test_data_in_a_closure_are_looked_at_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(y: Tensor) -> None:
        standardised(y, X)

    told, by_few, whole = _bound(monkeypatch, model, (Y,), {})
    assert not told
    _assert_equal(by_few, whole)


def test_arguments_without_rows_need_no_few(monkeypatch: pytest.MonkeyPatch) -> None:
    told, by_few, whole = _bound(monkeypatch, gmm.diagonal, (X,), {})
    assert not told
    _assert_equal(by_few, whole)


def test_a_square_argument_is_not_cut() -> None:
    rows = Rows("rows", 4, torch.tensor([0, 2]))
    assert rows.cut([torch.arange(4), {"x": torch.zeros(3, 4)}, "name"])[1]["x"].shape == (3, 2)
    with pytest.raises(ValueError, match="cannot be told"):
        rows.cut(torch.zeros(4, 4))


def test_the_run_at_the_start_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Binding, the choice of M-step and engine, and the warnings about a start share it."""
    runs: list[int] = []

    def model(y: Tensor, x: Tensor) -> None:
        runs.append(len(y))
        regression_mixture.linear(y, x)

    result = pyro_em.fit(model, Y, X, max_iter=1, tol=0)
    assert math.isfinite(result.log_likelihood)  # type: ignore[arg-type]
    # A look for pseudo-rows, the plain model, the start, another point, drawn latents, the check of the result.
    assert runs.count(N) == 6
