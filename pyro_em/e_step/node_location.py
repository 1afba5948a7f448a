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

from pyro_em.e_step.node_placed import Placed, Tables, cumulated, first_of, second_of
from pyro_em.e_step.node_sets import Nodes
from pyro_em.sufficient import Sufficient


@dataclass
class Place:
    """A site at the nodes of one E-step; `placed` moves with the M-step, `tables` belong to it."""

    nodes: Nodes
    placed: Placed
    tables: Tables


class NodeLocation:
    """Q of one site as a function of a move δ of a block from a place."""

    def __init__(self, place: Place, starts: Mapping[str, int], size: int) -> None:
        rows, nodes = place.placed.rows, place.nodes
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
        self._start = place.placed
        self._placed, self._tables = place.placed, place.tables
        self._firsts: dict[tuple[int, ...], Tensor] = {}
        self._seconds: dict[tuple[int, ...], Tensor] = {}
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
        self._delta, self._firsts, self._seconds, self._gradient = delta.clone(), {}, {}, None
        if not bool((delta != 0).any()):
            self._placed = self._start
        else:
            changed = list(self._start.b)
            for k, change in zip(self.block.columns, self.block.change(delta), strict=True):
                changed[k] = changed[k] + (change[:1] if self.rows.alike and k else change)
            self._placed = self._replaced(tuple(changed), delta)
        kept = self.place.placed is self._placed
        self._tables = self.place.tables if kept else self._placed.tables(self.nodes.z)

    def _replaced(self, b: tuple[Tensor, ...], delta: Tensor) -> Placed:
        """The site at other coefficients."""
        return Placed(self.rows, b)

    def value(self, delta: Tensor) -> Tensor:
        """Q up to a constant, as terms of one sign."""
        self._moved(delta)
        rows, a = self.rows, self.rows.cumulant.linear
        if rows.alike:
            lines = [rows.events * own * mean for own, mean in zip(self._placed.b[1:], self.means[1:], strict=True)]
        else:
            lines = [a * own * reach for own, reach in zip(self._placed.b[1:], self._reach_of_all[1:], strict=True)]
        once = rows.weight is None and self.nodes.shares is None
        level = a * self._placed.b[0] if once else a * self._placed.b[0] * self._reach_of_all[0]
        spread = -(self.weights * cumulated(rows, self._tables))
        return torch.cat([x.reshape(-1) for x in (level, *lines, spread)])

    @property
    def _reach_of_all(self) -> list[Tensor]:
        known = dict(zip(self.block.columns, self.reach, strict=True))
        return [known[k] if k in known else self._at_rows(x) for k, x in enumerate(self.means)]

    def _first(self, *columns: int) -> Tensor:
        """Σ_q w m A' (R,), weighted with the ζ of these columns (0 for 1)."""
        key = tuple(k for k in columns if k)
        if key not in self._firsts:
            self._firsts[key] = first_of(self.rows, self._tables, self._weighted(key))
        return self._firsts[key]

    def _second(self, *columns: int) -> Tensor:
        """The same of A''."""
        key, first = tuple(k for k in columns if k), self._first(*columns)
        if key not in self._seconds:
            self._seconds[key] = second_of(self.rows, self._tables, self._weighted(key), first)
        return self._seconds[key]

    def _weighted(self, key: tuple[int, ...]) -> Tensor:
        v = self.weights
        for k in key:
            v = v * self.nodes.z[k - 1]
        return v

    def gradient(self, delta: Tensor) -> Tensor:
        """∂Q/∂θ (P,)."""
        self._moved(delta)
        if not self.block.columns:
            return torch.zeros_like(delta)
        if self._gradient is None:
            a, pairs = self.rows.cumulant.linear, zip(self.block.columns, self.reach, strict=True)
            self._gradient = self.block.pull([a * reach - self._first(k) for k, reach in pairs])
        return self._gradient

    def hessian(self, delta: Tensor) -> Tensor:
        """-∂²Q/∂θ² (P, P)."""
        self._moved(delta)
        columns = self.block.columns
        if not columns:
            return torch.zeros(len(delta), len(delta), dtype=torch.float64)
        pairs = ((i, j) for i in range(len(columns)) for j in range(i, len(columns)))
        return self.block.gram({(i, j): self._second(columns[i], columns[j]) for i, j in pairs})

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Change of η at the posterior's mean, (R,)."""
        parts = [x * r for x, r in zip(self.block.change(delta), self.reach, strict=True)]
        return {self.rows.slot: sum(parts[1:], parts[0])} if parts else {}

    def write(self, sufficient: Sufficient, delta: Tensor) -> None:
        """Move the place itself."""
        self._moved(delta)
        self.place.placed, self.place.tables = self._placed, self._tables
        sufficient.touch(self.rows.name)
