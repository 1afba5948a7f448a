"""Designs: η = A θ for a block of parameters, and the three products that a regression needs, without A.

    predict   A θ                       pull   Aᵀ v                   gram   Aᵀ diag(ω) A

A is formed only where it is small, as products with it cost the fewest calls. Otherwise its terms c·θ[i]
(model/affine.py) are stacked in groups whose indices vary along the same dims, with coefficients (m, ...) over the
other dims. For `a[z] + X @ b[z]` the index is (m, K, 1), the coefficients (m, 1, N): predict and pull are matrix
products, and the Gram matrices of all K states are one product of the weights (K, N) with the m (m + 1)/2 products
x_i x_j, which are made chunk by chunk (gram.py).

A Gram matrix is kept in *pieces* over those dims that it cannot be summed along (its indices' dims, and dims that a
caller asks for), so that it can be scaled there, and a quadratic form can be read off per cell, before the
pieces are scattered onto the block.

Shapes: cells are the batch dims of a site's argument, `.to_event` elements included, rank R; m terms; P entries
of the block, flattened parameter after parameter. Index -1 (no entry) goes to a spare entry P.
"""

from __future__ import annotations

import copy
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.gram import gram_matrices
from pyro_em.model.predictor import Term
from pyro_em.shapes import broadcast_shapes

DENSE = 2**17  # entries of A up to which products with A itself cost less than its pieces


@dataclass(frozen=True, eq=False)
class Group:
    """Terms whose indices vary along the same dims: `index` and `coefficient` are (m, cells), broadcastable."""

    index: Tensor
    coefficient: Tensor

    @property
    def index_dims(self) -> frozenset[int]:
        return frozenset(i for i, size in enumerate(self.index.shape[1:]) if size > 1)

    @property
    def dims(self) -> frozenset[int]:
        return frozenset(i for i, size in enumerate(self.coefficient.shape[1:]) if size > 1)


@dataclass(frozen=True, eq=False)
class Column:
    """A piece of Aᵀ v: `vector` (m, kept cells) belongs to the entries of `rows`."""

    rows: Group
    vector: Tensor

    def scaled(self, factor: Tensor) -> Column:
        """Times a factor over the kept cells."""
        return Column(self.rows, self.vector * factor)


@dataclass(frozen=True, eq=False)
class Piece:
    """One block of a Gram matrix: `matrix` (m, m', kept cells) belongs to the entries (rows, columns)."""

    rows: Group
    columns: Group
    matrix: Tensor

    def scaled(self, factor: Tensor) -> Piece:
        """Times a factor over the kept cells."""
        return Piece(self.rows, self.columns, self.matrix * factor)


class Design:
    """One argument as a linear function of the block.

    :param terms: of this argument, those of parameters outside of the block left out.
    :param starts: where each parameter begins in the block; :param size: P.
    :param cells: full batch shape of argument and data.
    """

    def __init__(self, terms: Sequence[Term], starts: Mapping[str, int], size: int, cells: torch.Size) -> None:
        self.size, self.cells = size, cells
        self.groups = _groups([t for t in terms if t.parameter in starts], starts, size, len(cells))
        self._dense: dict[torch.Size, Tensor] = {}

    def dense(self) -> Tensor | None:
        """A (cells, P), None where it is large."""
        if self.cells.numel() * self.size > DENSE:
            return None
        if self.cells not in self._dense:
            self._dense[self.cells] = self.matrix()
        return self._dense[self.cells]

    def matrix(self) -> Tensor:
        """A (cells, P), whatever its size."""
        matrix = torch.zeros(self.cells.numel(), self.size + 1, dtype=torch.float64)
        for group in self.groups:
            for index, coefficient in zip(group.index, group.coefficient, strict=True):
                place, own = (x.expand(self.cells).reshape(-1, 1) for x in (index, coefficient))
                matrix.scatter_add_(1, place, own.double())
        return matrix[:, :-1].contiguous()

    def _summed(self, v: Tensor) -> Tensor:
        """v, which may have dims that the cells have not, as one number for every cell, flattened."""
        shape = broadcast_shapes(v.shape, self.cells)
        v = v.expand(shape)
        return (v if shape == self.cells else v.sum_to_size(self.cells)).reshape(-1)

    def over(self, cells: torch.Size) -> Design:
        """The same terms over other cells of equal rank, where no term varies along a dim that they have not."""
        if cells == self.cells:
            return self
        other = copy.copy(self)
        other.cells = cells
        return other

    def predict(self, theta: Tensor) -> Tensor:
        """A θ over the cells (broadcastable); θ (P,)."""
        matrix = self.dense()
        if matrix is not None:
            return (matrix @ theta).reshape(self.cells)
        padded = torch.cat([theta, theta.new_zeros(1)])
        total: Tensor | None = None  # of the size of the data: none more than are needed
        for group in self.groups:
            operands = [("y", padded[group.index]), ("y", group.coefficient)]
            own = self.sum_of(operands, "", frozenset(range(len(self.cells))))
            total = own if total is None else total + own
        return theta.new_zeros((1,) * len(self.cells)) if total is None else total

    def pull(self, v: Tensor) -> Tensor:
        """Aᵀ v for v over the cells (broadcastable), (P,)."""
        matrix = self.dense()
        return self.gathered(self.pulled(v)) if matrix is None else self._summed(v) @ matrix

    def gram_matrix(self, weight: Tensor, other: Design | None = None) -> Tensor:
        """Aᵀ diag(ω) A, or Aᵀ diag(ω) B for another design, (P, P)."""
        left, right = self.dense(), (self if other is None else other).dense()
        if left is None or right is None or len(left) != len(right):
            return self.scatter(self.gram(weight, other=other), symmetric=other is None)
        return left.mT @ (self._summed(weight).unsqueeze(-1) * right)

    def pulled(self, v: Tensor, keep: frozenset[int] = frozenset()) -> list[Column]:
        """Pieces of Aᵀ v, kept along `keep`."""
        found = []
        for group in self.groups:
            vector = self.sum_of([("", v), ("y", group.coefficient)], "y", group.index_dims | keep)
            found.append(Column(group, self._kept(vector, 1, keep)))
        return found

    def gathered(self, columns: Sequence[Column]) -> Tensor:
        """The vector (P,) of some pieces."""
        total = torch.zeros(self.size + 1, dtype=torch.float64)
        for column in columns:
            own = _fold(column.vector, column.rows.index, 1)
            index, own = torch.broadcast_tensors(column.rows.index, own)
            total.index_add_(0, index.reshape(-1), own.reshape(-1))
        return total[:-1]

    def inner(self, columns: Sequence[Column], delta: Tensor, keep: frozenset[int]) -> Tensor:
        """δᵀ Aᵀ v split over the cells of `keep`."""
        padded = torch.cat([delta, delta.new_zeros(1)])
        total = delta.new_zeros((1,) * len(self.cells))
        for column in columns:
            own = (column.vector * padded[column.rows.index]).sum(0)
            total = total + _summed(own, keep)
        return total

    def gram(self, weight: Tensor, keep: frozenset[int] = frozenset(), other: Design | None = None) -> list[Piece]:
        """Pieces of Aᵀ diag(ω) A (or Aᵀ diag(ω) B for another design), kept along `keep`.

        Without `other` a pair of different groups comes once: `scatter` and `quadratic` know.
        """
        pieces = []
        for i, a in enumerate(self.groups):
            for b in self.groups[i:] if other is None else other.groups:
                dims = a.index_dims | b.index_dims | keep
                shared = other is None and a is b and not a.dims & dims
                matrix = self.products(weight, a, dims) if shared else None
                if matrix is None:
                    matrix = self.sum_of([("", weight), ("y", a.coefficient), ("z", b.coefficient)], "yz", dims)
                pieces.append(Piece(a, b, self._kept(matrix, 2, keep)))
        return pieces

    def scatter(self, pieces: Sequence[Piece], symmetric: bool = True) -> Tensor:
        """The matrix (P, P) of some pieces."""
        width = self.size + 1
        flat = torch.zeros(width * width, dtype=torch.float64)
        for piece in pieces:
            index = piece.rows.index.unsqueeze(1) * width + piece.columns.index.unsqueeze(0)
            index, own = torch.broadcast_tensors(index, _fold(piece.matrix, index, 2))
            flat.index_add_(0, index.reshape(-1), own.reshape(-1))
            if symmetric and piece.rows is not piece.columns:
                turned = index % width * width + index // width
                flat.index_add_(0, turned.reshape(-1), own.reshape(-1))
        return flat.reshape(width, width)[:-1, :-1].contiguous()

    def quadratic(self, pieces: Sequence[Piece], delta: Tensor, keep: frozenset[int]) -> Tensor:
        """δᵀ Aᵀ diag(ω) A δ split over the cells of `keep`."""
        padded = torch.cat([delta, delta.new_zeros(1)])
        total = delta.new_zeros((1,) * len(self.cells))
        for piece in pieces:
            left, right = padded[piece.rows.index].unsqueeze(1), padded[piece.columns.index].unsqueeze(0)
            own = _summed((piece.matrix * left * right).sum((0, 1)), keep)
            total = total + (own if piece.rows is piece.columns else 2 * own)
        return total

    def _kept(self, x: Tensor, lead: int, keep: frozenset[int]) -> Tensor:
        """A kept dim that no operand had stands for all of its cells."""
        shape = [self.cells[i] if i in keep else s for i, s in enumerate(x.shape[lead:])]
        return x.expand(*x.shape[:lead], *shape)

    def sum_of(self, operands: Sequence[tuple[str, Tensor]], lead: str, keep: frozenset[int]) -> Tensor:
        """Σ of a product over the cells except along `keep`; operands are (term dims, tensor (terms, cells))."""
        rank = len(self.cells)
        names = string.ascii_lowercase[:rank]
        terms, tensors, present = [], [], set()
        for extra, x in operands:
            cells = x.shape[len(extra) :][-rank:] if rank else ()  # any dims before these have size 1
            x = x.reshape((*x.shape[: len(extra)], *(1,) * (rank - len(cells)), *cells))
            own = [i for i in range(rank) if x.shape[len(extra) + i] > 1]
            present |= set(own)
            terms.append(extra + "".join(names[i] for i in own))
            tensors.append(x.reshape((*x.shape[: len(extra)], *(x.shape[len(extra) + i] for i in own))))
        out = [i for i in range(rank) if i in keep and i in present]
        result = torch.einsum(",".join(terms) + "->" + lead + "".join(names[i] for i in out), *tensors)
        repeats = math.prod(self.cells[i] for i in range(rank) if i not in keep and i not in present)
        shape = [self.cells[i] if i in out else 1 for i in range(rank)]
        return (result * repeats if repeats != 1 else result).reshape((*result.shape[: len(lead)], *shape))

    def products(self, weight: Tensor, group: Group, dims: frozenset[int]) -> Tensor | None:
        """Gram matrices of one group for every cell of `dims`, its coefficients being the same in all of them."""
        rows = sorted(group.dims)
        if not rows:
            return None
        # Σ over what the coefficients do not see comes first.
        weight = self.sum_of([("", weight)], "", dims | group.dims)
        if any(weight.shape[i] == 1 for i in rows):
            weight = weight.expand([self.cells[i] if i in group.dims else s for i, s in enumerate(weight.shape)])
        states = [i for i in range(weight.dim()) if i not in group.dims]
        w = weight.permute(states + rows).reshape(math.prod(weight.shape[i] for i in states), -1)
        x = group.coefficient.permute([0, *(1 + i for i in states), *(1 + i for i in rows)]).reshape(
            len(group.index), -1
        )
        found = gram_matrices(w, x)
        shape = [weight.shape[i] if i in states else 1 for i in range(weight.dim())]
        return found.permute(1, 2, 0).reshape(len(x), len(x), *shape)


def _groups(terms: Sequence[Term], starts: Mapping[str, int], size: int, rank: int) -> list[Group]:
    placed = []
    for term in terms:
        if not bool((term.index >= 0).any()):
            continue
        index = torch.where(term.index >= 0, term.index + starts[term.parameter], size)
        placed.append((_padded(index, rank), _padded(term.coefficient, rank)))
    kinds: dict[tuple[frozenset[int], frozenset[int]], list[tuple[Tensor, Tensor]]] = {}
    order = sorted(placed, key=lambda pair: -sum(s > 1 for s in pair[1].shape))
    for index, coefficient in order:
        index_dims = frozenset(i for i, s in enumerate(index.shape) if s > 1)
        dims = frozenset(i for i, s in enumerate(coefficient.shape) if s > 1)
        # Constants join a group of the same indices, as a row of ones.
        key = next((k for k in kinds if k[0] == index_dims and (dims == k[1] or not dims)), (index_dims, dims))
        kinds.setdefault(key, []).append((index, coefficient))
    return [
        Group(
            torch.stack(torch.broadcast_tensors(*(index for index, _ in members))),
            torch.stack(torch.broadcast_tensors(*(coefficient for _, coefficient in members))).contiguous(),
        )
        for members in kinds.values()
    ]


def _fold(x: Tensor, index: Tensor, lead: int) -> Tensor:
    """Sum kept cells that no index tells apart."""
    gone = [i for i in range(lead, x.dim()) if index.shape[i] == 1 and x.shape[i] > 1]
    return x.sum(gone, keepdim=True) if gone else x


def _summed(x: Tensor, keep: frozenset[int]) -> Tensor:
    gone = [i for i in range(x.dim()) if i not in keep]
    return x.sum(gone, keepdim=True) if gone else x


def _padded(x: Tensor, rank: int) -> Tensor:
    return x.reshape((1,) * (rank - x.dim()) + tuple(x.shape))
