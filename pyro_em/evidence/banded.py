"""Forward-backward of short chains that share one transition table, as two triangular solves of one band matrix.

    α_t = b_t ∘ Aᵀ α_{t-1},  α_0 = b_0 ∘ π      is   L α = (b_0 ∘ π, 0, ..., 0)
    β_{t-1} = A (b_t ∘ β_t), β_{T-1} = 1        is   Lᵀ β = (0, ..., 0, 1)

with L unit lower triangular, its blocks below the diagonal -b_t(j) A(i, j), bandwidth 2K - 1. LAPACK's dtbtrs does
each in T·K columns without a call in between. Nothing is rescaled on the way: b is divided beforehand by powers of two
whose mean logarithm is the `rate`, that of p(x_t | past) at the last call, which keeps the messages within range and
changes no digit of theirs: what a call finds does not depend on the one before. Where they leave it all the same, the
chains go through blocked.py, which rescales. NumPy throughout: its calls cost less than torch's, and here they are
all the cost.

Shapes: K states, T steps, C chains; chains follow one another in the band, without a link between them.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # its parts are imported when they are used first
import torch
from torch import Tensor

from pyro_em.evidence.blocked import BlockedPosterior, Blocks, Scratch, smooth_blocked
from pyro_em.evidence.chain import LOWEST

LOG_2 = math.log(2)
HIGHEST = math.exp(-LOWEST)  # of a message: what is flushed in the other is then less than e^-100 of the posterior mass
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
        self._set_rate(0.0)
        band = np.zeros(C * T * K * 2 * K)  # columns of 2K entries; the diagonal is one and not read
        self._matrix = band.reshape(-1, 2 * K).T
        strides = [8 * n for n in (2 * K * K * T, 2 * K * K, 2 * K - 1, 1)]
        self._links = np.lib.stride_tricks.as_strided(band[K:], (C, T - 1, K, K), strides)
        self._b, self._ends = np.empty((C, T, K)), np.empty((2, C, T, K))
        self._columns = self._ends.reshape(2, -1, 1)
        self._states, self._right = np.empty((C, T, K)), np.zeros((C, T, K))

    def smooth(self, initial: Tensor, table: Tensor, likelihood: Tensor, scratch: Scratch) -> BlockedPosterior | None:
        """`smooth_blocked` for one block a chain; None if neither can be certified (use chain.py).

        What it returns lies in arrays that the next call overwrites.
        """
        found = self._solved(initial.numpy(), table.numpy(), likelihood.numpy())
        if found is None:
            found = smooth_blocked(initial, table, likelihood, self.blocks, scratch)
            self._set_rate(0.0 if found is None else float(found.log_scale.mean()) / self.blocks.steps)
        return found

    def _set_rate(self, rate: float) -> None:
        """In units of log 2 / 16, so that it often stays what it was."""
        units = round(16 * rate / LOG_2)
        if self._units != units:
            self._units = units
            shifts = np.rint(np.arange(self.blocks.steps + 1) * (units / 16))
            self._factors, self._shift = np.exp2(-np.diff(shifts)).reshape(-1, 1), int(shifts[-1])

    def _solved(self, initial: np.ndarray, table: np.ndarray, likelihood: np.ndarray) -> BlockedPosterior | None:
        """None if the messages leave the range of floats; arguments as `messages`."""
        found = self.messages(initial, table, likelihood)
        if found is None:
            return None
        log_scale, states, alpha, right = found
        return BlockedPosterior(torch.from_numpy(log_scale), *(torch.from_numpy(x.T) for x in (states, alpha, right)))

    def messages(
        self, initial: np.ndarray, table: np.ndarray, likelihood: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """`log_scale` (C,), then (C, T, K) each: posteriors of states, and the two factors of those of pairs.

        β is divided by α's total, so that α ∘ β is the posterior. None if they leave the range of floats.

        :param initial: distribution of the first state, (K, C) or (K, 1).
        :param table: transition probabilities A, (K, K), rows to columns.
        :param likelihood: b (K, T, C).
        """
        b, ends, right = self._b, self._ends, self._right
        np.multiply(likelihood.T, self._factors, out=b)
        np.multiply(b[:, 1:, None], -table, out=self._links)
        ends.fill(0.0)
        np.multiply(initial.T, b[:, 0], out=ends[0, :, 0])
        forward, backward = self._columns
        solve = scipy.linalg.lapack.dtbtrs
        alpha = solve(self._matrix, forward, uplo="L", trans="N", diag="U", overwrite_b=1)[0].reshape(b.shape)
        total = np.add.reduce(alpha[:, -1], -1)
        smallest, largest = float(total.min()), float(total.max())
        if not (smallest > 0 and math.isfinite(largest)):
            return None
        ends[1, :, -1] = 1 / total.reshape(-1, 1)
        beta = solve(self._matrix, backward, uplo="L", trans="T", diag="U", overwrite_b=1)[0].reshape(b.shape)
        # What is flushed in one message, below e^-708, may meet the largest entry of the other.
        ahead, behind = float(np.maximum.reduce(alpha, None)), float(np.maximum.reduce(beta, None))
        if not (ahead < HIGHEST and behind < HIGHEST):
            return None
        np.multiply(alpha, beta, out=self._states)
        np.multiply(b[:, 1:], beta[:, 1:], out=right[:, :-1])
        mantissa, exponent = np.frexp(total)
        log_scale = np.log(mantissa) + (exponent + self._shift) * LOG_2
        self._set_rate(float(log_scale.mean()) / self.blocks.steps)
        return log_scale, self._states, alpha, right
