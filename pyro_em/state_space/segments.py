"""Blocks of steps in a row, solved for v = (a, r, z) of each: a before its first step, r behind its last one, its z.

Forwards every block needs the a that it inherits, backwards the r:

    a' = (a, y) E,    z = (a, y) Z,    r' = (r, z) B        (matrices of block_matrices.py)

What is wanted of v is Σ |z|² of every sequence, Σ w v vᵀ and Σ w v. `Few` sequences are solved by products over all
blocks at once, of `Many` one block follows the other, with sequences in the last dim: what is made of one is still in
the cache for the next.

Shapes: M blocks of L steps with m matrices (m = M, or one for all), S sequences, D state dims, P cells; V = 2D + L·P
entries of v.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyro_em.state_space.block_matrices import Matrices
from pyro_em.state_space.scan import scan

Array = NDArray[np.float64]
_memory = threading.local()  # pages that are new at every call cost as much as what is written to them
KEPT = 2**27  # bytes of an array that is kept
SCANNED = 64  # blocks from which on what they inherit is found by blocks of blocks


def scratch(name: str, *shape: int) -> Array:
    """An array to write to, which the next call with that name overwrites."""
    known: dict[str, Array] = _memory.__dict__
    found = known.get(name)
    if found is None or found.shape != shape:
        found = np.empty(shape)
        if found.nbytes <= KEPT:
            known[name] = found
    return found


class Segment(Protocol):
    """The blocks of one segment; a and r are (S, D), or (D, S) of many sequences."""

    def ahead(self, a: Array) -> Array:
        """Forwards from a before its first step to a behind its last one."""
        ...

    def behind(self, r: Array) -> Array:
        """Backwards, after `ahead`, from r behind its last step to r before its first one."""
        ...

    def squares(self) -> Array:
        """Σ |z|² of every sequence, (S,), after `ahead`."""
        ...

    def sums(self) -> tuple[Array, Array]:
        """Σ w g gᵀ, (G, G), and Σ w g of every step (M·L, G), after `behind`."""
        ...

    def ends(self) -> tuple[Array, Array]:
        """g of the first step and of the last one, (S, G), after `behind`."""
        ...


class Few:
    """`rows` (M, S, D + L·P) has the data, and room for a."""

    def __init__(self, name: str, rows: Array, own: Matrices, w: Array | None) -> None:
        M, S, width = rows.shape
        self.rows, self.own, self.w, self.D = rows, own, w, own.end.shape[2]
        self.both = scratch(name, M, S, self.D + width)

    def ahead(self, a: Array) -> Array:
        D, own = self.D, self.own
        a = _inherit(self.both[..., :D], _product(self.rows[..., D:], own.end[:, D:]), own.end[:, :D], a)
        self.rows[..., :D] = self.both[..., :D]
        _product(self.rows, own.to_z, self.both[..., 2 * D :])
        return a

    def behind(self, r: Array) -> Array:
        D, back = self.D, self.own.back_end
        step = _product(self.both[..., 2 * D :], back[:, D:])
        return _inherit(self.both[::-1, :, D : 2 * D], step[::-1], back[::-1, :D], r)

    def squares(self) -> Array:
        z = self.both[..., 2 * self.D :]
        return np.einsum("msp,msp->s", z, z)

    def sums(self) -> tuple[Array, Array]:
        own, w = self.own, self.w
        x = self.both @ own.back if own.formed else self.both
        heavy = x if w is None else x * w[:, None]
        S, width = x.shape[1:]
        sums = heavy[:, 0] if S == 1 else np.ones(S) @ heavy
        if own.formed or len(own.back) == 1:
            products = (heavy.reshape(-1, width).T @ x.reshape(-1, width))[None]
        else:
            products = heavy.swapaxes(1, 2) @ x
        return (products[0], sums) if own.formed else of_moments(own, products, sums)

    def ends(self) -> tuple[Array, Array]:
        back, G = self.own.back, self.own.width
        return self.both[0] @ back[0, :, :G], self.both[-1] @ back[-1, :, -G:]


class Many:
    """`rows` (M, D + L·P, S) has the data, and room for a.

    v of all blocks stand in a row, so that a of the next block is the end of the z of one.
    """

    def __init__(self, name: str, rows: Array, own: Matrices, w: Array | None) -> None:
        M, width, S = rows.shape
        self.rows, self.own, self.w, self.D = rows, own, w, own.end.shape[2]
        self.V = V = width + self.D
        self.row = scratch(name, M * V + self.D, S)
        self.products = np.zeros((0, 0))
        self.of_blocks = np.zeros((0, 0))

    def ahead(self, a: Array) -> Array:
        D, V, row = self.D, self.V, self.row
        row[:D] = a
        for k, (step, given) in enumerate(zip(self._turned(self.own.to_z, self.own.end), self.rows, strict=False)):
            given[:D] = row[k * V : k * V + D]
            np.dot(step, given, row[k * V + 2 * D : k * V + V + D])
        return row[-D:]

    def behind(self, r: Array) -> Array:
        D, V, row = self.D, self.V, self.row
        for k, back in zip(range(len(self.rows) - 1, -1, -1), self._turned(self.own.back_end)[::-1], strict=False):
            row[k * V + D : k * V + 2 * D] = r
            r = back.dot(row[k * V + D : k * V + V])
        return r

    def squares(self) -> Array:
        z = self.row[: -self.D].reshape(len(self.rows), self.V, -1)[:, 2 * self.D :]
        return np.einsum("mps,mps->s", z, z)

    def sums(self) -> tuple[Array, Array]:
        own, w, flat = self.own, self.w, self.row[: -self.D]
        M, S = len(self.rows), flat.shape[1]
        x, formed = flat.reshape(M, self.V, S), own.formed
        if formed:
            back = np.ascontiguousarray(own.back.swapaxes(1, 2))
            x = np.matmul(back, x, out=scratch("formed", M, own.width, S))
        heavy = x if w is None else x * w
        products = np.matmul(heavy, x.swapaxes(1, 2))
        sums = (heavy.reshape(-1, S) @ np.ones(S)).reshape(M, -1)
        return (products.sum(0), sums) if formed else of_moments(own, products, sums)

    def ends(self) -> tuple[Array, Array]:
        back, G, V, D = self.own.back, self.own.width, self.V, self.D
        return self.row[:V].T @ back[0, :, :G], self.row[-D - V : -D].T @ back[-1, :, -G:]

    def _turned(self, *matrices: Array) -> list[Array]:
        """Those of every block, for columns."""
        turned = np.ascontiguousarray(np.concatenate(matrices, 2).swapaxes(1, 2))
        return list(turned) if len(turned) > 1 else [turned[0]] * len(self.rows)


def of_moments(own: Matrices, products: Array, sums: Array) -> tuple[Array, Array]:
    """Σ w g gᵀ and Σ w g of every step from those of v by block; where one matrix serves all, products may be added."""
    X, G = own.back, own.width
    if len(X) == 1:
        products = products.sum(0, keepdims=True)
        by_step = sums @ X[0]
    else:
        by_step = sums[:, None] @ X
    return X.reshape(-1, G).T @ (products @ X).reshape(-1, G), by_step.reshape(-1, G)


def _product(rows: Array, matrices: Array, out: Array | None = None) -> Array:
    """rows (M, S, ·) @ matrices (m, ·, ·) block by block, m = M or 1."""
    M, S, _ = rows.shape
    if out is None:
        out = scratch("ends", M, S, matrices.shape[-1])
    if len(matrices) == M:
        np.matmul(rows, matrices, out=out)
    else:
        np.matmul(_flat(rows), matrices[0], out=_flat(out))
    return out


def _flat(x: Array) -> Array:
    """Rows (M·S, ·) of an array that is contiguous but for its last dim: the same memory."""
    M, S, width = x.shape
    return np.lib.stride_tricks.as_strided(x, (M * S, width), (x.strides[1 if S > 1 else 0], x.strides[2]))


def _inherit(out: Array, own: Array, powers: Array, state: Array) -> Array:
    """What every block begins with, to `out`: it adds its own (M, S, D) to what it inherits times its power.

    Returns what the last one leaves.
    """
    M, m = len(own), len(powers)
    if m < M and M > SCANNED:
        part = own.swapaxes(0, 1).copy()
        part[:, 0] += state @ powers[0]
        solved = scan(part, np.ascontiguousarray(powers[0].T)).swapaxes(0, 1)
        out[0], out[1:] = state, solved[:-1]
        last: Array = solved[-1]
        return last
    for k in range(M):
        out[k] = state
        state = state.dot(powers[min(k, m - 1)])
        state += own[k]
    return state
