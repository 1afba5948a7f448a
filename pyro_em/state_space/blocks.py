"""Sums over the smoothed means of a time-invariant chain, by blocks of steps.

Both recursions of block_matrices.py, of the predicted means a forwards and of r backwards, are solved in two segments
(segments.py): steps at which the gains still move, one by one, and blocks of L steps after them. One product with a
block's matrix gives all of its z from its own data and the a at its beginning, and what a block inherits obeys the same
recursion with L^L. All of a block is linear in v = (a, r, z) of that block, so the sums are

    Σ (x, r, u)(x, r, u)ᵀ = Σ_blocks Bᵀ (Σ_sequences v vᵀ) B

and no smoothed mean is formed.

Shapes: M blocks of L steps, S sequences, T steps, D state dims, P cells.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_em.state_space.block_matrices import of_block, of_steps
from pyro_em.state_space.riccati import Gains
from pyro_em.state_space.segments import KEPT, Few, Many, Segment

Array = NDArray[np.float64]
_memory = threading.local()
MANY = 32


@dataclass(frozen=True)
class Blocks:
    """Data cut into a few first steps `lead` (·, S, P) and M blocks of `length` steps.

    `rows` (M, S, D + L·P) has room for what the blocks inherit; of many sequences it is (M, D + L·P, S), and `lead`
    is (·, P, S).
    """

    lead: Array
    rows: Array
    length: int
    many: bool
    reach: float = 0.0  # max |y|
    _steps: dict[str, Any] = field(default_factory=dict)

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
        L = 4 if S > 16 else 8
        M = T // L
        cut = T - M * L
        body = y[:, cut:].reshape(S, M, L * P)
        if S >= MANY:
            rows = np.empty((M, D + L * P, S))
            rows[:, D:] = body.transpose(1, 2, 0)
            lead = y[:, :cut].transpose(1, 2, 0)
        else:
            rows = np.empty((M, S, D + L * P))
            rows[:, :, D:] = body.swapaxes(0, 1)
            lead = y[:, :cut].swapaxes(0, 1)
        found = Blocks(np.ascontiguousarray(lead), rows, L, S >= MANY, max(float(y.max()), -float(y.min())))
        _memory.__dict__["blocks"] = (y, D, found) if rows.nbytes <= KEPT else None
        return found

    def steps(self, blocks: int, D: int) -> Array:
        """The first steps and those of the first few blocks as rows of blocks of one step."""
        if self._steps.get("of") != blocks:
            self._steps.update(of=blocks, rows=self._cut(blocks, D))
        return self._steps["rows"]

    def _cut(self, blocks: int, D: int) -> Array:
        L, cut, S = self.length, len(self.lead), self.num_sequences
        own = self.rows[:blocks]
        n, P = cut + blocks * L, self.lead.shape[1 if self.many else 2]
        if self.many:
            found = np.empty((n, D + P, S))
            found[:cut, D:] = self.lead
            found[cut:].reshape(blocks, L, D + P, S)[:, :, D:] = own[:, D:].reshape(blocks, L, P, S)
        else:
            found = np.empty((n, S, D + P))
            found[:cut, :, D:] = self.lead
            found[cut:].reshape(blocks, L, S, D + P)[..., D:] = own[..., D:].reshape(blocks, S, L, P).swapaxes(1, 2)
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
    n, (D, P) = len(own), own.gains.shape[1:]
    width = 2 * D + P
    L, cut, M = data.length, len(data.lead), len(data.rows)
    moving = min(M, max(0, -(-(n - 1 - cut) // L)))  # blocks with gains that are not the last ones
    kind, parts = Many if data.many else Few, list[Segment]()
    if cut + moving * L:
        steps = np.minimum(np.arange(cut + moving * L), n - 1)
        parts.append(kind("first", data.steps(moving, D), of_steps(own, C, steps), w))
    if moving < M:
        parts.append(kind("blocks", data.rows[moving:], of_block(own, A, C, L), w))
    S = data.num_sequences
    state = np.zeros((S, D)) if start is None else np.broadcast_to(start, (S, D))
    if data.many:
        state = state.T
    for segment in parts:
        state = segment.ahead(state)
    state = np.zeros_like(state)
    for segment in reversed(parts):
        state = segment.behind(state)
    total, squares, by_step = np.zeros((1 + width, 1 + width)), np.zeros(S), []
    for segment in parts:
        squares += segment.squares()
        products, sums = segment.sums()
        total[1:, 1:] += products
        total[0, 1:] += sums.sum(0)
        by_step.append(sums)
    count = float(S if w is None else w.sum())
    ends = parts[0].ends()[0], parts[-1].ends()[1]
    if path is not None:
        _add_path(total, path, np.concatenate(by_step), count)
        for x, t in zip(ends, (0, -1), strict=True):
            x[:, :D] += path[t]
    total[1:, 0] = total[0, 1:]
    return squares, Sums(total, count, *ends)


def _add_path(total: Array, path: Array, sums: Array, count: float) -> None:
    """What adding `path` (T, D) to x adds to the sums, those of x, r, u over sequences being `sums` (T, ·)."""
    x = slice(1, 1 + path.shape[1])
    crossed = path.T @ sums
    total[x, 1:] += crossed
    total[1:, x] += crossed.T
    total[x, x] += count * path.T @ path
    total[0, x] += count * path.sum(0)
