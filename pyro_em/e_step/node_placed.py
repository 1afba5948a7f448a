"""A site that reads latents by quadrature, at coefficients B of its predictor: its tables, and sums of them.

    η_n = Σ_k B_nk ζ_k,     ζ = (1, z)

Shapes: z (K, Q, G), sums over the rows of each element (Q, G), what belongs to the places of rows (R,).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.e_step.node_rows import NodeRows
from pyro_em.e_step.node_tables import Table

Tables = tuple[Table, ...]  # of every panel


class Placed:
    """A site at the coefficients `b` of its predictor, and `others` of its arguments (node_several.py)."""

    def __init__(self, rows: NodeRows, b: tuple[Tensor, ...], others: Mapping[str, Tensor] | None = None) -> None:
        self.rows, self.b, self.others = rows, b, others

    @cached_property
    def _bases(self) -> list[Any]:
        """What its tables have in common, by panel."""
        cumulant = self.rows.cumulant
        return [cumulant.base(panel, panel.of_rows(self.b[0]), self.others) for panel in self.rows.panels.panels]

    def tables(self, z: Tensor) -> Tables:
        """What the densities of all rows are at z (K, Q, G)."""
        rows, b = self.rows, self.b
        found = []
        common = sum((own * z[k] for k, own in enumerate(b[2:], 1)), b[1] * z[0]) if rows.alike else None
        for panel, base in zip(rows.panels.panels, self._bases, strict=True):
            if common is not None:
                t = panel.of_nodes(common)
            else:
                t = panel.of_rows(b[1]) * panel.of_nodes(z[0])
                for k, own in enumerate(b[2:], 1):
                    t.addcmul_(panel.of_rows(own), panel.of_nodes(z[k]))
            found.append(rows.cumulant.table(panel, base, t))
        return tuple(found)

    @cached_property
    def line(self) -> tuple[Tensor, list[Tensor]]:
        """Σ a η over the rows of each element is a line in z: its value at 0 and its slopes, (1, G) each."""
        rows, a = self.rows, self.rows.cumulant.linear
        slopes = [k * rows.events if rows.alike else over_rows(rows, a * k) for k in self.b[1:]]
        return over_rows(rows, a * self.b[0]) + rows.constant, slopes


def cumulated(site: NodeRows, tables: Tables) -> Tensor:
    """Σ m A over the rows of each element, (Q, G)."""
    total: Tensor | None = None
    for panel, own in zip(site.panels.panels, tables, strict=True):
        total = panel.into(total, own.sums, site.panels.size)
    return torch.zeros(1, site.panels.size, dtype=torch.float64) if total is None else total


def first_of(site: NodeRows, tables: Tables, v: Tensor) -> Tensor:
    """Σ_q v m A' at the places (R,); v (Q, G)."""
    return _joined([own.first(panel.of_nodes(v)) for panel, own in zip(site.panels.panels, tables, strict=True)])


def second_of(site: NodeRows, tables: Tables, v: Tensor, first: Tensor) -> Tensor:
    """Σ_q v m A'' at the places (R,), given `first_of`; v (Q, G)."""
    pairs = zip(site.panels.panels, tables, strict=True)
    return _joined([own.second(panel.of_nodes(v), panel.of_rows(first)) for panel, own in pairs])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([x.reshape(-1) for x in parts])


def in_groups(site: NodeRows, tables: Tables) -> tuple[Tensor, Tensor]:
    """Σ m A' and Σ m A'' over the rows of each element at one z, (1, G)."""
    first: Tensor | None = None
    second: Tensor | None = None
    for panel, own in zip(site.panels.panels, tables, strict=True):
        one, two = own.in_groups()
        first = panel.into(first, one, site.panels.size)
        second = panel.into(second, two, site.panels.size)
    zero = torch.zeros(1, site.panels.size, dtype=torch.float64)
    return zero if first is None else first, zero if second is None else second


def over_rows(site: NodeRows, x: Tensor) -> Tensor:
    """What belongs to the places (R,), summed over the rows of each element: (1, G)."""
    total: Tensor | None = None
    for panel in site.panels.panels:
        total = panel.into(total, panel.over_rows(panel.of_rows(x)), site.panels.size)
    return torch.zeros(1, site.panels.size, dtype=torch.float64) if total is None else total
