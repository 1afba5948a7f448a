"""Observed sites brought into the compiled form: from Pyro's dims to rows of Φ (see layout.py and features.py)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.features import Block, Part
from pyro_em.e_step.layout import SiteLayout, root_order
from pyro_em.e_step.natural import NATURAL, log_base_measure
from pyro_em.e_step.nested_rows import Groups, groups_of, summed
from pyro_em.e_step.states import JointStates
from pyro_em.families.base import OneHotStatistic, Statistic
from pyro_em.families.trials import BernoulliFamily
from pyro_em.model.density import clean_value
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.trace import Run, SiteRecord


def site_layouts(
    component: Component, run: Run, graph: FactorGraph, states: JointStates, complement: bool
) -> tuple[list[SiteLayout], list[Block], Tensor | None, int]:
    """Layouts and blocks of the observed sites, the log base measure of every row, and the number of rows.

    :param complement: leave out the last of indicators that sum to one.
    :raises NotCompiled: for a family without natural form, or arguments that vary along the rows.
    """
    root = root_order(component, run, graph)
    num_rows = math.prod(graph.plate_sizes[d] for d in root)
    layouts, begin = [], 1
    base: Tensor | None = None
    for name in component.factors:
        site = run.sites[name]
        if site.enumerated:
            _check_arguments(site, component)
            continue
        if type(site.family) not in NATURAL:
            raise NotCompiled(f"the family of site '{name}' has no natural form here")
        groups = groups_of(site, component, graph, root)
        _check_arguments(site, component, groups)
        layout, own_base = _layout(site, begin, component, root, num_rows, complement, groups)
        layouts.append(layout)
        begin += layout.block.num_features
        if own_base is not None:
            base = own_base if base is None else base + own_base
    return layouts, [layout.block for layout in layouts], base, num_rows


def _check_arguments(site: SiteRecord, component: Component, groups: Groups | None = None) -> None:
    if site.family is None or site.arguments is None:
        raise NotCompiled(f"site '{site.name}' hides its arguments")
    for argument, value in site.arguments.items():
        batch = value.shape[: value.dim() - site.family.arguments[argument]]
        for plate in site.plates:
            position = len(batch) - site.element_dims + plate.dim
            rows = site.symbols[plate.dim] in component.root or (groups is not None and plate.dim == groups.dim)
            if rows and position >= 0 and batch[position] > 1:
                raise NotCompiled(f"argument '{argument}' of site '{site.name}' varies along plate '{plate.name}'")


def _layout(
    site: SiteRecord,
    begin: int,
    component: Component,
    root: list[str],
    num_rows: int,
    complement: bool,
    groups: Groups | None,
) -> tuple[SiteLayout, Tensor | None]:
    family = site.family
    assert family is not None and site.arguments is not None
    at_root = [next(p.dim for p in site.plates if site.symbols[p.dim] == d) for d in root] if groups is None else []
    if groups is not None:
        at_root, num_rows, complement = [groups.dim], len(groups.element), False
    inner = tuple((p.dim, p.size) for p in site.plates if p.dim not in at_root)
    elements = tuple(site.fn.event_shape[: site.element_dims])
    positions = math.prod(size for _, size in inner) * math.prod(elements)
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
        if any(own not in (1, size) for own, size in zip(x.shape, full, strict=False)):
            raise NotCompiled(f"the mask of site '{site.name}' depends on a latent")
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
    arguments = {**site.constants, **site.arguments}
    statistics = family.statistics(value, arguments)
    complement = complement and (isinstance(statistics[0], OneHotStatistic) or isinstance(family, BernoulliFamily))
    center, parts, codes = None, [], []
    for statistic in statistics[:1] if complement else statistics:
        if isinstance(statistic, OneHotStatistic):
            index, width = rows(statistic.index, 0), statistic.size - complement
            states = torch.arange(width, device=index.device)
            raw = (index.unsqueeze(1) == states.unsqueeze(-1)).to(torch.uint8).reshape(-1, num_rows)
            parts.append(Part("raw", width, _masked(raw, mask, width)))
            codes.append(index)
            continue
        assert isinstance(statistic, Statistic)  # a latent response has no natural form here
        if len(statistic.factors) == 1:
            (factor,) = statistic.factors
            raw = rows(factor, statistic.factor_dim)
            width = factor.shape[-1] if statistic.factor_dim else 1
            if family.centered:
                mean = raw.double().mean(1) if mask is None else _masked_mean(raw, mask, positions)
                # In the precision in which the model itself meets the data: float64 parameters widen float32 data.
                wide = functools.reduce(torch.promote_types, (v.dtype for v in site.arguments.values()), raw.dtype)
                mean = mean.to(wide)
                # Into memory of its own, feature-major: `rows` may have given a view of the user's data.
                raw = torch.sub(raw, mean.unsqueeze(1), out=raw.new_empty(raw.shape, dtype=wide))
                shape = [dict(inner).get(d, 1) for d in range(-max([0, *(-d for d, _ in inner)]), 0)]
                center = mean.double().reshape((*shape, *elements, *((-1,) if family.event_dim else ())))
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
    block = Block(positions, tuple(parts), flags, code, complement)
    if groups is not None:
        block = summed(block, mask, groups, family.centered)
        base = None if base is None else groups.sum(base.double())
    return SiteLayout(site, begin, inner, elements, block, center, groups=groups), base


def _masked(raw: Tensor, mask: Tensor | None, width: int) -> Tensor:
    if mask is None:
        return raw.contiguous()
    return torch.where(mask.repeat_interleave(width, 0), raw, raw.new_zeros(())).contiguous()


def _masked_mean(x: Tensor, mask: Tensor, positions: int) -> Tensor:
    keep = mask.repeat_interleave(len(x) // positions, 0)
    total = torch.where(keep, x.double(), torch.zeros((), dtype=torch.float64)).sum(1)
    return total / keep.sum(1).clamp(min=1)
