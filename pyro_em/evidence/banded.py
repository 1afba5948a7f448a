"""Forward-backward of chains that share one transition table: short blocks of time, joined by the solve of a band.

    α_t = b_t ∘ Aᵀ α_{t-1},   w_t = b_t ∘ A w_{t+1},   γ_t = α_t ∘ A w_{t+1},   pairs  α_t(i) A(i, j) w_{t+1}(j)

A chain is cut into J blocks of L steps. What a block does to a message, G = D_0 A D_1 A ... D_{L-1} A with D = diag(b),
is multiplied up for all blocks side by side. p, the predicted state where a block begins, and w there follow from

    p_{j+1} = G_jᵀ p_j,   p_0 = initial,        and        w_j = G_j w_{j+1},   w_J = 1,

both unknowns of one unit lower triangular matrix, with -Gᵀ and, backwards in time, -G below its diagonal: bandwidth
2K - 1, which BLAS's dtbsv solves in 2(J + 1)K columns without a call in between. From there all blocks run side by
side. Longer blocks leave less to solve and cost more calls; `blocks_of` weighs them.

Nothing is rescaled on the way: b is divided beforehand by powers of two whose mean logarithm is the `rate`, that of
p(x_t | past) at the last call, which keeps the messages within range and changes no digit of theirs: what a call finds
does not depend on the one before. Where they leave it all the same, the chains go through blocked.py, which rescales.
NumPy throughout: its calls cost less than torch's, and so do its products of narrow matrices. Steps come first in
every array: operations on what lies in one piece take half of the time of those on strides.

Shapes: K states; C chains of J blocks of L steps (the last ones padded with b = 1), M = C·J columns as in blocked.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import scipy  # its parts are imported when they are used first
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from pyro_em.evidence.blocked import ROW_SUM, BlockedPosterior, Blocks, Scratch, smooth_blocked
from pyro_em.evidence.chain import LOWEST
from pyro_em.tape.calls import Call, written_by

LOG_2 = math.log(2)
HIGHEST = math.exp(-LOWEST)  # of two messages that meet: what is flushed is then less than e^-100 of the posterior mass
_LIBRARY = torch.library.Library("pyro_em", "FRAGMENT")
_ALIVE: WeakValueDictionary[int, Banded] = WeakValueDictionary()  # operations take numbers, no objects
_NUMBERS = itertools.count()
MOST = 1_500_000  # T·C·K² up to which blocked.py takes longer: 2 to 3 times as long but near this
LONGEST = 64  # steps of a block
STEPS = 1000  # over which half a unit of the rate adds up to 22 nats
CALLS = 2600.0  # of a step of all blocks
SOLVE, LINK, PRODUCT = 4.7, 3.0, 0.027  # a block's: times K, K² and, for every step beyond the second, K³
PADDING = 0.4  # of a step and state, where weights have to say what is padding


def is_short(steps: int, chains: int, states: int) -> bool:
    """Whether chains are rather smoothed here than in blocks."""
    return steps > 1 and steps * chains * states**2 <= MOST


def blocks_of(steps: int, chains: int, states: int) -> Blocks:
    """The blocks that take the least time, by measured times of calls and of arithmetic (nanoseconds)."""

    def cost(length: int) -> float:
        blocks, cube = chains * -(-steps // length), states**3
        padded = PADDING * steps * chains * states if steps % length else 0.0
        return CALLS * length + blocks * (SOLVE * states + LINK * states**2 + PRODUCT * (length - 2) * cube) + padded

    length = min(range(2, min(steps, LONGEST) + 1), key=cost)
    return Blocks(steps, chains, length, -(-steps // length))


@dataclass(frozen=True, eq=False)
class Rate:
    """What b is divided by, at the first steps of blocks (K, M), and exponents of the products up to there (J + 1,)."""

    units: int  # log 2 / `grain`, of a step
    factors: np.ndarray
    shifts: np.ndarray
    largest: float

    @cached_property
    def shift(self) -> int:
        """Of a whole chain."""
        return int(self.shifts[-1])


def _memory(*shape: int) -> np.ndarray:
    """Zeros from where a line of cache begins, as torch has it and NumPy has not: its calls take some percent less."""
    return torch.zeros(shape, dtype=torch.float64, device="cpu").numpy()


class Banded:
    """Messages of C chains of K states; the arrays are kept from one call to the next, and views of them, which take as
    long to make as to use. `given` (L, K, M) is where b goes before a call of `messages`, which scales it; `likelihood`
    is the same, (K, L, M). `ends` (2, C, J + 1, K) are p, and w backwards in time. `share`: w is multiplied by it."""

    rate: Rate

    def __init__(self, blocks: Blocks, states: int) -> None:
        K, L, C, J = states, blocks.length, blocks.chains, blocks.per_chain
        self.blocks = blocks
        self.number = next(_NUMBERS)
        _ALIVE[self.number] = self
        self.given = b = _memory(L, K, C * J)
        self.likelihood = b.transpose(1, 0, 2)
        self._first = b[0]
        self._grain = 2 ** max(4, (blocks.steps // STEPS).bit_length() + 4)
        self.rate = self._rate_of(0)
        self._pair, self._negative = _memory(2, K, K), _memory(K, K)
        self._transposed, self._table = self._pair
        entries = np.arange(K * K).reshape(K, K)
        self._entries = np.stack([entries.T, entries])
        self._up = self._products(b.reshape(L, K, C, J))
        self.ends = ends = _memory(2, C, J + 1, K)
        self._both = ends.reshape(2, -1)
        self._start, self._last = ends[0, :, 0], ends[0, :, -1]
        self._right_sides = np.zeros_like(ends)  # but for the initial distributions
        self._right_sides[1, :, 0] = 1.0
        # By position, as names cost time: incx, offx, lower, trans, diag, overwrite_x.
        solve, width = scipy.linalg.blas.dtbsv, 2 * K - 1
        self._solve = partial(solve, width, self._matrix, ends.reshape(-1), 1, 0, 1, 0, 1, 1)
        self._ones, self._total, self._log_scale, self.share = np.ones(K), _memory(C), _memory(C), _memory(C)
        self._across = self._runs(b)
        self._found = (self._log_scale, *(x.transpose(1, 0, 2) for x in (self.states, self.alpha, self.w[1:])))

    def _products(self, b: np.ndarray) -> list[Call]:
        """Calls that write -G_j into the band: forwards, then backwards in time."""
        L, K, C, J = b.shape
        per = C * (J + 1)
        # Columns of 2K entries and one between them: a power of two would put all blocks into the same lines of cache.
        # The diagonal is one and not read.
        high = 2 * K + 1
        band = np.zeros(2 * per * K * high)
        self._matrix = band.reshape(-1, high).T
        block = high * K
        ahead = [8 * n for n in (high - 1, 1, (J + 1) * block, block)]
        behind = [8 * n for n in (1, high - 1, (J + 1) * block, -block)]
        shape = (K, K, C, J)
        links = as_strided(band[K:], shape, ahead), as_strided(band[(per + J - 1) * block + K :], shape, behind)
        first = b[0][:, None]
        self._twice = twice = _memory(K, K, K)  # -A(i, k) A(k, m)
        own, other = _memory(K, K, C, J), _memory(K, K, C, J)
        calls: list[Call] = [partial(np.dot, twice.reshape(-1, K), b[-1].reshape(K, -1), own.reshape(K * K, -1))]
        for l in range(L - 2, 0, -1):
            calls.append(partial(np.multiply, own, b[l][:, None], own))
            calls.append(partial(np.dot, self._table, own.reshape(K, -1), other.reshape(K, -1)))
            own, other = other, own
        # In the order of what is written, which is far apart.
        turned = [x.transpose(1, 0, 2, 3) for x in (own, np.broadcast_to(first, own.shape), links[1])]
        return [*calls, partial(np.multiply, own, first, links[0]), partial(np.multiply, *turned)]

    def _runs(self, b: np.ndarray) -> list[Call]:
        """Calls that take the messages through the blocks, and multiply them to posteriors."""
        L, K, M = b.shape
        C, J = self.blocks.chains, self.blocks.per_chain
        self.alpha, self.w = alpha, w = _memory(L, K, M), _memory(L + 1, K, M)
        predicted, self.states = _memory(K, M), _memory(L, K, M)  # at first A w of the next step
        following = w[L].reshape(K, C, J)
        calls: list[Call] = [
            partial(np.copyto, predicted.reshape(K, C, J), self.ends[0, :, :-1].transpose(2, 0, 1)),
            partial(np.copyto, following, self.ends[1, :, -2::-1].transpose(2, 0, 1)),
            partial(np.multiply, following, self.share[:, None] if C > 1 else self.share.reshape(()), following),
            partial(np.multiply, predicted, b[0], alpha[0]),
        ]
        for l in range(1, L):
            calls.append(partial(np.dot, self._transposed, alpha[l - 1], predicted))
            calls.append(partial(np.multiply, predicted, b[l], alpha[l]))
        for l in range(L - 1, -1, -1):
            calls.append(partial(np.dot, self._table, w[l + 1], self.states[l]))
            calls += [partial(np.multiply, self.states[l], b[l], w[l])] if l else []  # the first w is not used
        calls.append(partial(np.multiply, alpha, self.states, self.states))
        calls.append(partial(following[..., -1].fill, 0.0))
        self._steps, self._right, self._posterior = np.ones(L), w[1:].transpose(0, 2, 1), self.states.transpose(0, 2, 1)
        return calls

    def smooth(self, initial: Tensor, table: Tensor, likelihood: Tensor, scratch: Scratch) -> BlockedPosterior | None:
        """`smooth_blocked`; None if no route can be certified (use chain.py)."""
        found = self.solved(initial, table, likelihood)
        if found is None:
            found = smooth_blocked(initial, table, likelihood, self.blocks, scratch)
            self.set_rate(0.0 if found is None else float(found.log_scale.mean()) / self.blocks.steps)
        return found

    def solved(self, initial: Tensor, table: Tensor, likelihood: Tensor) -> BlockedPosterior | None:
        """By band solves alone, None if the messages leave the range of floats. One operation of torch, which a
        recording (tape/) can hold. Arguments as for `smooth_blocked`."""
        log_scale, *found, held = torch.ops.pyro_em.band_solves(self.number, initial, table, likelihood)
        return BlockedPosterior(log_scale, *(x.reshape(likelihood.shape) for x in found)) if bool(held) else None

    def outputs(self) -> list[Tensor]:
        """Memory for what `into` writes."""
        return [*(torch.empty(x.shape, dtype=torch.float64) for x in self._found), torch.empty((), dtype=torch.bool)]

    def into(self, outputs: Sequence[Any], initial: np.ndarray, table: np.ndarray, likelihood: np.ndarray) -> None:
        """`solved` from and to arrays, the last of which says whether the others hold."""
        np.copyto(self.likelihood, likelihood)
        normalised = bool((np.absolute(table.sum(1) - 1) <= ROW_SUM).all())
        total = self.messages(initial, table) if normalised else None
        *results, held = outputs
        held[...] = total is not None
        if total is None:
            return
        mantissa, exponent = np.frexp(total)
        np.add(np.log(mantissa), (exponent + self.rate.shift) * LOG_2, out=self._log_scale)
        self.set_rate(float(self._log_scale.mean()) / self.blocks.steps)
        for out, own in zip(results, self._found, strict=True):
            np.copyto(out, own)

    def set_rate(self, rate: float) -> None:
        """Mean log-likelihood of a step, in units of log 2 / `grain`, so that it often stays what it was."""
        units = round(self._grain * max(rate / LOG_2, -1000 / self.blocks.length))  # floats end at 2^±1022
        if self.rate.units != units:
            self.rate = self._rate_of(units)

    def _rate_of(self, units: int) -> Rate:
        blocks = self.blocks
        starts = np.minimum(np.arange(blocks.per_chain + 1) * blocks.length, blocks.steps)
        shifts = np.rint(starts * (units / self._grain))
        factors = np.exp2(-np.diff(shifts))
        first = np.tile(factors, (len(self._first), blocks.chains))
        return Rate(units, first, shifts, max(1.0, float(factors.max())))

    def messages(self, initial: np.ndarray, table: np.ndarray) -> np.ndarray | None:
        """Posteriors of `states` (L, K, M) under `given`, and the factors of those of pairs: `alpha` (L, K, M), and of
        the next step `w` (L + 1, K, M), zero behind the last block.

        Returns the likelihood of every chain (C,) times 2^-`shift`, by which w is divided. None if something leaves the
        range of floats.

        :param initial: distribution of the first state, (K, C) or (K, 1).
        :param table: transition probabilities A, (K, K), rows to columns; rows sum to one, as A is applied behind the
            last step too.
        """
        self.use(table)
        np.copyto(self.ends, self._right_sides)
        np.copyto(self._start, initial.T)
        self.join()
        total = np.dot(self._last, self._ones, self._total)  # half of the time of a sum
        if not self.holds(min(total.tolist())):
            return None
        np.reciprocal(total, self.share)
        self.run()
        return total

    def use(self, table: np.ndarray) -> None:
        """A, for what follows."""
        table.take(self._entries, None, self._pair, "clip")  # otherwise it would write to memory of its own first
        np.negative(self._table, self._negative)
        np.multiply(self._negative[:, None], self._transposed, self._twice)

    def join(self) -> None:
        """Solve for `ends`, which hold the right-hand sides."""
        np.multiply(self._first, self.rate.factors, self._first)
        for call in self._up:
            call()
        self._solve()

    def holds(self, least: float) -> bool:
        """Whether messages that meet in `least` at a chain's end are within the range of floats."""
        if not least > 0:
            return False
        # What is flushed, below e^-708, may meet the largest entries of both messages, and a factor.
        ahead, behind = np.maximum.reduce(self._both, 1).tolist()
        return bool(ahead * behind / least * self.rate.largest < HIGHEST)

    def pairs(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Σ α wᵀ of neighbours, (K, K), each with its weight (L, M)."""
        return self._added(self.alpha if weights is None else self.alpha * weights[:, None], self._right)

    def moments(self, phi: np.ndarray) -> np.ndarray:
        """Σ φ γᵀ, (F, K), of features (L, F, M)."""
        return self._added(phi, self._posterior)

    def _added(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Products of every step, added up."""
        each = np.matmul(left, right)
        return np.dot(self._steps, each.reshape(len(each), -1)).reshape(each.shape[1:])

    def run(self) -> None:
        """Through the blocks from `ends`, w times `share`: `states`, `alpha` and `w`."""
        for call in self._across:
            call()


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
