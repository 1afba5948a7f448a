"""Sums over the smoothed means of a time-invariant chain, by blocks of steps.

Both recursions of block_matrices.py, of the predicted means a forwards and of r backwards, are solved in blocks of L
steps: one product with the block's matrix gives all of its z from its own data and the a at its beginning, and what a
block inherits obeys the same recursion with L^L. All of a block is linear in v = (a, r, z) of that block, a before its
first step and r behind its last one, so the sums are

    Σ (x, r, u)(x, r, u)ᵀ = Σ_blocks Bᵀ (Σ_sequences v vᵀ) B

and no smoothed mean is formed. Blocks at steps where gains still move have matrices B of their own. Few sequences are
solved by products over all blocks at once, many of them (`MANY`) block after block.

Shapes: M blocks of L steps, S sequences, D state dims, P cells; m blocks have matrices of their own.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_em.state_space.block_matrices import backward, forward
from pyro_em.state_space.riccati import Gains
from pyro_em.state_space.scan import scan

Array = NDArray[np.float64]
_memory = threading.local()  # pages that are new at every call cost as much as what is written to them
KEPT = 2**27  # bytes of an array that is kept
MANY = 32


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

    `rows` (M, S, D + L·P) has room for what the blocks inherit; of many sequences it is (M, D + L·P, S).
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
        body = y[:, cut:].reshape(S, M, L * P)
        if S >= MANY:
            rows = np.empty((M, D + L * P, S))
            rows[:, D:] = body.transpose(1, 2, 0)
        else:
            rows = np.empty((M, S, D + L * P))
            rows[:, :, D:] = body.swapaxes(0, 1)
        found = Blocks(np.ascontiguousarray(y[:, :cut].swapaxes(0, 1)), rows, L)
        _memory.__dict__["blocks"] = (y, D, found) if rows.nbytes <= KEPT else None
        return found


@dataclass(frozen=True)
class Sums:
    """Σ w (1, x, r, u)(1, x, r, u)ᵀ over all steps and sequences, (1 + 2D + P)², and Σ w.

    `first` and `last` are (x, r, u) of every sequence at these steps, (S, 2D + P).
    """

    total: Array
    count: float
    first: Array
    last: Array


@dataclass(frozen=True)
class _Solved:
    """v = (a, r, z) of blocks, 2D + L·P entries each."""

    squares: Array  # Σ |z|² of every sequence, (S,)
    products: Array  # Σ w v vᵀ over the blocks with one matrix, (m, ·, ·)
    sums: Array  # Σ w v over them, (m, ·), or over the sequences of every block, (M, ·)
    first: Array  # v of the first block and of the last one, (S, ·)
    last: Array
    before: Array  # r before the first block, (S, D)


def smoothed(
    own: Gains, data: Blocks, A: Array, C: Array, w: Array | None = None, path: Array | None = None
) -> tuple[Array, Sums]:
    """Σ_t |z_t|² of every sequence, and sums of (x, r_t, u_t), sequences weighted by w (S,).

    :param path: what the data are deviations from at x, (T, D); it is added to x.
    """
    n, (D, P) = len(own), own.gains.shape[1:]
    L, (cut, S, _) = data.length, data.lead.shape
    M, width = len(data.rows), 2 * D + P
    state, lead = np.zeros((S, D)), np.empty((cut, S, D + P))
    for t in range(cut):
        g = min(t, n - 1)
        lead[t, :, :D] = state
        lead[t, :, D:] = (data.lead[t] - state @ C.T) @ own.whiteners[g].T
        state = state @ own.closed[g].T + data.lead[t] @ own.gains[g].T
    squares = np.einsum("tsp,tsp->s", lead[:, :, D:], lead[:, :, D:])
    r, total = np.zeros((S, D)), np.zeros((1 + width, 1 + width))
    ends: list[Array] = []  # (x, r, u) at the first step of the blocks, and at the last
    if M:
        own_blocks = min(M, max(0, -(-(n - 1 - cut) // L)) + 1)  # the last of these serves all later ones
        steps = np.minimum(cut + np.arange(own_blocks)[:, None] * L + np.arange(L), n - 1)
        solve = _in_turn if S >= MANY else _at_once
        back, end = backward(own, A, C, steps)
        found = solve(data.rows, *forward(own, C, steps), end, state, w, path is not None)
        squares, r = squares + found.squares, found.before
        total[1:, 1:] = back.reshape(-1, width).T @ (found.products @ back).reshape(-1, width)
        of_steps = _product(found.sums[:, None], back, "sums").reshape(-1, width)
        total[0, 1:] = of_steps.sum(0)
        if path is not None:
            _add_path(total, path[cut:], of_steps, float(S if w is None else w.sum()))
        ends = [found.first @ back[0, :, :width], found.last @ back[-1, :, -width:]]
    out = np.empty((cut, S, width))
    for t in range(cut - 1, -1, -1):
        g = min(t, n - 1)
        whitened = lead[t, :, D:] @ own.whiteners[g]
        out[t, :, D : 2 * D] = r
        out[t, :, 2 * D :] = whitened - r @ own.gains[g]
        r = whitened @ C + r @ own.closed[g]
        out[t, :, :D] = lead[t, :, :D] + r @ own.predicted[g]
    if path is not None:
        out[..., :D] += path[:cut, None]
        for x, t in zip(ends, (cut, -1), strict=False):
            x[:, :D] += path[t]
    if cut:
        flat = out.reshape(-1, width)
        heavy = flat if w is None else (out * w[:, None]).reshape(-1, width)
        total[1:, 1:] += heavy.T @ flat
        total[0, 1:] += heavy.sum(0)
        ends = [out[0], ends[-1] if M else out[-1]]
    total[1:, 0] = total[0, 1:]
    return squares, Sums(total, float(S if w is None else w.sum()), *ends)


def _add_path(total: Array, path: Array, sums: Array, count: float) -> None:
    """What adding `path` (T, D) to x adds to the sums, those of x, r, u over sequences being `sums` (T, ·)."""
    x = slice(1, 1 + path.shape[1])
    crossed = path.T @ sums
    total[x, 1:] += crossed
    total[1:, x] += crossed.T
    total[x, x] += count * path.T @ path
    total[0, x] += count * path.sum(0)


def _at_once(
    rows: Array, to_z: Array, end: Array, back_end: Array, state: Array, w: Array | None, all_sums: bool
) -> _Solved:
    """By products over all blocks; `state` is a before the first one, (S, D)."""
    (M, S, _), m, D = rows.shape, len(end), state.shape[1]
    both = _scratch("both", M, S, D + rows.shape[2])
    starts, later, z = both[..., :D], both[..., D : 2 * D], both[..., 2 * D :]
    _inherit(starts, _product(rows[..., D:], end[:, D:], "ends"), end[:, :D], state)
    rows[..., :D] = starts
    _product(rows, to_z, z)
    step = _product(z, back_end[:, D:], "ends")
    _inherit(later, step, back_end[:, :D], np.zeros_like(state), reverse=True)
    heavy = both if w is None else both * w[:, None]
    G = np.empty((m, *both.shape[2:] * 2))
    np.matmul(heavy[: m - 1].swapaxes(1, 2), both[: m - 1], out=G[:-1])
    np.matmul(_flat(heavy[m - 1 :]).T, _flat(both[m - 1 :]), out=G[-1])
    each = M if all_sums else m - 1
    sums = np.empty((M if all_sums else m, both.shape[2]))
    ones = np.ones((M - m + 1) * S)  # numpy's own sums over a long first dim take five times as long
    np.matmul(ones[:S], heavy[:each], out=sums[:each])
    if not all_sums:
        np.matmul(ones, _flat(heavy[m - 1 :]), out=sums[-1])
    squares = np.einsum("msp,msp->s", z, z)
    return _Solved(squares, G, sums, both[0], both[-1], later[0] @ back_end[0, :D] + step[0])


def _in_turn(
    rows: Array, to_z: Array, end: Array, back_end: Array, state: Array, w: Array | None, all_sums: bool
) -> _Solved:
    """Block after block, sequences in the last dim: what is made of one is still in the cache for the next."""
    (M, _, S), m, D = rows.shape, len(end), state.shape[1]
    to_z, end, back_end = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (to_z, end, back_end))
    both = _scratch("both", M, D + rows.shape[1], S)
    rows[0, :D] = state.T
    for k in range(M - 1):
        np.matmul(end[min(k, m - 1)], rows[k], out=rows[k + 1, :D])
    both[:, :D] = rows[:, :D]
    z = both[:, 2 * D :]
    np.matmul(to_z[:-1], rows[: m - 1], out=z[: m - 1])
    np.matmul(to_z[-1], rows[m - 1 :], out=z[m - 1 :])
    both[-1, D : 2 * D] = 0.0
    for k in range(M - 1, 0, -1):
        np.matmul(back_end[min(k, m - 1)], both[k, D:], out=both[k - 1, D : 2 * D])
    heavy = both if w is None else both * w
    G, sums = np.matmul(heavy, both.swapaxes(1, 2)), heavy @ np.ones(S)
    G = np.concatenate([G[: m - 1], G[m - 1 :].sum(0, keepdims=True)])
    if not all_sums:
        sums = np.concatenate([sums[: m - 1], sums[m - 1 :].sum(0, keepdims=True)])
    squares = np.einsum("mps,mps->s", z, z)
    return _Solved(squares, G, sums, both[0].T, both[-1].T, (back_end[0] @ both[0, D:]).T)


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
    return np.lib.stride_tricks.as_strided(x, (M * S, width), (x.strides[1 if S > 1 else 0], x.strides[2]))


def _inherit(out: Array, own: Array, powers: Array, start: Array, reverse: bool = False) -> None:
    """What every block begins with: it adds its own (M, S, D) to what it inherits times its power."""
    M, m = len(own), len(powers)
    state = start
    order = range(M - 1, -1, -1) if reverse else range(M)
    if M - m > 64:  # the blocks whose matrices are alike, by blocks of blocks
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
