"""Exact smoothing of discrete chains, many at once.

For log-potentials u_t (unary) and a_t (between t-1 and t), with W_t = exp(a_t) diag(exp u_t),

    Z = w_0 W_1 W_2 ... W_{T-1} 1,      w_0 = exp u_0,

and the posteriors are α_{t-1} W_t β_t, up to a constant. Three ways to the messages α and β:

    tree         products of neighbouring W_t, then of these, and so on; back down, every node passes α to
                 its second half and β to its first. 2 log T batched products, for short chains.
    two levels   blocks of time side by side, then from block to block (two_level.py); memory O(T·K).
    log-space    the same with logsumexp; slower, and the only one without a certificate. Its pairs are formed in
                 chunks of steps, when they are asked for.

The first two work with scaled probabilities. A number below the smallest float is flushed to zero, which
drops paths; their posterior mass is at most that number over the product of the scales it meets. So if that
product is not below e^`LOWEST` the result is right to the last digit, otherwise it is found in log-space.
Structural zeros are exact. No gradients flow; chains of unequal numbers of states are not handled.

Shapes: T steps, B chains, K states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.evidence.ring import logsumexp
from pyro_em.evidence.two_level import LINEAR, LOG, Messages

LOWEST = -600.0  # what is flushed, below e^-708, is then less than e^-100 of the posterior mass
TREE = 500  # B·K² above which the arithmetic of the tree costs more than the calls it saves
CELLS = 2**19  # of the tables of pairs that are held at once
SHORT, LONG = 16, 2000  # steps between which the tree saves calls, and its memory does not matter
WIDE = 2**20  # cells of tables for every step up to which it does not matter either, as they are there anyway


@dataclass(frozen=True)
class ChainPosterior:
    """Evidence and posteriors of B chains.

    `log_evidence` is (B,), -inf where the data are impossible (the posteriors are zero there); `unary` is
    (T, B, K); the pairwise posterior is left_i · table_ij · right_j with `left`, `right` (T-1, B, K) and
    `table` (T-1 or 1, B or 1, K, K), kept as factors because sums of it need not form the product.
    """

    log_evidence: Tensor
    unary: Tensor
    left: Tensor
    table: Tensor
    right: Tensor

    def pairs(self) -> Tensor:
        """Posterior of neighbours, (T-1, B, K, K)."""
        return self.left.unsqueeze(-1) * self.table * self.right.unsqueeze(-2)

    def before(self, begin: int, end: int) -> Tensor:
        """Of some steps, weights of the state before each state after, (t, B, after, before)."""
        table = self.table if len(self.table) == 1 else self.table[begin:end]
        return self.left[begin:end].unsqueeze(-2) * table.mT

    def total_pairs(self, weight: Tensor | None) -> Tensor:
        """Weighted sum of `pairs` over steps and chains, (K, K); `weight` is (T-1, B)."""
        if self.table.shape[:2] != (1, 1):
            pairs = self.pairs()
            return (pairs if weight is None else weight[..., None, None] * pairs).sum((0, 1))
        left = self.left if weight is None else self.left * weight.unsqueeze(-1)
        return self.table[0, 0] * (left.flatten(0, 1).mT @ self.right.flatten(0, 1))


class _LogPosterior(ChainPosterior):
    """`left`, `table` and `right` are logarithms, up to one constant for every step and chain."""

    def pairs(self) -> Tensor:
        return self._between(0, len(self.left))

    def before(self, begin: int, end: int) -> Tensor:
        return self._between(begin, end).mT

    def total_pairs(self, weight: Tensor | None) -> Tensor:
        total = self.left.new_zeros(self.table.shape[-2:])
        for begin, end in steps_of_cells(self.left, self.table):
            own = self._between(begin, end)
            total += (own if weight is None else weight[begin:end, :, None, None] * own).sum((0, 1))
        return total

    def _between(self, begin: int, end: int) -> Tensor:
        table = self.table if len(self.table) == 1 else self.table[begin:end]
        joint = self.left[begin:end].unsqueeze(-1) + table + self.right[begin:end].unsqueeze(-2)
        total = torch.where(self.log_evidence.isfinite(), logsumexp(joint.flatten(-2)), -torch.inf)
        return _normalised(joint.flatten(-2), total).unflatten(-1, table.shape[-2:])


def steps_of_cells(messages: Tensor, pair: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of steps (T-1, B, K) whose pairs together have about `CELLS` cells."""
    count, B, _ = messages.shape
    size = max(1, CELLS // (B * pair.shape[-1] * pair.shape[-2]))
    yield from ((begin, min(count, begin + size)) for begin in range(0, count, size))


def smooth(unary: Tensor, pair: Tensor) -> ChainPosterior:
    """Evidence and posteriors of chains with log-potentials `unary` (T, B, K) and `pair`.

    :param pair: (T-1 or 1, B or 1, K, K), from the state at t-1 (rows) to the state at t (columns); without
        steps (T = 1) it is not read.
    """
    T, B, K = unary.shape
    if T == 1:
        return _single(unary, pair)
    shift, pair_shift = unary.amax(-1), pair.amax((-2, -1))
    emission, table = (unary - shift.unsqueeze(-1)).exp(), (pair - pair_shift[..., None, None]).exp()
    found = (_tree if _is_small(T, B, K, len(table)) else _two_levels)(emission, table)
    if not bool(found.smallest >= LOWEST):  # also when it is NaN
        return _log_space(unary, pair)
    shifts = shift.sum(0) + pair_shift.expand(T - 1, B).sum(0)
    return ChainPosterior(found.log_scale + shifts, found.unary, found.left, table, found.right)


def _is_small(steps: int, chains: int, states: int, tables: int) -> bool:
    """Whether the tree takes less time than two levels and little more memory than its input."""
    cells = chains * states**2
    return cells <= TREE and steps > SHORT and (steps <= LONG or (tables > 1 and steps * cells <= WIDE))


@dataclass(frozen=True)
class _Messages:
    """`left` and `right` as in `ChainPosterior`; `smallest`, log of the smallest scales that meet."""

    log_scale: Tensor
    unary: Tensor
    left: Tensor
    right: Tensor
    smallest: Tensor


def _single(unary: Tensor, pair: Tensor) -> ChainPosterior:
    log_evidence = logsumexp(unary[0])
    posterior = _normalised(unary, log_evidence)
    none = unary.new_zeros(0, *unary.shape[1:])
    return ChainPosterior(log_evidence, posterior, none, pair.exp(), none)


def _normalised(log_joint: Tensor, log_evidence: Tensor) -> Tensor:
    """exp(log_joint - log Z), zero where Z is (`log_joint` has one more dim, the last)."""
    possible = log_evidence.isfinite().unsqueeze(-1)
    shift = torch.where(possible, log_evidence.unsqueeze(-1), torch.zeros_like(log_evidence).unsqueeze(-1))
    return torch.where(possible, (log_joint - shift).exp(), torch.zeros_like(log_joint))


def _rows(vector: Tensor, matrix: Tensor) -> Tensor:
    """Σ_i v_i M_ij."""
    return (vector.unsqueeze(-2) @ matrix).squeeze(-2)


def _columns(matrix: Tensor, vector: Tensor) -> Tensor:
    """Σ_j M_ij v_j."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _products(steps: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Levels of products of neighbouring matrices, and the scales that they were divided by."""
    levels, scales = [steps], []
    while len(levels[-1]) > 1:
        nodes = levels[-1]
        if len(nodes) % 2:
            one = torch.eye(nodes.shape[-1], dtype=nodes.dtype).expand_as(nodes[:1])
            nodes = levels[-1] = torch.cat([nodes, one])
        product = nodes[0::2] @ nodes[1::2]
        scales.append(product.amax((-2, -1), keepdim=True))
        levels.append(product / scales[-1])
    return levels, scales


def _descend(levels: list[Tensor], alpha: Tensor, beta: Tensor, count: int, rescale: bool) -> tuple[Tensor, Tensor]:
    """α at the start and β at the end of each of the `count` matrices, from those of their whole product."""
    for nodes in reversed(levels[:-1]):
        alpha, beta = alpha[: len(nodes) // 2], beta[: len(nodes) // 2]  # without what only filled up
        middle = _rows(alpha, nodes[0::2]), _columns(nodes[1::2], beta)
        if rescale:
            middle = middle[0] / middle[0].sum(-1, keepdim=True), middle[1] / middle[1].sum(-1, keepdim=True)
        alpha = torch.stack([alpha, middle[0]], 1).flatten(0, 1)
        beta = torch.stack([middle[1], beta], 1).flatten(0, 1)
    return alpha[:count], beta[:count]


def entering(initial: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors that enter each of a sequence of transfer matrices from both sides, (J, B, K) each, up to scale.

    :param initial: row vector before the first matrix, (B, K); after the last one there are ones.
    :param matrices: (J, B, K, K).
    """
    levels, _ = _products(matrices)
    return _descend(levels, initial.unsqueeze(0), torch.ones_like(initial).unsqueeze(0), len(matrices), True)


def _tree(emission: Tensor, table: Tensor) -> _Messages:
    steps = table * emission[1:].unsqueeze(-2)  # (T-1, B, K, K)
    levels, scales = _products(steps)
    alpha = emission[:1]  # at the start of every node of a level
    beta = torch.ones_like(alpha)  # at the end of every node
    total = (_rows(alpha, levels[-1]) * beta).sum(-1)
    alpha, beta = _descend(levels, alpha, beta, len(steps), False)
    joint = _rows(alpha, steps) * beta
    norm = joint.sum(-1, keepdim=True)
    start = alpha[:1] * _columns(steps[:1], beta[:1]) / norm[:1]
    right = emission[1:] * beta / norm
    # The scales of a path from the root to a leaf multiply.
    smallest = torch.stack([scale.min() for scale in scales] + [norm.min()]).log().sum()
    log_scale = torch.cat([total, *(scale[..., 0, 0] for scale in scales)]).log().sum(0)
    return _Messages(log_scale, torch.cat([start, joint / norm]), alpha, right, smallest)


def _two_levels(emission: Tensor, table: Tensor) -> _Messages:
    alpha, beta = Messages(LINEAR, emission[0], emission[1:], table).forward_and_backward()
    left = alpha[:-1]
    predicted = _after(left, table)
    right = emission[1:] * beta[1:]
    step = (predicted * emission[1:]).sum(-1)  # what α is divided by
    norm = (predicted * right).sum(-1, keepdim=True)
    first = emission[0].sum(-1)
    # What the messages are divided by, and what they meet: nothing else makes numbers small.
    back = (right * table.sum(-2)).sum(-1)
    smallest = torch.stack([step.min(), first.min(), norm.min(), back.min()]).log().sum()
    joint = alpha * beta
    return _Messages(first.log() + step.log().sum(0), joint / joint.sum(-1, keepdim=True), left, right / norm, smallest)


def _after(left: Tensor, table: Tensor) -> Tensor:
    """Σ_i left_i · table_ij, (T-1, B, K)."""
    if table.shape[:2] == (1, 1):
        return left @ table[0, 0]
    return (left.unsqueeze(-1) * table).sum(-2)


def _log_space(unary: Tensor, pair: Tensor) -> ChainPosterior:
    alpha, beta = Messages(LOG, unary[0], unary[1:], pair).forward_and_backward()
    left, right = alpha[:-1], unary[1:] + beta[1:]
    rise = unary.new_zeros(unary.shape[1])
    for begin, end in steps_of_cells(left, pair):
        joint = left[begin:end].unsqueeze(-1) + (pair if len(pair) == 1 else pair[begin:end])
        step = logsumexp(joint.mT) + unary[begin + 1 : end + 1]  # α of the next step before it is rescaled
        rise += (logsumexp(step) - logsumexp(left[begin:end])).sum(0)
    log_evidence = logsumexp(unary[0]) + rise
    log_evidence = torch.where(log_evidence.isnan(), -torch.inf, log_evidence)
    both = alpha + beta
    posterior = _normalised(both, torch.where(log_evidence.isfinite(), logsumexp(both), -torch.inf))
    return _LogPosterior(log_evidence, posterior, left, pair, right)
