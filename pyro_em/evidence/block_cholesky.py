"""Cholesky factors of a sparse Gaussian system, its solution, and the entries of its inverse that rows need.

In the order of elimination_order.py, with J_E the own block of element E and J_EN that with its neighbours,

    L Lᵀ = J_E,   G = J_E⁻¹ J_EN,   J_NN ← J_NN - J_ENᵀ G            (elimination, one batched step for each plate)
    Σ_EN = -G Σ_NN,   Σ_EE = J_E⁻¹ - Σ_EN Gᵀ                          (J⁻¹ on the pattern of J, last level first)

Pairs of neighbours are coupled after the elimination, so that Σ_NN is known where it is asked for: no other entry of
the inverse is formed. Source: Takahashi, Fagan and Chen (1973); Erisman and Tinney (1975).

Letters: D unknowns (vectors have D + 1 entries, the last one 0); n elements of a level, k unknowns of each, t
neighbours; m unknowns of the tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.evidence.elimination_order import Level, Order


@dataclass(frozen=True)
class Sparse:
    """The factors: L (n, k, k) and G (n, k, t) of every level, and L (m, m) of the tail, if there is one."""

    order: Order
    lowers: tuple[Tensor, ...]
    gains: tuple[Tensor, ...]
    tail: Tensor | None

    def solve(self, linear: Tensor) -> Tensor:
        """J⁻¹h, (D + 1,)."""
        owns = []
        for level, lower, gain in zip(self.order.levels, self.lowers, self.gains, strict=True):
            h = linear[level.unknowns].unsqueeze(-1)
            owns.append(_solved(lower, h).squeeze(-1))
            pulled = gain.flatten(0, 1).mT @ h.reshape(-1) if level.targets is None else (gain.mT @ h).reshape(-1)
            linear = linear.index_add(0, level.neighbours.reshape(-1), -pulled)
        found = torch.zeros_like(linear)
        if self.tail is not None:
            at = self.order.tail
            found = found.index_copy(0, at, torch.cholesky_solve(linear[at].unsqueeze(-1), self.tail).squeeze(-1))
        for level, own, gain in reversed(list(zip(self.order.levels, owns, self.gains, strict=True))):
            near = found[level.neighbours]
            moved = gain @ near if level.targets is None else (gain @ near.unsqueeze(-1)).squeeze(-1)
            found = found.index_copy(0, level.unknowns.reshape(-1), (own - moved).reshape(-1))
        return found

    def log_det(self, weight: Tensor | None = None) -> Tensor:
        """log|J|, the unknowns (D + 1,) counted by `weight`, which does not tell coupled ones apart."""
        diagonals = [lower.diagonal(dim1=-2, dim2=-1).reshape(-1) for lower in self.lowers]
        unknowns = [level.unknowns.reshape(-1) for level in self.order.levels]
        if self.tail is not None:
            diagonals.append(self.tail.diagonal())
            unknowns.append(self.order.tail)
        logs = torch.cat(diagonals).log()
        return 2 * (logs if weight is None else logs * weight[torch.cat(unknowns)]).sum()

    def inverse(self) -> Tensor:
        """J⁻¹ in the cells of the store, those with mirror images once."""
        zero = self.lowers[0].new_zeros(1) if self.lowers else None
        known = []
        if self.tail is not None:
            common = torch.cholesky_inverse(self.tail)
            zero = self.tail.new_zeros(1)
            known.append(common.reshape(-1))
        assert zero is not None
        store = torch.cat([zero, *known])
        for level, lower, gain in reversed(list(zip(self.order.levels, self.lowers, self.gains, strict=True))):
            if level.targets is None:
                cross = -(gain.flatten(0, 1) @ common).reshape(gain.shape)
            else:
                cross = -gain @ store[level.pairs]
            own = _inverse(lower) - cross @ gain.mT
            store = torch.cat([store, own.reshape(-1), cross.reshape(-1)])
        return store


def factor(order: Order, store: Tensor) -> Sparse | None:
    """The factors of a system, or None if it is not positive definite.

    :param store: J in its cells, those with mirror images once.
    """
    lowers, gains = [], []
    for level in order.levels:
        n, k = level.unknowns.shape
        lower = _lower(store[level.own].reshape(n, k, k))
        if lower is None:
            return None
        cross = store[level.cross].reshape(n, k, -1)
        gain = _solved(lower, cross)
        store = _eliminated(store, level, cross, gain)
        lowers.append(lower)
        gains.append(gain)
    m = len(order.tail)
    tail = _lower(store[1 : 1 + m * m].reshape(m, m)) if m else None
    return None if m and tail is None else Sparse(order, tuple(lowers), tuple(gains), tail)


def _eliminated(store: Tensor, level: Level, cross: Tensor, gain: Tensor) -> Tensor:
    if level.targets is not None:
        return store.index_add(0, level.targets, -(cross.mT @ gain).reshape(-1))
    change = cross.flatten(0, 1).mT @ gain.flatten(0, 1)
    end = 1 + change.numel()
    return torch.cat([store[:1], store[1:end] - change.reshape(-1), store[end:]])


def _lower(x: Tensor) -> Tensor | None:
    if x.shape[-1] == 1:  # a batched Cholesky factor takes a call for every element
        return x.sqrt() if bool((x > 0).all()) else None
    lower, failed = torch.linalg.cholesky_ex(x)
    return None if bool(failed.any()) else lower


def _solved(lower: Tensor, x: Tensor) -> Tensor:
    return x / (lower * lower) if lower.shape[-1] == 1 else torch.cholesky_solve(x, lower)


def _inverse(lower: Tensor) -> Tensor:
    return 1 / (lower * lower) if lower.shape[-1] == 1 else torch.cholesky_inverse(lower)
