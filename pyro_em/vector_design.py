"""Designs of vector arguments: η_d = A_d θ for the D entries of a vector, all by the products of one design.

    predict   (A_d θ)_d               pull   Σ_d A_dᵀ v_d               gram   Σ_de A_dᵀ diag(ω_de) A_e

The entries are one more dim left of the cells, so that A is one design over (D, cells). The curvature of a softmax,
diag(a) − b bᵀ for every cell, is not formed: with Z = Σ_d diag(b_d) A_d its Gram matrix is Aᵀ diag(a) A − ZᵀZ, the
second one product per state that the index tells apart, of m·D rows, made chunk by chunk.

Shapes as in design.py; what is given or returned for every entry of a vector has the D entries last, as arguments do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.design import Design, Group
from pyro_em.model.predictor import Term

CHUNK = 2**18  # cells of Z that are made at once


@dataclass(frozen=True)
class SoftmaxCurvature:
    """diag(a) − b bᵀ for every cell; `diagonal` a and `root` b are (cells, D)."""

    diagonal: Tensor
    root: Tensor


Curvature = Tensor | SoftmaxCurvature


class VectorDesign:
    """One vector argument as a linear function of the block.

    :param terms: with the entries as the last dim of index and coefficient.
    :param starts: where each parameter begins in the block; :param size: P.
    :param entries: D; :param cells: batch shape of the argument.
    """

    def __init__(
        self, terms: Sequence[Term], starts: Mapping[str, int], size: int, entries: int, cells: torch.Size
    ) -> None:
        self.size, self.entries, self.cells = size, entries, cells
        rank = len(cells)
        placed = [
            replace(t, index=_entries_first(t.index, rank), coefficient=_entries_first(t.coefficient, rank))
            for t in terms
        ]
        self.whole = Design(placed, starts, size, torch.Size((entries, *cells)))

    def over(self, cells: torch.Size) -> VectorDesign:
        """The same terms over other cells of equal rank, where no term varies along a dim that they have not."""
        other = copy.copy(self)
        other.cells, other.whole = cells, self.whole.over(torch.Size((self.entries, *cells)))
        return other

    def predict(self, theta: Tensor) -> Tensor:
        """η (cells, D), broadcastable over the cells; θ (P,)."""
        found = self.whole.predict(theta)
        return found.expand(self.entries, *found.shape[1:]).movedim(0, -1)

    def pull(self, v: Tensor) -> Tensor:
        """Σ_d A_dᵀ v_d for v (cells, D), (P,)."""
        return self.whole.pull(self._placed(v, 1))

    def gram_matrix(self, weight: Curvature) -> Tensor:
        """Σ_de A_dᵀ diag(ω_de) A_e for symmetric ω (cells, D, D), or that of a softmax, (P, P)."""
        matrix = self.whole.dense()
        own = None if matrix is None else matrix.reshape(self.entries, -1, self.size)
        if isinstance(weight, SoftmaxCurvature):
            root = self._placed(weight.root, 1)
            diagonal = self.whole.gram_matrix(self._placed(weight.diagonal, 1))
            if own is None:
                return diagonal - self._scattered(lambda a, b, kept: self._outer(a, b, root, kept))
            z = (self._wide(root).unsqueeze(-1) * own).sum(0)
            return diagonal - z.mT @ z
        omega = self._placed(weight, 2)
        if own is None:
            return self._scattered(
                lambda a, b, kept: self._flat.sum_of(
                    [("UV", omega), ("yU", self._each(a)), ("zV", self._each(b))], "yUzV", kept
                )
            )
        return torch.einsum("dnq,den,enp->qp", own, self._wide(omega), own)

    @property
    def _flat(self) -> Design:
        """The cells without the entries."""
        return Design([], {}, 0, self.cells)

    def _each(self, group: Group) -> Tensor:
        """Coefficients (m, D, cells)."""
        x = group.coefficient
        return x.expand(len(x), self.entries, *x.shape[2:])

    def _outer(self, a: Group, b: Group, root: Tensor, kept: frozenset[int]) -> Tensor:
        """Σ of Z_a Z_b, (m, D, m', D, kept cells), chunk by chunk along the longest dim that is summed."""
        flat = self._flat
        dim = max((i for i in range(len(self.cells)) if i not in kept), key=self.cells.__getitem__, default=None)
        size = 1 if dim is None else self.cells[dim]
        rows = len(a.index) * self.entries * max(1, self.cells.numel() // size)
        chunk = max(1, CHUNK // rows)
        total: Tensor | None = None
        for begin in range(0, size, chunk):
            end = min(size, begin + chunk)

            def part(x: Tensor, begin: int = begin, end: int = end) -> Tensor:
                place = x.dim() - len(self.cells) + (dim or 0)
                return x if dim is None or x.shape[place] == 1 else x.narrow(place, begin, end - begin)

            own = part(root)
            left = part(self._each(a)) * own
            right = left if a is b else part(self._each(b)) * own
            cells = self.cells if dim is None else torch.Size((*self.cells[:dim], end - begin, *self.cells[dim + 1 :]))
            found = flat.over(cells).sum_of([("yU", left), ("zV", right)], "yUzV", kept)
            total = found if total is None else total + found
        assert total is not None
        return total

    def _scattered(self, product: Callable[[Group, Group, frozenset[int]], Tensor]) -> Tensor:
        """The matrix (P, P) of the products (m, D, m', D, kept cells) of all pairs of groups of terms."""
        total = torch.zeros((self.size + 1) ** 2, dtype=torch.float64)
        for a in self.whole.groups:
            for b in self.whole.groups:
                kept = frozenset(i - 1 for i in a.index_dims | b.index_dims if i > 0)
                matrix = product(a, b, kept)
                index = a.index[:, :, None, None] * (self.size + 1) + b.index[None, None]
                index, matrix = torch.broadcast_tensors(index, matrix)
                total.index_add_(0, index.reshape(-1), matrix.reshape(-1))
        return total.reshape(self.size + 1, -1)[:-1, :-1].contiguous()

    def _wide(self, x: Tensor) -> Tensor:
        """x (entries, cells) for every cell, cells flattened."""
        lead = x.shape[: x.dim() - len(self.cells)]
        return x.expand(*lead, *self.cells).reshape(*lead, -1)

    def _placed(self, x: Tensor, trailing: int) -> Tensor:
        """x (cells, D, ...) with its last dims first, summed over dims that the cells have not."""
        rank = len(self.cells)
        x = x.movedim(tuple(range(-trailing, 0)), tuple(range(trailing)))
        lead = x.dim() - trailing - rank
        if lead > 0:
            x = x.sum(tuple(range(trailing, trailing + lead)))
        x = x.reshape(*x.shape[:trailing], *(1,) * -lead, *x.shape[trailing:])
        gone = [trailing + i for i, n in enumerate(self.cells) if n == 1 and x.shape[trailing + i] > 1]
        return x.sum(gone, keepdim=True) if gone else x


def _entries_first(x: Tensor, rank: int) -> Tensor:
    x = x.reshape(1) if x.dim() == 0 else x
    return x.reshape((1,) * (rank + 1 - x.dim()) + tuple(x.shape)).movedim(-1, 0)
