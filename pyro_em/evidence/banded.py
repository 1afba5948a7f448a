"""Forward-backward of short chains that share one transition table, as two triangular solves of one band matrix.

    α_t = b_t ∘ Aᵀ α_{t-1},  α_0 = b_0 ∘ π      is   L α = (b_0 ∘ π, 0, ..., 0)
    β_{t-1} = A (b_t ∘ β_t), β_{T-1} = 1        is   Lᵀ β = (0, ..., 0, 1)

with L unit lower triangular, its blocks below the diagonal -b_t(j) A(i, j), bandwidth 2K - 1. BLAS's dtbsv does each
in T·K columns without a call in between. Nothing is rescaled on the way: b is divided beforehand by powers of two
whose mean logarithm is the `rate`, that of p(x_t | past) at the last call, which keeps the messages within range and
changes no digit of theirs: what a call finds does not depend on the one before. Where they leave it all the same, the
chains go through blocked.py, which rescales. NumPy throughout: its calls cost less than torch's, and here they are
all the cost.

Shapes: K states, T steps, C chains; chains follow one another in the band, without a link between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import scipy  # its parts are imported when they are used first
import torch
from torch import Tensor

from pyro_em.evidence.blocked import BlockedPosterior, Blocks, Scratch, smooth_blocked
from pyro_em.evidence.chain import LOWEST
from pyro_em.tape.calls import Call, written_by

LOG_2 = math.log(2)
HIGHEST = math.exp(-LOWEST)  # of a message: what is flushed in the other is then less than e^-100 of the posterior mass
_LIBRARY = torch.library.Library("pyro_em", "FRAGMENT")
_ALIVE: WeakValueDictionary[int, Banded] = WeakValueDictionary()  # operations take numbers, no objects
_NUMBERS = itertools.count()
MOST = 300_000  # T·C·K² up to which the blocks' calls cost more than the solves


def is_short(steps: int, chains: int, states: int) -> bool:
    """Whether chains are rather smoothed here than in blocks."""
    return steps > 1 and steps * chains * states**2 <= MOST


class Banded:
    """Solves for C chains of T steps and K states; the arrays are kept from one call to the next."""

    _units: int | None = None

    def __init__(self, blocks: Blocks, states: int) -> None:
        K, T, C = states, blocks.steps, blocks.chains
        self.blocks = blocks
        self.number = next(_NUMBERS)
        _ALIVE[self.number] = self
        self.set_rate(0.0)
        band = np.zeros(C * T * K * 2 * K)  # columns of 2K entries; the diagonal is one and not read
        self._matrix = band.reshape(-1, 2 * K).T
        strides = [8 * n for n in (2 * K - 1, 1, 2 * K * K * T, 2 * K * K)]
        self._links = np.lib.stride_tricks.as_strided(band[K:], (K, K, C, T - 1), strides)
        b, ends, right = np.empty((K, C, T)), np.empty((2, C, T, K)), np.zeros((K, C, T))
        self._log_scale = np.empty(C)
        self._negative, self.states = np.empty((K, K)), np.empty((C, T, K))
        self._b, self._ends, self.left, self.right = b, ends, ends[0], right
        # Views are made once: to make one takes as long as to use it.
        self._beta = ends[1]
        self._forward, self._backward = ends.reshape(2, -1)
        self._first, self._start = b[:, :, 0].T, ends[0, :, 0]
        self._last, self._end = ends[0, :, -1], ends[1, :, -1]
        self._table, self._next = self._negative[:, :, None, None], b[:, :, 1:]
        self._behind, self._seen = ends[1, :, 1:].transpose(2, 0, 1), right[:, :, :-1]

    def smooth(self, initial: Tensor, table: Tensor, likelihood: Tensor, scratch: Scratch) -> BlockedPosterior | None:
        """`smooth_blocked` for one block a chain; None if neither can be certified (use chain.py)."""
        found = self.solved(initial, table, likelihood)
        if found is None:
            found = smooth_blocked(initial, table, likelihood, self.blocks, scratch)
            self.set_rate(0.0 if found is None else float(found.log_scale.mean()) / self.blocks.steps)
        return found

    def solved(self, initial: Tensor, table: Tensor, likelihood: Tensor) -> BlockedPosterior | None:
        """By band solves alone, None if the messages leave the range of floats. One operation of torch, which a
        recording (tape/) can hold.

        :param likelihood: b (K, T, C); the others as for `messages`.
        """
        log_scale, states, left, right, held = torch.ops.pyro_em.band_solves(self.number, initial, table, likelihood)
        if not bool(held):
            return None
        return BlockedPosterior(log_scale, states.permute(2, 1, 0), left.permute(2, 1, 0), right.transpose(1, 2))

    def outputs(self) -> list[Tensor]:
        """Memory for what `into` writes."""
        results = (self._log_scale, self.states, self.left, self.right)
        return [*(torch.empty(x.shape, dtype=torch.float64) for x in results), torch.empty((), dtype=torch.bool)]

    def into(self, outputs: Sequence[Any], initial: np.ndarray, table: np.ndarray, likelihood: np.ndarray) -> None:
        """`solved` from and to arrays, the last of which says whether the others hold."""
        total = self.messages(initial, table, likelihood.transpose(0, 2, 1))
        *results, held = outputs
        held[...] = total is not None
        if total is None:
            return
        mantissa, exponent = np.frexp(total)
        np.add(np.log(mantissa), (exponent + self.shift) * LOG_2, out=self._log_scale)
        self.set_rate(float(self._log_scale.mean()) / self.blocks.steps)
        for out, own in zip(results, (self._log_scale, self.states, self.left, self.right), strict=True):
            np.copyto(out, own)

    def set_rate(self, rate: float) -> None:
        """Mean log-likelihood of a step, in units of log 2 / 16, so that it often stays what it was."""
        units = round(16 * rate / LOG_2)
        if self._units != units:
            self._units = units
            shifts = np.rint(np.arange(self.blocks.steps + 1) * (units / 16))
            self._factors, self.shift = np.exp2(-np.diff(shifts)), int(shifts[-1])

    def messages(self, initial: np.ndarray, table: np.ndarray, likelihood: np.ndarray) -> np.ndarray | None:
        """Posteriors of `states` (C, T, K), and the factors of those of pairs: `left` α (C, T, K) and `right` b ∘ β of
        the next step (K, C, T).

        Returns the likelihood of every chain (C,) times 2^-`shift`, by which β is divided, so that α ∘ β is the
        posterior. None if something leaves the range of floats.

        :param initial: distribution of the first state, (K, C) or (K, 1).
        :param table: transition probabilities A, (K, K), rows to columns.
        :param likelihood: b (K, C, T).
        """
        np.multiply(likelihood, self._factors, out=self._b)
        np.negative(table, out=self._negative)
        np.multiply(self._table, self._next, out=self._links, order="C")  # along the steps, the longest of the dims
        self._ends.fill(0.0)
        np.multiply(initial.T, self._first, out=self._start)
        solve, width = scipy.linalg.blas.dtbsv, len(self._matrix) - 1
        solve(width, self._matrix, self._forward, lower=1, diag=1, overwrite_x=1)
        total = np.add.reduce(self._last, -1)
        if not min(total.tolist()) > 0:
            return None
        np.divide(1.0, total[:, None], out=self._end)
        solve(width, self._matrix, self._backward, lower=1, trans=1, diag=1, overwrite_x=1)
        # What is flushed in one message, below e^-708, may meet the largest entry of the other.
        if not np.maximum.reduce(self._ends, None) < HIGHEST:
            return None
        np.multiply(self.left, self._beta, out=self.states)
        np.multiply(self._next, self._behind, out=self._seen, order="C")
        return total


def _band_solves(number: int, initial: Tensor, table: Tensor, likelihood: Tensor) -> tuple[Tensor, ...]:
    outputs = _ALIVE[number].outputs()
    _ALIVE[number].into([x.numpy() for x in outputs], *(x.numpy() for x in (initial, table, likelihood)))
    return tuple(outputs)


_RESULTS = ", ".join(["Tensor"] * 5)
_LIBRARY.define(f"band_solves(int number, Tensor initial, Tensor table, Tensor likelihood) -> ({_RESULTS})")
_LIBRARY.impl("band_solves", _band_solves, "CPU")


@written_by(torch.ops.pyro_em.band_solves.default)
def _replayed(arguments: Sequence[Any], outputs: Sequence[Any]) -> Call:
    number, *arrays = arguments
    return partial(_ALIVE[number].into, outputs, *arrays)
