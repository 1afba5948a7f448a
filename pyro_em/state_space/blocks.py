"""Means of a time-invariant chain, filtered and smoothed by blocks of steps.

With e_t = y_t - C a_t at the predicted means a_t, z_t = F_t⁻¹ e_t whitened, and K_t, L_t, P_t of riccati.py

    a_{t+1} = L_t a_t + K_t y_t,     r_{t-1} = Cᵀ F_t⁻ᵀ z_t + L_tᵀ r_t,     E x_t = a_t + P_t r_{t-1}

and u_t = F_t⁻ᵀ z_t - K_tᵀ r_t (Koopman 1993). Both recursions are solved in blocks of L steps: one product with the
block's matrix gives all of its steps from its own data, and what it inherits at its end obeys the same recursion with
L^L. Blocks at steps where gains still move have matrices of their own.

Shapes: M blocks of L steps, S sequences, D state dims, P cells; m blocks have matrices of their own.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_em.state_space.riccati import Gains
from pyro_em.state_space.scan import scan

Array = NDArray[np.float64]
_memory = threading.local()  # pages that are new at every call cost as much as what is written to them
KEPT = 2**27  # bytes of an array that is kept


def _scratch(name: str, *shape: int) -> Array:
    """An array to write to, which the next call with that name overwrites."""
    known: dict[str, Array] = _memory.__dict__
    found = known.get(name)
    if found is None or found.shape != shape:
        found = np.empty(shape)
        if found.nbytes <= KEPT:
            known[name] = found
    return found


@dataclass(frozen=True)
class Blocks:
    """Data cut into `lead` single steps and M blocks, (M, S, L·P)."""

    lead: Array  # (lead, S, P)
    blocks: Array
    length: int

    @staticmethod
    def of(y: Array) -> Blocks:
        """Of data (S, T, P)."""
        S, T, P = y.shape
        L = 4 if S > 16 else 8
        M = T // L
        cut = T - M * L
        body = _scratch("data", M, S, L * P)
        body[...] = y[:, cut:].reshape(S, M, L * P).swapaxes(0, 1)
        return Blocks(np.ascontiguousarray(y[:, :cut].swapaxes(0, 1)), body, L)


def smoothed(own: Gains, data: Blocks, C: Array) -> tuple[Array, tuple[Array, Array]]:
    """Σ_t |z_t|² of every sequence, and (x, r_t, u_t) at every step: (lead, S, ·) and (M, S, L, ·)."""
    n, (D, P) = len(own), own.gains.shape[1:]
    L, (cut, S, _) = data.length, data.lead.shape
    M = len(data.blocks)
    turned, gains = own.closed.swapaxes(1, 2), own.gains.swapaxes(1, 2)
    state, lead = np.zeros((S, D)), np.empty((cut, S, D + P))
    for t in range(cut):
        g = min(t, n - 1)
        lead[t, :, :D] = state
        lead[t, :, D:] = (data.lead[t] - state @ C.T) @ own.whiteners[g].T
        state = state @ turned[g] + data.lead[t] @ gains[g]
    own_blocks = min(M, max(0, -(-(n - 1 - cut) // L)) + 1)  # the last of these serves all later ones
    steps = np.minimum(cut + np.arange(own_blocks)[:, None] * L + np.arange(L), n - 1)
    squares = np.einsum("tsp,tsp->s", lead[:, :, D:], lead[:, :, D:])
    if not M:
        z = np.empty((0, S, L * P))
        ends = r = np.zeros((S, D))
    else:
        to_a, to_z, end = _forward(own, C, steps)
        starts = _inherited(_product("ends", data.blocks, end[:, D:]), end[:, :D], state)
        a = _product("a", data.blocks, to_a[:, D:], starts, to_a[:, :D])
        z = _product("z", data.blocks, to_z[:, D:], starts, to_z[:, :D])
        squares = squares + np.einsum("msp,msp->s", z, z)
        back, end = _backward(own, C, steps)
        later = _inherited(_product("ends", z, end[:, D:]), end[:, :D], np.zeros((S, D)), reverse=True)
        r = later[0] @ end[0, :D] + z[0] @ end[0, D:]
        ends = later
        body = _product("body", z, back[:, D:], ends, back[:, :D]).reshape(M, S, L, -1)
        body[..., :D] += a.reshape(M, S, L, D)
    if not M:
        body = np.empty((0, S, L, 2 * D + P))
    out = np.empty((cut, S, 2 * D + P))
    for t in range(cut - 1, -1, -1):
        g = min(t, n - 1)
        w = lead[t, :, D:] @ own.whiteners[g]
        out[t, :, D : 2 * D] = r
        out[t, :, 2 * D :] = w - r @ own.gains[g]
        r = w @ C + r @ own.closed[g]
        out[t, :, :D] = lead[t, :, :D] + r @ own.predicted[g]
    return squares, (out, body)


def _forward(own: Gains, C: Array, steps: Array) -> tuple[Array, Array, Array]:
    """Matrices (m, D + L·P, ·) from a block's first a and its data to all a, all z, and the next block's a."""
    (m, L), (D, P) = steps.shape, own.gains.shape[1:]
    X = np.zeros((m, D + L * P, D))
    X[:, :D] = np.eye(D)
    to_a, to_z = np.empty((m, D + L * P, L, D)), np.zeros((m, D + L * P, L, P))
    for i in range(L):
        g, cells = steps[:, i], slice(D + i * P, D + (i + 1) * P)
        whitener = own.whiteners[g].swapaxes(1, 2)
        to_a[:, :, i] = X
        to_z[:, :, i] = -X @ (C.T @ whitener)
        to_z[:, cells, i] = whitener
        X = X @ own.closed[g].swapaxes(1, 2)
        X[:, cells] = own.gains[g].swapaxes(1, 2)
    return to_a.reshape(m, D + L * P, L * D), to_z.reshape(m, D + L * P, L * P), X


def _backward(own: Gains, C: Array, steps: Array) -> tuple[Array, Array]:
    """From r after a block and its z to all (P_t r_{t-1}, r_t, u_t), and to r before it; (m, D + L·P, ·)."""
    (m, L), (D, P) = steps.shape, own.gains.shape[1:]
    X = np.zeros((m, D + L * P, D))
    X[:, :D] = np.eye(D)
    out = np.zeros((m, D + L * P, L, 2 * D + P))
    for i in range(L - 1, -1, -1):
        g, cells = steps[:, i], slice(D + i * P, D + (i + 1) * P)
        out[:, :, i, D : 2 * D] = X
        out[:, :, i, 2 * D :] = -X @ own.gains[g]
        out[:, cells, i, 2 * D :] += own.whiteners[g]
        X = X @ own.closed[g]
        X[:, cells] += own.whiteners[g] @ C
        out[:, :, i, :D] = X @ own.predicted[g]
    return out.reshape(m, D + L * P, L * (2 * D + P)), X


def _product(name: str, rows: Array, matrices: Array, more: Array | None = None, extra: Array | None = None) -> Array:
    """rows @ matrices (+ more @ extra) block by block, the last matrix serving all blocks after it."""
    (M, S, _), m = rows.shape, len(matrices)
    out = _scratch(name, M, S, matrices.shape[-1])
    pairs = [(rows, matrices)] if more is None or extra is None else [(rows, matrices), (more, extra)]
    for i, (x, matrix) in enumerate(pairs):
        parts = (
            (x[: m - 1], matrix[:-1], out[: m - 1]),
            (x[m - 1 :].reshape(-1, x.shape[-1]), matrix[-1], out[m - 1 :]),
        )
        for left, right, target in parts:
            target = target.reshape(*left.shape[:-1], out.shape[-1])
            if i:
                target += left @ right
            else:
                np.matmul(left, right, out=target)
    return out


def _inherited(own: Array, powers: Array, start: Array, reverse: bool = False) -> Array:
    """What every block begins with (M, S, D): each adds its own (M, S, D) to what it inherits times its power."""
    M, m = len(own), len(powers)
    out = np.empty_like(own)
    order = range(M - 1, -1, -1) if reverse else range(M)
    state = start
    if M - m > 64 and own.shape[1] < 32:  # the blocks whose matrices are alike, by blocks of blocks
        fixed = slice(m - 1, M)
        part = np.ascontiguousarray(own[fixed].swapaxes(0, 1))
        if not reverse:
            for k in range(m - 1):
                out[k] = state
                state = state @ powers[k] + own[k]
            out[m - 1] = state
            part[:, 0] += state @ powers[-1]
            out[m:] = scan(part, np.ascontiguousarray(powers[-1].T))[:, :-1].swapaxes(0, 1)
            return out
        part[:, -1] += state @ powers[-1]
        solved = scan(part, np.ascontiguousarray(powers[-1].T), reverse=True).swapaxes(0, 1)
        out[M - 1], out[m - 1 : M - 1] = state, solved[1:]
        state, order = solved[0], range(m - 2, -1, -1)
    for k in order:
        out[k] = state
        state = state @ powers[min(k, m - 1)] + own[k]
    return out
