"""Linear systems whose levels are far from 0 beside their noises, against filters of 40 digits."""

from __future__ import annotations

import dataclasses

import mpmath as mp
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.state_space import kalman
from pyro_em.state_space.centred import FAR, is_far
from pyro_em.state_space.chunked import states
from pyro_em.state_space.joint import log_joint
from pyro_em.state_space.linear_gaussian import Chain
from pyro_em.state_space.smoother import smooth
from pyro_em.state_space.steady import steady_moments
from tests.test_kalman import random_chain


def exact_log_evidence(chain: Chain) -> float:
    """By 40 digits, of one sequence that is seen throughout."""
    with mp.workdps(40):
        A, Q, C, R = (mp.matrix(x[0, 0].tolist()) for x in (chain.A, chain.Q, chain.C, chain.R))
        b, d, m = (mp.matrix(x.reshape(-1).tolist()) for x in (chain.b, chain.d, chain.mean))
        P, total = mp.matrix(chain.covariance[0].tolist()), mp.mpf(0)
        for t, y in enumerate(chain.y[0].tolist()):
            if t:
                m, P = A * m + b, A * P * A.T + Q
            S = C * P * C.T + R
            e, inverse = mp.matrix(y) - C * m - d, S**-1
            total -= ((e.T * inverse * e)[0] + mp.log(mp.det(S)) + len(y) * mp.log(2 * mp.pi)) / 2
            K = P * C.T * inverse
            m, P = m + K * e, P - K * C * P
        return float(total)


@pytest.mark.parametrize("drift", [0.0, 1e3, 1e7])
def test_data_far_away_keep_all_digits(drift: float) -> None:
    """Levels that drift away from 0 by `drift` a step: log-evidences as if they did not."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(150, 2, generator=g) + torch.tensor([drift, -0.3 * drift])).cumsum(0)
    C = torch.tensor([[1.0, 0.3], [0.1, 0.7]])
    y = x @ C.mT + torch.randn(150, 2, generator=g) + 1.0
    eye = torch.eye(2)[None]
    offset = torch.tensor([[drift, -0.3 * drift]])
    chain = Chain(offset, 4 * eye, eye[None], offset[None], eye[None], C[None, None], torch.ones(1, 1, 2), eye[None],
                  y[None])  # fmt: skip
    truth = exact_log_evidence(chain)
    for run in (kalman.log_evidence, lambda c: smooth(c).log_evidence, lambda c: states(c).log_evidence,
                lambda c: steady_moments(c).log_evidence):  # fmt: skip
        assert float(run(chain)) == pytest.approx(truth, rel=2e-14)


def _level(unit: float, y: Tensor) -> Chain:
    one = torch.ones(1, 1, 1)
    noise = unit**2 * one
    return Chain(0 * one[0], noise, one[None], 0 * one, noise[None], one[None], 0 * one, noise[None], unit * y)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_how_far_data_are_does_not_depend_on_their_unit(unit: float) -> None:
    noise = 2**0.5  # of a step and its observation
    assert not is_far(_level(unit, torch.full((1, 9, 1), 0.99 * FAR * noise)))
    assert is_far(_level(unit, torch.full((1, 9, 1), 1.01 * FAR * noise)))


def test_offsets_that_vary_with_time_may_be_far_from_the_data() -> None:
    """The data less their offsets are the data of the same chain without."""
    g = torch.Generator().manual_seed(0)
    y = 1e4 + torch.randn(1, 40, 1, generator=g).cumsum(1)
    near, offsets = _level(1.0, y), 1e3 * torch.randn(1, 40, 1, generator=g).round(decimals=3)
    varying = dataclasses.replace(near, y=y + offsets, d=offsets)
    found, truth = smooth(varying), smooth(near)
    assert found.log_evidence.item() == pytest.approx(exact_log_evidence(near), rel=1e-10)
    torch.testing.assert_close(found.mean, truth.mean, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found.filtered_mean, truth.filtered_mean, rtol=1e-12, atol=0.0)


def test_a_far_chain_has_the_gradient_of_a_near_one() -> None:
    """Deviations from a path are the same chain: gradients too, of offsets as of matrices."""
    chain = random_chain(S=2, T=60, D=2, P=2, missing=True)
    far = dataclasses.replace(
        chain, y=chain.y + torch.where(chain.seen, 1e4, 0.0), d=chain.d + 1e4 - 300 * chain.C.sum(-1),
        b=chain.b + 300 - 300 * chain.A.sum(-1), mean=chain.mean + 300,
    )  # fmt: skip

    def gradients(chain: Chain) -> tuple[Tensor, ...]:
        leaves = {n: getattr(chain, n).clone().requires_grad_() for n in ("b", "Q", "d", "R", "mean", "covariance")}
        return torch.autograd.grad(kalman.log_evidence(dataclasses.replace(chain, **leaves)).sum(), [*leaves.values()])

    for one, other in zip(gradients(far), gradients(chain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def _drifting(y: Tensor, within: bool) -> None:
    """Two levels that drift, as a loop or (`within`) as one site whose start is wide."""
    c = pyro.param("c", torch.zeros(2))
    Q, R = (pyro.param(n, torch.eye(2), constraint=dist.constraints.positive_definite) for n in "QR")
    x, noise = torch.zeros(2), dist.MultivariateNormal
    if within:
        wide, one = noise(x, 1e6 * torch.eye(2)), torch.eye(2)
        pyro.sample("y", dist.GaussianHMM(wide, one, noise(c, Q), one, noise(x, R), duration=len(y)), obs=y)
        return
    for t in pyro_em.markov(len(y)):
        x = pyro.sample(f"x_{t}", noise(x + c, Q))
        pyro.sample(f"y_{t}", noise(x, R), obs=y[t])


@pytest.mark.parametrize("within", [False, True])
def test_a_fit_of_a_drift_to_a_million(within: bool) -> None:
    """Noises of 1 to 4 around a drift of 3,000 a step: no update seems to fall, and the reference agrees at the end."""
    g = torch.Generator().manual_seed(0)
    moves = torch.randn(400, 2, generator=g) @ torch.tensor([[1.0, 0.3], [0.0, 0.9]]) + torch.tensor([3000.0, 3.0])
    y = moves.cumsum(0) + 2 * torch.randn(400, 2, generator=g)
    result = pyro_em.fit(_drifting, y, within, accelerate="anderson", max_iter=200)
    assert result.converged
    torch.testing.assert_close(result.params["c"], torch.tensor([3000.0, 3.0]), rtol=0, atol=0.2)
    torch.testing.assert_close(result.params["R"], 4 * torch.eye(2), rtol=0, atol=1.5)


@pytest.mark.parametrize("states", [1, 2])
def test_fits_of_wide_starts_far_from_their_mean(states: int) -> None:
    """N(0, 1e12) for a level at a million: the usual way to say that nothing is known."""
    y = 1e6 + torch.cumsum(torch.randn(100, generator=torch.Generator().manual_seed(0)), 0)

    def model(y: Tensor) -> None:
        q = pyro.param("q", torch.ones(states), constraint=dist.constraints.positive)
        r = pyro.param("r", torch.tensor(1.0), constraint=dist.constraints.positive)
        x = torch.zeros(states)
        for t in pyro_em.markov(len(y)):
            moved = x if t == 0 or states == 1 else torch.stack([x[..., 0] + x[..., 1], x[..., 1]], -1)
            x = pyro.sample(f"x_{t}", dist.Normal(moved, 1e6 if t == 0 else q).to_event(1))
            pyro.sample(f"y_{t}", dist.Normal(x[..., 0], r), obs=y[t])

    result = pyro_em.fit(model, y, accelerate="anderson", max_iter=60, tol=1e-5)
    assert result.converged


def test_the_joint_density_counts_no_coordinate_without_noise() -> None:
    """A second-order autoregression, its lag the second coordinate of the state; one observation is not seen."""
    g = torch.Generator().manual_seed(2)
    z, y = torch.randn(8, generator=g), torch.randn(1, 7, 1, generator=g)
    x = torch.stack([z[1:], z[:-1]], -1)[None]
    A, C = torch.tensor([[0.6, 0.3], [1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    zero, one = torch.zeros(1, 1, 2), torch.ones(1, 1, 1)
    seen = torch.ones(1, 7, 1, dtype=torch.bool)
    seen[0, 3] = False
    Q = torch.diag(torch.tensor([0.5, 0.0]))[None, None]
    chain = Chain(zero[0], torch.eye(2)[None], A[None, None], zero, Q, C[None, None], 0 * one, one[None], y, seen)
    normal = dist.Normal
    steps = normal(0.6 * z[1:-1] + 0.3 * z[:-2], 0.5**0.5).log_prob(z[2:]).sum()
    data = (normal(2 * z[1:], 1.0).log_prob(y[0, :, 0]) * seen[0, :, 0]).sum()
    expected = normal(0.0, 1.0).log_prob(z[:2]).sum() + steps + data
    torch.testing.assert_close(log_joint(chain, x), expected[None], rtol=1e-12, atol=0.0)
