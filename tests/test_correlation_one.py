"""Random slopes and intercepts whose correlation is estimated as ±1: a boundary estimate (lme4's "singular fit").

The likelihood of the limit is that of y ~ N(X β, Σ_g λ λᵀ + σ² I), one effect λ = (λ₀, λ₁) a group.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.e_step.auto import choose_engine
from pyro_em.m_step import auto
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind

GROUPS, ROWS = 12, 8
GENERATOR = torch.Generator().manual_seed(3)
DOUBLE = torch.float64
SUBJECT = torch.arange(GROUPS).repeat_interleave(ROWS)
DAY = torch.arange(ROWS, dtype=DOUBLE).repeat(GROUPS) - 3.5


def _data() -> Tensor:
    effect = torch.randn(GROUPS, generator=GENERATOR, dtype=DOUBLE)[SUBJECT]
    noise = torch.randn(GROUPS * ROWS, generator=GENERATOR, dtype=DOUBLE)
    return 2 + 0.5 * DAY + effect * (1 + 0.5 * DAY) + 0.7 * noise


Y = {1.0: _data()}
Y[-1.0] = Y[1.0].reshape(GROUPS, ROWS).flip(1).reshape(-1)  # the days from the last to the first


def effects(y: Tensor, factor: bool) -> None:
    beta = pyro.param("beta", torch.zeros(2))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    start, constraint = torch.eye(2), constraints.lower_cholesky if factor else constraints.positive_definite
    spread = {"scale_tril" if factor else "covariance_matrix": pyro.param("D", start, constraint=constraint)}
    with pyro.plate("subjects", GROUPS):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), **spread))
    with pyro.plate("rows", len(y)):
        own = b[..., SUBJECT, :]
        pyro.sample("y", dist.Normal(beta[0] + own[..., 0] + (beta[1] + own[..., 1]) * DAY, s), obs=y)


def _limit(params: dict[str, Tensor], D: Tensor, y: Tensor) -> float:
    """The log-likelihood with the smallest eigenvalue of D at 0, from the dense covariance of a group."""
    values, vectors = torch.linalg.eigh(D)
    loading = vectors[:, 1] * values[1].sqrt()
    z = loading[0] + loading[1] * DAY[:ROWS]
    own = dist.LowRankMultivariateNormal(torch.zeros(ROWS), z.unsqueeze(-1), params["s"].square().expand(ROWS))
    residuals = y - params["beta"][0] - params["beta"][1] * DAY
    return float(own.log_prob(residuals.reshape(GROUPS, ROWS)).sum())


@pytest.mark.parametrize("factor", [False, True], ids=["covariance", "factor"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_is_a_boundary_estimate(sign: float, factor: bool) -> None:
    with pytest.warns(pyro_em.BoundaryEstimate, match="'D'"):
        result = pyro_em.fit(effects, Y[sign], factor, max_iter=400, tol=0)
    D = result.params["D"]
    D = D @ D.mT if factor else D
    correlation = float(D[0, 1] / (D[0, 0] * D[1, 1]).sqrt())
    assert sign * correlation > 0.98
    assert _limit(result.params, D, Y[sign]) >= result.log_likelihood


def test_an_update_near_it_is_no_work_for_the_general_maximiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slopes of a nearly singular covariance have fewer digits than the certificate asks for."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the general maximiser was asked")

    monkeypatch.setattr(auto, "maximise", never)
    for gap in (1e-4, 1e-6, 1e-8, 1e-10):
        D = torch.tensor([[1.0, 0.5 * (1 - gap)], [0.5 * (1 - gap), 0.25]], dtype=DOUBLE)
        bound = bind(effects, (Y[1.0], False), {}, with_prior=False, params={"D": D})
        m = MStep(bound, "auto", "em")
        engine, params, objective = choose_engine(bound, m), bound.start, -float("inf")
        for _ in range(3):
            found = engine.e_step(params)
            assert found.log_likelihood > objective
            objective = found.log_likelihood
            params, info = m.update(params, found)
            assert info.certificate is not None and info.certificate < 1e-4


def test_a_slope_beyond_rounding_is_not_certified() -> None:
    """A covariance beside the maximum is told from one at it, however near it is to a singular one."""
    D = torch.tensor([[1.0, 0.5 * (1 - 1e-8)], [0.5 * (1 - 1e-8), 0.25]], dtype=DOUBLE)
    bound = bind(effects, (Y[1.0], False), {}, with_prior=False, params={"D": D})
    m = MStep(bound, "auto", "em")
    found = choose_engine(bound, m).e_step(bound.start)
    with pytest.raises(auto.NotCertified):
        m.certify(bound.start, found.sufficient)
    updated, _ = m.closed_update(bound.start, found.sufficient)
    m.certify(updated, found.sufficient)
    off = {**updated, "D": updated["D"] * (1 + 1e-4)}
    found.sufficient.put(off["D"], bound.uses["D"])
    with pytest.raises(auto.NotCertified):
        m.certify(off, found.sufficient)
