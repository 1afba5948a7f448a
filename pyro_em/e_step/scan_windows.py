"""One E-step of long chains, window by window: emissions, messages and sums of a window stay in cache.

    window i:  b = exp(W Φ_i),   p, w by a band solve (evidence/banded.py),   sums over the steps that are its own

A window begins from a uniform vector before its own steps, and ends with ones after them. That this was early and late
enough is certified at every border: the window before has to end where the next one begins, and the next one's w has
to be what the window before found there. The first p is the initial distribution and the last w is one, so that by
induction all are right. Where a border disagrees the windows are joined exactly instead, by two passes: p is carried
from window to window forwards, then w backwards, as everything else is summed.

It is one operation of torch, that of scan_short.py, so that a recording (tape/) holds the whole E-step.

Shapes: K states, F features; C chains of n windows of J blocks of L steps (evidence/windows.py); data (C·n·L, J).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.e_step.base import IMPOSSIBLE
from pyro_em.e_step.scan_short import BARE, SCALED, ChainSums, Given, Weights
from pyro_em.evidence.banded import LOG_2, Banded
from pyro_em.evidence.blocked import AGREE, Scratch, smooth_blocked
from pyro_em.evidence.windows import Windows


@dataclass(eq=False)
class Border:
    """Vectors (K,) at the ends of a window's own steps: p, and w."""

    p: tuple[np.ndarray, np.ndarray]
    w: tuple[np.ndarray, np.ndarray]


OneChain = Callable[[int, Sequence[np.ndarray], Given], float | None]


class Windowed(ChainSums):
    """Φ (F, C·n·L·J), zero where there is padding; `base` (C,) are sums of log base measures."""

    def __init__(
        self, windows: Windows, phi: Tensor, base: Tensor, states: int, weights: Weights, padding: Tensor | None
    ) -> None:
        super().__init__(phi, base, states, weights, padding)
        self.windows, self.banded = windows, Banded(windows.blocks, states)
        self._kind = BARE
        self._rates = [[self.banded.rate] * (windows.chains * windows.count) for _ in (BARE, SCALED)]
        self._size = windows.length * windows.blocks.per_chain
        shape = self._shape = (windows.length, windows.blocks.per_chain)
        self._scale = np.empty(shape)
        last = windows.length * windows.first(windows.count - 1)
        steps = last + np.arange(windows.length)[:, None] + windows.length * np.arange(windows.blocks.per_chain)
        self._behind = steps >= windows.steps - 1  # of the last window: no transition leaves these
        self._uniform, self._ones = np.full(states, 1.0 / states), np.ones(states)

    def into(self, outputs: Sequence[np.ndarray], given: Given) -> None:
        """`smooth` from and to arrays, the last of which says whether the others hold."""
        *sums, held = outputs
        given = given._replace(initial=np.broadcast_to(given.initial, (self.states, self.windows.chains)))
        self.banded.use(given.table)
        found = self._joined_somehow(sums, given)
        if not found and self._kind == BARE:
            self._kind = SCALED
            found = self._joined_somehow(sums, given)
        held[...] = found
        sums[2] *= given.table

    def _joined_somehow(self, sums: Sequence[np.ndarray], given: Given) -> bool:
        return self._summed(sums, given, self._forgetful) or self._summed(sums, given, self._carried)

    def _summed(self, sums: Sequence[np.ndarray], given: Given, one_chain: OneChain) -> bool:
        """Sums over all chains, each by this way of joining its windows; whether it could."""
        for x in sums:
            x.fill(0.0)
        evidence, *others = sums
        for c in range(self.windows.chains):
            found = one_chain(c, others, given)
            if found is None:
                return False
            weight = 1.0 if self.chain_weights is None else float(self.chain_weights[c])
            own = weight * (found + float(self.base[c])) if weight else 0.0
            evidence += own, abs(own)
        return True

    def _forgetful(self, c: int, sums: Sequence[np.ndarray], given: Given) -> float | None:
        """One chain, its windows begun and ended early and late; None where that was not early or late enough."""
        windows, total, before = self.windows, 0.0, None
        for place in range(windows.count):
            start = self._uniform if place else given.initial[:, c]
            border = self._joined(c, place, given, (0, start), (windows.blocks.per_chain, self._ones))
            if border is None or (before is not None and not _agree(before, border)):
                return None
            total += self._count(c, place, border, sums, bool(place))
            before = border
        return total

    def _carried(self, c: int, sums: Sequence[np.ndarray], given: Given) -> float | None:
        """One chain, with the vectors at the borders carried forwards and then backwards."""
        windows, total = self.windows, 0.0
        starts, end = [given.initial[:, c]], self._ones
        for place in range(windows.count - 1):
            begin, _ = windows.inner(place)
            border = self._joined(c, place, given, (begin, starts[-1]), (windows.blocks.per_chain, self._ones))
            if border is None:
                return None
            starts.append(border.p[1] / border.p[1].sum())
        for place in range(windows.count - 1, -1, -1):
            begin, until = windows.inner(place)
            border = self._joined(c, place, given, (begin, starts[place]), (until, end))
            if border is None:
                return None
            total += self._count(c, place, border, sums, False)
            end = border.w[0] / border.w[0].sum()
        return total

    def _joined(
        self, c: int, place: int, given: Given, start: tuple[int, np.ndarray], end: tuple[int, np.ndarray]
    ) -> Border | None:
        """Emissions and p and w where blocks begin, from a p and a w at two of these; None if they leave the range of
        floats or some row is impossible."""
        banded, i = self.banded, c * self.windows.count + place
        begin, until = self.windows.inner(place)
        for attempt in range(2):
            if not self._likelihood(i, given, self._kind):
                return None
            banded.rate = self._rates[self._kind][i]
            banded.ends.fill(0.0)
            ahead, behind = banded.ends[0, 0], banded.ends[1, 0, ::-1]
            ahead[start[0]], behind[end[0]] = start[1], end[1]
            banded.join()
            total = float(ahead[until] @ behind[until])
            if banded.holds(total):
                banded.share.fill(1.0 / total)
                return Border((ahead[begin].copy(), ahead[until].copy()), (behind[begin].copy(), behind[until].copy()))
            if attempt or not self._measured(i, given):
                return None
        return None

    def _likelihood(self, i: int, given: Given, kind: int) -> bool:
        """b of a window, and logs of scales if it is scaled; whether all rows are then possible."""
        at = slice(i * self._size, (i + 1) * self._size)
        density, scale = self.banded.given, self._scale
        np.matmul(given.w, self._phi(at), density)
        if given.differences is not None:
            likelihood = self.banded.likelihood
            np.add(likelihood, given.differences[:, at].reshape(likelihood.shape), likelihood)
        if kind == BARE:
            np.exp(density, density)
            return True
        np.maximum.reduce(density, 1, out=scale)
        np.subtract(density, scale[:, None], density)
        np.exp(density, density)
        return bool(scale.min() > 0.1 * IMPOSSIBLE)

    def _phi(self, at: slice) -> np.ndarray:
        """Features of a window, (L, F, J)."""
        return self.phi[:, at].reshape(-1, *self._shape).transpose(1, 0, 2)

    def _measured(self, i: int, given: Given) -> bool:
        """Find the rate of a window whose messages leave the range of floats at the one it has."""
        banded = self.banded
        if not self._likelihood(i, given, SCALED):
            return False
        arrays = (self._uniform[:, None], given.table, banded.likelihood)
        initial, table, b = (torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)
        found = smooth_blocked(initial, table, b, banded.blocks, Scratch())
        if found is None:
            return False
        total = float(found.log_scale) + (float(self._scale.sum()) if self._kind == BARE else 0.0)
        banded.set_rate(total / self.windows.blocks.steps)
        self._rates[self._kind][i] = banded.rate
        return True

    def _count(self, c: int, place: int, border: Border, sums: Sequence[np.ndarray], normalise: bool) -> float:
        """Add what a window's own steps give; their log-likelihood after all before them.

        :param normalise: the first p does not sum to one.
        """
        first, pairs, totals = sums
        banded, windows, i = self.banded, self.windows, c * self.windows.count + place
        begin, until = windows.inner(place)
        shifts = banded.rate.shifts
        start, end = border.p
        scales = 0.0
        if self._kind == SCALED:
            scales = float(self._scale[:, begin:until].sum())
        # Whatever the rate: the same to the last bit.
        mantissa, exponent = math.frexp(float(end.sum()) / (float(start.sum()) if normalise else 1.0))
        log_scale = math.log(mantissa) + (exponent + float(shifts[until] - shifts[begin])) * LOG_2
        banded.set_rate(log_scale / ((until - begin) * windows.length))
        self._rates[self._kind][i] = banded.rate
        banded.run()
        for x in (banded.alpha, banded.states):
            x[:, :, :begin] = 0.0
            x[:, :, until:] = 0.0
        weight = 1.0 if self.chain_weights is None else float(self.chain_weights[c])
        if place == windows.count - 1:
            banded.alpha.transpose(0, 2, 1)[self._behind] = 0.0
        at = slice(i * self._size, (i + 1) * self._size)
        for own, out in zip(self.pair_weights, pairs, strict=True):
            out += banded.pairs(None if own is None else own.reshape(-1)[at].reshape(self._shape))
        if place == 0:
            for own, out in zip(self.first_weights, first, strict=True):
                out += banded.states[0, :, 0] * (1.0 if own is None else float(own[c]))
        totals += weight * banded.moments(self._phi(at))
        return log_scale + scales


def _agree(before: Border, after: Border) -> bool:
    """Whether two windows say the same of their border, of p and of w."""
    pairs = (before.p[1], after.p[0]), (before.w[1], after.w[0])
    return all(bool(np.absolute(a / a.sum() - b / b.sum()).max() <= AGREE) for a, b in pairs)
