"""Which coefficients of a residual meet in the precision of the parameters: all pairs of entries that share a cell.

Of entries C_qp = base + Σ a θ_i with precision Π of the cells and regressors G, -∂²Q/∂θ_i∂θ_k is the sum of
a a' (GᵀG)_qq' Π_pp' over pairs of entries, those of other cells being 0 where Π is diagonal. They do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.e_step.bilinear import Form


@dataclass(frozen=True, eq=False)
class Pairs:
    """The entries of one block, and all pairs of them that share a cell (any pair for a vector)."""

    index: Tensor  # of each entry in the block
    place: Tensor  # in the flattened (q, P)
    coefficient: Tensor
    target: Tensor  # of each pair in the flattened (B, B)
    regressors: Tensor  # in the flattened (q, q)
    cells: Tensor  # in the flattened (P, P), or the cell
    product: Tensor
    coupling: Tensor  # the two entries of each pair in the block (2, pairs)
    zero: Tensor  # (B,)
    _known: list[Tensor] = field(default_factory=list)

    @cached_property
    def falling(self) -> Tensor:
        """Minus the coefficients."""
        return -self.coefficient

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Cell rows[i] + columns[j] of every pair (i, j); asked with the same rows and columns in every update."""
        if not self._known or self._known[0] is not rows or self._known[1] is not columns:
            one, other = self.coupling
            self._known[:] = rows, columns, rows[one] + columns[other]
        return self._known[2]


def pairs_of(form: Form, starts: Mapping[str, int], size: int, vector: bool) -> Pairs:
    """Of the parameters that have a place in a block.

    :param vector: the cells of a row have a covariance.
    """
    own = [e for e in form.entries if e.parameter in starts]
    empty = torch.zeros(0, dtype=torch.long)
    index = torch.cat([e.index + starts[e.parameter] for e in own]) if own else empty
    row = torch.cat([e.row for e in own]) if own else empty
    cell = torch.cat([e.cell for e in own]) if own else empty
    coefficient = torch.cat([e.coefficient for e in own]) if own else empty.double()
    left, right = map(torch.tensor, _pairs(np.zeros(len(index), dtype=int) if vector else cell.cpu().numpy()))
    cells = form.base.shape[1]
    return Pairs(
        index,
        row * cells + cell,
        coefficient,
        index[left] * size + index[right],
        row[left] * form.num_regressors + row[right],
        cell[left] * cells + cell[right] if vector else cell[left],
        coefficient[left] * coefficient[right],
        torch.stack([index[left], index[right]]),
        torch.zeros(size, dtype=torch.float64),
    )


def _pairs(group: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """All ordered pairs of places with the same number, group by group.

    >>> [x.tolist() for x in _pairs(np.array([7, 3, 7]))]
    [[1, 0, 0, 2, 2], [1, 0, 2, 0, 2]]
    """
    order = group.argsort(kind="stable")
    begins = np.searchsorted(group[order], group[order])
    sizes = np.searchsorted(group[order], group[order], side="right") - begins
    within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    return np.repeat(order, sizes), order[np.repeat(begins, sizes) + within]
