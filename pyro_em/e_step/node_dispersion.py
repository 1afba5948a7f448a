"""Newton's view of a site at the nodes, where other arguments move with the parameters too (node_several.py).

With e the coordinates of such an argument, φ(e), e = B θ (m_step/slot.py), and sums over the nodes of a row's group

    ∂Q/∂e = φ' Σ_q w_q ℓ_φ,     -∂²Q/∂e² = -φ'² Σ_q w_q ℓ_φφ - φ'' Σ_q w_q ℓ_φ,     -∂²Q/∂B_k ∂e = -φ' Σ_q w_q ζ_qk ℓ_ηφ

join what node_location.py has for η. Shapes: as there; N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.design import Design
from pyro_em.e_step.node_location import NodeLocation, Place
from pyro_em.e_step.node_panels import Panel
from pyro_em.e_step.node_placed import Placed, Tables, cumulated
from pyro_em.e_step.node_several import Several, SeveralTable, trailing
from pyro_em.e_step.node_tables import Table
from pyro_em.m_step.curves import cellwise_derivatives
from pyro_em.m_step.slot import Slot
from pyro_em.model.predictor import Term
from pyro_em.sufficient import Sufficient


class NodeDispersion(NodeLocation):
    """Q of one site as a function of a move δ of a block; `slots` are those of the other arguments that it enters."""

    def __init__(
        self,
        place: Place,
        starts: Mapping[str, int],
        size: int,
        slots: Sequence[Slot],
        theta: Tensor,
        arguments: Mapping[str, Tensor],
    ) -> None:
        super().__init__(place, starts, size)
        assert isinstance(self.rows.cumulant, Several)
        self._cumulant = self.rows.cumulant
        self.slots = [_over(slot, starts, size, self.rows.cells) for slot in slots]
        self._etas = [slot.eta(arguments[slot.name], theta) for slot in self.slots]
        self._found: tuple[Tables, list[Tensor], list[list[Tensor]] | None] | None = None
        self._forwards = [slot.forward(arguments[slot.name]) for slot in slots]

    def _others(self, delta: Tensor) -> list[Tensor]:
        pairs = zip(self._forwards, self._etas, self.slots, strict=True)
        return [forward(eta + slot.change(delta)) for forward, eta, slot in pairs]

    def _replaced(self, b: tuple[Tensor, ...], delta: Tensor) -> Placed:
        moved = zip(self.slots, self._others(delta), strict=True)
        own = {**(self._start.others or {}), **{slot.name: self._cumulant.placed(x) for slot, x in moved}}
        return Placed(self.rows, b, own)

    def value(self, delta: Tensor) -> Tensor:
        """Q up to a constant, one term for each element and node."""
        self._moved(delta)
        return -(self.weights * cumulated(self.rows, self._tables)).reshape(-1)

    def gradient(self, delta: Tensor) -> Tensor:
        """∂Q/∂θ (P,)."""
        slopes, _ = self._derivatives(delta, curved=not bool((delta != 0).any()))
        count = len(self.block.columns)
        total = self.block.pull(slopes[:count]) if count else torch.zeros_like(delta)
        for i, slot in enumerate(self.slots):
            total = total + slot.pull(self._at_cells(slopes[count + i]) * self._chain(i, delta)[0])
        return total

    def hessian(self, delta: Tensor) -> Tensor:
        """-∂²Q/∂θ² (P, P)."""
        slopes, curvatures = self._derivatives(delta, curved=True)
        assert curvatures is not None
        count = len(self.block.columns)
        pairs = {(i, j): curvatures[i][j] for i in range(count) for j in range(i, count)}
        total = self.block.gram(pairs) if count else torch.zeros(len(delta), len(delta), dtype=torch.float64)
        for i, slot in enumerate(self.slots, count):
            slope, curvature = self._chain(i - count, delta)
            own = self._at_cells(curvatures[i][i]) * slope**2 + self._at_cells(slopes[i]) * curvature
            total = total + slot.gram(own, slot)
            for j, other in enumerate(self.slots[: i - count], count):
                both = self._at_cells(curvatures[i][j]) * slope * self._chain(j - count, delta)[0]
                cross = slot.gram(both, other)
                total = total + cross + cross.mT
            for k, design in enumerate(self.block.designs):
                mixed = slot._reached(self._at_cells(curvatures[k][i]) * slope)
                assert isinstance(slot.design, Design)
                cross = design.gram_matrix(mixed, slot.design)
                total = total + cross + cross.mT
        return total

    def _derivatives(self, delta: Tensor, curved: bool) -> tuple[list[Tensor], list[list[Tensor]] | None]:
        """Slopes in the coefficients of the columns and in the arguments at the places (R,), and curvatures in all
        pairs of them: found with the slopes at the start, where a step needs them; where it ended mostly none does.
        """
        self._moved(delta)
        if self._found is not None and self._found[0] is self._tables and (self._found[2] is not None or not curved):
            return self._found[1:]
        pairs = list(zip(self.rows.panels.panels, self._tables, strict=True))
        parts = [self._in_panel(panel, table, curved) for panel, table in pairs]
        places = range(len(self.block.columns) + len(self.slots))
        slopes = [_joined([own[i] for own, _ in parts]) for i in places]
        curvatures = None
        if curved:
            curvatures = [[_joined([own[i][j] for _, own in parts]) for j in places] for i in places]
        self._found = self._tables, slopes, curvatures
        return slopes, curvatures

    def _in_panel(self, panel: Panel, table: Table, curved: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The same for the rows of one panel, (W, 1, G); no curvatures unless `curved`."""
        assert isinstance(table, SeveralTable)
        columns, others = self.block.columns, self._cumulant.others
        along = [None if k == 0 else panel.of_nodes(self.nodes.z[k - 1]) for k in columns]
        function, place = table.weighted(panel.of_nodes(self.weights), along)
        kept = [*range(len(columns)), *(len(columns) + others.index(slot.name) for slot in self.slots)]
        if curved:
            slopes, curvatures = cellwise_derivatives(function, place)
            return [slopes[i] for i in kept], [[curvatures[i][j] for j in kept] for i in kept]
        leaves = [x.clone().requires_grad_(True) for x in place]
        with torch.enable_grad():
            first = torch.autograd.grad(function(leaves).sum(), leaves)
        return [first[i] for i in kept], []

    def _chain(self, i: int, delta: Tensor) -> tuple[Tensor, Tensor]:
        """φ'(e) and minus φ''(e) over the cells."""
        eta = self._etas[i] + self.slots[i].change(delta)
        slopes, curvatures = cellwise_derivatives(lambda own: self._forwards[i](own[0]), [eta])
        return slopes[0].expand(self.rows.cells), curvatures[0][0].expand(self.rows.cells)

    def _at_cells(self, x: Tensor) -> Tensor:
        """What belongs to the places (R,), at the rows, in the shape of the cells."""
        return self.rows.panels.summed(x, self.rows.cells.numel()).reshape(self.rows.cells)

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Change of the coordinates of every argument."""
        return super().changes(delta) | {slot.name: slot.change(delta) for slot in self.slots}

    def write(self, sufficient: Sufficient, delta: Tensor) -> None:
        """Move the place itself, and the arguments."""
        for slot, value in zip(self.slots, self._others(delta), strict=True):
            sufficient.arguments[self.rows.name][slot.name] = value
        super().write(sufficient, delta)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in parts])


def _over(slot: Slot, starts: Mapping[str, int], size: int, cells: torch.Size) -> Slot:
    """The same argument over the rows alone: where the latents' atoms are among the cells, it does not vary."""
    use, rank = slot.use, len(cells)
    if use.predictor is not None:
        terms = use.predictor.terms
    else:
        assert use.index is not None
        terms = (Term(use.parameter, use.index, torch.ones((), dtype=torch.float64)),)
    lean = [replace(t, index=trailing(t.index, rank), coefficient=trailing(t.coefficient, rank)) for t in terms]
    return replace(slot, design=Design(lean, starts, size, cells))
