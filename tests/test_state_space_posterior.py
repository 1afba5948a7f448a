"""State-space sites: states, draws, forecasts, missing cells and standard errors against the joint normal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.errors import InputError
from tests.published_state_space import local_level
from tests.state_space import Case, Dense
from tests.state_space_cases import CASES, trend

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _fit(case: Case, **options: Any) -> Any:
    algorithm = "em" if case.log_prior is None else "map-em"
    init = {name: value.clone() for name, value in case.init.items()}
    return pyro_em.fit(case.model, case.data, algorithm=algorithm, init=init, **options)


@every
def test_states_are_those_of_the_joint_normal(case: Case) -> None:
    """G3: smoothed and filtered means and covariances, one-step densities, entropy."""
    result = _fit(case, max_iter=1, tol=0)
    own, states = case.dense(result.params), result.posterior().states("y")
    T, D = own.b.shape
    expected = [own.posterior(y) for y in case.data]
    mean = torch.stack([m.reshape(T + 1, D) for m, _ in expected])
    blocks = [c.reshape(T + 1, D, T + 1, D) for _, c in expected]
    covariance = torch.stack([torch.stack([b[t, :, t] for t in range(T + 1)]) for b in blocks])
    lag = torch.stack([torch.stack([b[t, :, t - 1] for t in range(1, T + 1)]) for b in blocks])
    close = {"rtol": 1e-9, "atol": 1e-10}
    shape = (len(case.data), T + 1, D)
    torch.testing.assert_close(states.mean.reshape(shape), mean, **close)
    torch.testing.assert_close(states.covariance.reshape(*shape, D), covariance, **close)
    torch.testing.assert_close(states.lag_covariance.reshape(len(case.data), T, D, D), lag, **close)
    torch.testing.assert_close(states.filtered().mean.reshape(shape)[:, -1], mean[:, -1], **close)
    steps = states.log_prob_steps().reshape(len(case.data), T)
    torch.testing.assert_close(steps.sum(), torch.as_tensor(result.log_likelihood), **close)
    if not case.copies:
        entropy = sum(0.5 * torch.logdet(2 * torch.pi * torch.e * c) for _, c in expected)
        torch.testing.assert_close(states.entropy().sum(), entropy, **close)


def test_draws_and_forecasts_of_states() -> None:
    """Moments of many joint draws, across two steps too; forecasts are the joint normal of a longer series."""
    case = next(c for c in CASES if c.name == "tied")
    result = _fit(case, max_iter=1, tol=0)
    own, states = case.dense(result.params), result.posterior().states("y")
    torch.manual_seed(0)
    draws = states.sample(40_000)
    T, D = own.b.shape
    assert draws.shape == (40_000, 3, T + 1, D)
    mean, covariance = own.posterior(case.data[0])
    flat = draws[:, 0].reshape(len(draws), -1)
    torch.testing.assert_close(flat.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(flat.mT), covariance, rtol=0, atol=0.02)

    longer = Dense.of(T + 2, own.m, own.P, own.F[0], own.b[0], own.Q[0], own.H[0], own.d[0], own.R[0]).observed()
    n = T * own.d.shape[-1]
    S, gap = longer.covariance_matrix, case.data[0].reshape(-1) - longer.mean[:n]
    gain = torch.linalg.solve(S[:n, :n], S[:n, n:]).mT
    future, spread = longer.mean[n:] + gain @ gap, S[n:, n:] - gain @ S[:n, n:]
    forecast = states.forecast(2)
    torch.testing.assert_close(forecast.mean[0].reshape(-1), future, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(forecast.covariance_matrix[0, 1], spread[3:, 3:], rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="steps"):
        states.forecast(0)
    wandering = next(c for c in CASES if c.name == "regression")
    with pytest.raises(InputError, match="differs from step to step"):
        _fit(wandering, max_iter=0).posterior().states("y").forecast(1)
    with pytest.raises(InputError, match="no sample site 'x'"):
        result.posterior().states("x")


def test_missing_cells_and_steps() -> None:
    """NaN cells are left out exactly: evidence, states and imputations are those of the joint normal of the rest."""
    case = next(c for c in CASES if c.name == "offsets")
    y = case.data.clone()
    y[0, 2] = torch.nan
    y[1, 3, 1] = torch.nan
    y[2, 4:, 0] = torch.nan
    y[2, 5] = torch.nan
    init = {name: value.clone() for name, value in case.init.items()}
    result = pyro_em.fit(case.model, y, init=init, missing="nan", max_iter=8, tol=0)
    assert (np.diff(result.history["objective"]) >= 0).all()
    own = case.dense(result.params)
    total = 0.0
    imputed = result.impute()["y"]
    for row, series in enumerate(y):
        seen = ~series.reshape(-1).isnan()
        joint = own.observed()
        S, gap = joint.covariance_matrix, (series.reshape(-1) - joint.mean)[seen]
        part = torch.distributions.MultivariateNormal(joint.mean[seen], S[seen][:, seen])
        total += float(part.log_prob(series.reshape(-1)[seen]))
        gain = torch.linalg.solve(S[seen][:, seen], S[seen][:, ~seen]).mT
        gone = series.isnan()
        torch.testing.assert_close(imputed.mean[row][gone], joint.mean[~seen] + gain @ gap, rtol=1e-9, atol=1e-9)
        variance = (S[~seen][:, ~seen] - gain @ S[seen][:, ~seen]).diagonal()
        torch.testing.assert_close(imputed.variance[row][gone], variance, rtol=1e-9, atol=1e-9)
    assert result.log_likelihood == pytest.approx(total, rel=1e-12)
    draws = imputed.sample(4000)
    torch.testing.assert_close(draws.mean(0)[y.isnan()], imputed.mean[y.isnan()], rtol=0, atol=0.1)
    assert torch.equal(draws[0][~y.isnan()], y[~y.isnan()])


def test_missing_steps_update_as_the_oracle_does() -> None:
    """G6 with a gap: whole steps are missing, so that the noise is estimated from the others."""
    case = next(c for c in CASES if c.name == "trend")
    y = case.data.clone()
    y[0, [3, 4, 9]] = torch.nan
    init = {name: value.clone() for name, value in case.init.items()}
    updated = pyro_em.fit(trend, y, init=init, missing="nan", max_iter=1, tol=0).params
    before = case.dense(case.init)
    mean, cov, H, d = before.joint()
    seen = ~y[0, :, 0].isnan()
    H, S = H[seen], (H @ cov @ H.mT + torch.block_diag(*before.R))[seen][:, seen]
    gain = torch.linalg.solve(S, H @ cov).mT
    m, V = mean + gain @ (y[0, seen, 0] - H @ mean - d[seen]), cov - gain @ H @ cov
    residual = y[0, seen, 0] - H @ m
    expected = (residual**2 + (H @ V @ H.mT).diagonal()).mean().sqrt()
    torch.testing.assert_close(updated["r"], expected, rtol=1e-10, atol=0)


def test_a_loop_over_steps_is_the_same_chain() -> None:
    """The local level written as a `pyro.markov` loop: the known iterates of the Nile on its first years."""

    def loop(y: Tensor) -> None:
        q = pyro.param("q", torch.tensor(1000.0), constraint=constraints.positive)
        r = pyro.param("r", torch.tensor(10000.0), constraint=constraints.positive)
        x = torch.tensor(1000.0)
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(x, torch.tensor(1000.0) if t == 0 else q.sqrt()))
            pyro.sample(f"y_{t}", dist.Normal(x, r.sqrt()), obs=y[t])

    y = torch.tensor([1120.0, 1160, 963, 1210, 1160])
    by_loop = pyro_em.fit(loop, y, max_iter=3, tol=0)
    by_site = pyro_em.fit(local_level, y, 1000.0, 1e6, max_iter=3, tol=0, init={"q": 1000.0, "r": 10000.0})
    assert by_loop.history["objective"] == pytest.approx(by_site.history["objective"], rel=1e-12)
    for name in ("q", "r"):
        torch.testing.assert_close(by_loop.params[name], by_site.params[name], rtol=1e-10, atol=0)
    states = by_site.posterior().states("y")
    loop_mean = torch.stack([by_loop.posterior().mean(f"x_{t}") for t in range(5)])
    torch.testing.assert_close(states.mean[1:, 0], loop_mean.reshape(-1), rtol=1e-9, atol=1e-9)


def test_standard_errors_are_those_of_the_dense_likelihood() -> None:
    case = CASES[4]
    result = _fit(case, max_iter=500, tol=1e-8, accelerate="squarem")
    names = list(case.init)

    def value(*values: Tensor) -> Tensor:
        return case.log_evidence(dict(zip(names, values, strict=True)))

    blocks = torch.autograd.functional.hessian(value, tuple(result.params[n] for n in names))
    hessian = torch.stack([torch.stack([b.reshape(()) for b in row]) for row in blocks])
    errors = torch.linalg.inv(-hessian).diagonal().sqrt()
    found = result.standard_errors()
    torch.testing.assert_close(torch.stack([found[n] for n in names]), errors, rtol=1e-5, atol=0)
