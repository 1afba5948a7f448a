"""Bad input of regressions, every kind: a sentence that names what and where, and nothing lost.

Before an error the caller's param store, random numbers and data are as they were; after a warning everything
returned is finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.errors import (
    CollinearDesign,
    InputError,
    NonFiniteError,
    PyroEMError,
    SeparatedData,
    UnidentifiedParameter,
)
from tests import zoo_data
from tests.problems import BY_NAME, Problem
from tests.problems_data import labelled_rows
from tests.zoo_regression import experts, poisson_regressions, regressions

NAMES = ["regressions", "poisson_regressions", "experts", "zero_inflated_regression", "gamma_means"]
TREATED = torch.arange(30) % 3


def _fitted(problem: Problem, args: tuple[Any, ...] | None = None, **options: Any) -> Any:
    algorithm = "map-em" if problem.priors else "em"
    return pyro_em.fit(problem.model, *(args or problem.args), init=problem.start(), algorithm=algorithm, **options)


@pytest.fixture(autouse=True)
def untouched() -> Iterator[Callable[[], None]]:
    """Gives a check that the caller's parameters and random numbers are what they were."""
    torch.manual_seed(3)
    pyro.param("b", torch.tensor([7.0]))
    pyro.param("mine", torch.tensor([1.0, 2.0]))
    before = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    state = torch.get_rng_state()

    def check() -> None:
        now = dict(pyro.get_param_store().items())
        assert now.keys() == before.keys()
        assert all(torch.equal(now[n], v) for n, v in before.items())
        assert torch.equal(torch.get_rng_state(), state)

    yield check


WEIGHTS: list[tuple[str, Callable[[int], Tensor], str]] = [
    ("negative", lambda n: torch.ones(n).index_fill(0, torch.tensor([4]), -1.0), "negative"),
    ("nan", lambda n: torch.ones(n).index_fill(0, torch.tensor([4]), math.nan), "finite|NaN"),
    ("infinite", lambda n: torch.ones(n).index_fill(0, torch.tensor([4]), math.inf), "finite"),
    ("all zero", lambda n: torch.zeros(n), "zero"),
    ("too short", lambda n: torch.ones(n - 1), "rows"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "make", "message"), WEIGHTS, ids=[w[0] for w in WEIGHTS])
def test_weights(name: str, kind: str, make: Any, message: str, untouched: Callable[[], None]) -> None:
    problem = BY_NAME[name]
    with pytest.raises(InputError, match=message) as caught:
        _fitted(problem, weights={problem.plate: make(len(problem.args[1]))})
    assert "rows" in str(caught.value)
    untouched()


def _spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.reshape(len(x), -1)[3, -1] = value
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["covariate", "response"])
def test_data_that_are_no_numbers(name: str, value: float, which: int, untouched: Callable[[], None]) -> None:
    problem = BY_NAME[name]
    args = list(problem.args)
    args[which] = _spoiled(args[which], value)
    with pytest.raises(PyroEMError, match=r"row \(?3|data are not finite"):
        _fitted(problem, tuple(args))
    untouched()


@pytest.mark.parametrize(
    ("name", "value"), [("poisson_regressions", -1.0), ("poisson_regressions", 0.5), ("gamma_means", -0.1)]
)
def test_responses_outside_of_the_support(name: str, value: float, untouched: Callable[[], None]) -> None:
    problem = BY_NAME[name]
    X, y, *rest = problem.args
    with pytest.raises(InputError, match=r"row 3"):
        _fitted(problem, (X, _spoiled(y, value), *rest))
    untouched()


def test_contradictory_labels(untouched: Callable[[], None]) -> None:
    y, _, _ = labelled_rows()
    allowed = torch.ones(30, 3, dtype=torch.bool)
    allowed[11] = False
    for model in (zoo_data.allowed_by_factor, zoo_data.allowed_by_exclusion):
        with pytest.raises((NonFiniteError, InputError), match=r"11"):
            pyro_em.fit(model, y, allowed)
        untouched()


def test_an_index_beyond_the_categories(untouched: Callable[[], None]) -> None:
    """A level that the parameter has no entry for."""

    def model(level: Tensor, y: Tensor) -> None:
        a = pyro.param("a", torch.zeros(2))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(a[level] + z, 1.0), obs=y)

    with pytest.raises((PyroEMError, IndexError), match="index"):
        pyro_em.fit(model, TREATED, torch.zeros(30))
    untouched()


def test_a_category_without_rows_keeps_its_start() -> None:
    """Four levels, the data have three: warned of by name, everything else is fitted."""

    def model(y: Tensor) -> None:
        a = pyro.param("level", torch.tensor([0.0, 0.0, 0.0, 0.5]))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(torch.exp(a[TREATED])), obs=y)

    y = torch.poisson(torch.full((30,), 4.0))
    with pytest.warns(UnidentifiedParameter, match="'level'"):
        result = pyro_em.fit(model, y)
    means = torch.stack([y[k == TREATED].mean() for k in range(3)])
    torch.testing.assert_close(result.params["level"][:3].exp(), means, rtol=1e-8, atol=0.0)
    assert float(result.params["level"][3]) == 0.5


@pytest.mark.parametrize("model", [regressions, experts], ids=["locations", "gate and locations"])
def test_collinear_designs(model: Any) -> None:
    """A column twice: named, the shortest step, the likelihood of the design without it."""
    X, y = BY_NAME["experts" if model is experts else "regressions"].args
    count = X.shape[-1]
    twice = torch.cat([X, X[:, -1:]], -1)
    b = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.3, 0.0]]) if count == 2 else BY_NAME["experts"].start()["b"]
    b = torch.cat([b[:, :count], torch.zeros(2, 1)], -1)
    start = {"b": b, "s": torch.tensor([0.8, 1.1])}
    once = {"b": b[:, :count], "s": start["s"]}
    with pytest.warns(CollinearDesign, match="'b'"):
        found = pyro_em.fit(model, twice, y, init=start, max_iter=40, tol=0)
    expected = pyro_em.fit(model, X, y, init=once, max_iter=40, tol=0)
    assert all(bool(v.isfinite().all()) for v in found.params.values())
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-8)


def test_collinear_designs_behind_links_are_solved_by_the_shortest_step() -> None:
    X, counts, exposure = BY_NAME["poisson_regressions"].args
    twice = torch.cat([X, X[:, 1:2]], -1)
    b = BY_NAME["poisson_regressions"].start()["b"]
    start = {"b": torch.cat([b, torch.zeros(2, 1)], -1)}
    found = pyro_em.fit(poisson_regressions, twice, counts, exposure, init=start, max_iter=20, tol=0)
    expected = pyro_em.fit(poisson_regressions, X, counts, exposure, init={"b": b}, max_iter=20, tol=0)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-8)
    assert all(bool(v.isfinite().all()) for v in found.params.values())


def test_separated_data() -> None:
    """Of a gate: two groups of rows that a covariate tells apart perfectly."""
    x = torch.linspace(-1, 1, 20)
    y = torch.where(x > 0.05, 50.0, -50.0) + 0.5 * torch.sin(9 * x)
    X = torch.stack([torch.ones(20), x], -1)
    start = {"b": torch.tensor([[-50.0, 0.0], [50.0, 0.0]])}
    with pytest.warns(SeparatedData, match=r"'gate'.*map-em"):
        result = pyro_em.fit(experts, X, y, init=start, max_iter=200)
    assert all(bool(v.isfinite().all()) for v in result.params.values())
