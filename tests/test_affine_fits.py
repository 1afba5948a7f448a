"""Regressions solved in closed form: least squares, collinear and unseen levels, ties, offsets, layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor

import pyro_em
from pyro_em.errors import CollinearDesign
from pyro_em.kernels import QuadraticKernel
from tests.classics import positive, simplex
from tests.test_affine import GROUP, N, P, X, Y
from tests.zoo_regression import regressions


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
