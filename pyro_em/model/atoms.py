"""Runs of a model with given values for its continuous latents: one value each, or several along one more dim.

Several values (*atoms*) stand in one more leftmost plate dim, `dim`, which enumeration dims leave free. Most models
take them in one run, as they take enumerated states. A model that indexes a latent by position (`b[subject]`) would
index the atoms instead; it is run once per atom and the runs are stacked, which is always right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.device import checked_indices
from pyro_em.errors import Refusal
from pyro_em.model.compat import detached, dims_of
from pyro_em.model.density import log_density, packed_log_density
from pyro_em.model.packing import align
from pyro_em.model.trace import Run, SiteRecord, quiet_store, run_model
from pyro_em.types import Model, Params

Shapes = Mapping[str, tuple[torch.Size, torch.Size]]


@dataclass(frozen=True)
class AtomRuns:
    """How to run a model at values of its continuous latents.

    `shapes` are the latents' own (batch, event) shapes; `symbols[site][dim]` names dims that Pyro does not know of
    (that of the atoms, and enumeration dims that only reach the site through a latent's value).
    """

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dim: int
    shapes: Shapes
    symbols: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)
    looped: bool = False

    def one(self, params: Params, values: Mapping[str, Tensor]) -> Run:
        """The run at one value of each latent, in the latents' own shapes."""
        return self._run(params, values, {})

    def several(self, params: Params, values: Mapping[str, Tensor]) -> Run:
        """The run at atoms: values of shape (states..., S, plates...) + event, with m dims before the event."""
        if not self.looped:
            return self._run(params, values, self.symbols)
        counts: dict[str, int] = {}  # of atoms, which differ from set to set
        for name, value in values.items():
            symbol = self.symbols[name][self.dim]
            counts[symbol] = max(counts.get(symbol, 1), value.shape[self.axis(name, value)])
        runs = [self._run(params, self.atom(values, s), {}) for s in range(max(counts.values()))]
        return stack(runs, self.dim, self.symbols, counts)

    def _run(self, params: Params, values: Mapping[str, Tensor], symbols: Mapping[str, Mapping[int, str]]) -> Run:
        with quiet_store(), pyro.validation_enabled(False):
            return run_model(
                self.model,
                self.args,
                self.kwargs,
                {**params, **values},
                max_plate_nesting=-self.dim,
                integrated=frozenset(self.shapes),
                symbols=symbols,
            )

    def axis(self, name: str, value: Tensor) -> int:
        """Where a latent's atoms have their dim."""
        return value.dim() - len(self.shapes[name][1]) + self.dim

    def atom(self, values: Mapping[str, Tensor], s: int) -> dict[str, Tensor]:
        """Atom number s of each latent (of the first states, if it depends on any), in the latents' own shapes."""
        found = {}
        for name, value in values.items():
            axis = self.axis(name, value)
            own = value.select(axis, min(s, value.shape[axis] - 1))
            batch, event = self.shapes[name]
            own = own.reshape([-1, *batch, *event])
            found[name] = own[0]
        return found

    def as_atoms(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Values in the latents' own shapes, one behind the other along the atoms' dim."""
        found = {}
        for name, (batch, event) in self.shapes.items():
            padded = [v[name].reshape((1,) * (-self.dim - len(batch)) + (*batch, *event)) for v in values]
            found[name] = torch.cat(padded)
        return found

    def certified(self, params: Params, values: Sequence[Mapping[str, Tensor]], first: Run) -> AtomRuns:
        """Self if one run at several atoms says what single runs say, else the same with `looped`.

        :param first: the run at the first of the values.
        """
        with torch.no_grad():
            stacked = stack([first, *(self.one(params, v) for v in values[1:])], self.dim, self.symbols)
            try:
                with checked_indices():
                    together = self.several(params, self.as_atoms(values))
                same = together.sites.keys() == stacked.sites.keys() and all(
                    _equal(together.sites[n], stacked.sites[n]) for n in stacked.sites
                )
            except (RuntimeError, IndexError, ValueError, TypeError, Refusal):  # whatever indexing a wrong dim leads to
                same = False
        return self if same else dataclasses.replace(self, looped=True)


def _equal(a: SiteRecord, b: SiteRecord) -> bool:
    x, y = detached(packed_log_density(a)), detached(packed_log_density(b))
    dims = "".join(dict.fromkeys(dims_of(x) + dims_of(y)))
    x, y = align(x, dims), align(y, dims)
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)


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
        return dataclasses.replace(first, symbols=named, fn=_Tabulated(first.fn, table), value=value)
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
    rank = trailing - dim
    padded = [p.reshape((1,) * (rank - p.dim()) + tuple(p.shape)) if p.dim() < rank else p for p in parts]
    return torch.cat(padded, padded[0].dim() - trailing + dim)


class _Tabulated:
    """A distribution of unknown family at several atoms: its log-density is a table."""

    def __init__(self, fn: Any, table: Tensor) -> None:
        self.fn, self.table = fn, table
        self.event_dim, self.event_shape, self.batch_shape = fn.event_dim, fn.event_shape, fn.batch_shape
        self.support = fn.support

    def log_prob(self, value: Tensor) -> Tensor:
        return self.table
