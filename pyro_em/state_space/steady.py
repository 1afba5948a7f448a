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
    # `dot` rather than `@`: on matrices this small the ufunc costs more than the product.
    found = _Covariances([], [], [], [], False)
    eye, zero = np.eye(len(P)), np.zeros((len(P), len(C)))
    A, C = np.ascontiguousarray(A), np.ascontiguousarray(C)
    AT, CT = np.ascontiguousarray(A.T), np.ascontiguousarray(C.T)
    for t in range(T):
        predicted = P
        if t == 0 and first_unseen:
            K, factor = zero, np.eye(len(C))
        else:
            CP = C.dot(P)
            factor, failed = dpotrf(CP.dot(CT) + R, lower=1, clean=1)
            if failed:
                raise SingularInnovation(t)
            K = dpotrs(factor, CP, lower=1)[0].T
            keep = eye - K.dot(C)
            P = keep.dot(P).dot(keep.T) + K.dot(R).dot(K.T)
            P = (P + P.T) / 2
        found.filtered.append(P)
        found.predicted.append(predicted)
        found.gains.append(K)
        found.factors.append(factor)
        P = A.dot(P).dot(AT) + Q
        if t > first_unseen and abs(P - predicted).max() <= STEADY * abs(P).max():
            return _Covariances(found.filtered, found.predicted, found.gains, found.factors, True)
    return found


@dataclass(frozen=True)
class _Backward:
    """Smoother gains G and the rest covariances B of steps 0..n-1, (n, D, D): V_t = G V_{t+1} Gᵀ + B."""

    gains: Array
    rests: Array


def _backward(found: _Covariances, A: Array, Q: Array, num: int) -> _Backward:
    P = np.stack(found.filtered[:num]) if num else np.zeros((0, *A.shape))
    following = A @ P @ A.T + Q
    G = gain(*map(torch.from_numpy, (P, np.ascontiguousarray(A), following))).numpy()
    keep = np.eye(len(A)) - G @ A
    return _Backward(G, keep @ P @ keep.swapaxes(1, 2) + G @ Q @ G.swapaxes(1, 2))


def _smoothed_sums(found: _Covariances, back: _Backward, A: Array, T: int) -> tuple[Array, Array, Array, Array, Array]:
    """V_0, V_{T-1}, and sums over steps: Σ V_t, Σ Cov(x_t, x_{t-1}), Σ Cov(x_t - A x_{t-1}).

    With x_{t-1} = G x_t + ε the residual is (I - AG) x_t - Aε: a sum of squares.
    """
    n = len(found)
    V = last = found.filtered[-1]
    smoothed, which, times = [], [], []  # V_{t+1}, number of its gain, and how many steps look like this one
    gains, rests = list(back.gains), list(back.rests)
    turned = [np.ascontiguousarray(G.T) for G in gains]
    t = T - 2
    while t >= 0:
        i = min(t, n - 1)
        before = gains[i].dot(V).dot(turned[i]) + rests[i]
        settled = t > n and abs(before - V).max() <= STEADY * abs(before).max()
        smoothed.append(V)
        which.append(i)
        times.append(t - n + 1 if settled else 1)
        V, t = before, t - times[-1]
    if not smoothed:
        return V, last, V, np.zeros_like(V), np.zeros_like(V)
    all_V, w = np.stack(smoothed), np.array(times, dtype=float)
    G, B = back.gains[which], back.rests[which]
    VG = all_V @ G.swapaxes(1, 2)
    move = np.eye(len(A)) - A @ G
    own = move @ all_V @ move.swapaxes(1, 2) + A @ B @ A.T
    total = last + np.tensordot(w, G @ VG + B, 1)
    return V, last, (total + total.T) / 2, np.tensordot(w, VG, 1), np.tensordot(w, own, 1)


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
    y = chain.y.numpy() - d if d.any() else chain.y.numpy()
    S, T, _ = y.shape
    late = int(chain.first_unseen)
    found = _filter(P0, A, Q, C, R, T, bool(late))
    back = _backward(found, A, Q, min(len(found), T - 1))
    filtered = _filtered_means(found, y, mean, A, b, C)
    predicted = np.empty_like(filtered)
    predicted[:, 0] = mean
    np.add(_rows(filtered, A)[:, :-1], b, out=predicted[:, 1:])
    innovations = _rows(predicted, C)
    evidence = _log_evidence(found, np.subtract(y, innovations, out=innovations), late)
    x = _smoothed_means(found, back, filtered, predicted)
    V0, VT, total, lag, residual = _smoothed_sums(found, back, A, T)
    w = np.ones(S) if weight is None else weight.double().numpy()
    W = float(w.sum())
    r0 = x[:, :1] - mean
    none = np.zeros((S, 1, 0))
    before = x[:, :-1]
    moved = _rows(x, A)[:, :-1]
    moved += b
    r = np.subtract(x[:, 1:], moved, out=moved)
    initial = _sums(w, r0, none, W * V0, np.zeros((len(A), 0)), np.zeros((0, 0)))
    earlier = W * (total - VT)
    transition = _sums(w, r, before, W * residual, W * lag - A @ earlier, earlier)
    means = _rows(x, C)
    e = np.subtract(y, means, out=means)

    def seen(steps: slice, own: Array) -> LinearMoments:
        return _sums(w, e[:, steps], x[:, steps], C @ own @ C.T, -C @ own, own)

    first = seen(slice(0, 1 - late), (1 - late) * W * V0)
    return ChainMoments(torch.from_numpy(evidence), initial, transition, seen(slice(1, T), W * (total - V0)), first)


def _rows(x: Array, M: Array) -> Array:
    """M x for every row of x (S, T, D), as one product."""
    return (x.reshape(-1, x.shape[-1]) @ M.T).reshape(*x.shape[:2], len(M))


def _filtered_means(found: _Covariances, y: Array, mean: Array, A: Array, b: Array, C: Array) -> Array:
    """E[x_t | y_0..y_t], (S, T, D): x_t = F_t x_{t-1} + K_t y_t + (I - K_t C) b with F_t = (I - K_t C) A."""
    n, (S, T, P) = len(found), y.shape
    gains = np.stack(found.gains)
    keep = np.eye(len(A)) - gains @ C
    F = np.ascontiguousarray((keep @ A).swapaxes(1, 2))
    first = np.ascontiguousarray(y[:, :n].swapaxes(0, 1)) @ gains.swapaxes(1, 2) + (keep @ b)[:, None]  # (n, S, D)
    first[0] += keep[0] @ (mean - b)
    for t in range(1, n):
        first[t] += first[t - 1].dot(F[t])
    x = np.empty((S, T, len(A)))
    x[:, :n] = first.swapaxes(0, 1)
    if n < T:
        x[:, n:] = (y[:, n:].reshape(-1, P) @ gains[-1].T + keep[-1] @ b).reshape(S, T - n, -1)
        x[:, n] += x[:, n - 1] @ F[-1]
        _scan(x[:, n:], np.ascontiguousarray(F[-1].T))
    return x


def _smoothed_means(found: _Covariances, back: _Backward, filtered: Array, predicted: Array) -> Array:
    """E[x_t | all y], (S, T, D): x_t = G_t x_{t+1} + (filtered_t - G_t predicted_{t+1})."""
    S, T, D = filtered.shape
    n = min(len(found), T - 1)
    x = filtered.copy()
    if T == 1:
        return x
    x[:, n - 1 : -1] -= (predicted[:, n:].reshape(-1, D) @ back.gains[-1].T).reshape(S, T - n, D)
    _scan(x[:, n - 1 :], back.gains[-1], reverse=True)
    turned = np.ascontiguousarray(back.gains.swapaxes(1, 2))
    first = np.ascontiguousarray(x[:, : n - 1].swapaxes(0, 1))
    first -= np.ascontiguousarray(predicted[:, 1:n].swapaxes(0, 1)) @ turned[: n - 1]
    after = x[:, n - 1]
    for t in range(n - 2, -1, -1):
        first[t] += after.dot(turned[t])
        after = first[t]
    x[:, : n - 1] = first.swapaxes(0, 1)
    return x


def _log_evidence(found: _Covariances, innovations: Array, late: int) -> Array:
    """Σ_t log N(innovation_t; 0, S_t) of every sequence, over the steps from `late` on."""
    n, (S, T, P) = len(found), innovations.shape
    factors = np.stack(found.factors)
    inverse = np.linalg.inv(factors).swapaxes(1, 2)
    z = np.ascontiguousarray(innovations[:, late:n].swapaxes(0, 1)) @ inverse[late:]
    squares = (z * z).sum((0, 2))
    tail = (innovations[:, n:].reshape(-1, P) @ inverse[-1]).reshape(S, -1)
    squares += np.einsum("st,st->s", tail, tail)
    logs = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
    half_log_det = logs[late:].sum() + (T - n) * logs[-1]
    return -0.5 * squares - half_log_det - 0.5 * LOG_2PI * P * (T - late)


def _sums(w: Array, r: Array, parents: Array, square: Array, cross: Array, parents_square: Array) -> LinearMoments:
    """Weighted sums over sequences and steps; the last three are the parts of the covariances."""
    S, T, V = r.shape
    both = np.concatenate([r, parents], 2).reshape(S * T, V + parents.shape[2])
    heavy = both if bool((w == 1).all()) else both * np.repeat(w, T)[:, None]
    products, sums = heavy.T @ both, heavy.sum(0)
    parts = (
        np.array(w.sum() * T),
        sums[:V],
        products[:V, :V] + square,
        products[:V, V:] + cross,
        sums[V:],
        products[V:, V:] + parents_square,
    )
    return LinearMoments(*(torch.from_numpy(np.ascontiguousarray(x)).reshape(1, 1, *x.shape) for x in parts))
