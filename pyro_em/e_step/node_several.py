"""Densities of which other arguments move besides the predictor η: a dispersion, a shape, a noise.

    log p(y | η, φ),     φ an argument that parameters reach and latents do not

No statistic holds such data: a table has the log-density itself at every row and node. Derivatives are torch's.

Not handled: arguments that are vectors. Shapes: as in node_panels.py; φ (W, 1, G), or one number for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.e_step.node_panels import Panel, Panels
from pyro_em.e_step.node_tables import Cumulant, Table
from pyro_em.m_step.curves import cellwise_derivatives
from pyro_em.model.density import clean_value
from pyro_em.model.trace import SiteRecord

Arguments = Mapping[str, Tensor]
Function = Callable[[list[Tensor]], Tensor]


class Several(Cumulant):
    """Of a site whose argument `slot` is `forward` of η, while the arguments `others` move with parameters."""

    empty = 0.0

    def __init__(
        self,
        site: SiteRecord,
        slot: str,
        forward: Callable[[Tensor], Tensor],
        others: tuple[str, ...],
        panels: Panels,
        cells: torch.Size,
    ) -> None:
        zero = torch.zeros(len(panels.rows), dtype=torch.float64)
        super().__init__(zero, torch.ones_like(zero))
        assert site.family is not None and site.arguments is not None
        self.family, self.slot, self.forward, self.others = site.family, slot, forward, others
        self._rows, self._cells = panels.rows.clamp(min=0), cells  # an empty place has the data of some row
        self.present = panels.rows >= 0
        known = {n: v for n, v in {**site.constants, **site.arguments}.items() if n not in (slot, *others)}
        self._known = {n: self.placed(v.detach().double()) if isinstance(v, Tensor) else v for n, v in known.items()}
        self._data = self.placed(clean_value(site).double())

    def placed(self, x: Tensor) -> Tensor:
        """An argument at the places (R,), or as it is where it is one number."""
        if x.numel() == 1:
            return x.reshape(())
        return trailing(x, len(self._cells)).expand(self._cells).reshape(-1)[self._rows]

    def base(self, panel: Panel, b: Tensor, arguments: Arguments | None = None) -> Any:
        """`arguments` are the others, `placed`."""
        assert arguments is not None

        def of_panel(x: Any) -> Any:
            return panel.of_rows(x) if isinstance(x, Tensor) and x.dim() else x

        known = {name: of_panel(x) for name, x in self._known.items()}
        own = [of_panel(arguments[name]) for name in self.others]
        return b, own, known, of_panel(self._data), panel.of_rows(self.present)

    def table(self, panel: Panel, base: Any, t: Tensor) -> SeveralTable:
        b, own, known, data, present = base

        def density(etas: list[Tensor]) -> Tensor:
            moved = {self.slot: self.forward(etas[0]), **dict(zip(self.others, etas[1:], strict=True))}
            return torch.where(present, self.family.log_prob({**known, **moved}, data), 0.0)

        return SeveralTable(panel, density, b + t, own)


class SeveralTable(Table):
    """η and the other arguments, with the function that is evaluated there."""

    def __init__(self, panel: Panel, density: Callable[[list[Tensor]], Tensor], eta: Tensor, own: list[Tensor]) -> None:
        self.panel, self.density, self.eta, self.own = panel, density, eta, own
        self._sums: Tensor | None = None
        self._along: tuple[Tensor, Tensor] | None = None

    @property
    def sums(self) -> Tensor:
        if self._sums is None:
            self._sums = self.panel.over_rows(-self.density([self.eta, *self.own]))
        return self._sums

    @property
    def along(self) -> tuple[Tensor, Tensor]:
        """Slope and curvature in η."""
        if self._along is None:
            slopes, curvatures = cellwise_derivatives(lambda etas: self.density([*etas, *self.own]), [self.eta])
            self._along = slopes[0], curvatures[0][0]
        return self._along

    def first(self, v: Tensor) -> Tensor:
        return -(self.along[0] * v).sum(1, keepdim=True)

    def second(self, v: Tensor, first: Tensor) -> Tensor:
        return (self.along[1] * v).sum(1, keepdim=True)

    def in_groups(self) -> tuple[Tensor, Tensor]:
        slope, curvature = self.along
        return self.panel.over_rows(-slope), self.panel.over_rows(curvature)

    def weighted(self, v: Tensor, along: Sequence[Tensor | None]) -> tuple[Function, list[Tensor]]:
        """Σ_q v log p(y | η + Σ_i δ_i ζ_i, φ) over all rows, as a function of the δ and φ of every row, and its place.

        What does not move along the nodes (the gamma function of a shape) is then evaluated once for each row.

        :param along: ζ of each δ at the nodes, None for 1.
        """
        shape = torch.Size((self.eta.shape[0], 1, self.eta.shape[2]))
        place = [torch.zeros(shape, dtype=torch.float64) for _ in along] + [x.expand(shape) for x in self.own]

        def function(leaves: list[Tensor]) -> Tensor:
            eta = self.eta
            for zeta, delta in zip(along, leaves, strict=False):
                eta = eta + (delta if zeta is None else delta * zeta)
            return v * self.density([eta, *leaves[len(along) :]])

        return function, place


def trailing(x: Tensor, rank: int) -> Tensor:
    """Without leading dims of size 1 beyond `rank`."""
    return x.reshape(x.shape[max(0, x.dim() - rank) :])
