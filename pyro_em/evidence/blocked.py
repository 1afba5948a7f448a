"""Forward-backward of long chains that share one transition table: time is cut into blocks, all run side by side.

    α_t = (Aᵀ α_{t-1}) ∘ b_t,    β_t = A (b_{t+1} ∘ β_{t+1}),    log Z = Σ log of the scales that α is divided by

C chains of T steps are cut into J blocks of L steps each; the M = C·J blocks are the columns of every product, so
that L steps do the work of T. What a block needs from its neighbours are two vectors, p (the predicted state at
its start) and e (what follows its end). They are found

    overlap   by running the last steps of the block before it from a uniform vector (and the first steps of the
              block after it, backwards): a chain forgets where it came from;
    exact     from the transfer matrices of all blocks, multiplied up in a tree (chain.py).

Either way they are certified: run from its p, a block must end where the next one begins, and the first p is
the initial distribution itself, so that by induction all are right. What fails falls back to the next route,
the last of them being log-space (chain.py). As there, numbers are rescaled every few steps, structural zeros
are exact, and what underflow may have dropped is bounded by the scales.

Rows of A must sum to one: then steps beyond a chain's end, with b = 1, change nothing.

α and β are divided by the same scales, so that Σ_i α_t(i) β_t(i) is the same at all steps of a block; it is made
one at its end.

Shapes: K states, L steps in a block, M = C·J columns with the blocks of a chain side by side. K comes first:
reductions over a small last dim are slow, and sums over all steps are one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.evidence.chain import LOWEST, entering
from pyro_em.products import product_of

RESCALE = 8  # steps between two rescalings, each of them three calls beside the four of a step
OVERLAP = 48  # steps that a chain is given to forget, at first
SHORTEST, LONGEST, WORTH = 32, 256, 4000  # steps of a block; columns times states that a step should have
AGREE = 1e-13  # largest difference of a boundary vector (entries up to 1) from what its neighbour says
WIDE = 5000  # cells of the transfer matrices of one step above which overlap is worth trying first
ROW_SUM = 1e-12


@dataclass(frozen=True)
class Blocks:
    """How C chains of T steps are cut: L steps in each of J blocks a chain (the last ones may be padded)."""

    steps: int
    chains: int
    length: int
    per_chain: int

    @property
    def columns(self) -> int:
        return self.chains * self.per_chain

    @property
    def padded(self) -> bool:
        """Whether there are places behind a chain's end."""
        return self.length * self.per_chain != self.steps

    @staticmethod
    def of(steps: int, chains: int, states: int) -> Blocks:
        """Blocks as long as leaves the arithmetic of a step worth its calls."""
        length = min(steps, max(SHORTEST, min(LONGEST, steps * chains * states // WORTH)))
        return Blocks(steps, chains, length, -(-steps // length))

    def order(self) -> Tensor:
        """(L, M): the row t·C + c that lies there, -1 for padding."""
        t = torch.arange(self.length).reshape(-1, 1, 1) + self.length * torch.arange(self.per_chain)
        rows = t * self.chains + torch.arange(self.chains).reshape(1, -1, 1)
        return torch.where(t < self.steps, rows, -1).reshape(self.length, -1)


class Scratch:
    """Arrays that are kept from one E-step to the next: fresh memory costs more than the arithmetic on it.

    What a call returns lies in them and is overwritten by the next call. `overlap` is how many steps the chains
    were last given to forget; parameters that are close to the last ones forget as fast.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, Tensor] = {}
        self.overlap = OVERLAP

    def array(self, name: str, *shape: int) -> Tensor:
        """An array of that shape, with whatever it held before."""
        found = self._arrays.get(name)
        if found is None or found.shape != shape:
            found = self._arrays[name] = torch.empty(shape, dtype=torch.float64)
        return found


@dataclass(frozen=True)
class BlockedPosterior:
    """`log_scale` (C,): log Z of b and A; `states` (K, L, M); pairs are left_i · A_ij · right_j, both (K, L, M), of
    the step there and the one after it (zero at the last step of a chain's last block)."""

    log_scale: Tensor
    states: Tensor
    left: Tensor
    right: Tensor


def smooth_blocked(
    initial: Tensor, table: Tensor, likelihood: Tensor, blocks: Blocks, scratch: Scratch
) -> BlockedPosterior | None:
    """Posterior of all states and pairs; None if it cannot be certified (use chain.py).

    :param initial: distribution of the first state, (K, C) or (K, 1).
    :param table: transition probabilities A, (K, K), rows to columns.
    :param likelihood: b (K, L, M), the largest of every column about 1, padding 1.
    """
    if not float((table.sum(1) - 1).abs().max()) <= ROW_SUM:
        return None
    with np.errstate(all="ignore"):  # what is not a number is not certified
        return _smooth_blocked(initial, table, likelihood, blocks, scratch)


def _smooth_blocked(
    initial: Tensor, table: Tensor, likelihood: Tensor, blocks: Blocks, scratch: Scratch
) -> BlockedPosterior | None:
    K, _, M = likelihood.shape
    first = initial.expand(K, blocks.chains)
    if blocks.per_chain == 1:
        return _within(first, torch.ones(K, M, dtype=table.dtype), table, likelihood, blocks, scratch)
    if K * K * M > WIDE and scratch.overlap <= blocks.length:
        start, end = _overlapping(first, table, likelihood, blocks, scratch.overlap)
        found = _within(start, end, table, likelihood, blocks, scratch)
        if found is not None:
            return found
        scratch.overlap = min(2 * scratch.overlap, max(blocks.length, scratch.overlap + 1))
    start, end = _exact(first, table, likelihood, blocks)
    return _within(start, end, table, likelihood, blocks, scratch)


def _overlapping(
    first: Tensor, table: Tensor, likelihood: Tensor, blocks: Blocks, overlap: int
) -> tuple[Tensor, Tensor]:
    K, _, M = likelihood.shape
    ahead = torch.full((K, M), 1.0 / K, dtype=table.dtype)
    behind, moved = ahead.clone(), torch.empty_like(ahead)
    multiply, seen = product_of(table)
    forward, backward = seen(table.mT.contiguous()), seen(table.contiguous())
    ahead_seen, behind_seen, moved_seen = seen(ahead), seen(behind), seen(moved)
    for i in range(overlap):
        torch.mul(ahead, likelihood[:, blocks.length - overlap + i], out=moved)
        multiply(forward, moved_seen, ahead_seen)
        torch.mul(behind, likelihood[:, overlap - 1 - i], out=moved)
        multiply(backward, moved_seen, behind_seen)
        if i % RESCALE == RESCALE - 1:
            ahead /= ahead.sum(0)
            behind /= behind.sum(0)
    shape = (K, blocks.chains, blocks.per_chain)
    start, end = torch.empty(shape, dtype=table.dtype), torch.ones(shape, dtype=table.dtype)
    start[..., 0] = first
    start[..., 1:] = ahead.reshape(shape)[..., :-1]
    # `behind` is β at the end of the block before: already multiplied by A.
    end[..., :-1] = behind.reshape(shape)[..., 1:]
    return start.reshape(K, M), end.reshape(K, M)


def _exact(first: Tensor, table: Tensor, likelihood: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """From transfer matrices F = Π_l diag(b_l) A of every block, kept as columns (end state, start state, block)."""
    K, _, M = likelihood.shape
    forward = table.mT.contiguous()
    columns = (forward.unsqueeze(-1) * likelihood[:, 0]).reshape(K, K * M)
    scale = torch.zeros(K * M, dtype=table.dtype)
    other = torch.empty_like(columns)
    for l in range(1, blocks.length):
        columns.view(K, K, M).mul_(likelihood[:, l].unsqueeze(1))
        torch.mm(forward, columns, out=other)
        columns, other = other, columns
        if l % RESCALE == 0 or l == blocks.length - 1:
            total = columns.sum(0)
            columns /= torch.where(total > 0, total, 1.0)
            scale += total.log()
    scale = scale.reshape(K, M)
    largest = scale.amax(0)
    scale = (scale - torch.where(largest.isfinite(), largest, 0.0)).exp()
    shape = (K, K, blocks.chains, blocks.per_chain)
    matrices = (columns.view(K, K, M) * scale).reshape(shape).permute(3, 2, 1, 0)  # (J, C, start state, end state)
    start, end = entering(first.mT, matrices.contiguous())
    start = start / start.sum(-1, keepdim=True)
    # A vector at the end of F, which ends with A, stands for b ∘ β of the next step: β here is A times that.
    return start.permute(2, 1, 0).reshape(K, M), table @ end.permute(2, 1, 0).reshape(K, M)


def _within(
    start: Tensor, end: Tensor, table: Tensor, likelihood: Tensor, blocks: Blocks, scratch: Scratch
) -> BlockedPosterior | None:
    """All blocks from their p (K, M) and β at their last step (K, M), and the certificate."""
    K, L, M = likelihood.shape
    forward, backward = table.mT.contiguous(), table.contiguous()
    left, right, beta = (scratch.array(name, K, L, M) for name in ("left", "right", "beta"))
    alpha, b, v, own = left.unbind(1), likelihood.unbind(1), right.unbind(1), beta.unbind(1)
    torch.mul(start, b[0], out=alpha[0])
    multiply, seen = product_of(table)
    ahead, behind, alpha_seen, v_seen, own_seen = seen(forward), seen(backward), seen(left), seen(right), seen(beta)
    scales: dict[int, Tensor] = {}
    for l in range(L):
        if l:
            multiply(ahead, alpha_seen[:, l - 1], alpha_seen[:, l])
            alpha[l].mul_(b[l])
        if l % RESCALE == 0 or l == L - 1:
            scales[l] = alpha[l].sum(0)
            alpha[l].div_(scales[l])
    torch.div(end, (alpha[L - 1] * end).sum(0), out=own[L - 1])
    # right[l] = b_{l+1} ∘ β_{l+1} / scale, so that β_l = A right[l].
    for l in range(L - 1, 0, -1):
        torch.mul(b[l], own[l], out=v[l - 1])
        if l in scales:
            v[l - 1].div_(scales[l])
        multiply(behind, v_seen[:, l - 1], own_seen[:, l - 1])
    shape = (K, blocks.chains, blocks.per_chain)
    across = v[L - 1].reshape(shape)
    across[..., -1] = 0.0
    across[..., :-1] = (b[0] * own[0]).view(shape)[..., 1:]
    if blocks.per_chain > 1 and not _certified(start, end, alpha[L - 1], across, forward, backward):
        return None
    all_scales = torch.stack(list(scales.values()))
    # What is flushed to zero in α, relative to the scale it meets, has a posterior mass of that times β.
    if not float(all_scales.min().log() - beta.max().log()) >= LOWEST:
        return None
    states = beta.mul_(left)
    if blocks.per_chain > 1:  # the pair across a boundary is scaled by its own sum
        last, following = alpha[L - 1].reshape(shape)[..., :-1], across[..., :-1]
        total = (last * (backward @ following.reshape(K, -1)).view(following.shape)).sum(0)
        across[..., :-1] = following / total
    v[L - 1].copy_(across.reshape(K, M))
    log_scale = all_scales.log().sum(0).reshape(blocks.chains, blocks.per_chain).sum(1)
    return BlockedPosterior(log_scale, states, left, right)


def _certified(start: Tensor, end: Tensor, last: Tensor, across: Tensor, forward: Tensor, backward: Tensor) -> bool:
    """Whether every block ends where the next one begins, forwards and backwards."""
    shape = across.shape
    K = len(start)
    ahead = (forward @ last).view(shape)[..., :-1]
    ahead = ahead / ahead.sum(0)
    following = across[..., :-1]
    behind = (backward @ following.reshape(K, -1)).view(following.shape)
    behind = behind / behind.sum(0)
    given = end.view(shape)[..., :-1]
    given = given / given.sum(0)
    error = torch.maximum((ahead - start.view(shape)[..., 1:]).abs().max(), (behind - given).abs().max())
    return float(error) <= AGREE
