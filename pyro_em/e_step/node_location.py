"""A site's share of Q at the nodes of one E-step, as Newton's method of the M-step sees it (m_step/predictors.py).

With weights w_q of the nodes of the group of row n, and the moments of A' and A'' (node_cumulants.py),

    ∂Q/∂B_nk = Σ_q w_q (a_n - m_n A'(η_nq)) ζ_qk,        -∂²Q/∂B_nk ∂B_nl = Σ_q w_q m_n A''(η_nq) ζ_qk ζ_ql

are formed for every row, and from them gradient and Hessian in the parameters by the designs A_k of the rows: nothing
of the size of rows times nodes meets a design. Shapes: as in node_rows.py and node_sets.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.node_rows import NodeRows
from pyro_em.e_step.node_sets import Nodes, Table, cumulated, moments_of, table_of
from pyro_em.sufficient import Sufficient


@dataclass
class Place:
    """A site at the nodes of one E-step; the coefficients `b` move with the M-step, `table` belongs to the first."""

    rows: NodeRows
    nodes: Nodes
    b: tuple[Tensor, ...]
    table: Table | None


class NodeLocation:
    """Q of one site as a function of a move δ of a block from a place."""

    def __init__(self, place: Place, starts: Mapping[str, int], size: int) -> None:
        rows, nodes = place.rows, place.nodes
        self.name, self.place, self.rows, self.nodes, self.block = (
            rows.name,
            place,
            rows,
            nodes,
            rows.block(starts, size),
        )
        weights = nodes.weights if rows.weight is None else nodes.weights * rows.weight
        self.weights = weights
        ones = weights.sum(0, keepdim=True)
        self.means = [ones, *((weights * z).sum(0, keepdim=True) for z in nodes.z)]  # of ζ_k, (1, G)
        self.reach = tuple(self._at_rows(self.means[k]) for k in self.block.columns)
        self._delta: Tensor | None = None
        self._b, self._start = place.b, place.b
        self._table: Table = ()
        self._found: tuple[list[Tensor], dict[tuple[int, int], Tensor]] | None = None
        self._gradient: Tensor | None = None

    def _at_rows(self, x: Tensor) -> Tensor:
        """What belongs to the elements (1, G) at the places (R,)."""
        parts = [
            panel.of_nodes(x).expand(panel.shape[0], 1, panel.shape[1]).reshape(-1) for panel in self.rows.panels.panels
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _moved(self, delta: Tensor) -> None:
        if self._delta is not None and torch.equal(self._delta, delta):
            return
        self._delta, self._found, self._gradient = delta.clone(), None, None
        if not bool((delta != 0).any()):
            kept = self.place.table if self.place.b is self._start else None
            self._b = self._start
            self._table = table_of(self.rows, self._b, self.nodes.z) if kept is None else kept
            return
        changed = list(self._start)
        for k, change in zip(self.block.columns, self.block.change(delta), strict=True):
            changed[k] = changed[k] + (change[:1] if self.rows.alike and k else change)
        self._b = tuple(changed)
        self._table = table_of(self.rows, self._b, self.nodes.z)

    def value(self, delta: Tensor) -> Tensor:
        """Q up to a constant, as terms of one sign."""
        self._moved(delta)
        rows, a = self.rows, self.rows.cumulant.linear
        if rows.alike:
            lines = [rows.events * own * mean for own, mean in zip(self._b[1:], self.means[1:], strict=True)]
        else:
            lines = [a * own * reach for own, reach in zip(self._b[1:], self._reach_of_all[1:], strict=True)]
        level = a * self._b[0] if rows.weight is None else a * self._b[0] * self._reach_of_all[0]
        spread = -(self.weights * cumulated(rows, self._table))
        return torch.cat([x.reshape(-1) for x in (level, *lines, spread)])

    @property
    def _reach_of_all(self) -> list[Tensor]:
        known = dict(zip(self.block.columns, self.reach, strict=True))
        return [known[k] if k in known else self._at_rows(x) for k, x in enumerate(self.means)]

    def _derivatives(self, delta: Tensor) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
        self._moved(delta)
        if self._found is not None:
            return self._found
        slopes: dict[int, Tensor] = {}
        curvatures: dict[tuple[int, int], Tensor] = {}
        columns, z = self.block.columns, self.nodes.z
        known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

        def moments(*ks: int) -> tuple[Tensor, Tensor]:
            """Weighted with the ζ of those columns, of which the first is 1."""
            key = tuple(k for k in ks if k)
            if key not in known:
                v = self.weights
                for k in key:
                    v = v * z[k - 1]
                known[key] = moments_of(self.rows, self._table, v)
            return known[key]

        for i, k in enumerate(columns):
            slopes[i] = self.rows.cumulant.linear * self.reach[i] - moments(k)[0]
            for j in range(i, len(columns)):
                curvatures[i, j] = moments(k, columns[j])[1]
        self._found = [slopes[i] for i in range(len(columns))], curvatures
        return self._found

    def gradient(self, delta: Tensor) -> Tensor:
        """∂Q/∂θ (P,)."""
        slopes, _ = self._derivatives(delta)
        if self._gradient is None:
            self._gradient = self.block.pull(slopes)
        return self._gradient

    def hessian(self, delta: Tensor) -> Tensor:
        """-∂²Q/∂θ² (P, P)."""
        return self.block.gram(self._derivatives(delta)[1])

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Change of η at the posterior's mean, (R,)."""
        parts = [x * r for x, r in zip(self.block.change(delta), self.reach, strict=True)]
        return {self.rows.slot: sum(parts[1:], parts[0])}

    def write(self, sufficient: Sufficient, delta: Tensor) -> None:
        """Move the place itself."""
        self._moved(delta)
        self.place.b, self.place.table = self._b, self._table
        sufficient.touch(self.rows.name)
