"""Rows that enter through mean and covariance only: pseudo-rows give the same fit, and nothing else is condensed."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_em
from pyro_em import binding
from pyro_em.condense import condense
from pyro_em.evidence.pseudo_rows import _moments, pseudo_rows
from tests import zoo_latent as z

ROWS, FEATURES = 2200, 30


@pytest.fixture(scope="module")
def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    loading = torch.randn(FEATURES, 2, generator=generator, dtype=torch.float64)
    factors = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return 5.0 + factors @ loading.T + 0.7 * noise


@pytest.mark.parametrize("widths", [[FEATURES], [12, FEATURES - 12]])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 1e6])  # to 0, where nothing is taken off first; far from it
def test_pseudo_rows_have_number_mean_and_covariance(data: Tensor, shift: float, widths: list[int]) -> None:
    moved = data + shift
    rows = pseudo_rows(list(moved.split(widths, -1)))
    assert rows is not None and rows.shape == (FEATURES + 1, FEATURES)
    torch.testing.assert_close(rows.mean(0), moved.mean(0), rtol=1e-13, atol=1e-13)
    digits = 1e-11 if abs(shift) < 1e6 else 1e-9  # of the data themselves
    torch.testing.assert_close(rows.T.cov(correction=0), moved.T.cov(correction=0), rtol=digits, atol=digits)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_squares_are_summed_in_one_triangle_and_mirrored(data: Tensor, shift: float) -> None:
    center = None if shift == 0 else torch.full((FEATURES,), shift, dtype=torch.float64)
    squares, sums = _moments([data], center, None)
    truth = (data - shift).mT @ (data - shift)
    assert torch.equal(squares, squares.mT)  # both triangles: BLAS writes the upper one, and leaves 0 in the other
    torch.testing.assert_close(squares, truth, rtol=1e-13, atol=1e-10)
    torch.testing.assert_close(sums, (data - shift).sum(0), rtol=1e-13, atol=1e-10)


def test_data_that_are_not_finite_give_none(data: Tensor) -> None:
    bad = data.clone()
    bad[1234, 3] = torch.nan
    assert pseudo_rows([bad]) is None


def test_a_constant_cell_is_kept(data: Tensor) -> None:
    rows = pseudo_rows([torch.cat([data[:, :3], torch.full((ROWS, 1), 2.0, dtype=torch.float64)], -1)])
    assert rows is not None
    torch.testing.assert_close(rows[:, 3], torch.full((5,), 2.0, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", [z.factor_analysis, z.ppca])
def test_the_fit_is_that_of_all_rows(model: Any, data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    init = {"b": data.mean(0) + 0.1, "W": torch.randn(FEATURES, 2, generator=generator, dtype=torch.float64)}
    few = pyro_em.fit(model, data, 2, init=init, max_iter=4, tol=0)
    assert "31 pseudo-rows of equal weight stand for the 2,200 elements of plate 'rows'" in str(few.plan)
    assert "rows=2200" in str(few.plan)
    monkeypatch.setattr(binding, "condense", lambda *args: None)
    whole = pyro_em.fit(model, data, 2, init=init, max_iter=4, tol=0)
    assert "pseudo-rows" not in str(whole.plan)
    assert few.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-13)
    assert few.history["score"] == pytest.approx(whole.history["score"], rel=1e-9)
    assert few.num_observations == whole.num_observations == ROWS
    assert few.bic == pytest.approx(whole.bic, rel=1e-13)
    for name, value in whole.params.items():
        torch.testing.assert_close(few.params[name], value, rtol=1e-10, atol=1e-11)
    assert few.posterior().mean("z").shape == (ROWS, 2)
    assert float(few.log_prob().sum()) == pytest.approx(few.log_likelihood, rel=1e-12)


def test_what_users_see_is_as_without(data: Tensor) -> None:
    """A random first value is drawn once, from the same state of the generator."""

    def model(x: Tensor) -> None:
        start = pyro.param("w", lambda: torch.randn(x.shape[-1]))
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(5.0 + u.unsqueeze(-1) * start, 1.0).to_event(1), obs=x)

    condensed = pyro_em.fit(model, data, seed=3, max_iter=0)
    assert "pseudo-rows" in str(condensed.plan)
    ordinary = pyro_em.fit(model, data, seed=3, max_iter=0, weights={"rows": torch.ones(ROWS)})
    torch.testing.assert_close(condensed.params["w"], ordinary.params["w"], rtol=0, atol=0)
    assert condensed.log_likelihood == pytest.approx(ordinary.log_likelihood, rel=1e-13)


def _masked(x: Tensor) -> None:
    with pyro.plate("rows", len(x)), poutine.mask(mask=x[:, 0] > 0):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(u.unsqueeze(-1), torch.ones(FEATURES)).to_event(1), obs=x)


def _covariate(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(u.unsqueeze(-1) * x[:, :1], torch.ones(FEATURES)).to_event(1), obs=x)


def _by_index(x: Tensor) -> None:
    with pyro.plate("rows", len(x)) as row:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(u.unsqueeze(-1), x[row, :1].abs()).to_event(1), obs=x)


def _discrete(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        u = pyro.sample("u", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(u.unsqueeze(-1), torch.ones(FEATURES)).to_event(1), obs=x)


def _heavy(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.StudentT(4.0, u.unsqueeze(-1), torch.ones(FEATURES)).to_event(1), obs=x)


def _grouped(x: Tensor) -> None:
    with pyro.plate("groups", 11):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        own = b[torch.arange(len(x)) % 11]
        pyro.sample("x", dist.Normal(own.unsqueeze(-1), torch.ones(FEATURES)).to_event(1), obs=x)


@pytest.mark.parametrize("model", [_masked, _covariate, _by_index, _discrete, _heavy, _grouped])
def test_nothing_else_is_condensed(model: Any, data: Tensor) -> None:
    with pyro.get_param_store().scope():
        assert condense(model, (data,), {}) is None


def test_few_rows_are_not(data: Tensor) -> None:
    assert condense(z.factor_analysis, (data[:1000],), {}) is None


def test_a_common_latent_couples_the_rows(data: Tensor) -> None:
    """Seen after binding: `shock` is no parameter, so that log p(x) is no sum over rows."""
    x = data[:, :2].repeat(16, 1)
    plan = pyro_em.plan(z.common_shock, x)
    assert "pseudo-rows" not in str(plan)


def test_bad_data_are_named_by_row(data: Tensor) -> None:
    bad = data.clone()
    bad[1234, 5] = torch.nan
    with pytest.raises(pyro_em.errors.InputError, match="row 1234"):
        pyro_em.fit(z.factor_analysis, bad)


def _other_ways(monkeypatch: pytest.MonkeyPatch, run: Any) -> tuple[Any, Any]:
    few = run()
    monkeypatch.setattr(binding, "condense", lambda *args: None)
    return few, run()


@pytest.mark.parametrize("whole_numbers", [True, False])
def test_weighted_rows_have_weighted_moments(
    whole_numbers: bool, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.arange(ROWS, dtype=torch.float64) % 4 + (0.0 if whole_numbers else 0.3)
    init = {"b": data.mean(0) + 0.1}

    def run() -> Any:
        return pyro_em.fit(z.factor_analysis, data, 2, init=init, weights={"rows": weight}, max_iter=4, tol=0)

    few, whole = _other_ways(monkeypatch, run)
    assert "pseudo-rows" in str(few.plan) and "pseudo-rows" not in str(whole.plan)
    assert few.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-13)
    assert few.history["score"] == pytest.approx(whole.history["score"], rel=1e-9)
    assert few.num_observations == pytest.approx(float(weight.sum()), rel=1e-14)
    assert few.bic == pytest.approx(whole.bic, rel=1e-13)
    for name, value in whole.params.items():
        torch.testing.assert_close(few.params[name], value, rtol=1e-9, atol=1e-10)


def test_bad_weights_are_named(data: Tensor) -> None:
    weight = torch.ones(ROWS, dtype=torch.float64)
    weight[7] = -1.0
    with pytest.raises(pyro_em.InputError, match="weights"):
        pyro_em.fit(z.factor_analysis, data, 2, weights={"rows": weight})
    with pytest.raises(pyro_em.InputError, match="no vectorised plate"):
        pyro_em.fit(z.factor_analysis, data, 2, weights={"columns": weight})


def test_drawn_starts_are_those_of_all_rows(data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        return pyro_em.fit(z.ppca, data, 2, restarts=2, seed=5, max_iter=3, tol=0)

    few, whole = _other_ways(monkeypatch, run)
    assert "pseudo-rows" in str(few.plan) and "pseudo-rows" not in str(whole.plan)
    for (found, _), (expected, _) in zip(few.restarts, whole.restarts, strict=True):
        assert found == pytest.approx(expected, rel=1e-11)


def test_steps_of_the_em_class(data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        pyro.clear_param_store()
        em = pyro_em.EM(z.ppca)
        losses = [em.step(data, 2) for _ in range(4)]
        assert em._bound is not None
        return losses, len(em._bound.problem.sites[-1].value), pyro.param("W").detach().clone()

    (few, rows, W), (whole, all_rows, expected) = _other_ways(monkeypatch, run)
    assert (rows, all_rows) == (FEATURES + 1, ROWS)
    assert few == pytest.approx(whole, rel=1e-13)
    torch.testing.assert_close(W, expected, rtol=1e-9, atol=1e-10)
