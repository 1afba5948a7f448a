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
    """Data cut into `lead` single steps (lead, S, P) and M blocks.

    `rows` (M, S, D + L·P) has room for what the blocks inherit.
    """

    lead: Array
    rows: Array
    length: int

    @staticmethod
    def of(y: Array, D: int) -> Blocks:
        """Of data (S, T, P). Those of an EM run are the same object at every step, and are cut once."""
        known: tuple[Array, int, Blocks] | None = _memory.__dict__.get("blocks")
        if known is not None and known[0] is y and known[1] == D:
            return known[2]
        S, T, P = y.shape
        L = 4 if S > 16 else 8
        M = T // L
        cut = T - M * L
        rows = np.empty((M, S, D + L * P))
        rows[:, :, D:] = y[:, cut:].reshape(S, M, L * P).swapaxes(0, 1)
        found = Blocks(np.ascontiguousarray(y[:, :cut].swapaxes(0, 1)), rows, L)
        _memory.__dict__["blocks"] = (y, D, found) if rows.nbytes <= KEPT else None
        return found


def smoothed(own: Gains, data: Blocks, A: Array, C: Array) -> tuple[Array, tuple[Array, Array]]:
    """Σ_t |z_t|² of every sequence, and (x, r_t, u_t) at every step: (lead, S, ·) and (M, S, L, ·)."""
    n, (D, P) = len(own), own.gains.shape[1:]
    L, (cut, S, _) = data.length, data.lead.shape
    M = len(data.rows)
    state, lead = np.zeros((S, D)), np.empty((cut, S, D + P))
    for t in range(cut):
        g = min(t, n - 1)
        lead[t, :, :D] = state
        lead[t, :, D:] = (data.lead[t] - state @ C.T) @ own.whiteners[g].T
        state = state @ own.closed[g].T + data.lead[t] @ own.gains[g].T
    squares = np.einsum("tsp,tsp->s", lead[:, :, D:], lead[:, :, D:])
    r, body = np.zeros((S, D)), np.empty((0, S, L, 2 * D + P))
    if M:
        own_blocks = min(M, max(0, -(-(n - 1 - cut) // L)) + 1)  # the last of these serves all later ones
        steps = np.minimum(cut + np.arange(own_blocks)[:, None] * L + np.arange(L), n - 1)
        to_z, end = _forward(own, C, steps)
        both = _scratch("both", M, S, 2 * D + L * P)  # what is inherited from before and from behind, and z
        starts, later, z = both[..., :D], both[..., D : 2 * D], both[..., 2 * D :]
        _inherit(starts, _product(data.rows[..., D:], end[:, D:], "ends"), end[:, :D], state)
        data.rows[..., :D] = starts
        _product(data.rows, to_z, z)
        squares += np.einsum("msp,msp->s", z, z)
        back, end = _backward(own, A, C, steps)
        ends = _product(z, end[:, D:], "ends")
        _inherit(later, ends, end[:, :D], r, reverse=True)
        r = later[0] @ end[0, :D] + ends[0]
        body = _product(both, back, "body").reshape(M, S, L, 2 * D + P)
    out = np.empty((cut, S, 2 * D + P))
    for t in range(cut - 1, -1, -1):
        g = min(t, n - 1)
        w = lead[t, :, D:] @ own.whiteners[g]
        out[t, :, D : 2 * D] = r
        out[t, :, 2 * D :] = w - r @ own.gains[g]
        r = w @ C + r @ own.closed[g]
        out[t, :, :D] = lead[t, :, :D] + r @ own.predicted[g]
    return squares, (out, body)


def _forward(own: Gains, C: Array, steps: Array) -> tuple[Array, Array]:
    """Matrices (m, D + L·P, ·) from a block's first a and its data to all z, and to the next block's a."""
    (m, L), (D, P) = steps.shape, own.gains.shape[1:]
    X = np.zeros((m, D + L * P, D))
    X[:, :D] = np.eye(D)
    to_z = np.zeros((m, D + L * P, L, P))
    for i in range(L):
        g, cells = steps[:, i], slice(D + i * P, D + (i + 1) * P)
        whitener = own.whiteners[g].swapaxes(1, 2)
        to_z[:, :, i] = -X @ (C.T @ whitener)
        to_z[:, cells, i] = whitener
        X = X @ own.closed[g].swapaxes(1, 2)
        X[:, cells] = own.gains[g].swapaxes(1, 2)
    return to_z.reshape(m, D + L * P, L * P), X


def _backward(own: Gains, A: Array, C: Array, steps: Array) -> tuple[Array, Array]:
    """From a block's first a, r behind it and its z to all (x, r_t, u_t), (m, 2D + L·P, ·); from the last two to r
    before it, (m, D + L·P, D)."""
    (m, L), (D, P) = steps.shape, own.gains.shape[1:]
    rows = 2 * D + L * P
    X = np.zeros((m, rows, D))
    X[:, D : 2 * D] = np.eye(D)
    out = np.zeros((m, rows, L, 2 * D + P))
    for i in range(L - 1, -1, -1):
        g, cells = steps[:, i], slice(2 * D + i * P, 2 * D + (i + 1) * P)
        out[:, :, i, D : 2 * D] = X
        out[:, :, i, 2 * D :] = -X @ own.gains[g]
        out[:, cells, i, 2 * D :] += own.whiteners[g]
        X = X @ own.closed[g]
        X[:, cells] += own.whiteners[g] @ C
        out[:, :, i, :D] = X @ own.predicted[g]
    a = np.zeros((m, rows, D))
    a[:, :D] = np.eye(D)
    for i in range(L):  # in innovations: a ← A a + K F z
        g, cells = steps[:, i], slice(2 * D + i * P, 2 * D + (i + 1) * P)
        out[:, :, i, :D] += a
        a = a @ A.T
        a[:, cells] += own.factors[g].swapaxes(1, 2) @ own.gains[g].swapaxes(1, 2)
    return out.reshape(m, rows, L * (2 * D + P)), X[:, D:]


def _product(rows: Array, matrices: Array, to: str | Array) -> Array:
    """rows (M, S, ·) @ matrices (m, ·, ·) block by block, the last matrix serving all blocks after it."""
    (M, S, _), m = rows.shape, len(matrices)
    out = _scratch(to, M, S, matrices.shape[-1]) if isinstance(to, str) else to
    if m > 1:
        np.matmul(rows[: m - 1], matrices[:-1], out=out[: m - 1])
    flat, target = _flat(rows[m - 1 :]), _flat(out[m - 1 :])
    np.matmul(flat, matrices[-1], out=target)
    return out


def _flat(x: Array) -> Array:
    """Rows (M·S, ·) of an array that is contiguous but for its last dim: the same memory."""
    M, S, width = x.shape
    return np.lib.stride_tricks.as_strided(x, (M * S, width), (x.strides[1], x.strides[2]))


def _inherit(out: Array, own: Array, powers: Array, start: Array, reverse: bool = False) -> None:
    """What every block begins with: it adds its own (M, S, D) to what it inherits times its power."""
    M, m = len(own), len(powers)
    state = start
    order = range(M - 1, -1, -1) if reverse else range(M)
    if M - m > 64 and own.shape[1] < 32:  # the blocks whose matrices are alike, by blocks of blocks
        part, power = np.ascontiguousarray(own[m - 1 :].swapaxes(0, 1)), np.ascontiguousarray(powers[-1].T)
        if reverse:
            part[:, -1] += state @ powers[-1]
            solved = scan(part, power, reverse=True).swapaxes(0, 1)
            out[M - 1], out[m - 1 : M - 1] = state, solved[1:]
            state, order = solved[0], range(m - 2, -1, -1)
        else:
            for k in range(m - 1):
                out[k] = state
                state = state @ powers[k] + own[k]
            out[m - 1] = state
            part[:, 0] += state @ powers[-1]
            out[m:] = scan(part, power)[:, :-1].swapaxes(0, 1)
            return
    for k in order:
        out[k] = state
        state = state.dot(powers[min(k, m - 1)])
        state += own[k]
