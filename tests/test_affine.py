"""Affine locations: what is recognised as one, that the solve is exact, and what a poor design does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor

import pyro_em
from pyro_em.design import Design
from pyro_em.errors import CollinearDesign
from pyro_em.gram import gram_matrices
from pyro_em.kernels import QuadraticKernel
from pyro_em.model.predictor import Term
from pyro_em.problem import bind
from tests.classics import positive, simplex
from tests.zoo_regression import regressions

N, P = 40, 3
RNG = np.random.default_rng(5)
X = torch.tensor(RNG.normal(size=(N, P)))
GROUP = torch.arange(N) % 4
Y = torch.tensor(RNG.normal(size=N))


def _param(name: str, *shape: int) -> Tensor:
    size = int(np.prod(shape))
    return pyro.param(name, (torch.arange(size) * 0.37).sin().reshape(shape))


LOCATIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "X @ w": (lambda z: X @ _param("w", P), 3),
    "intercept": (lambda z: _param("a") + X @ _param("w", P), 4),
    "by class": (lambda z: _param("a", 2)[z] + (X * _param("w", 2, P)[z]).sum(-1), 4),
    "einsum": (lambda z: torch.einsum("np,...np->...n", X, _param("w", 2, P)[z]), 3),
    "slope only": (lambda z: _param("a") + X[:, 0] * _param("w", 2)[z], 2),
    "indexed": (lambda z: _param("a", 4)[GROUP] + _param("w", 4)[GROUP] * X[:, 0], 2),
    "latent covariate": (lambda z: _param("a") + _param("w", 2)[0] * z + _param("w", 2)[1] * X[:, 1], 3),
    "cumsum": (lambda z: _param("w", P).cumsum(0)[GROUP.clamp(max=2)] + X[:, 0], 3),
    "offset": (lambda z: 3.0 - 2 * _param("a") + X[:, 1].exp(), 1),
}


def _model(location: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("rows", N):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("y", dist.Normal(location(z), 1.3), obs=Y)

    return model


@pytest.mark.parametrize("name", LOCATIONS)
def test_the_design_is_read_off(name: str) -> None:
    """At new parameters the predictor gives the argument that the model gives."""
    location, num_terms = LOCATIONS[name]
    problem = bind(_model(location), (), {}, with_prior=False)
    predictors = {id(p): p for uses in problem.uses.values() for u in uses if (p := u.predictor) is not None}
    (predictor,) = predictors.values()
    assert len(predictor.terms) == num_terms
    assert sum(t.coefficient.numel() for t in predictor.terms) <= num_terms * N, "factored: nothing of size N K"
    params = {n: torch.randn_like(v) for n, v in problem.start.items()}
    expected = problem.run(params).sites["y"].arguments["loc"]  # type: ignore[index]
    torch.testing.assert_close(predictor.argument(params).expand(expected.shape), expected, rtol=1e-13, atol=1e-13)
    assert problem.recognised


@pytest.mark.parametrize(
    "location",
    [
        lambda z: _param("a") * (X @ _param("w", P)),
        lambda z: (X @ _param("w", P)).tanh(),
        lambda z: (X @ _param("w", P)).relu(),
        lambda z: X @ _param("w", P) ** 2,
        lambda z: torch.sort(_param("w", P)).values[z] + X @ _param("w", P),
    ],
    ids=["product", "tanh", "relu", "square", "sort"],
)
def test_what_is_not_affine_is_not_taken_for_it(location: Callable[[Tensor], Tensor]) -> None:
    problem = bind(_model(location), (), {}, with_prior=False)
    assert not problem.recognised
    assert pyro_em.plan(_model(location)).route("w") != "closed"


def _dense(terms: list[Term], starts: dict[str, int], size: int, cells: torch.Size) -> Tensor:
    A = torch.zeros(*cells, size + 1)
    for term in terms:
        index = torch.where(term.index >= 0, term.index + starts[term.parameter], size).expand(cells)
        A.scatter_add_(-1, index.unsqueeze(-1), term.coefficient.expand(cells).unsqueeze(-1))
    return A[..., :size]


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b"), ("b", "c"), ("a", "b", "c", "g")], ids="".join)
@pytest.mark.parametrize("shape", [(5, 30), (1, 30), (5, 1)], ids=str)
@pytest.mark.parametrize("formed", [True, False])
def test_designs_are_the_dense_products(
    names: tuple[str, ...], shape: tuple[int, int], formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intercepts and slopes by class, common slopes, group effects, against the (K, N, P) table."""
    if not formed:
        monkeypatch.setattr("pyro_em.design.DENSE", 0)
    K, R = 5, 30
    state = torch.arange(K).reshape(K, 1)
    known = {
        "a": ([Term("a", state, torch.ones(1, 1))], K),
        "b": ([Term("b", 2 * state + j, torch.randn(1, R)) for j in range(2)], 2 * K),
        "c": ([Term("c", torch.zeros(1, 1, dtype=torch.long), torch.randn(K, 1))], 1),
        "g": ([Term("g", torch.randint(-1, 4, (1, R)), torch.ones(1, 1))], 4),
    }
    starts, size, terms = {}, 0, []
    for name in names:
        starts[name], size = size, size + known[name][1]
        terms += known[name][0]
    cells = torch.Size((K, R))
    design, A = Design(terms, starts, size, cells), _dense(terms, starts, size, cells)
    theta, weight = torch.randn(size), torch.rand(shape)
    full = weight.expand(cells)
    torch.testing.assert_close(design.predict(theta).expand(cells), A @ theta)
    torch.testing.assert_close(design.pull(weight), torch.einsum("kn,knp->p", full, A))
    squares = full * (A @ theta) ** 2
    for keep in (frozenset[int](), frozenset({0}), frozenset({0, 1})):
        pieces = design.gram(weight, keep)
        torch.testing.assert_close(design.scatter(pieces), torch.einsum("kn,knp,knq->pq", full, A, A))
        gone = [i for i in range(2) if i not in keep]
        expected = squares.sum(gone, keepdim=True) if gone else squares
        torch.testing.assert_close(design.quadratic(pieces, theta, keep).expand(expected.shape), expected)
    assert (design.dense() is not None) == formed
    torch.testing.assert_close(design.gram_matrix(weight), torch.einsum("kn,knp,knq->pq", full, A, A))
    other = design.scatter(design.gram(weight, other=design), symmetric=False)
    torch.testing.assert_close(other, torch.einsum("kn,knp,knq->pq", full, A, A))


@pytest.mark.parametrize("states", [1, 4])
def test_gram_matrices_are_summed_by_chunks(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_em.gram.CHUNK_BYTES", 1)
    x, w = torch.randn(6, 1000), torch.rand(states, 1000)
    torch.testing.assert_close(gram_matrices(w, x), torch.einsum("sn,an,bn->sab", w, x, x))


def _ols(X: Tensor, y: Tensor) -> None:
    b = pyro.param("b", torch.ones(X.shape[1]))
    s = pyro.param("s", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(X @ b, s), obs=y)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_least_squares_after_one_update(offset: float) -> None:
    """Also with responses around 1e6, where sums of y² would lose the residuals."""
    design = torch.cat([torch.ones(N, 1), X], 1)
    y = offset + X @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * Y
    found = np.linalg.lstsq(design.numpy(), y.numpy(), rcond=None)[0]
    result = pyro_em.fit(_ols, design, y, max_iter=1, tol=0)
    np.testing.assert_allclose(result.params["b"].numpy(), found, rtol=1e-12, atol=1e-9)
    rss = float(((y.numpy() - design.numpy() @ found) ** 2).mean())
    assert float(result.params["s"]) ** 2 == pytest.approx(rss, rel=1e-7)
    assert result.plan.route("b") == "closed"


def test_collinear_designs_are_named_and_solved_by_the_shortest_step() -> None:
    design = torch.cat([X, X[:, :1] + X[:, 1:2]], 1)
    with pytest.warns(CollinearDesign, match="'b'"):
        result = pyro_em.fit(_ols, design, Y)
    expected = 1 + np.linalg.pinv(design.numpy()) @ (Y - design.sum(1)).numpy()
    np.testing.assert_allclose(result.params["b"].numpy(), expected, atol=1e-10)
    assert result.converged and any("collinear" in text for text in result.warnings)
    assert "the design is collinear: step of least length" in str(pyro_em.plan(_ols, design, Y))


@pytest.mark.parametrize("units", [1.0, 1e6])
def test_the_shortest_step_does_not_depend_on_rounding_or_units(units: float) -> None:
    """A singular Λ with entries of very different size: no direction with information is lost."""
    A = torch.randn(20, 4) * torch.tensor([1.0, units, 1 / units, 1.0])
    A = torch.cat([A, A[:, 3:] + units * A[:, 2:3]], 1)
    precision, linear = A.mT @ A, A.mT @ torch.randn(20)
    step = QuadraticKernel(linear, precision, torch.zeros(5), vector=True).argmax()
    torch.testing.assert_close(precision @ step, linear, rtol=1e-9, atol=1e-9 * float(linear.abs().max()))
    null = torch.tensor([0.0, 0.0, units, 1.0, -1.0])
    assert abs(float(step @ null)) <= 1e-9 * float(step.norm() * null.norm())


def test_an_unseen_level_keeps_its_value() -> None:
    def model() -> None:
        a = pyro.param("a", torch.arange(6.0))
        b = pyro.param("b", torch.tensor(0.0))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(a[GROUP] + b * X[:, 0], 1.0), obs=Y)

    with pytest.warns(CollinearDesign, match="'a'"):
        result = pyro_em.fit(model)
    assert result.params["a"][4:].tolist() == [4.0, 5.0]


class Layer(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[torch.nn.Linear](P, 1)

    def forward(self) -> None:
        sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(self.layer(X).squeeze(-1), sd), obs=Y)


def test_a_linear_layer_is_solved() -> None:
    module = Layer()
    result = pyro_em.fit(module, max_iter=1, tol=0)
    design = torch.cat([X, torch.ones(N, 1)], 1).numpy()
    expected = np.linalg.lstsq(design, Y.numpy(), rcond=None)[0]
    found = torch.cat([result.params["layer.weight"].reshape(-1), result.params["layer.bias"]])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert torch.equal(module.layer.weight.detach(), result.params["layer.weight"])
    assert result.plan.route("layer.weight") == "closed"


def test_a_fixed_intercept_is_an_offset() -> None:
    def model() -> None:
        a = pyro.param("a", torch.tensor(0.7))
        b = pyro.param("b", torch.zeros(P))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(a + X @ b, 1.0), obs=Y)

    result = pyro_em.fit(model, m_step={"a": "fixed"})
    expected = np.linalg.lstsq(X.numpy(), (Y - 0.7).numpy(), rcond=None)[0]
    np.testing.assert_allclose(result.params["b"].numpy(), expected, atol=1e-12)
    assert float(result.params["a"]) == pytest.approx(0.7)


def test_bounded_slopes_are_left_to_the_numeric_step() -> None:
    def model() -> None:
        b = pyro.param("b", torch.ones(P), constraint=positive)
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(X @ b, 1.0), obs=X.abs().sum(1))

    result = pyro_em.fit(model, max_iter=200)
    assert result.plan.route("b") != "closed"
    assert bool((result.params["b"] >= 0).all())


def tied_weighted_ridge(x: Tensor, u: Tensor, y: Tensor, seen: Tensor) -> None:
    """Three classes; the third has the mean of the others' slopes, two sites share them, some rows are masked."""
    w = pyro.param("w", torch.full((3,), 1 / 3), constraint=simplex)
    level = pyro.sample("level", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    slope = pyro.sample("slope", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
    s = pyro.param("s", torch.tensor(1.0), constraint=positive)
    slopes = torch.cat([slope, slope.mean(0, keepdim=True)])
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(level[z] + slopes[z] * x, s), obs=y)
        with pyro.poutine.mask(mask=seen):
            pyro.sample("again", dist.Normal(u - slopes[z], 2 * s), obs=u + y)


def test_ties_weights_and_a_normal_prior_are_solved_in_closed_form() -> None:
    """No rule knows this model; the plan says which served each parameter, and the update is the argmax."""
    rng = np.random.default_rng(2)
    x, u = torch.tensor(rng.normal(size=(2, 60)))
    y = torch.tensor(0.5 * rng.normal(size=60)) + torch.tensor([0.0, 4.0, 8.0]).repeat(20) + x
    seen, weights = torch.tensor(rng.random(60) < 0.7), torch.tensor(rng.integers(0, 3, 60))
    start = {"level": torch.tensor([0.0, 3.0, 9.0]), "slope": torch.tensor([0.5, -0.5])}
    options: dict[str, Any] = {"algorithm": "map-em", "weights": {"rows": weights}}
    plan = pyro_em.plan(tied_weighted_ridge, x, u, y, seen, **options)
    reasons = {row.name: row.reason for row in plan.m_step}
    assert {row.route for row in plan.m_step} == {"closed"}
    assert reasons["level"] == "linear solve (Normal.loc, prior Normal), jointly with 'slope'"
    assert reasons["slope"] == "linear solve (Normal.loc, prior MultivariateNormal), jointly with 'level'"
    assert reasons["s"] == "ratio of moments (Normal.scale)"
    result = pyro_em.fit(tied_weighted_ridge, x, u, y, seen, init=start, max_iter=15, tol=0, **options)
    objective = np.array(result.history["objective"])
    assert (np.diff(objective) >= -1e-12 * np.abs(objective).max()).all()
    # Rows of weight zero can as well be absent, rows of weight two come twice.
    index = torch.repeat_interleave(torch.arange(60), weights)
    repeated = pyro_em.fit(
        tied_weighted_ridge, x[index], u[index], y[index], seen[index], init=start, algorithm="map-em",
        max_iter=15, tol=0,
    )  # fmt: skip
    for name, value in result.params.items():
        torch.testing.assert_close(repeated.params[name], value, rtol=1e-9, atol=1e-9)


def test_rows_may_be_permuted_and_units_changed() -> None:
    rng = np.random.default_rng(3)
    y = Y + 3 * torch.tensor(rng.integers(0, 2, N)) + X[:, 0]
    start = {"a": torch.tensor([0.0, 3.0]), "b": torch.zeros(2, P) + 0.1}
    options: dict[str, Any] = {"max_iter": 15, "tol": 0}
    first = pyro_em.fit(regressions, X, y, init=start, **options)
    order = torch.tensor(rng.permutation(N))
    other = pyro_em.fit(regressions, X[order], y[order], init=start, **options)
    assert other.log_likelihood == pytest.approx(first.log_likelihood, rel=1e-11)
    scaled = {"a": 10 * start["a"] + 5, "b": 10 * start["b"], "s": torch.full((2,), 10.0)}
    third = pyro_em.fit(regressions, X, 10 * y + 5, init=scaled, **options)
    assert third.log_likelihood + N * np.log(10) == pytest.approx(first.log_likelihood, rel=1e-10)
    torch.testing.assert_close(third.params["b"], 10 * first.params["b"], rtol=1e-9, atol=1e-9)


def test_a_covariate_that_is_nan_is_named() -> None:
    missing = X.clone()
    missing[7, 1] = torch.nan
    with pytest.raises(pyro_em.InputError, match=r"Site 'y': its argument 'loc' is NaN in row 7\."):
        pyro_em.fit(regressions, missing, Y)
