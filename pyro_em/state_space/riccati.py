"""Covariances of a time-invariant chain: those of the filter until they stand still, and sums of the smoothed ones.

They do not depend on the data, so all sequences share them. Predicted covariances obey

    P_{t+1} = Q + A P_t (I + J P_t)⁻¹ Aᵀ,      J = Cᵀ R⁻¹ C

whose k-th iterate has the same form with A_k, J_k, Q_k (Chu, Fan and Lin 2005: the doubling of a Riccati equation), so
that m of them give the next m at once. The first few steps, and all of them where R is singular, are taken one by one
in Joseph's form: a wide start would cancel digits.

Backwards with L_t = A - K_t C, where K_t = A P_t Cᵀ S_t⁻¹ is the predictor's gain (de Jong 1989; Koopman 1993)

    N_{t-1} = Cᵀ S_t⁻¹ C + L_tᵀ N_t L_t,   Cov(x_t | y) = P_t - P_t N_{t-1} P_t,   Cov(η_t, x_t | y) = -Q N_t L_t P_t

for the noise η_t that leads to x_{t+1}; once L stands still, N and its sum over steps are found by doubling too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported when they are used first
import torch
from numpy.typing import NDArray

from pyro_em.state_space.steps import SingularInnovation, gain

Array = NDArray[np.float64]
EPS = np.finfo(np.float64).eps
STEADY = 8 * EPS  # relative distance of a covariance from its limit that is rounding
WIDE = 1e3  # times the steady covariance
BY_ONE = 48  # steps taken one by one at the beginning
CHECKED = 4  # steps after which they are compared


@dataclass(frozen=True)
class Gains:
    """Of steps 0..n-1, (n, ...); the last one's hold for all later steps."""

    predicted: Array  # P_t
    gains: Array  # K_t, (n, D, P)
    closed: Array  # L_t
    factors: Array  # Cholesky factor F_t of S_t
    whiteners: Array  # its inverse (0 at a step that is not seen)
    half_log_dets: Array  # ½ log|S_t|, (n,)

    def __len__(self) -> int:
        return len(self.predicted)


def filter_gains(P: Array, A: Array, Q: Array, C: Array, R: Array, T: int, first_unseen: bool) -> Gains:
    """:raises SingularInnovation: where an observed step has no density given the past."""
    found = _predicted(P, A, Q, C, R, T, first_unseen)
    innovation = C @ found @ C.T + R
    if first_unseen:
        innovation[0] = np.eye(len(C))
    try:
        factors = np.asarray(np.linalg.cholesky(innovation), np.float64)
    except np.linalg.LinAlgError:
        step = next(t for t, S in enumerate(innovation) if scipy.linalg.lapack.dpotrf(S, lower=1)[1])
        raise SingularInnovation(step) from None
    whiteners = np.asarray(np.linalg.inv(factors), np.float64)
    half = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
    if first_unseen:
        whiteners[0], half[0] = 0.0, 0.0
    gains = A @ found @ C.T @ whiteners.swapaxes(1, 2) @ whiteners
    return Gains(found, gains, A - gains @ C, factors, whiteners, half)


def _predicted(P: Array, A: Array, Q: Array, C: Array, R: Array, T: int, first_unseen: bool) -> Array:
    """P_0, P_1, ... up to where they stand still, at most T of them."""
    factor, failed = scipy.linalg.lapack.dpotrf(R, lower=1, clean=1)
    J = None
    if not failed:
        root = scipy.linalg.lapack.dtrtri(factor, lower=1)[0] @ C
        J = root.T @ root
    steps = [P]
    while len(steps) < T and (J is None or len(steps) < BY_ONE):
        steps.append(_next(steps[-1], A, Q, C, R, len(steps) - 1, unseen=first_unseen and len(steps) == 1))
        if len(steps) % CHECKED == 0:
            last = np.stack(steps[-CHECKED - 1 :])
            first = len(steps) - len(last) + 1  # number of the step that last[1] is
            moved = abs(last[1:] - last[:-1]).max((1, 2)) > STEADY / 2 * abs(last[:-1]).max((1, 2))
            still = [t for t in range(max(first, 1 + first_unseen), len(steps)) if not moved[t - first]]
            if still:
                return np.stack(steps[: still[0]])
    if J is None or len(steps) >= T:
        return np.stack(steps)
    known, block = steps[:-1], np.stack(steps[-1:])
    eye = np.eye(len(A))
    while len(known) + len(block) < T:
        later = Q + A @ np.linalg.solve(eye + block @ J, block) @ A.T
        block = np.concatenate([block, (later + later.swapaxes(1, 2)) / 2])
        if abs(A).max() ** 2 * abs(P).max() <= EPS * abs(Q).max():  # all that came last are the limit
            away = np.flatnonzero(abs(block - block[-1]).max((1, 2)) > STEADY * abs(block[-1]).max())
            block = block[: away[-1] + 2] if len(away) else block[:1]
            break
        left = A @ np.linalg.inv(eye + Q @ J)
        A, Q, J = left @ A, Q + left @ Q @ A.T, J + A.T @ J @ np.linalg.solve(eye + Q @ J, A)
    return np.concatenate([*(p[None] for p in known), block])[:T]


def _next(P: Array, A: Array, Q: Array, C: Array, R: Array, step: int, *, unseen: bool) -> Array:
    """One step in Joseph's form."""
    if unseen:
        P = A.dot(P).dot(A.T)
    else:
        CP = C.dot(P)
        factor, failed = scipy.linalg.lapack.dpotrf(CP.dot(C.T) + R, lower=1, clean=1)
        if failed:
            raise SingularInnovation(step)
        K = A.dot(scipy.linalg.lapack.dpotrs(factor, CP, lower=1)[0].T)
        closed = A - K.dot(C)
        P = closed.dot(P).dot(closed.T)
        P += K.dot(R).dot(K.T)
    P += Q
    return (P + P.T) / 2


@dataclass(frozen=True)
class SmoothedSums:
    """V_0, V_{T-1} and Σ_t V_t of Cov(x_t | y), and over the transitions Σ Cov(η_t), Σ Cov(η_t, x_t)."""

    first: Array
    last: Array
    total: Array
    noise: Array
    noise_states: Array


def smoothed_sums(own: Gains, A: Array, C: Array, Q: Array, R: Array, T: int) -> SmoothedSums:
    """Sums over all T steps."""
    n, P = len(own), own.predicted
    info = C.T @ own.whiteners.swapaxes(1, 2)
    info = info @ info.swapaxes(1, 2)  # Cᵀ S⁻¹ C
    N, steady = _doubled(info[-1], own.closed[-1], T - n)
    later = np.empty((n, *N.shape))  # N_{t-1} at steps t < n
    after = np.empty((n - 1, *N.shape)) if n > 1 else np.zeros((0, *N.shape))  # N_t at steps t < n - 1
    turned = np.ascontiguousarray(own.closed.swapaxes(1, 2))
    for t in range(n - 1, -1, -1):
        if t < n - 1:
            after[t] = N
        N = turned[t].dot(N).dot(own.closed[t])
        N += info[t]
        later[t] = N
    V = P - P @ later @ P
    last = own.predicted[-1]
    _narrow(V, own, A, C, Q, R)
    total = V.sum(0) + (T - n) * last - last @ steady @ last
    crossed = (after @ own.closed[: n - 1] @ P[: n - 1]).sum(0) + steady @ own.closed[-1] @ last
    noise = (T - 1) * Q - Q @ (after.sum(0) + steady) @ Q
    V_last = V[-1] if n == T else last - last @ info[-1] @ last
    return SmoothedSums(V[0], V_last, (total + total.T) / 2, (noise + noise.T) / 2, -Q @ crossed)


def _narrow(V: Array, own: Gains, A: Array, C: Array, Q: Array, R: Array) -> None:
    """Put right the V_t of wide starts, where P - P N P cancels: by Rauch, Tung and Striebel, as a sum of squares."""
    size = abs(own.predicted).max((1, 2))
    wide = np.flatnonzero(size > WIDE * size[-1])
    eye = np.eye(len(A))
    for t in reversed(range(int(wide[-1]) + 1 if len(wide) else 0)):
        if t + 1 >= len(own):
            continue
        P, W = own.predicted[t], own.whiteners[t]
        K = P @ C.T @ W.T @ W
        keep = eye - K @ C
        P = keep @ P @ keep.T + K @ R @ K.T
        G = gain(*map(torch.from_numpy, (P, np.ascontiguousarray(A), own.predicted[t + 1]))).numpy()
        keep = eye - G @ A
        V[t] = keep @ P @ keep.T + G @ (Q + V[t + 1]) @ G.T


def _doubled(M: Array, L: Array, m: int) -> tuple[Array, Array]:
    """N after m steps N ← M + Lᵀ N L from 0, and the sum of N after 1, ..., m steps."""
    N, total, Phi = np.zeros_like(M), np.zeros_like(M), np.eye(len(M))  # after k steps; the sum is over 0..k-1 of them
    N2, total2, Phi2, size = M, np.zeros_like(M), L, 1  # the same after `size` steps, a power of 2
    while m:
        if m & 1:
            N, total, Phi = N + Phi.T @ N2 @ Phi, total + size * N + Phi.T @ total2 @ Phi, Phi @ Phi2
        m >>= 1
        if m:
            N2, total2, Phi2 = N2 + Phi2.T @ N2 @ Phi2, total2 + size * N2 + Phi2.T @ total2 @ Phi2, Phi2 @ Phi2
            size *= 2
    return N, total + N
