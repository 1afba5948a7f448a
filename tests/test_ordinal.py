"""Ordered categories: the density, regressions against statsmodels, graded responses against a direct maximisation.

Published fits are in test_reference_fits.py (published_ordinal.py), laws over the rows "ordered_classes" and "graded"
of the tables of problems.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy.optimize import minimize
from scipy.special import expit
from statsmodels.miscmodels.ordinal_model import OrderedModel
from torch import Tensor

import pyro_em
from models import ordinal
from pyro_em.families.ordinal import OrderedLogisticFamily

BOUNDARY = pyro_em.BoundaryEstimate


@pytest.mark.parametrize("eta", [-700.0, -45.0, -3.0, 0.2, 50.0, 650.0])
@pytest.mark.parametrize("gap", [1e-13, 1e-4, 1.0, 300.0])
def test_densities_keep_their_digits(eta: float, gap: float) -> None:
    """A difference of probabilities has none left here; the oracle takes it with 500 digits."""
    cuts = torch.tensor([-0.5, -0.5 + gap])
    arguments = {"predictor": torch.tensor(eta), "cutpoints": cuts}
    found = OrderedLogisticFamily().log_prob({"predictor": torch.tensor(0.0), "cutpoints": cuts}, torch.arange(3))
    with mpmath.workdps(500):
        low, high = (1 / (1 + mpmath.exp(-mpmath.mpf(float(c)))) for c in cuts)
        expected = [float(mpmath.log(p)) for p in (low, high - low, 1 - high)]
    assert found.tolist() == pytest.approx(expected, rel=1e-13)

    shifted = cuts - eta  # as a predictor moves them
    found = OrderedLogisticFamily().log_prob(arguments, torch.arange(3))
    with mpmath.workdps(500):
        low, high = (1 / (1 + mpmath.exp(-mpmath.mpf(float(c)))) for c in shifted)
        expected = [float(mpmath.log(p)) if p > 0 else -np.inf for p in (low, high - low, 1 - high)]
    assert found.tolist() == pytest.approx(expected, rel=1e-13)


def test_cut_points_that_are_equal_leave_a_category_without_probability() -> None:
    cuts = torch.tensor([0.3, 0.3], requires_grad=True)
    family = OrderedLogisticFamily()
    found = family.log_prob({"predictor": torch.tensor(0.0), "cutpoints": cuts}, torch.arange(3))
    assert found[1] == -torch.inf and float(found[[0, 2]].detach().exp().sum()) == pytest.approx(1.0, rel=1e-15)
    (slope,) = torch.autograd.grad(found[[0, 2]].sum(), cuts)
    assert bool(slope.isfinite().all())
    outside = family.outside({"cutpoints": torch.tensor([[0.3, 0.3], [0.3, 0.2], [0.3, torch.nan]])})
    assert outside is not None and outside.tolist() == [False, True, True]


@pytest.mark.parametrize("how", ["ordered", "real", "gaps"])
def test_regression_is_that_of_statsmodels(how: str) -> None:
    """One Newton M-step, however the cut points are written: in order, unconstrained, or by their distances."""
    x, y = ordinal.simulate_regression(150)

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.param("beta", torch.zeros(2))
        if how == "gaps":
            first = pyro.param("first", torch.tensor(-1.0))
            gaps = pyro.param("gaps", torch.ones(2), constraint=constraints.positive)
            cut = first + torch.cat([torch.zeros(1), gaps.cumsum(0)])
        else:
            own = constraints.ordered_vector if how == "ordered" else constraints.real
            cut = pyro.param("cut", torch.tensor([-1.0, 0.0, 1.0]), constraint=own)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.OrderedLogistic(x @ beta, cut), obs=y)

    found = pyro_em.fit(model, x, y, tol=1e-9)
    assert found.converged and found.num_iterations <= 2
    assert {found.plan.route(name) for name in found.params} == {"newton"}
    peer: Any = OrderedModel(y.numpy(), x.numpy(), distr="logit").fit(method="newton", disp=False, tol=1e-12)
    cut = peer.model.transform_threshold_params(peer.params)[1:-1]
    assert found.log_likelihood == pytest.approx(peer.llf, rel=1e-12)
    np.testing.assert_allclose(found.params["beta"].numpy(), peer.params[:2], rtol=1e-6)
    np.testing.assert_allclose(found.standard_errors()["beta"].numpy(), peer.bse[:2], rtol=1e-5)
    if how != "gaps":
        np.testing.assert_allclose(found.params["cut"].numpy(), cut, rtol=1e-6)
    draws = found.predictive(x, y, num_samples=200)["y"] if how == "ordered" else None
    assert draws is None or set(draws.unique().tolist()) == {0, 1, 2, 3}


def test_graded_responses_against_a_direct_maximisation() -> None:
    """Log-likelihood by the trapezoid rule in NumPy, climbed by BFGS with differences for slopes."""
    y = ordinal.simulate(80, 3, 3)
    rule = {"theta": pyro_em.Quadrature(31)}
    found = pyro_em.fit(ordinal.graded, y, e_step=rule, tol=1e-8, accelerate="squarem", max_iter=200)
    nodes = np.linspace(-9, 9, 181)
    weights = np.exp(-nodes * nodes / 2) / np.sqrt(2 * np.pi) * (nodes[1] - nodes[0])
    data = y.numpy()

    def negative(u: np.ndarray[Any, Any]) -> float:
        slope, first, gap = np.exp(u[:3]), u[3:6], np.exp(u[6:9])
        eta = slope * nodes[:, None]
        below = np.stack([0 * eta, expit(first - eta), expit(first + gap - eta), 0 * eta + 1])  # (K + 1, Q, J)
        p = np.diff(below, axis=0)[data, :, np.arange(3)].prod(1)  # (N, Q)
        return -float(np.log(p @ weights).sum())

    cut, slope = found.params["cut"].numpy(), found.params["slope"].numpy()
    ours = np.concatenate([np.log(slope), cut[:, 0], np.log(np.diff(cut)[:, 0])])
    assert found.converged
    assert found.integration_error < 1e-6
    assert found.log_likelihood == pytest.approx(-negative(ours), abs=1e-6)
    peer = minimize(negative, np.r_[np.zeros(3), -np.ones(3), np.zeros(3)], method="BFGS", options={"gtol": 1e-4})
    assert -negative(ours) >= -peer.fun - 1e-6
    np.testing.assert_allclose(ours, peer.x, atol=2e-3)


def test_a_category_that_nobody_chose_is_named() -> None:
    x, y = ordinal.simulate_regression(80)
    unseen = r"Site 'y': no observation is in category 4 of the 5 categories 0 to 4"
    with pytest.warns(BOUNDARY, match=unseen), pytest.warns(pyro_em.SeparatedData, match="'cut': it rises for ever"):
        found = pyro_em.fit(ordinal.regression, x, y, 5)
    assert float(found.params["cut"][3]) > 20
    with pytest.warns(BOUNDARY, match=r"no observation is in category 1 of the 4"):
        found = pyro_em.fit(ordinal.regression, x, y.where(y != 1, 2), 4)
    merged = pyro_em.fit(ordinal.regression, x, (y.where(y != 1, 2) - 1).clamp(min=0), 3)  # the category left out
    assert found.converged and found.log_likelihood == pytest.approx(merged.log_likelihood, abs=1e-6)
    torch.testing.assert_close(found.params["cut"][1:], merged.params["cut"], atol=1e-5, rtol=0)


def test_cut_points_of_an_item_that_have_met_are_reported() -> None:
    y = ordinal.simulate(30, 3, 3)
    y[:, 1] = torch.where(y[:, 1] == 1, 2, y[:, 1])
    rule = {"theta": pyro_em.Quadrature(9, tolerance=1e-4)}
    with pytest.warns(BOUNDARY, match=r"Site 'y': two cut points have met in some rows \(of an item, say\)"):
        found = pyro_em.fit(ordinal.graded, y, 3, e_step=rule, tol=1e-4, accelerate="squarem")
    assert found.converged and float(found.params["cut"][1].diff()) < 1e-6
    assert np.isfinite(found.log_likelihood)


def test_categories_out_of_range_and_unordered_starts_are_refused() -> None:
    x, y = ordinal.simulate_regression(40)
    with pytest.raises(
        pyro_em.errors.InputError, match=r"Site 'y': the observation in row .*\(categories count from 0"
    ):
        pyro_em.fit(ordinal.regression, x, y + 1, 4)

    def unordered(x: Tensor, y: Tensor) -> None:
        cut = pyro.param("cut", torch.tensor([1.0, 0.0, 2.0]))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.OrderedLogistic(x[:, 0], cut), obs=y)

    with pytest.raises(pyro_em.errors.InputError, match=r"Site 'y': its argument 'cutpoints' cannot be used"):
        pyro_em.fit(unordered, x, y)


def test_answers_that_are_missing_are_left_out() -> None:
    x, y = ordinal.simulate_regression(60)
    holes = y.double()
    holes[[3, 17]] = torch.nan
    kept = ~holes.isnan()
    found = pyro_em.fit(ordinal.regression, x, holes, 4, missing="nan")
    expected = pyro_em.fit(ordinal.regression, x[kept], y[kept], 4)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
    torch.testing.assert_close(found.params["beta"], expected.params["beta"], rtol=1e-7, atol=1e-8)


def test_single_precision() -> None:
    x, y = ordinal.simulate_regression(80)

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.param("beta", torch.zeros(2, dtype=torch.float32))
        cut = pyro.param("cut", torch.tensor([-1, 0, 1], dtype=torch.float32), constraint=constraints.ordered_vector)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.OrderedLogistic(x @ beta, cut), obs=y)

    found, expected = pyro_em.fit(model, x.float(), y), pyro_em.fit(ordinal.regression, x, y)
    assert found.params["cut"].dtype == torch.float32
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-5)
