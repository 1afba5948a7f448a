"""Moments of a time-invariant chain: covariances until they stop moving, then means by blocks of steps.

The covariances of a time-invariant chain do not depend on the data, are shared by all sequences, and converge
geometrically: they are iterated (small LAPACK calls) until a step moves them by no more than rounding, and are
the same from there on. With constant gains the filter and the smoother are linear recursions

    x_t = F x_{t-1} + u_t

and those are solved in blocks of L steps: one product with the block-triangular matrix of F⁰..F^(L-1) solves
every block from zero, the ends of the blocks obey the same recursion with F^L (solved alike), and one more
product adds what each block inherits. Only sums of moments are formed. `smoother.py` does the same step by
step for any chain and is what this file is tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotrs
from torch import Tensor

from pyro_em.state_space.linear_gaussian import Chain, ChainMoments, LinearMoments
from pyro_em.state_space.steps import LOG_2PI, SingularInnovation, gain

Array = NDArray[np.float64]
STEADY = 4 * np.finfo(np.float64).eps  # relative change of a covariance that is rounding
NEGLIGIBLE = 1e-25  # powers of F below this add nothing to any sum in float64


@dataclass(frozen=True)
class _Covariances:
    """Filter covariances of steps 0..n-1 (the last one's hold for all later steps)."""

    filtered: list[Array]
    predicted: list[Array]  # of the step itself; [0] is the initial covariance
    gains: list[Array]
    factors: list[Array]  # Cholesky factor of the innovation covariance (the identity at an unseen step)
    steady: bool

    def __len__(self) -> int:
        return len(self.filtered)


def _filter(P: Array, A: Array, Q: Array, C: Array, R: Array, T: int, first_unseen: bool) -> _Covariances:
    found = _Covariances([], [], [], [], False)
    eye, zero = np.eye(len(P)), np.zeros((len(P), len(C)))
    for t in range(T):
        predicted = P
        if t == 0 and first_unseen:
            K, factor = zero, np.eye(len(C))
        else:
            CP = C @ P
            factor, failed = dpotrf(CP @ C.T + R, lower=1, clean=1)
            if failed:
                raise SingularInnovation(t)
            K = dpotrs(factor, CP, lower=1)[0].T
            keep = eye - K @ C
            P = keep @ P @ keep.T + K @ R @ K.T
            P = (P + P.T) / 2
        found.filtered.append(P)
        found.predicted.append(predicted)
        found.gains.append(K)
        found.factors.append(factor)
        P = A @ P @ A.T + Q
        if t > first_unseen and abs(P - predicted).max() <= STEADY * abs(P).max():
            return _Covariances(found.filtered, found.predicted, found.gains, found.factors, True)
    return found


@dataclass(frozen=True)
class _Backward:
    """Smoother gains G, I - GA and the rest covariances B of steps 0..n-1: V_t = G V_{t+1} Gᵀ + B."""

    gains: list[Array]
    rests: list[Array]


def _backward(found: _Covariances, A: Array, Q: Array, num: int) -> _Backward:
    gains, rests = [], []
    eye = np.eye(len(A))
    for t in range(num):
        P = found.filtered[t]
        predicted = found.predicted[t + 1] if t + 1 < len(found) else A @ P @ A.T + Q
        factor, failed = dpotrf(predicted, lower=1)
        diagonal = factor.diagonal() ** 2
        if failed or (diagonal < 1e-10 * predicted.diagonal()).any():
            G = gain(torch.from_numpy(P), torch.from_numpy(A), torch.from_numpy(predicted)).numpy()
        else:
            G = dpotrs(factor, A @ P, lower=1)[0].T
        keep = eye - G @ A
        gains.append(G)
        rests.append(keep @ P @ keep.T + G @ Q @ G.T)
    return _Backward(gains, rests)


def _smoothed_sums(found: _Covariances, back: _Backward, A: Array, T: int) -> tuple[Array, Array, Array, Array, Array]:
    """V_0, V_{T-1}, and sums over steps: Σ V_t, Σ Cov(x_t, x_{t-1}), Σ Cov(x_t - A x_{t-1}).

    With x_{t-1} = G x_t + ε the residual is (I - AG) x_t - Aε: a sum of squares.
    """
    n = len(found)
    V = found.filtered[-1]
    last, total = V, V.copy()
    lag, residual = np.zeros_like(V), np.zeros_like(V)
    eye = np.eye(len(A))
    t = T - 2
    while t >= 0:
        i = min(t, n - 1)
        G, B = back.gains[i], back.rests[i]
        move = eye - A @ G
        own = move @ V @ move.T + A @ B @ A.T
        VG = V @ G.T
        before = G @ VG + B
        before = (before + before.T) / 2
        settled = t > n and abs(before - V).max() <= STEADY * abs(before).max()
        times = t - n + 1 if settled else 1  # steps n..t all look like this one
        total += times * before
        lag += times * VG
        residual += times * own
        V, t = before, t - times
    return V, last, total, lag, residual


def _scan(u: Array, F: Array, reverse: bool = False) -> Array:
    """x_t = F x_{t-1} + u_t along dim 1 of u (S, n, D), or x_t = F x_{t+1} + u_t; u is used up."""
    S, n, D = u.shape
    L = max(4, 64 // D)
    if n <= 2 * L:
        steps = range(n - 2, -1, -1) if reverse else range(1, n)
        for t in steps:
            u[:, t] += u[:, t + 1 if reverse else t - 1] @ F.T
        return u
    powers = [np.eye(D), F]
    while len(powers) <= L:
        powers.append(powers[-1] @ F)
    M = n // L
    # Steps that do not fill a block come last in the direction of the recursion.
    rest = n - M * L
    body = u[:, rest:] if reverse else u[:, : M * L]
    lags = np.subtract.outer(range(L), range(L))
    table = np.stack([*(p.T for p in powers[:L]), np.zeros((D, D))])
    blocks = table[np.where(lags >= 0, lags, L) if reverse else np.where(lags <= 0, -lags, L)]
    blocks = blocks.transpose(0, 2, 1, 3).reshape(L * D, L * D)
    solved = (body.reshape(S * M, L * D) @ blocks).reshape(S, M, L, D)
    far = powers[L]
    ends = np.ascontiguousarray(solved[:, :, 0] if reverse else solved[:, :, -1])
    if abs(far).max() > NEGLIGIBLE:
        ends = _scan(ends, np.where(abs(far) > NEGLIGIBLE, far, 0.0), reverse)
    inherit = np.concatenate([powers[L - i if reverse else i + 1].T for i in range(L)], 1)
    wide = solved.reshape(S, M, L * D)
    if reverse:
        wide[:, :-1] += ends[:, 1:] @ inherit
    else:
        wide[:, 1:] += ends[:, :-1] @ inherit
    body[...] = wide.reshape(S, M * L, D)
    for t in range(rest):
        if reverse:
            u[:, rest - 1 - t] += u[:, rest - t] @ F.T
        else:
            u[:, M * L + t] += u[:, M * L + t - 1] @ F.T
    return u


def steady_moments(chain: Chain, weight: Tensor | None = None) -> ChainMoments:
    """Moments summed over steps and sequences (weighted by `weight` (S,)), leading dims (1, 1).

    For chains of which *all* arguments are shared by steps and sequences, offsets too.
    :raises SingularInnovation: where an observed step has no density given the past.
    """
    mean, P0 = chain.mean[0].numpy(), chain.covariance[0].numpy()
    A, b, Q, C, d, R = (x[0, 0].numpy() for x in (chain.A, chain.b, chain.Q, chain.C, chain.d, chain.R))
    y = chain.y.numpy() - d
    S, T, _ = y.shape
    late = int(chain.first_unseen)
    found = _filter(P0, A, Q, C, R, T, bool(late))
    back = _backward(found, A, Q, min(len(found), T - 1))
    filtered = _filtered_means(found, y, mean, A, b, C)
    predicted = np.empty_like(filtered)
    predicted[:, 0] = mean
    predicted[:, 1:] = filtered[:, :-1] @ A.T + b
    evidence = _log_evidence(found, y - predicted @ C.T, late)
    x = _smoothed_means(found, back, filtered, predicted)
    V0, VT, total, lag, residual = _smoothed_sums(found, back, A, T)
    w = np.ones(S) if weight is None else weight.double().numpy()
    W = float(w.sum())
    r0 = x[:, :1] - mean
    none = np.zeros((S, 1, 0))
    before = x[:, :-1]
    r = x[:, 1:] - before @ A.T - b
    initial = _sums(w, r0, none, W * V0, np.zeros((len(A), 0)), np.zeros((0, 0)))
    earlier = W * (total - VT)
    transition = _sums(w, r, before, W * residual, W * lag - A @ earlier, earlier)
    seen = x[:, late:]
    e = y[:, late:] - seen @ C.T
    own = W * (total - V0 if late else total)
    observation = _sums(w, e, seen, C @ own @ C.T, -C @ own, own)
    return ChainMoments(torch.from_numpy(evidence), initial, transition, observation)


def _filtered_means(found: _Covariances, y: Array, mean: Array, A: Array, b: Array, C: Array) -> Array:
    """E[x_t | y_0..y_t], (S, T, D): x_t = F_t x_{t-1} + K_t y_t + (I - K_t C) b with F_t = (I - K_t C) A."""
    n, (S, T, _) = len(found), y.shape
    gains = np.stack(found.gains)
    keep = np.eye(len(A)) - gains @ C
    F = keep @ A
    x = np.empty((S, T, len(A)))
    x[:, :n] = (y[:, :n].swapaxes(0, 1) @ gains.swapaxes(1, 2)).swapaxes(0, 1) + keep @ b
    x[:, 0] += keep[0] @ (mean - b)
    for t in range(1, n):
        x[:, t] += x[:, t - 1] @ F[t].T
    if n < T:
        x[:, n:] = y[:, n:] @ gains[-1].T + keep[-1] @ b
        x[:, n] += x[:, n - 1] @ F[-1].T
        _scan(x[:, n:], F[-1])
    return x


def _smoothed_means(found: _Covariances, back: _Backward, filtered: Array, predicted: Array) -> Array:
    """E[x_t | all y], (S, T, D): x_t = G_t x_{t+1} + (filtered_t - G_t predicted_{t+1})."""
    T = filtered.shape[1]
    n = min(len(found), T - 1)
    x = filtered.copy()
    if T == 1:
        return x
    G = np.stack(back.gains)
    x[:, : n - 1] -= (predicted[:, 1:n].swapaxes(0, 1) @ G[: n - 1].swapaxes(1, 2)).swapaxes(0, 1)
    x[:, n - 1 : -1] -= predicted[:, n:] @ G[-1].T
    _scan(x[:, n - 1 :], G[-1], reverse=True)
    for t in range(n - 2, -1, -1):
        x[:, t] += x[:, t + 1] @ G[t].T
    return x


def _log_evidence(found: _Covariances, innovations: Array, late: int) -> Array:
    """Σ_t log N(innovation_t; 0, S_t) of every sequence, over the steps from `late` on."""
    n, (_, T, P) = len(found), innovations.shape
    inverse = np.stack([np.linalg.inv(f) for f in found.factors])
    z = innovations[:, late:n].swapaxes(0, 1) @ inverse[late:].swapaxes(1, 2)
    squares = (z * z).sum((0, 2))
    tail = innovations[:, n:] @ inverse[-1].T
    squares += np.einsum("stp,stp->s", tail, tail)
    half_log_det = np.log(np.stack([f.diagonal() for f in found.factors[late:]])).sum()
    half_log_det += (T - n) * np.log(found.factors[-1].diagonal()).sum()
    return -0.5 * squares - half_log_det - 0.5 * LOG_2PI * P * (T - late)


def _sums(w: Array, r: Array, parents: Array, square: Array, cross: Array, parents_square: Array) -> LinearMoments:
    """Weighted sums over sequences and steps; the last three are the parts of the covariances."""
    S, T, V = r.shape
    D = parents.shape[-1]
    even = bool((w == 1).all())
    flat, s = r.reshape(S * T, V), parents.reshape(S * T, D)
    weighted = flat if even else (r * w[:, None, None]).reshape(S * T, V)
    heavy = s if even else (parents * w[:, None, None]).reshape(S * T, D)
    parts = (
        np.array(w.sum() * T),
        weighted.sum(0),
        weighted.T @ flat + square,
        weighted.T @ s + cross,
        heavy.sum(0),
        heavy.T @ s + parents_square,
    )
    return LinearMoments(*(torch.from_numpy(np.ascontiguousarray(x)).reshape(1, 1, *x.shape) for x in parts))
