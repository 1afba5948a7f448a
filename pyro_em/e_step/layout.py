"""Where everything lies in the compiled E-step: joint states, positions, and the way back to Pyro's dims.

Pyro's dims of a site are, from the left: enumeration dims, plate dims (root and inner), elements of
`.to_event`. The compiled form has J joint states (all enumeration dims, leftmost first), positions (inner plates,
then elements) and rows (root plates). Both keep the dims in Pyro's order, so that the way back is a reshape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.features import Block, Part
from pyro_em.e_step.natural import NATURAL, Coefficients, log_base_measure
from pyro_em.e_step.states import JointStates
from pyro_em.families.base import OneHotStatistic
from pyro_em.families.normal import LogNormalFamily, NormalFamily
from pyro_em.families.trials import GeometricFamily
from pyro_em.model import compat
from pyro_em.model.density import clean_value
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.packing import align
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.statistics import SiteMoments


@dataclass(frozen=True, eq=False)
class SiteLayout:
    """One observed site: its positions, its rows of Φ (`begin`..), its center, and its dims."""

    site: SiteRecord
    begin: int
    inner: tuple[tuple[int, int], ...]  # (dim, size) of inner plates, leftmost first
    elements: tuple[int, ...]
    block: Block
    center: Tensor | None

    @staticmethod
    def over_root(packed: Tensor, component: Component, run: Run, graph: FactorGraph) -> Tensor:
        """A packed tensor over root plates as one row per element, (N,)."""
        if not set(compat.dims_of(packed)) <= component.root:
            raise NotCompiled("weights that vary within a row")
        order = _root_order(component, run, graph)
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
        family, block = self.site.family, self.block
        assert family is not None
        args = {a: self.spread(v, states, family.arguments[a]).unsqueeze(2) for a, v in arguments.items()}
        data = 1 if isinstance(family, GeometricFamily) else 0  # its first statistic is the constant one
        value = block.value(data, end, family.event_dim, self._one_hot)
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

    def moments(self, totals: Tensor, states: JointStates) -> SiteMoments:
        """Moments of the site in Pyro's dims from the sums (J, F)."""
        positions, family = self.block.positions, self.site.family
        assert family is not None
        row, found = self.begin, []
        for part in self.block.parts:
            count = positions * part.num_rows
            own = totals[:, row : row + count].reshape(states.num, positions, part.num_rows)
            row += count
            found.append(_symmetric(own, part.width) if part.kind == "outer" else own)
        if self.block.flags is None:
            weight = totals[:, :1].expand(states.num, positions)
        else:
            weight = totals[:, row : row + positions]
        event = family.event_dim
        shaped = [self._in_place(weight, states)]
        for own, part in zip(found, self.block.parts, strict=True):
            vector = part.kind == "outer" or part.width > 1 or event > 0 or self._one_hot
            shaped.append(self._in_place(own if vector else own.squeeze(-1), states))
        return SiteMoments(tuple(shaped), shaped[0].shape, self.center)

    @property
    def _one_hot(self) -> bool:
        arguments = self.site.arguments or {}
        return any(self.site.family.arguments[a] == 1 for a in arguments) and self.site.family.event_dim == 0  # type: ignore[union-attr]

    def _in_place(self, x: Tensor, states: JointStates) -> Tensor:
        dims = {**dict(zip(states.dims, states.sizes, strict=True)), **dict(self.inner)}
        depth = max([0, *(-d for d in dims)])
        lead = [dims.get(d, 1) for d in range(-depth, 0)]
        return x.reshape((*lead, *self.elements, *x.shape[2:]))


def _symmetric(upper: Tensor, width: int) -> Tensor:
    i, j = torch.triu_indices(width, width)
    full = upper.new_empty(*upper.shape[:-1], width, width)
    full[..., i, j] = upper
    full[..., j, i] = upper
    return full


def weights_of(coefficients: Coefficients, layout: SiteLayout, states: JointStates) -> tuple[Tensor, Tensor]:
    """The site's columns of W, (J, num_features), and its part of the bias, (J,)."""
    etas, normalizer = coefficients
    columns = []
    for eta, part in zip(etas, layout.block.parts, strict=True):
        event = 2 if part.kind == "outer" else 1 if layout.site.family.event_dim or layout._one_hot else 0  # type: ignore[union-attr]
        own = layout.spread(eta, states, event)
        if part.kind == "outer":
            i, j = torch.triu_indices(part.width, part.width)
            own = own[..., i, j] * torch.where(i == j, 1.0, 2.0).to(own)
        columns.append(own.reshape(states.num, -1))
    bias = -layout.spread(normalizer, states, 0)
    if layout.block.flags is not None:
        columns.append(bias)
        return torch.cat(columns, 1), bias.new_zeros(states.num)
    return torch.cat(columns, 1), bias.sum(1)


def site_layouts(
    component: Component, run: Run, graph: FactorGraph, states: JointStates
) -> tuple[list[SiteLayout], list[Block], Tensor | None, int]:
    """Layouts and blocks of the observed sites, the log base measure of every row, and the number of rows.

    :raises NotCompiled: for a family without natural form, or arguments that vary along the rows.
    """
    root = _root_order(component, run, graph)
    num_rows = math.prod(graph.plate_sizes[d] for d in root)
    layouts, begin, base = [], 1, torch.zeros(num_rows, dtype=torch.float64)
    for name in component.factors:
        site = run.sites[name]
        if site.enumerated:
            _check_arguments(site, component)
            continue
        if type(site.family) not in NATURAL:
            raise NotCompiled(f"the family of site '{name}' has no natural form here")
        _check_arguments(site, component)
        layout, own_base = _layout(site, begin, component, graph, root, num_rows)
        layouts.append(layout)
        begin += layout.block.num_features
        if own_base is not None:
            base += own_base
    return layouts, [layout.block for layout in layouts], base, num_rows


def _root_order(component: Component, run: Run, graph: FactorGraph) -> list[str]:
    """Root plates, outermost (leftmost dim) first."""
    dims = {site.symbols[p.dim]: p.dim for site in run.sites.values() for p in site.plates}
    return sorted(component.root, key=dims.__getitem__)


def _check_arguments(site: SiteRecord, component: Component) -> None:
    if site.family is None or site.arguments is None:
        raise NotCompiled(f"site '{site.name}' hides its arguments")
    for argument, value in site.arguments.items():
        batch = value.shape[: value.dim() - site.family.arguments[argument]]
        for plate in site.plates:
            position = len(batch) - site.element_dims + plate.dim
            if site.symbols[plate.dim] in component.root and position >= 0 and batch[position] > 1:
                raise NotCompiled(f"argument '{argument}' of site '{site.name}' varies along plate '{plate.name}'")


def _layout(
    site: SiteRecord, begin: int, component: Component, graph: FactorGraph, root: list[str], num_rows: int
) -> tuple[SiteLayout, Tensor | None]:
    family = site.family
    assert family is not None and site.arguments is not None
    inner = tuple((p.dim, p.size) for p in site.plates if site.symbols[p.dim] not in component.root)
    elements = tuple(site.fn.event_shape[: site.element_dims])
    positions = math.prod(size for _, size in inner) * math.prod(elements)
    at_root = [next(p.dim for p in site.plates if site.symbols[p.dim] == d) for d in root]
    value = clean_value(site)

    def rows(x: Tensor, event_dim: int) -> Tensor:
        """(batch + event) -> (positions · width, N)."""
        depth = max([0, *(-p.dim for p in site.plates)]) + len(elements)
        lead = x.dim() - event_dim
        x = x.reshape((1,) * max(0, depth - lead) + tuple(x.shape))
        rank = x.dim() - event_dim
        full = [1] * rank
        for plate in site.plates:
            full[rank - len(elements) + plate.dim] = plate.size
        for i, size in enumerate(elements):
            full[rank - len(elements) + i] = size
        x = torch.broadcast_to(x, (*full, *x.shape[rank:]))
        outer = [rank - len(elements) + d for d in at_root]
        rest = [i for i in range(x.dim()) if i not in outer]
        return x.permute(rest + outer).reshape(-1, num_rows)

    mask = None
    if site.mask is not None or site.element_mask is not None:
        mask = torch.ones((), dtype=torch.bool)
        if site.mask is not None:
            mask = site.mask.reshape(site.mask.shape + (1,) * len(elements))
        if site.element_mask is not None:
            mask = mask & site.element_mask
        mask = rows(mask, 0)
    center = None
    arguments = {**site.constants, **site.arguments}
    if family.centered:
        (location, *_) = family.statistics(value, arguments)
        x = rows(location.dense(), family.event_dim)
        mean = x.double().mean(1) if mask is None else _masked_mean(x, mask, positions)
        shape = [dict(inner).get(d, 1) for d in range(-max([0, *(-d for d, _ in inner)]), 0)]
        center = mean.reshape((*shape, *elements, *((-1,) if family.event_dim else ())))
        wide = [dict(inner).get(d, 1) for d in range(-max([0, *(-p.dim for p in site.plates)]), 0)]
        center_of_data = mean.reshape((*wide, *elements, *((-1,) if family.event_dim else ())))
    else:
        center_of_data = None
    parts, codes = [], []
    for statistic in family.statistics(value, arguments, center_of_data):
        if isinstance(statistic, OneHotStatistic):
            raw = rows(statistic.dense().to(torch.uint8), 1)
            parts.append(Part("raw", statistic.size, _masked(raw, mask, statistic.size)))
            codes.append(rows(statistic.index, 0))
        elif len(statistic.factors) == 1:
            (factor,) = statistic.factors
            raw = rows(factor, statistic.factor_dim)
            width = factor.shape[-1] if statistic.factor_dim else 1
            parts.append(Part("raw", width, _masked(raw, mask, width)))
            codes.append(raw)
        else:
            width = statistic.factors[0].shape[-1] if statistic.factor_dim else 1
            parts.append(Part("square" if statistic.factor_dim == 0 else "outer", width, None))
    flags = None if mask is None else mask.to(torch.uint8)
    discrete = bool(getattr(site.fn.support, "is_discrete", False))
    code = torch.cat([c.long() for c in codes] + ([] if flags is None else [flags.long()])) if discrete else None
    base = log_base_measure(family, value, arguments)
    if base is not None:
        base = rows(base, 0)
        base = (base if mask is None else torch.where(mask, base, base.new_zeros(()))).sum(0)
    return SiteLayout(site, begin, inner, elements, Block(positions, tuple(parts), flags, code), center), base


def _masked(raw: Tensor, mask: Tensor | None, width: int) -> Tensor:
    if mask is None:
        return raw.contiguous()
    return torch.where(mask.repeat_interleave(width, 0), raw, raw.new_zeros(())).contiguous()


def _masked_mean(x: Tensor, mask: Tensor, positions: int) -> Tensor:
    keep = mask.repeat_interleave(len(x) // positions, 0)
    total = torch.where(keep, x.double(), torch.zeros((), dtype=torch.float64)).sum(1)
    return total / keep.sum(1).clamp(min=1)
