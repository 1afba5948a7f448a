"""Blocks of steps in a row, solved for v = (a, r, z) of each: a before its first step, r behind its last one, its z.

Forwards every block needs the a that it inherits, backwards the r:

    (z, a') = E (a, y),     r' = B (r, z)        (matrices of block_matrices.py)

What is wanted is Σ |z|² of every sequence, and from Σ w v vᵀ and Σ w v those of g = (x, r, u) of all steps. `Few`
sequences are solved by products over all blocks at once, of `Many` one block follows the other, with sequences in the
last dim: what is made of one is still in the cache for the next.

Shapes: M blocks of L steps with m matrices (M or 1; of `Many` any, the last one for all later blocks), S sequences,
D state dims, P cells; V = 2D + L·P entries of v, G = 2D + P of g.
"""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol

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

    def products(self) -> Products:
        """Of all steps, after `behind`."""
        ...

    def first_state(self) -> Array:
        """x of the first step, (S, D), after `behind`."""
        ...


class Products(NamedTuple):
    """Σ w g gᵀ of all steps, of the first and of the last one, (G, G) each, and Σ w g of every step, (M·L, G)."""

    total: Array
    first: Array
    last: Array
    sums: Array


class Few:
    """`rows` (M, S, D + L·P) has the data, and room for a."""

    def __init__(self, name: str, rows: Array, own: Matrices, w: Array | None) -> None:
        M, S, width = rows.shape
        self.rows, self.own, self.w, self.D = rows, own, w, own.before.shape[1]
        self.both = scratch(name, M, S, self.D + width)

    def ahead(self, a: Array) -> Array:
        D, matrices = self.D, self.own.ahead.swapaxes(1, 2)
        to_z, end = matrices[..., :-D], matrices[..., -D:]
        a = _inherit(self.both[..., :D], _product(self.rows[..., D:], end[:, D:]), end[:, :D], a)
        self.rows[..., :D] = self.both[..., :D]
        _product(self.rows, to_z, self.both[..., 2 * D :])
        return a

    def behind(self, r: Array) -> Array:
        D, before = self.D, self.own.before.swapaxes(1, 2)
        step = _product(self.both[..., 2 * D :], before[:, D:])
        return _inherit(self.both[::-1, :, D : 2 * D], step[::-1], before[::-1, :D], r)

    def squares(self) -> Array:
        z = self.both[..., 2 * self.D :]
        return np.einsum("msp,msp->s", z, z)

    def products(self) -> Products:
        own, w, G = self.own, self.w, self.own.width
        x = self.both @ own.back.swapaxes(1, 2) if own.formed else self.both
        heavy = x if w is None else x * w[:, None]
        S, width = x.shape[1:]
        sums = heavy[:, 0] if S == 1 else np.ones(S) @ heavy
        one, other = heavy[0].T @ x[0], heavy[-1].T @ x[-1]
        if own.formed or len(own.back) == 1:
            heavy, x = (y.reshape(-1, G if own.formed else width) for y in (heavy, x))
            total = heavy.T @ x
            if own.formed:
                return Products(total, one[:G, :G], other[-G:, -G:], sums.reshape(-1, G))
            return of_moments(own, total[None], one, other, sums)
        return of_moments(own, heavy.swapaxes(1, 2) @ x, one, other, sums)

    def first_state(self) -> Array:
        return self.both[0] @ self.own.back[0, : self.D].T


class Many:
    """`rows` (M, D + L·P, S) has the data, and room for a.

    v of all blocks stand in a row, so that a of the next block is the end of what is made of one.
    """

    def __init__(self, name: str, rows: Array, own: Matrices, w: Array | None) -> None:
        M, width, S = rows.shape
        self.rows, self.own, self.w, self.D = rows, own, w, own.before.shape[1]
        self.V = V = width + self.D
        self.row = scratch(name, M * V + self.D, S)
        self.places = _places(name, rows, self.row, self.D)

    def ahead(self, a: Array) -> Array:
        self.row[: self.D] = a
        for step, place in zip(self._by_block(self.own.ahead), self.places, strict=True):
            place.given_a[...] = place.a
            step.dot(place.given, place.made)  # np.dot takes three times as long to begin
        return self.row[-self.D :]

    def behind(self, r: Array) -> Array:
        for before, place in zip(self._by_block(self.own.before)[::-1], self.places[::-1], strict=True):
            place.r[...] = r
            r = before.dot(place.r_and_z)
        return r

    def squares(self) -> Array:
        z = self.row[: -self.D].reshape(len(self.rows), self.V, -1)[:, 2 * self.D :]
        return np.einsum("mps,mps->s", z, z)

    def products(self) -> Products:
        own, w, flat = self.own, self.w, self.row[: -self.D]
        M, S = len(self.rows), flat.shape[1]
        x = flat.reshape(M, self.V, S)
        if own.formed:
            x = np.matmul(own.back, x, out=scratch("formed", M, own.back.shape[1], S)).reshape(-1, own.width, S)
        heavy = x if w is None else x * w
        products = np.matmul(heavy, x.swapaxes(1, 2))
        sums = (heavy.reshape(-1, S) @ np.ones(S)).reshape(len(x), -1)
        if own.formed:
            return Products(products.sum(0), products[0], products[-1], sums)
        return of_moments(own, products, products[0], products[-1], sums)

    def first_state(self) -> Array:
        return self.row[: self.V].T @ self.own.back[0, : self.D].T

    def _by_block(self, matrices: Array) -> list[Array]:
        return [*matrices, *[matrices[-1]] * (len(self.rows) - len(matrices))]


class _Place(NamedTuple):
    """Of one block: its data with room for a, that room, a, (z, a of the next block), r, and (r, z)."""

    given: Array
    given_a: Array
    a: Array
    made: Array
    r: Array
    r_and_z: Array


def _places(name: str, rows: Array, row: Array, D: int) -> list[_Place]:
    """Of all blocks; those of an EM run stay where they are."""
    known = _memory.__dict__.get("places of " + name)
    if known is not None and known[0] is rows and known[1] is row:
        found: list[_Place] = known[2]
        return found
    V = D + rows.shape[1]
    found = []
    for k, given in enumerate(rows):
        own = row[k * V : k * V + V + D]
        found.append(_Place(given, given[:D], own[:D], own[2 * D :], own[D : 2 * D], own[D:V]))
    if row is _memory.__dict__.get(name):
        _memory.__dict__["places of " + name] = rows, row, found
    return found


def of_moments(own: Matrices, products: Array, first: Array, last: Array, sums: Array) -> Products:
    """From Σ w v vᵀ of every block, of the first and of the last one, and Σ w v of every block. Of blocks with one
    matrix the products may be added."""
    X, G, later = own.back, own.width, len(own.back) - 1
    m, out, V = X.shape
    one, other = X[0, :G], X[-1, -G:]
    ends = one.dot(first).dot(one.T), other.dot(last).dot(other.T)
    if len(products) > m:
        products = np.concatenate([products[:later], products[later:].sum(0, keepdims=True)])
    shape = (m, out // G, G, V)
    found = (X @ products).reshape(shape) @ X.reshape(shape).swapaxes(2, 3)
    by_step = sums[later:] @ X[-1].T
    if later:
        by_step = np.concatenate([(X[:-1] @ sums[:later, :, None])[..., 0], by_step])
    return Products(found.sum((0, 1)), *ends, by_step.reshape(-1, G))


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
