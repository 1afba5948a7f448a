"""Gains of a time-invariant chain's filter, and sums of its smoothed covariances.

They do not depend on the data, so all sequences share them: those of the filter until the predicted covariances stand
still (covariances.py). Backwards with L_t = A - K_t C, where K_t = A P_t Cᵀ S_t⁻¹ is the predictor's gain (de Jong
1989; Koopman 1993)

    N_{t-1} = Cᵀ S_t⁻¹ C + L_tᵀ N_t L_t,   Cov(x_t | y) = P_t - P_t N_{t-1} P_t,   Cov(η_t, x_t | y) = -Q N_t L_t P_t

for the noise η_t that leads to x_{t+1}; once L stands still, N and its sum over steps are found by doubling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported when they are used first
import torch
from numpy.typing import NDArray

from pyro_em.state_space.covariances import predicted
from pyro_em.state_space.steps import SingularInnovation, gain

Array = NDArray[np.float64]
WIDE = 1e3  # times the steady covariance
LONG = 128  # steps from which on those of many chunks are taken side by side
FADED = 1e-16  # entries of a power of L whose square adds nothing any more


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
    found, joint = predicted(P, A, Q, C, R, T, first_unseen)
    O = len(C)
    if joint is None:
        factors = _innovations(found, C, R, first_unseen)
        whiteners = np.asarray(np.linalg.inv(factors), np.float64)
        crossed = A @ found @ C.T @ whiteners.swapaxes(1, 2)
    else:
        factors, crossed = joint[:, :O, :O], joint[:, O:, :O]
        whiteners = np.asarray(np.linalg.inv(factors), np.float64)
    half = np.log(factors.diagonal(axis1=1, axis2=2)).sum(1)
    if first_unseen:
        whiteners[0], half[0] = 0.0, 0.0
    gains = crossed @ whiteners
    return Gains(found, gains, A - gains @ C, factors, whiteners, half)


def _innovations(P: Array, C: Array, R: Array, first_unseen: bool) -> Array:
    """Factors of S_t."""
    innovation = C @ P @ C.T + R
    if first_unseen:
        innovation[0] = np.eye(len(C))
    try:
        return np.asarray(np.linalg.cholesky(innovation), np.float64)
    except np.linalg.LinAlgError:
        step = next(t for t, S in enumerate(innovation) if scipy.linalg.lapack.dpotrf(S, lower=1)[1])
        raise SingularInnovation(step) from None


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
    N, steady = _summed(info[-1], own.closed[-1], T - n)
    found = _backwards(info, own.closed, N)
    later, after = found[:-1], found[1:-1]  # N_{t-1} at steps t < n, and N_t at steps t < n - 1
    V = P - P @ later @ P
    last = own.predicted[-1]
    _narrow(V, own, A, C, Q, R)
    total = V.sum(0) + (T - n) * last - last @ steady @ last
    crossed = (after @ own.closed[: n - 1] @ P[: n - 1]).sum(0) + steady @ own.closed[-1] @ last
    noise = (T - 1) * Q - Q @ (after.sum(0) + steady) @ Q
    V_last = V[-1] if n == T else last - last @ info[-1] @ last
    return SmoothedSums(V[0], V_last, (total + total.T) / 2, (noise + noise.T) / 2, -Q @ crossed)


def _backwards(info: Array, closed: Array, N: Array) -> Array:
    """N_{-1}, N_0, ..., N_{n-1} from the last one, (n + 1, D, D).

    Many steps are taken in chunks side by side, of which each makes S + Φᵀ N Φ of the N behind it.
    """
    n, D = closed.shape[:2]
    L = math.isqrt(n)
    M = n // L if n > LONG else 0
    rest = n - M * L
    found = np.empty((n + 1, D, D))
    found[n] = N
    if M:
        own, own_info = (x[rest:].reshape(M, L, D, D) for x in (closed, info))
        turned = own.swapaxes(2, 3)
        S, Phi = np.zeros((M, D, D)), np.broadcast_to(np.eye(D), (M, D, D))
        for i in reversed(range(L)):
            S, Phi = own_info[:, i] + turned[:, i] @ S @ own[:, i], Phi @ own[:, i]
        ends = np.empty((M, D, D))
        for k in reversed(range(M)):
            ends[k] = N
            N = S[k] + Phi[k].T.dot(N).dot(Phi[k])
        inside = found[rest + 1 :].reshape(M, L, D, D)
        inside[:, -1] = ends
        for i in reversed(range(1, L)):
            inside[:, i - 1] = own_info[:, i] + turned[:, i] @ inside[:, i] @ own[:, i]
        found[rest] = N
    first, turned = closed[:rest], closed[:rest].swapaxes(1, 2)
    for own, back, add, place in zip(first[::-1], turned[::-1], info[:rest][::-1], found[:rest][::-1], strict=True):
        N = back.dot(N).dot(own)
        N += add
        place[...] = N
    return found


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


def _summed(M: Array, L: Array, m: int) -> tuple[Array, Array]:
    """N after m steps N ← M + Lᵀ N L from 0, and the sum of N after 1, ..., m steps."""
    N, total, Phi, size = (
        M,
        np.zeros_like(M),
        L,
        1,
    )  # after `size` steps, a power of 2; the sum is over 0..size-1 of them
    doubled = [(N, total, Phi)]
    while 2 * size <= m:
        if abs(Phi.item(0)) < FADED and float(abs(Phi).max()) < FADED:  # N is the limit
            return N, total + (m - size + 1) * N
        turned = Phi.T
        total = total + size * N + turned.dot(total).dot(Phi)
        N, Phi = N + turned.dot(N).dot(Phi), Phi.dot(Phi)
        doubled.append((N, total, Phi))
        size *= 2
    N, total, Phi = np.zeros_like(M), np.zeros_like(M), np.eye(len(M))
    for k, (own, own_total, power) in enumerate(doubled):
        if m >> k & 1:
            turned = Phi.T
            total = total + (1 << k) * N + turned.dot(own_total).dot(Phi)
            N, Phi = N + turned.dot(own).dot(Phi), Phi.dot(power)
    return N, total + N
