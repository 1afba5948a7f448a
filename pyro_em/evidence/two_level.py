"""Messages of chains at two levels: blocks of time side by side, then from block to block.

    m_t(j) = ⊕_i m_{t-1}(i) ⊗ a_t(i, j) ⊗ u_t(j)    forwards from m_0,      and backwards from ones,

over one of three semirings: probabilities (+, ·), log-probabilities (logsumexp, +), largest log-probabilities
(max, +). Directions count only: every message is rescaled, so that what is lost is what is below the smallest
float times the largest entry.

N steps are cut into J blocks of L. The transfer matrices of all blocks are multiplied up side by side, L products
of S³; vectors are taken from block to block by them, J small products; then all blocks are run side by side from
their own first vectors, L products of S². Where S³ is more work than one step after the other, there is one block.
Memory is O(N·S) besides the potentials.

Shapes: N steps, B chains, S states, L steps in a block, M = J·B columns, blocks side by side. S comes first:
reductions over a small last dim are slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 48  # steps below which there is one block
PRODUCTS = 400_000  # B·S³ up to which blocks of matrix products save calls; elementwise operations cost ten times more


@dataclass(frozen=True)
class Semiring:
    """`contract(m, a)` is ⊕_i m(i) ⊗ a(i, j); `join(p, v)` is ⊕_i p(s, i) ⊗ v(i); `scaled(m)` has entries of size 1."""

    zero: float
    one: float
    times: Callable[[Tensor, Tensor], Tensor]
    plus: Callable[[Tensor, int], Tensor]
    scaled: Callable[[Tensor], Tensor]
    products: int
    linear: bool = False

    def contract(self, m: Tensor, a: Tensor) -> Tensor:
        """m (S, ..., M), a (S, S) or (S, S, M)."""
        if self.linear and a.dim() == 2:
            return (a.mT @ m.reshape(len(m), -1)).reshape(m.shape)
        a = a.reshape(*a.shape[:2], *(1,) * (m.dim() - 2), -1)
        return self.plus(self.times(m.unsqueeze(1), a), 0)

    def join(self, p: Tensor, v: Tensor) -> Tensor:
        """p (S, S, B), v (S, B)."""
        return self.plus(self.times(p, v.unsqueeze(0)), 1)


def _sum_scaled(m: Tensor) -> Tensor:
    total = m.sum(0)
    return m / torch.where(total > 0, total, 1.0)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    shift = x.amax(dim, keepdim=True)
    shift = torch.where(shift == -math.inf, 0.0, shift)
    return (x - shift).exp_().sum(dim).log_() + shift.squeeze(dim)


def _max_scaled(m: Tensor) -> Tensor:
    largest = m.amax(0)
    return m - torch.where(largest == -math.inf, 0.0, largest)


LINEAR = Semiring(0.0, 1.0, torch.mul, torch.sum, _sum_scaled, PRODUCTS, linear=True)
LOG = Semiring(-math.inf, 0.0, torch.add, _logsumexp, _max_scaled, PRODUCTS // 100)
MAX = Semiring(-math.inf, 0.0, torch.add, torch.amax, _max_scaled, PRODUCTS // 100)


class Messages:
    """Potentials in blocks.

    :param start: message at the first time, (B, S), in the semiring's numbers like the others.
    :param unary: of the times after it, (N, B, S).
    :param pair: of neighbours, (N or 1, B or 1, S, S), from rows to columns.
    """

    def __init__(self, ring: Semiring, start: Tensor, unary: Tensor, pair: Tensor) -> None:
        N, B, S = unary.shape
        self.ring, self.start, self.sizes = ring, start, (N, B, S)
        shared = pair.shape[:2] == (1, 1)
        work = B * S**3 * (1 if shared or not ring.linear else 10)
        # Otherwise as many calls within the blocks as from block to block.
        self.length = N if N < FEWEST or work > ring.products else math.ceil(math.sqrt(N))
        self.blocks = -(-N // self.length)
        self.columns = self.blocks * B
        self.full = N - (self.blocks - 1) * self.length  # steps in the last block
        self.unary = self._laid_out(unary).reshape(self.length, S, self.columns)
        if len(pair) == 1:
            one = pair[0, 0] if shared else pair[0].permute(1, 2, 0).repeat(1, 1, self.blocks)
            self.pair = [one] * self.length
        else:
            wide = self._laid_out(pair.expand(N, B, S, S))
            self.pair = list(wide.reshape(self.length, S, S, self.columns).unbind(0))

    def _laid_out(self, x: Tensor) -> Tensor:
        """(N, B, states...) to (L, states..., J, B), whatever beyond the last step."""
        missing = self.blocks * self.length - len(x)
        if missing:
            x = torch.cat([x, x[:1].expand(missing, *x.shape[1:])])
        x = x.unflatten(0, (self.blocks, self.length))  # (J, L, B, states...)
        return x.permute(1, *range(3, x.dim()), 0, 2).contiguous()

    def _in_time(self, x: Tensor) -> Tensor:
        """(L, S, M) to (N, B, S)."""
        N, B, S = self.sizes
        return x.reshape(self.length, S, self.blocks, B).permute(2, 0, 3, 1).reshape(-1, B, S)[:N]

    def _matrices(self) -> Tensor:
        """Transfer matrices of the blocks up to scale, (J, end state, start state, B)."""
        ring, (_, B, S) = self.ring, self.sizes
        identity = torch.full((S, S, 1), ring.zero, dtype=self.unary.dtype)
        identity.diagonal().fill_(ring.one)
        m = identity.expand(S, S, self.columns)
        size = torch.zeros(S, self.columns, dtype=self.unary.dtype)
        for l in range(self.length):
            m = self._step(m, l)
            if ring.linear:  # columns are rescaled one by one, as they may differ by any order of magnitude
                total = m.sum(0)
                size += total.log()
                m = m / torch.where(total > 0, total, 1.0)
        if ring.linear:
            largest = size.amax(0)
            m = m * (size - torch.where(largest == -math.inf, 0.0, largest)).exp()
        return m.reshape(S, S, self.blocks, B).permute(2, 0, 1, 3)

    def _step(self, m: Tensor, l: int) -> Tensor:
        """One step of every block that has it."""
        ring, b = self.ring, self.unary[l]
        b = b.unsqueeze(1) if m.dim() == 3 else b
        new = ring.times(ring.contract(m, self.pair[l]), b)
        if l >= self.full:
            kept = self.columns - self.sizes[1]
            new = torch.cat([new[..., :kept], m[..., kept:]], -1)
        return new

    def forward_and_backward(self, backward: bool = True) -> tuple[Tensor, Tensor]:
        """Messages (N + 1, B, S) forwards (own u included) and backwards (later u only; empty if not asked for)."""
        ring, (_, B, S) = self.ring, self.sizes
        ones = torch.full((S, B), ring.one, dtype=self.unary.dtype)
        first, last = [ring.scaled(self.start.mT)], [ones]
        if self.blocks > 1:
            matrices = self._matrices()
            for p in matrices[:-1]:
                first.append(ring.scaled(ring.join(p, first[-1])))
            for p in reversed(matrices[1:].transpose(1, 2)) if backward else ():
                last.append(ring.scaled(ring.join(p, last[-1])))
        forwards = self._within(torch.cat(first, -1))
        forwards = torch.cat([first[0].mT.unsqueeze(0), self._in_time(forwards)])
        if not backward:
            return forwards, forwards[:0]
        after = self._in_time(self._within_backwards(torch.cat(last[::-1], -1)))
        before_all = ring.contract(ring.times(after[0].mT, self._first_unary()), self._first_pair())
        return forwards, torch.cat([ring.scaled(before_all).mT.unsqueeze(0), after])

    def _first_unary(self) -> Tensor:
        return self.unary[0][:, : self.sizes[1]]

    def _first_pair(self) -> Tensor:
        pair = self.pair[0].transpose(0, 1)
        return pair if pair.dim() == 2 else pair[..., : self.sizes[1]]

    def _within(self, m: Tensor) -> Tensor:
        out = torch.empty_like(self.unary)
        for l in range(self.length):
            m = out[l] = self.ring.scaled(self._step(m, l))
        return out

    def _within_backwards(self, m: Tensor) -> Tensor:
        """Message at the end of every step, from those at the blocks' ends."""
        ring = self.ring
        kept = self.columns - self.sizes[1]
        out = torch.empty_like(self.unary)
        for l in range(self.length - 1, -1, -1):
            out[l] = m
            if l == 0:
                break
            new = ring.scaled(ring.contract(ring.times(m, self.unary[l]), self.pair[l].transpose(0, 1)))
            m = new if l < self.full else torch.cat([new[:, :kept], m[:, kept:]], -1)
        return out
