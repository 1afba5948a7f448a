"""The location of a site in several states: one least squares problem for each (pooled_location.py), their sum in Q.

Entries of parameters that several states share get a term from each; moments are kept apart in the cells of arguments
that differ from state to state, and added up in those that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.e_step.pooled_location import PooledLocation
from pyro_em.m_step.location import Location
from pyro_em.model.trace import SiteRecord
from pyro_em.statistics import SiteMoments, argument_cells
from pyro_em.sufficient import Sufficient


class MixtureLocation(Location):
    """`parts` are the states, in order; `site` has the arguments of all of them, states in the leftmost dim."""

    def __init__(
        self, site: SiteRecord, parts: Sequence[PooledLocation], sufficient: Sufficient, total: SiteMoments | None
    ) -> None:
        self.site, self.parts, self.sufficient, self.total = site, parts, sufficient, total
        self.delta = torch.zeros(0, dtype=torch.float64)

    @property
    def moves(self) -> bool:
        """The location is more than an argument of its own in every cell."""
        return any(part.own.moves for part in self.parts)

    def opened(self, starts: Mapping[str, int], size: int) -> MixtureLocation:
        """As the location of a block of the M-step."""
        for part in self.parts:
            part.opened(starts, size)
        self.delta = torch.zeros(size, dtype=torch.float64)
        return self

    def move(self, delta: Tensor) -> None:
        self.delta = delta
        for part in self.parts:
            part.move(delta)

    def gradient(self) -> Tensor:
        return torch.stack([part.gradient() for part in self.parts]).sum(0)

    def precision(self) -> Tensor:
        return torch.stack([part.precision() for part in self.parts]).sum(0)

    def coupling(self) -> Tensor:
        return torch.cat([part.coupling() for part in self.parts], -1)

    def moments(self) -> SiteMoments:
        own = self.sufficient.arguments[self.site.name]
        others = {a: v for a, v in own.items() if a != "loc"}
        found = self._joined([part.moments() for part in self.parts], others)
        return SiteMoments(found.moments, found.cells, None, self.parts[0].moments().override, self.total)

    def value_moments(self) -> SiteMoments:
        """Of a latent's value, around its mean in the cells of all arguments."""
        arguments = self.sufficient.arguments[self.site.name]
        if self._apart(argument_cells(self.site, arguments)):
            return self._joined([part.value_moments() for part in self.parts], arguments)
        means = torch.stack([part.mean() * part.own.pooled.count for part in self.parts]).sum(0)
        count = torch.stack([part.own.pooled.count for part in self.parts]).sum()
        return self._joined([part.value_moments(means / count) for part in self.parts], arguments)

    def _apart(self, cells: torch.Size) -> bool:
        """Arguments differ from state to state."""
        own = argument_cells(self.site, self.parts[0].arguments)
        return cells.numel() > own.numel()

    def _joined(self, found: Sequence[SiteMoments], arguments: dict[str, Tensor]) -> SiteMoments:
        cells, part = argument_cells(self.site, arguments), found[0].cells
        together: Callable[[Sequence[Tensor]], Tensor] = _summed
        if cells.numel() > part.numel():

            def together(xs: Sequence[Tensor]) -> Tensor:
                return torch.stack(list(xs)).reshape(*cells, *xs[0].shape[len(part) :])

        moments = tuple(together(own) for own in zip(*(one.moments for one in found), strict=True))
        centers = [one.center for one in found if one.center is not None]
        if not centers or cells.numel() == part.numel():
            return SiteMoments(moments, cells, centers[0] if centers else None)
        event = 0 if self.site.family is None else self.site.family.location_dim
        wide = [c.expand(*part, *c.shape[c.dim() - event :]) for c in centers]
        return SiteMoments(moments, cells, together(wide))


def _summed(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs)).sum(0)
