"""Starts that are flat (diffuse) or wide, against the joint normal in closed form, 60 digits, and statsmodels."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_em.state_space import kalman
from pyro_em.state_space.chunked import states
from pyro_em.state_space.linear_gaussian import Chain
from pyro_em.state_space.smoother import smooth
from pyro_em.state_space.start import Undetermined
from pyro_em.state_space.steady import steady_moments
from tests.test_far_chains import exact_log_evidence
from tests.test_kalman import random_chain, same_sums

SHAPES: list[dict[str, Any]] = [
    {"S": 1, "T": 9, "D": 2, "P": 1},
    {"S": 3, "T": 12, "D": 2, "P": 3},
    {"S": 2, "T": 70, "D": 3, "P": 2, "missing": True},
    {"S": 1, "T": 60, "D": 3, "P": 1, "varying": True, "missing": True, "singular": True},
]


def flat_chain(flat: list[tuple[int, int]], **shape: Any) -> Chain:
    """A random chain of which the coordinates (step, cell) are flat."""
    chain = random_chain(**shape)
    D, steps = shape["D"], 1 + max(t for t, _ in flat)
    directions = torch.zeros(1, steps, D, len(flat))
    for f, (t, cell) in enumerate(flat):
        directions[:, t, cell, f] = 1.0
    return dataclasses.replace(chain, flat=directions)


EVERY = (kalman.log_evidence, lambda c: states(c).log_evidence, lambda c: smooth(c).log_evidence,
         lambda c: steady_moments(c).log_evidence)  # fmt: skip


def joint(chain: Chain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `dense`, with ∫ dφ by generalised least squares (the likelihood of Harville's REML)."""
    flat = chain.flat
    assert flat is not None
    S, T, P = chain.y.shape
    D, F = flat.shape[-2:]
    found = []
    for s in range(S):

        def at(x: Tensor, t: int, s: int = s) -> Tensor:
            return x[s if len(x) > 1 else 0, t if x.shape[1] > 1 else 0]

        own = dataclasses.replace(chain, flat=None)
        means, cov, moves = [chain.mean[0]], chain.covariance[0], [flat[0, 0]]
        for t in range(1, T):
            A = at(own.A, t - 1)
            means.append(A @ means[-1] + at(own.b, t - 1))
            moves.append(A @ moves[-1] + (flat[0, t] if t < flat.shape[1] else 0.0))
            cross = A @ cov[-D:]
            cov = torch.cat(
                [torch.cat([cov, cross.mT], 1), torch.cat([cross, cross[:, -D:] @ A.mT + at(own.Q, t - 1)], 1)]
            )
        mean, X = torch.cat(means), torch.cat(moves)
        H = torch.block_diag(*(at(own.C, t) for t in range(T)))
        d = torch.cat([at(own.d, t) for t in range(T)])
        R = torch.block_diag(*(at(own.R, t) for t in range(T)))
        kept = torch.ones(T * P, dtype=torch.bool) if own.seen is None else own.seen.expand(S, T, P)[s].reshape(-1)
        H, e, R = H[kept], (own.y[s].reshape(-1) - d)[kept], R[kept][:, kept]
        e, X, Z = e - H @ mean, X, H @ X
        V = H @ cov @ H.mT + R
        W = torch.linalg.inv(V)
        J = Z.mT @ W @ Z
        phi = torch.linalg.solve(J, Z.mT @ W @ e)
        r = e - Z @ phi
        two_pi = torch.log(torch.tensor(2 * torch.pi))
        log_p = -0.5 * (r @ W @ r + torch.logdet(V) + torch.logdet(J) + (len(e) - F) * two_pi)
        gain = cov @ H.mT @ W
        left = X - gain @ Z
        full = cov - gain @ H @ cov + left @ torch.linalg.inv(J) @ left.mT
        blocks = full.reshape(T, D, T, D)
        found.append((
            log_p, (mean + X @ phi + gain @ r).reshape(T, D), torch.stack([blocks[t, :, t] for t in range(T)]),
            torch.stack([blocks[t, :, t - 1] for t in range(1, T)]),
        ))  # fmt: skip
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("flat", [[(0, 0), (0, 1)], [(0, 1)], [(0, 0), (1, 1), (2, 0)]], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flat_starts_against_the_joint_normal(shape: dict[str, Any], flat: list[tuple[int, int]]) -> None:
    chain = flat_chain(flat, **shape)
    log_p, mean, covariance, lag = joint(chain)
    torch.testing.assert_close(kalman.log_evidence(chain), log_p, rtol=1e-11, atol=1e-11)
    for run in (states, smooth):
        found = run(chain)
        torch.testing.assert_close(found.log_evidence, log_p, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.step_log_evidence.sum(1), log_p, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.covariance.expand_as(covariance), covariance, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.lag.expand_as(lag), lag, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("late", [False, True], ids=["first step seen", "first step unseen"])
@pytest.mark.parametrize(("sequences", "steps"), [(1, 200), (3, 40), (40, 30)])
def test_summed_moments_of_flat_starts(sequences: int, steps: int, late: bool) -> None:
    chain = flat_chain([(0, 0), (0, 2)], S=sequences, T=steps, D=3, P=1)
    if late:
        seen = torch.ones(1, steps, 1, dtype=torch.bool)
        seen[:, 0] = False
        chain = dataclasses.replace(chain, seen=seen)
    same_sums(chain, torch.linspace(0.5, 2.0, sequences), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [1e4, 1e8, 1e12, 1e16])
@pytest.mark.parametrize("at", [0.0, 1e6])
def test_wide_starts_keep_all_digits(width: float, at: float) -> None:
    """Data that are far from the middle of a start as well, and a state of which they say little: by 40 digits."""
    g = torch.Generator().manual_seed(0)
    A, C = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    y = at + 2.0 * torch.arange(60.0).unsqueeze(-1) + torch.randn(60, 1, generator=g).cumsum(0)
    noise = torch.tensor([[1.0, 0.0], [0.0, 1e-4]])
    chain = Chain(torch.zeros(1, 2), width * torch.eye(2)[None], A[None, None], torch.zeros(1, 1, 2), noise[None, None],
                  C[None, None], torch.zeros(1, 1, 1), torch.ones(1, 1, 1, 1), y[None])  # fmt: skip
    truth = exact_log_evidence(chain)
    for run in EVERY:
        assert float(run(chain)) == pytest.approx(truth, rel=1e-14)


def test_a_wide_start_tends_to_a_flat_one() -> None:
    """log p + ½ log|2π W| of N(·, W) is the flat one but for 1/W, and so are states and gradients."""
    chain = flat_chain([(0, 0), (0, 1)], S=2, T=50, D=2, P=2, missing=True)
    wide = dataclasses.replace(chain, flat=None, covariance=1e14 * torch.eye(2)[None])

    def gradient(chain: Chain) -> Tensor:
        Q = chain.Q.clone().requires_grad_()
        return torch.autograd.grad(kalman.log_evidence(dataclasses.replace(chain, Q=Q)).sum(), Q)[0]

    constant = torch.log(torch.tensor(2 * torch.pi * 1e14))
    torch.testing.assert_close(kalman.log_evidence(wide) + constant, kalman.log_evidence(chain), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(wide), gradient(chain), rtol=1e-10, atol=1e-10)
    one, other = states(wide), states(chain)
    for name in ("mean", "covariance", "lag"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-10, atol=1e-10)


def test_what_no_data_speak_of_is_refused() -> None:
    """Fewer observations than flat directions, or a state that is never seen."""
    few = flat_chain([(0, 0), (0, 1), (0, 2)], S=1, T=2, D=3, P=1)
    hidden = flat_chain([(0, 0), (0, 1)], S=1, T=80, D=2, P=1)
    still = dataclasses.replace(hidden, A=torch.eye(2)[None, None], C=torch.tensor([[[[1.0, 0.0]]]]))
    for chain in (few, still):
        for run in EVERY:
            with pytest.raises(Undetermined):
                run(chain)
