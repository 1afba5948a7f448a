"""Locations of Laplace sites: weighted medians.

For entries m_e of a parameter that a Laplace site takes as they are, with scales b and posterior weights w,

    Q(m_e) = −Σ_n v_n |x_n − m_e| + constant,        v = w / b,

summed over the cells n that take the entry: concave, its maximum the weighted median (where the weights below and above
balance exactly, the middle between two data). The subgradients of Q at m are right − left ± at, with left, right and at
the weights of the data below, above and at m; the one nearest to 0 is what score and certificate read. Scales follow at
the new distances, Σ w |x − m| / Σ w (families/heavy.py). The order of the data is found once.

Shapes: U the batch of the site with its latents, flattened; E entries of the parameter.
Not handled: locations with a prior or of other families too, and predictors (least absolute deviations): refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.families.heavy import LaplaceFamily
from pyro_em.m_step.location import full_cells
from pyro_em.m_step.unit import weight_of
from pyro_em.model.density import clean_value
from pyro_em.model.trace import Run
from pyro_em.model.use import Use
from pyro_em.problem import Problem
from pyro_em.shapes import broadcast_shapes
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

RULE = "weighted median (Laplace.loc)"


@dataclass(frozen=True)
class Median:
    """One parameter, the location of Laplace sites; `uses` are those that count in Q."""

    problem: Problem
    name: str
    uses: tuple[Use, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def slope(self, params: Params, sufficient: Sufficient) -> Tensor:
        """max over the entries of the subgradient nearest to 0, ()."""
        data, entry = self._sorted
        weight = self._weights(sufficient)
        theta = params[self.name].detach().double().reshape(-1)
        side = (data - theta[entry]).sign() * weight
        slope, at = (torch.zeros_like(theta).index_add(0, entry, x) for x in (side, weight * (side == 0)))
        return (slope.abs() - at).clamp(min=0).amax()

    def update(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """The weighted medians; entries without weight stay."""
        data, entry = self._sorted
        weight = self._weights(sufficient)
        old = params[self.name].detach().double()
        zero = torch.zeros(old.numel(), dtype=torch.float64)
        total = zero.index_add(0, entry, weight)
        upto = torch.cumsum(weight, 0) - (torch.cumsum(total, 0) - total)[entry]
        half, some = total[entry] / 2, weight > 0
        slack = 1e-14 * total[entry]
        low = zero.new_full(zero.shape, torch.inf).scatter_reduce(
            0, entry, torch.where(some & (upto >= half - slack), data, torch.inf), "amin"
        )
        high = zero.new_full(zero.shape, torch.inf).scatter_reduce(
            0, entry, torch.where(some & (upto > half + slack), data, torch.inf), "amin"
        )
        best = torch.where(total > 0, (low + high) / 2, old.reshape(-1)).reshape(old.shape)
        moved = {**params, self.name: best.to(params[self.name].dtype)}
        sufficient.put(moved[self.name], self.uses)
        for use in self.uses:
            sufficient.forget(use.site)
        return moved, {self.name} if bool((total == 0).any()) else set()

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Data and entries of all cells of all sites, and their order: by entry, then by value."""
        data, entry = [], []
        for use in self.uses:
            site = self.problem.first.sites[use.site]
            cells = self._cells(use)
            assert use.index is not None
            data.append(clean_value(site).double().expand(cells).reshape(-1))
            entry.append(use.index.expand(cells).reshape(-1))
        x, e = torch.cat(data), torch.cat(entry)
        by_value = x.argsort(stable=True)
        return x, e, by_value[e[by_value].argsort(stable=True)]

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        x, e, order = self._order
        return x[order], e[order]

    def _cells(self, use: Use) -> torch.Size:
        site = self.problem.first.sites[use.site]
        shapes = (x.shape for x in (site.arguments or {}).values())
        return broadcast_shapes(full_cells(site), *shapes)

    def _weights(self, sufficient: Sufficient) -> Tensor:
        """v, in the order of the data."""
        found = []
        for use in self.uses:
            weight = weight_of(self.problem, use.site, sufficient)
            scale = sufficient.arguments[use.site]["scale"]
            found.append((weight / scale).expand(self._cells(use)).reshape(-1))
        return torch.cat(found)[self._order[2]]


def is_median(uses: tuple[Use, ...], run: Run) -> bool:
    """Whether every use of a parameter is as the location of a Laplace site, as it is."""
    return bool(uses) and all(is_laplace_location(use, run) and use.gather and use.whole for use in uses)


def is_laplace_location(use: Use, run: Run) -> bool:
    """A use in which Q has a kink at every datum."""
    return use.slot == "loc" and isinstance(run.sites[use.site].family, LaplaceFamily)
