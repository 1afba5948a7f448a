"""Sums over the smoothed means of a time-invariant chain, by blocks of steps.

Both recursions of block_matrices.py, of the predicted means a forwards and of r backwards, are solved in blocks of
steps: those at which the gains still move have matrices of their own, all later ones the same (segments.py). One
product with a block's matrix gives all of its z from its own data and the a at its beginning. All of a block is linear
in v = (a, r, z) of that block, so the sums are

    Σ (x, r, u)(x, r, u)ᵀ = Σ_blocks Bᵀ (Σ_sequences v vᵀ) B

and no smoothed mean is formed.

Shapes: M blocks of L steps, S sequences, T steps, D state dims, P cells.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_em.state_space.block_matrices import of_blocks
from pyro_em.state_space.riccati import Gains
from pyro_em.state_space.segments import KEPT, Few, Many, Segment

Array = NDArray[np.float64]
_memory = threading.local()
MANY = 32


@dataclass(frozen=True)
class Blocks:
    """Data cut into a few first steps `lead` (·, S, D + P), blocks of one step, and M blocks of `length` steps.

    `rows` (M, S, D + L·P) has room for what the blocks inherit; of many sequences it is (M, D + L·P, S), and `lead`
    is (·, D + P, S).
    """

    lead: Array
    rows: Array
    length: int
    many: bool
    reach: float = 0.0  # max |y|

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.rows.shape[2 if self.many else 1]

    @staticmethod
    def of(y: Array, D: int) -> Blocks:
        """Of data (S, T, P). Those of an EM run are the same object at every step, and are cut once."""
        known: tuple[Array, int, Blocks] | None = _memory.__dict__.get("blocks")
        if known is not None and known[0] is y and known[1] == D:
            return known[2]
        S, T, P = y.shape
        L, many = 4 if S > 16 else 8, S >= MANY
        M = T // L
        cut = T - M * L
        both = y[:, :cut].reshape(S, cut, P), y[:, cut:].reshape(S, M, L * P)
        if many:
            lead, rows = (np.empty((x.shape[1], D + x.shape[2], S)) for x in both)
            lead[:, D:], rows[:, D:] = (x.transpose(1, 2, 0) for x in both)
        else:
            lead, rows = (np.empty((x.shape[1], S, D + x.shape[2])) for x in both)
            lead[..., D:], rows[..., D:] = (x.swapaxes(0, 1) for x in both)
        found = Blocks(lead, rows, L, many, max(float(y.max()), -float(y.min())))
        _memory.__dict__["blocks"] = (y, D, found) if rows.nbytes <= KEPT else None
        return found


@dataclass(frozen=True)
class Sums:
    """Σ w (1, x, r, u)(1, x, r, u)ᵀ over all sequences, (1 + 2D + P)²: of all steps, of the first and of the last one.

    `initial` is that of the first step with x less the path's; `mean` is x there of every sequence (S, D), if `start`
    was given.
    """

    total: Array
    initial: Array
    first: Array
    last: Array
    mean: Array | None


def smoothed(
    own: Gains,
    data: Blocks,
    A: Array,
    C: Array,
    w: Array | None = None,
    path: Array | None = None,
    start: Array | None = None,
) -> tuple[Array, Sums]:
    """Σ_t |z_t|² of every sequence, and sums of (x, r_t, u_t), sequences weighted by w (S,).

    :param path: what the data are deviations from at x, (T, D); it is added to x.
    :param start: E x_0 before its data less the path's, of every sequence (S, D), if it is not 0.
    """
    n, D = own.gains.shape[:2]
    L, cut, M = data.length, len(data.lead), len(data.rows)
    kind, parts = Many if data.many else Few, list[Segment]()
    if cut:
        steps = np.minimum(np.arange(cut), n - 1).reshape(-1, 1)
        parts.append(kind("lead", data.lead, of_blocks(own, A, C, steps), w))
    if M:
        moving = min(M, max(0, -(-(n - 1 - cut) // L)))  # blocks with gains that are not the last ones
        steps = np.minimum(cut + np.arange((moving + 1) * L), n - 1).reshape(-1, L)
        matrices = of_blocks(own, A, C, steps[:M])
        if moving and (matrices.formed or not data.many):
            parts.append(kind("moving", data.rows[:moving], matrices[:moving], w))
            if moving < M:
                parts.append(kind("blocks", data.rows[moving:], matrices[moving:], w))
        else:
            parts.append(kind("blocks", data.rows, matrices, w))
    S = data.num_sequences
    state = np.zeros((S, D)) if start is None else np.broadcast_to(start, (S, D))
    if data.many:
        state = state.T
    for segment in parts:
        state = segment.ahead(state)
    state = np.zeros_like(state)
    for segment in reversed(parts):
        state = segment.behind(state)
    count = float(S if w is None else w.sum())
    squares, found = np.zeros(S), []
    for segment in parts:
        squares += segment.squares()
        found.append(segment.products())
    sums = np.concatenate([own.sums for own in found])
    total = _bordered(count * len(sums), sums.sum(0), np.sum([own.total for own in found], 0))
    first, last = _bordered(count, sums[0], found[0].first), _bordered(count, sums[-1], found[-1].last)
    initial, mean = first, None if start is None else parts[0].first_state()
    if path is not None:
        _add_path(total, path, sums, count)
        first = first.copy()
        _add_path(first, path[:1], sums[:1], count)
        _add_path(last, path[-1:], sums[-1:], count)
        mean = None if mean is None else mean + path[0]
    return squares, Sums(total, initial, first, last, mean)


def _bordered(count: float, sums: Array, products: Array) -> Array:
    """Σ w (1, g)(1, g)ᵀ."""
    found = np.empty((len(sums) + 1, len(sums) + 1))
    found[0, 0], found[0, 1:], found[1:, 0], found[1:, 1:] = count, sums, sums, products
    return found


def _add_path(total: Array, path: Array, sums: Array, count: float) -> None:
    """What adding `path` (T, D) to x adds to the products, the sums of x, r, u over sequences being `sums` (T, ·)."""
    x = slice(1, 1 + path.shape[1])
    crossed = path.T @ sums
    total[x, 1:] += crossed
    total[1:, x] += crossed.T
    total[x, x] += count * path.T @ path
    total[0, x] += count * path.sum(0)
    total[x, 0] = total[0, x]
