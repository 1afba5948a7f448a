"""Filters and smoothers of linear-Gaussian chains against the joint normal, statsmodels, and each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_em.state_space import kalman
from pyro_em.state_space.chunked import states
from pyro_em.state_space.linear_gaussian import Chain, ChainMoments, LinearMoments, chain_moments
from pyro_em.state_space.smoother import smooth
from pyro_em.state_space.steady import steady_moments
from pyro_em.state_space.steps import SingularInnovation


def random_chain(
    S: int, T: int, D: int, P: int, *, varying: bool = False, missing: bool = False, singular: bool = False
) -> Chain:
    """A stable chain; `singular` leaves the last state without noise."""
    g = torch.Generator().manual_seed(S + T)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def definite(*shape: int) -> Tensor:
        x = r(*shape, shape[-1])
        return x @ x.mT / shape[-1] + 0.3 * torch.eye(shape[-1])

    B, O = ((S, T - 1), (S, T)) if varying else ((1, 1), (1, 1))
    Q = definite(*B, D)
    if singular:
        Q[..., -1, :] = 0
        Q[..., :, -1] = 0
    seen = None
    if missing:
        seen = torch.rand(S, T, P, generator=g) > 0.3
        seen[:, 3] = False
    A = 0.9 * torch.linalg.qr(r(*B, D, D))[0]
    return Chain(r(1, D), definite(1, D), A, r(*B, D), Q, r(*O, P, D), r(*O, P), definite(*O, P), r(S, T, P), seen)


def dense(chain: Chain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-evidence, smoothed means, covariances and lag-one covariances from the joint normal."""
    S, T, P = chain.y.shape
    D = chain.mean.shape[-1]
    found = []
    for s in range(S):

        def at(x: Tensor, t: int, s: int = s) -> Tensor:
            return x[s if len(x) > 1 else 0, t if x.shape[1] > 1 else 0]

        means, cov = [chain.mean[0]], chain.covariance[0]
        for t in range(1, T):
            A = at(chain.A, t - 1)
            means.append(A @ means[-1] + at(chain.b, t - 1))
            cross = A @ cov[-D:]
            own = cross[:, -D:] @ A.mT + at(chain.Q, t - 1)
            cov = torch.cat([torch.cat([cov, cross.mT], 1), torch.cat([cross, own], 1)])
        mean = torch.cat(means)
        H = torch.block_diag(*(at(chain.C, t) for t in range(T)))
        d = torch.cat([at(chain.d, t) for t in range(T)])
        R = torch.block_diag(*(at(chain.R, t) for t in range(T)))
        y = chain.y[s].reshape(-1)
        if chain.seen is not None:
            kept = chain.seen.expand(S, T, P)[s].reshape(-1)
            H, d, y, R = H[kept], d[kept], y[kept], R[kept][:, kept]
        own = H @ cov @ H.mT + R
        gain = torch.linalg.solve(own, H @ cov).mT
        states = (cov - gain @ H @ cov).reshape(T, D, T, D)
        found.append(
            (
                torch.distributions.MultivariateNormal(H @ mean + d, own).log_prob(y),
                (mean + gain @ (y - H @ mean - d)).reshape(T, D),
                torch.stack([states[t, :, t] for t in range(T)]),
                torch.stack([states[t, :, t - 1] for t in range(1, T)]),
            )
        )
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]


SHAPES: list[dict[str, Any]] = [
    {"S": 2, "T": 8, "D": 2, "P": 3},
    {"S": 2, "T": 2, "D": 2, "P": 1},
    {"S": 3, "T": 70, "D": 3, "P": 2},
    {"S": 40, "T": 5, "D": 1, "P": 1},
    {"S": 2, "T": 70, "D": 2, "P": 2, "missing": True},
    {"S": 1, "T": 100, "D": 2, "P": 2, "varying": True, "missing": True},
    {"S": 2, "T": 60, "D": 3, "P": 2, "varying": True, "missing": True, "singular": True},
]


both = pytest.mark.parametrize("smoother", [smooth, states], ids=["torch", "numpy"])


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_joint_normal(shape: dict[str, Any], smoother: Any) -> None:
    chain = random_chain(**shape)
    log_evidence, mean, covariance, lag = dense(chain)
    found = smoother(chain)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(kalman.log_evidence(chain), log_evidence, **close)
    torch.testing.assert_close(found.log_evidence, log_evidence, **close)
    torch.testing.assert_close(found.mean, mean, **close)
    torch.testing.assert_close(found.covariance.expand_as(covariance), covariance, **close)
    torch.testing.assert_close(found.lag.expand_as(lag), lag, **close)
    filtered = smooth(chain)  # the last filtered state is the last smoothed one: its filter is its own oracle
    for name in ("filtered_mean", "filtered_covariance", "step_log_evidence"):
        own, other = getattr(found, name), getattr(filtered, name)
        torch.testing.assert_close(own.expand_as(other), other, **close)
    assert torch.equal(found.covariance, found.covariance.mT)
    assert float(torch.linalg.eigvalsh(found.covariance).min()) > -1e-13
    torch.testing.assert_close(found.step_log_evidence.sum(1), log_evidence, **close)


def test_one_step() -> None:
    chain = random_chain(S=2, T=1, D=2, P=2)
    own = chain.C[0, 0] @ chain.covariance[0] @ chain.C[0, 0].mT + chain.R[0, 0]
    mean = chain.C[0, 0] @ chain.mean[0] + chain.d[0, 0]
    truth = torch.distributions.MultivariateNormal(mean, own).log_prob(chain.y[:, 0])
    torch.testing.assert_close(kalman.log_evidence(chain), truth)
    assert smooth(chain).lag.shape == (2, 0, 2, 2)
    torch.testing.assert_close(states(chain).log_evidence, truth)
    torch.testing.assert_close(steady_moments(chain).log_evidence, truth)


def test_twice_differentiable() -> None:
    """Gradient and Hessian, through the two levels, are those of the joint normal."""
    chain = random_chain(S=1, T=60, D=2, P=1)

    def value(scales: Tensor, log_evidence: Any) -> Tensor:
        own = dataclasses.replace(chain, A=chain.A * scales[0], Q=chain.Q * scales[1], R=chain.R * scales[2])
        return log_evidence(own)[0].sum() if log_evidence is dense else log_evidence(own).sum()

    at = torch.tensor([0.9, 1.1, 0.8])
    for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        found = derivative(lambda x: value(x, kalman.log_evidence), at)
        torch.testing.assert_close(found, derivative(lambda x: value(x, dense), at), rtol=1e-8, atol=1e-8)


def _total(moments: LinearMoments, weight: Tensor) -> list[Tensor]:
    return [(x * weight.reshape(-1, *(1,) * (x.dim() - 1))).sum((0, 1)) for x in vars(moments).values()]


@pytest.mark.parametrize("late", [False, True], ids=["first step seen", "first step unseen"])
@pytest.mark.parametrize(
    "shape",
    [
        SHAPES[0],
        {"S": 40, "T": 23, "D": 2, "P": 3},
        {"S": 33, "T": 3, "D": 2, "P": 1},
        {"S": 3, "T": 333, "D": 3, "P": 1},
        {"S": 1, "T": 1500, "D": 2, "P": 2},
        {"S": 2, "T": 200, "D": 3, "P": 2, "singular": True},
    ],
    ids=str,
)
def test_steady_moments_are_the_sums_of_the_smoothed_ones(shape: dict[str, Any], late: bool) -> None:
    chain = random_chain(**shape)
    if late:
        seen = torch.ones(1, shape["T"], shape["P"], dtype=torch.bool)
        seen[:, 0] = False
        chain = dataclasses.replace(chain, seen=seen)
    weight = torch.linspace(0.5, 2.0, shape["S"])
    same_sums(chain, weight, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(("sequences", "steps"), [(3, 60), (3, 64), (40, 64)])
@pytest.mark.parametrize("width", [1e2, 1e5, 1e8, 1e10])
def test_steady_moments_of_a_wide_start(width: float, sequences: int, steps: int) -> None:
    """No digits go with the width, neither of covariances nor of states."""
    chain = random_chain(S=sequences, T=steps, D=2, P=1)
    chain = dataclasses.replace(chain, covariance=width * torch.eye(2)[None])
    same_sums(chain, torch.ones(sequences), rtol=1e-9, atol=1e-9)


def test_steady_moments_of_noise_that_is_nearly_singular() -> None:
    """Against the smoother: residuals that are small in one direction only are lost in sums of products."""
    g = torch.Generator().manual_seed(0)
    chain = random_chain(S=3, T=40, D=2, P=3)
    state, seen = (torch.linalg.qr(torch.randn(n, n, generator=g))[0] for n in (2, 3))
    roots = state * torch.tensor([1e-4, 1.0]), seen * torch.tensor([1e-4, 1e-4, 1.0])
    Q, R = (root @ root.mT for root in roots)
    A, b, C, d = (x[0, 0] for x in (chain.A, chain.b, chain.C, chain.d))
    x, y = chain.mean + torch.randn(3, 2, generator=g) @ roots[0].mT, []
    for t in range(40):
        x = x if t == 0 else x @ A.mT + b + torch.randn(3, 2, generator=g) @ roots[0].mT
        y.append(x @ C.mT + d + torch.randn(3, 3, generator=g) @ roots[1].mT)
    given = {"covariance": Q[None], "Q": Q[None, None], "R": R[None, None], "y": torch.stack(y, 1)}
    chain = dataclasses.replace(chain, **given)
    fast, slow = steady_moments(chain), chain_moments(chain, smooth(chain))
    assert fast.first is not None
    squares = (fast.observation.residual_squares + fast.first.residual_squares).squeeze()
    expected = slow.observation.residual_squares.sum((0, 1))
    direction = seen[:, 0]
    assert float(direction @ squares @ direction) == pytest.approx(float(direction @ expected @ direction), rel=1e-6)


def same_sums(chain: Any, weight: Tensor, evidence: float = 1e-12, **digits: float) -> None:
    fast: ChainMoments = steady_moments(chain, weight)
    slow = chain_moments(chain, smooth(chain))
    torch.testing.assert_close(fast.log_evidence, slow.log_evidence, rtol=evidence, atol=1e-12)
    for name in ("initial", "transition", "observation"):
        parts = [getattr(fast, name)] + ([fast.first] if name == "observation" else [])
        sums = [sum(x.sum((0, 1)) for x in own) for own in zip(*(vars(p).values() for p in parts), strict=True)]
        for own, other in zip(sums, _total(getattr(slow, name), weight), strict=True):
            torch.testing.assert_close(own, other, **digits)


@both
def test_a_diffuse_start_keeps_its_digits(smoother: Any) -> None:
    """Against the joint precision matrix, where a variance of 1e9 is a small number and nothing cancels."""
    chain = dataclasses.replace(random_chain(S=1, T=20, D=2, P=2), covariance=1e9 * torch.eye(2)[None])
    given = (chain.A, chain.Q, chain.C, chain.R)
    A, Q, C, R = (torch.linalg.inv(x[0, 0]) if i % 2 else x[0, 0] for i, x in enumerate(given))
    eye = torch.eye(40).reshape(20, 2, 40)
    precision = 1e-9 * eye[0].mT @ eye[0]
    for t in range(20):
        precision = precision + eye[t].mT @ C.mT @ R @ C @ eye[t]
        if t:
            move = eye[t] - A @ eye[t - 1]
            precision = precision + move.mT @ Q @ move
    truth = torch.linalg.inv(precision).reshape(20, 2, 20, 2)
    found = smoother(chain)
    for t in range(20):
        torch.testing.assert_close(found.covariance[0, t], truth[t, :, t], rtol=1e-11, atol=1e-13)


@both
def test_statsmodels_with_missing_cells(smoother: Any) -> None:
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    chain = random_chain(S=1, T=90, D=2, P=2, missing=True)
    y = torch.where(chain.seen, chain.y, torch.nan)[0] if chain.seen is not None else chain.y[0]
    peer = KalmanSmoother(2, 2)
    peer.bind(np.asfortranarray(y.numpy().T))
    peer["design"], peer["obs_intercept"] = chain.C[0, 0].numpy(), chain.d[0, 0].numpy()[:, None]
    peer["obs_cov"], peer["transition"] = chain.R[0, 0].numpy(), chain.A[0, 0].numpy()
    peer["state_intercept"], peer["selection"] = chain.b[0, 0].numpy()[:, None], np.eye(2)
    peer["state_cov"] = chain.Q[0, 0].numpy()
    peer.initialize_known(chain.mean[0].numpy(), chain.covariance[0].numpy())
    truth = peer.smooth()
    found = smoother(chain)
    assert float(found.log_evidence) == pytest.approx(truth.llf, rel=1e-9)
    np.testing.assert_allclose(found.mean[0].T, truth.smoothed_state, atol=1e-9)
    np.testing.assert_allclose(found.covariance[0].permute(1, 2, 0), truth.smoothed_state_cov, atol=1e-9)
    np.testing.assert_allclose(found.filtered_mean[0].T, truth.filtered_state, atol=1e-9)


def test_an_observed_step_without_noise_is_named() -> None:
    chain = random_chain(S=2, T=6, D=2, P=1)
    still = dataclasses.replace(chain, Q=0 * chain.Q, R=0 * chain.R, covariance=0 * chain.covariance)
    for run in (kalman.log_evidence, smooth, states, steady_moments):
        with pytest.raises(SingularInnovation, match="step 0"):
            run(still)
