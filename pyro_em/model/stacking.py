"""Runs of a model that differ in the values of some latents, stacked along a dim: one run of all values.

Sites have the arguments of all runs one behind the other along that dim, and size 1 there where they are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.model.compat import base_distribution
from pyro_em.model.density import log_density
from pyro_em.model.trace import Run, SiteRecord


def stack(
    runs: Sequence[Run], dim: int, symbols: Mapping[str, Mapping[int, str]], counts: Mapping[str, int] | None = None
) -> Run:
    """One run from several that differ in the latents' values, along `dim` of the sites in `symbols`.

    :param counts: how many of the runs count for the sites of a symbol; all by default.
    """
    first = runs[0]
    sites = {}
    for name, site in first.sites.items():
        if name in symbols:
            count = len(runs) if counts is None else counts[symbols[name][dim]]
            site = _stacked([run.sites[name] for run in runs[:count]], dim, symbols[name])
        sites[name] = site
    return dataclasses.replace(first, sites=sites)


def _stacked(sites: Sequence[SiteRecord], dim: int, symbols: Mapping[int, str]) -> SiteRecord:
    first = sites[0]
    named = {**first.symbols, **symbols}
    event = first.fn.event_dim
    value = joined([s.value for s in sites], dim, event)
    if first.family is None or first.arguments is None:
        table = joined([log_density(s, masked=False) for s in sites], dim, 0)
        return dataclasses.replace(first, symbols=named, fn=Tabulated(first.fn, table), value=value)
    arguments = {
        a: joined([(s.arguments or {})[a] for s in sites], dim, first.family.arguments[a] + first.element_dims)
        for a in first.arguments
    }
    batch = list((1,) * (-dim - len(first.batch_shape)) + first.batch_shape)
    batch[dim] = len(sites)
    return dataclasses.replace(first, symbols=named, arguments=arguments, value=value, batch_shape=tuple(batch))


def joined(parts: Sequence[Tensor], dim: int, trailing: int) -> Tensor:
    """The parts along `dim` of their batch (`trailing` dims stand right of it), or the first if all are one."""
    first = parts[0]
    if all(p is first or (not p.requires_grad and torch.equal(p, first)) for p in parts):
        return first
    return behind(parts, dim, trailing)


def behind(parts: Sequence[Tensor], dim: int, trailing: int) -> Tensor:
    """The parts one behind the other along `dim` of their batch."""
    rank = max(trailing - dim, *(p.dim() for p in parts))
    padded = [p.reshape((1,) * (rank - p.dim()) + tuple(p.shape)) if p.dim() < rank else p for p in parts]
    return torch.cat(padded, padded[0].dim() - trailing + dim)


class Tabulated:
    """A distribution of unknown family at several atoms: its log-density is a table."""

    def __init__(self, fn: Any, table: Tensor) -> None:
        self.fn, self.table = fn, table
        self.event_dim, self.event_shape, self.batch_shape = fn.event_dim, fn.event_shape, fn.batch_shape
        self.support = fn.support

    def log_prob(self, value: Tensor) -> Tensor:
        return self.table


def distribution_of(site: SiteRecord) -> Any:
    """A site's base distribution, of stacked runs in all of these."""
    base = base_distribution(site.fn)
    if tuple(site.fn.batch_shape) == site.batch_shape or site.arguments is None:
        return base
    return type(base)(**site.constants, **site.arguments, validate_args=False)
