"""One site that reads latents by quadrature: its predictor η = Σ_k B_k ζ_k, ζ = (1, z), as a function of parameters.

Every B_k is affine in them, B_k = offset_k + A_k θ (read off by node_reading.py), with one A_k for each block of the
M-step, laid out like the tables of rows and nodes.

Letters: N rows (cells of the site, `.to_event` elements included); R places of them in panels (node_panels.py);
K columns of the latents; P entries of the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.design import Design
from pyro_em.e_step.node_panels import Panels
from pyro_em.e_step.node_tables import Cumulant
from pyro_em.m_step.unit import begins_of
from pyro_em.model.predictor import Term
from pyro_em.types import Params

MATRIX = 2**20  # entries of a design over the places up to which it is kept as one matrix


@dataclass(frozen=True, eq=False)
class Block:
    """B_k as functions of one block of parameters: a matrix (R, P) over the places, or a design over the rows."""

    columns: tuple[int, ...]  # k of those that the block enters
    designs: tuple[Design, ...]
    matrices: tuple[Tensor | Design, ...]
    panels: Panels
    num_rows: int

    def change(self, delta: Tensor) -> tuple[Tensor, ...]:
        """A_k δ at the places, for each of `columns`."""
        return tuple(self._predict(a, delta) for a in self.matrices)

    def _predict(self, a: Tensor | Design, delta: Tensor) -> Tensor:
        if isinstance(a, Tensor):
            return a @ delta
        return self.panels.placed(a.predict(delta).expand(a.cells).reshape(-1))

    def pull(self, slopes: Sequence[Tensor]) -> Tensor:
        """Σ_k A_kᵀ s_k."""
        found = [
            s @ a if isinstance(a, Tensor) else a.pull(self._rows(s, a))
            for a, s in zip(self.matrices, slopes, strict=True)
        ]
        return sum(found[1:], found[0])

    def gram(self, curvatures: Mapping[tuple[int, int], Tensor]) -> Tensor:
        """Σ A_kᵀ diag(c_kl) A_l, c_kl for k ≤ l by place among `columns`."""
        total: Tensor | None = None
        for (i, j), c in curvatures.items():
            a, b = self.matrices[i], self.matrices[j]
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                own = a.mT @ (c.unsqueeze(-1) * b)
            else:
                assert isinstance(a, Design) and isinstance(b, Design)
                own = a.gram_matrix(self._rows(c, a), None if i == j else b)
            own = own if i == j else own + own.mT
            total = own if total is None else total + own
        assert total is not None
        return total

    def _rows(self, x: Tensor, a: Design) -> Tensor:
        return self.panels.summed(x, self.num_rows).reshape(a.cells)


@dataclass(frozen=True, eq=False)
class NodeRows:
    """A site as it is read; `terms` and `offsets` (R,) by k. `alike`: B_k for k > 0 is one number for all rows.

    `constant` (G,) is what does not depend on η in log p(y), summed over the rows of each element; `weight` (G,)
    how often the rows of an element count in Q, None for once. Terms are linear in the logarithms of `logs`.
    """

    name: str
    slot: str
    cells: torch.Size
    panels: Panels
    cumulant: Cumulant
    terms: tuple[tuple[Term, ...], ...]
    offsets: tuple[Tensor, ...]
    alike: bool
    constant: Tensor
    weight: Tensor | None
    names: tuple[str, ...]
    logs: frozenset[str]
    _blocks: dict[tuple[tuple[str, int], ...], Block] = field(default_factory=dict, repr=False)

    @cached_property
    def events(self) -> Tensor:
        """Σ a over the rows of each element, (1, G)."""
        total: Tensor | None = None
        for panel in self.panels.panels:
            own = panel.over_rows(panel.of_rows(self.cumulant.linear))
            total = panel.into(total, own, self.panels.size)
        return torch.zeros(1, self.panels.size, dtype=torch.float64) if total is None else total

    def block(self, starts: Mapping[str, int], size: int) -> Block:
        """The predictor as a function of the parameters that begin at `starts`."""
        key = tuple(starts.items())
        if key not in self._blocks:
            columns, matrices = [], []
            for k, own in enumerate(self.terms):
                used = [term for term in own if term.parameter in starts]
                if used:
                    columns.append(k)
                    matrices.append(Design(used, starts, size, self.cells))
            num = self.cells.numel()
            found: list[Tensor | Design] = list(matrices)
            if size * len(self.panels.rows) <= MATRIX:
                found = [self.panels.placed(design.matrix()) for design in matrices]
            self._blocks[key] = Block(tuple(columns), tuple(matrices), tuple(found), self.panels, num)
        return self._blocks[key]

    def coefficients(self, params: Params) -> tuple[Tensor, ...]:
        """B_k (R,) at `params`; (1,) where it is one number for all rows."""
        starts, size = begins_of(self.names, params)
        found = list(self.offsets)
        if self.names:
            block = self.block(starts, size)
            theta = coordinates(params, self.names, self.logs)
            for k, change in zip(block.columns, block.change(theta), strict=True):
                found[k] = found[k] + change
        return tuple(x[:1] if self.alike and k else x for k, x in enumerate(found))


def coordinates(params: Params, names: Sequence[str], logs: frozenset[str]) -> Tensor:
    """What terms are linear in: the parameters in a row, or their logarithms."""
    values = [params[n].detach().double().reshape(-1) for n in names]
    parts = [value.log() if name in logs else value for name, value in zip(names, values, strict=True)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
