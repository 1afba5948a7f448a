"""Where everything lies in the compiled E-step: joint states, positions, and the way back to Pyro's dims.

Pyro's dims of a site are, from the left: enumeration dims, plate dims (root and inner), elements of
`.to_event`. The compiled form has J joint states (all enumeration dims, leftmost first), positions (inner plates,
then elements) and rows (root plates). Both keep the dims in Pyro's order, so that the way back is a reshape.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled, OtherLayout
from pyro_em.e_step.features import Block
from pyro_em.e_step.natural import Coefficients, log_base_measure
from pyro_em.e_step.nested_rows import Groups
from pyro_em.e_step.states import JointStates
from pyro_em.families.circular import VonMisesFamily
from pyro_em.families.normal import LogNormalFamily, NormalFamily
from pyro_em.families.trials import GeometricFamily
from pyro_em.model import compat
from pyro_em.model.density import clean_value, log_density
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.packing import align
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.statistics import SiteMoments

# An entry that is known as a difference has 13 digits if it is at least this share of its weight.
CANCELLED = 1e-3


@dataclass(frozen=True, eq=False)
class SiteLayout:
    """One observed site: its positions, its rows of Φ (`begin`..), its center, and its dims."""

    site: SiteRecord
    begin: int
    inner: tuple[tuple[int, int], ...]  # (dim, size) of inner plates, leftmost first
    elements: tuple[int, ...]
    block: Block
    center: Tensor | None
    absolute: bool = False  # only Newton's method reads the moments: no entry needs digits of its own
    groups: Groups | None = None  # of which the rows of Φ are sums

    @staticmethod
    def over_root(packed: Tensor, component: Component, run: Run, graph: FactorGraph) -> Tensor:
        """A packed tensor over root plates as one row per element, (N,)."""
        if not set(compat.dims_of(packed)) <= component.root:
            raise NotCompiled("weights that vary within a row")
        order = root_order(component, run, graph)
        sizes = [graph.plate_sizes[d] for d in order]
        return align(packed, "".join(order)).expand(sizes).reshape(-1)

    def spread(self, x: Tensor, states: JointStates, event_dim: int) -> Tensor:
        """A tensor over argument cells as (J, positions) + event; it must not vary along the rows."""
        depth = max([0, *(-d for d in states.dims), *(-d for d, _ in self.inner)]) + len(self.elements)
        lead = x.dim() - event_dim
        x = x.reshape((1,) * max(0, depth - lead) + tuple(x.shape))
        rank = x.dim() - event_dim
        target = [1] * rank
        for dim, size in (*zip(states.dims, states.sizes, strict=True), *self.inner):
            target[rank - len(self.elements) + dim] = size
        for i, size in enumerate(self.elements):
            target[rank - len(self.elements) + i] = size
        event = tuple(x.shape[rank:])
        return torch.broadcast_to(x, (*target, *event)).reshape((states.num, self.block.positions, *event))

    def log_density(self, arguments: dict[str, Tensor], states: JointStates, end: int) -> Tensor:
        """The family's own log-density of the first rows without the base measure, (J, end): the engine's oracle."""
        if self.groups is not None:
            return self._of_groups(arguments, states, end)
        family, block = self.site.family, self.block
        assert family is not None
        args = {a: self.spread(v, states, family.arguments[a]).unsqueeze(2) for a, v in arguments.items()}
        data = 1 if isinstance(family, GeometricFamily) else 0  # its first statistic is the constant one
        value = block.value(data, end, family.event_dim, self._one_hot)
        if isinstance(family, VonMisesFamily):
            value = torch.atan2(block.value(1, end, 0, False), value)  # of sine and cosine
        if self.center is not None:
            center = self.center.reshape(1, block.positions, 1, *((-1,) if family.event_dim else ()))
            args["loc"] = args["loc"] - center
        base = type(family)() if not isinstance(family, LogNormalFamily) else NormalFamily()
        density = base.log_prob({**self.site.constants, **args}, value)
        own = log_base_measure(base, value, {**self.site.constants, **args})
        density = density if own is None else density - own
        if block.flags is not None:
            density = torch.where(block.flags[:, :end].bool(), density, density.new_zeros(()))
        return density.sum(1)

    def _of_groups(self, arguments: dict[str, Tensor], states: JointStates, end: int) -> Tensor:
        """The same where these are groups: that of the rows, added up."""
        assert self.groups is not None and self.site.family is not None
        density = log_density(dataclasses.replace(self.site, arguments=arguments))
        base = log_base_measure(self.site.family, clean_value(self.site), {**self.site.constants, **arguments})
        if base is not None:
            base = base.sum(tuple(range(-len(self.elements), 0))) if self.elements else base
            keep = torch.ones((), dtype=torch.bool) if self.site.mask is None else self.site.mask
            density = density - torch.where(keep, base, base.new_zeros(()))
        rank = max(density.dim(), *(-d for d in states.dims))
        density = density.reshape((1,) * (rank - density.dim()) + tuple(density.shape))
        wide = [1] * rank
        for dim, size in zip(states.dims, states.sizes, strict=True):
            wide[dim] = size
        inner = [rank + d for d, _ in self.inner]
        total = density.sum(inner, keepdim=True) if inner else density
        rows = total.movedim(self.groups.dim, -1)
        wide = [*wide[: rank + self.groups.dim], *wide[rank + self.groups.dim + 1 :], len(self.groups.element)]
        return self.groups.sum(rows.expand(wide).reshape(states.num, -1).double())[:, :end]

    def moments(self, totals: Tensor, states: JointStates) -> SiteMoments:
        """Moments of the site in Pyro's dims from the sums (J, F).

        :raises OtherLayout: if an entry that was left out is too small to be known as a difference.
        """
        positions, family = self.block.positions, self.site.family
        assert family is not None
        row, found = self.begin, []
        for part in self.block.parts:
            count = positions * part.num_rows
            if part.kind == "outer":
                place = _places(row, positions, part.width).to(totals.device)
                own = totals.index_select(1, place).reshape(states.num, positions, part.width, part.width)
            else:
                own = totals[:, row : row + count].reshape(states.num, positions, part.num_rows)
            row += count
            found.append(own)
        if self.block.flags is None:
            weight = totals[:, :1].expand(states.num, positions)
        else:
            weight = totals[:, row : row + positions]
        event = family.event_dim
        if self.block.complement:
            found = self._completed(found[0], weight)
        shaped = [self._in_place(weight, states)]
        for own in found:
            vector = own.dim() > 3 or own.shape[-1] > 1 or event > 0 or self._one_hot
            shaped.append(self._in_place(own if vector else own.squeeze(-1), states))
        return SiteMoments(tuple(shaped), shaped[0].shape, self.center)

    def _completed(self, own: Tensor, weight: Tensor) -> list[Tensor]:
        """The statistics with the entry that was left out: the weight less all others."""
        last = weight.unsqueeze(-1) - own.sum(-1, keepdim=True)
        if self.absolute:
            last = last.clamp(min=0)
        elif bool((last < CANCELLED * weight.unsqueeze(-1)).any()):
            raise OtherLayout
        return [torch.cat([own, last], -1)] if self._one_hot else [own, last]

    @property
    def _one_hot(self) -> bool:
        arguments = self.site.arguments or {}
        return any(self.site.family.arguments[a] == 1 for a in arguments) and self.site.family.event_dim == 0  # type: ignore[union-attr]

    def _in_place(self, x: Tensor, states: JointStates) -> Tensor:
        dims = {**dict(zip(states.dims, states.sizes, strict=True)), **dict(self.inner)}
        depth = max([0, *(-d for d in dims)])
        lead = [dims.get(d, 1) for d in range(-depth, 0)]
        return x.reshape((*lead, *self.elements, *x.shape[2:]))


@lru_cache(maxsize=64)
def _places(begin: int, positions: int, width: int) -> Tensor:
    """Where each entry of a symmetric matrix at each position stands among those on and above its diagonal."""
    i, j = torch.triu_indices(width, width)
    place = torch.empty(width, width, dtype=torch.long)
    place[i, j] = place[j, i] = torch.arange(len(i))
    first = begin + len(i) * torch.arange(positions)
    return (first.unsqueeze(-1) + place.reshape(-1)).reshape(-1)


def weights_of(coefficients: Coefficients, layout: SiteLayout, states: JointStates) -> tuple[Tensor, Tensor]:
    """The site's columns of W, (J, num_features), and its part of the bias, (J,).

    :raises OtherLayout: if an entry that was left out has probability zero.
    """
    etas, normalizer = coefficients
    columns = []
    if layout.block.complement:
        every = etas[0] if layout._one_hot else torch.stack(etas, -1)
        last = every[..., -1]
        if bool((last == -torch.inf).any()):
            raise OtherLayout  # the difference to it would be infinite for all others
        etas, normalizer = (every[..., :-1] - last.unsqueeze(-1),), normalizer - last
        if not layout._one_hot:
            etas = (etas[0].squeeze(-1),)
    for eta, part in zip(etas, layout.block.parts, strict=True):
        event = 2 if part.kind == "outer" else 1 if layout.site.family.event_dim or layout._one_hot else 0  # type: ignore[union-attr]
        own = layout.spread(eta, states, event)
        if part.kind == "outer":
            i, j = torch.triu_indices(part.width, part.width, device=own.device)
            own = own.flatten(-2).index_select(-1, i * part.width + j) * torch.where(i == j, 1.0, 2.0).to(own)
        columns.append(own.reshape(states.num, -1))
    bias = -layout.spread(normalizer, states, 0)
    if layout.block.flags is not None:
        columns.append(bias)
        return torch.cat(columns, 1), bias.new_zeros(states.num)
    return torch.cat(columns, 1), bias.sum(1) if bias.shape[1] > 1 else bias.squeeze(1)


def root_order(component: Component, run: Run, graph: FactorGraph) -> list[str]:
    """Root plates, outermost (leftmost dim) first."""
    dims = {site.symbols[p.dim]: p.dim for site in run.sites.values() for p in site.plates}
    return sorted(component.root, key=dims.__getitem__)
