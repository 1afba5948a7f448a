"""Discrete latents that sites outside of their plates read by an index: `z[group]` of rows in long format.

A model that indexes a latent by position would index Pyro's enumeration dim. So such a latent is enumerated from
outside: the model is run once for each of its K states k, all its elements in state k, and the runs are stacked,

    factor[k, n] = log p(y_n | z ≡ k),                 the log-density of row n where the element that it reads is in k,

which needs nothing but that a row reads a single element (row_maps.py finds which one, and refuses otherwise). However
the model indexes (`z[group]`, `z[..., group]`, `index_select`, `gather`, `Vindex`), its code is run as it stands.

An argument that in every state is the same for all rows has size 1 along their plate, as it has where Pyro enumerates:
`constant` says which, found once at random parameters.

Several such latents take K_1 · K_2 · ... runs. Not handled: masks that depend on them, `pyro.markov` loops beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import Refusal
from pyro_em.model.capture import Capture, PlainSite
from pyro_em.model.density import log_density
from pyro_em.model.stacking import Tabulated, behind
from pyro_em.model.timeline import read_outside
from pyro_em.model.trace import Run, SiteRecord, run_model
from pyro_em.types import Model

SYMBOLS = "ⓐⓑⓒⓓⓔⓕⓖⓗⓘⓙ"  # of their states in packed factors
RunAt = Callable[[dict[str, Tensor], dict[int, int]], Run]


@dataclass(frozen=True)
class IndexedLatent:
    """One of them: its dim and symbol, its states (K,) + event, the shape of its plates, the sites that read it.

    `through` are sites that it reaches through the value of a continuous latent only.
    """

    name: str
    dim: int
    symbol: str
    states: Tensor
    batch: torch.Size
    readers: frozenset[str]
    through: frozenset[str] = frozenset()

    def at(self, state: Tensor) -> Tensor:
        """The latent's value with its elements in the given states, (batch) or ()."""
        return self.states[state.expand(self.batch)]


@dataclass(frozen=True)
class Indexed:
    """All of them, the leftmost dim last; `constant` has the dims along which arguments (site, name) do not vary."""

    latents: tuple[IndexedLatent, ...]
    constant: Mapping[tuple[str, str], frozenset[int]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(latent.name for latent in self.latents)

    def run(self, run_at: RunAt, apart: bool = False) -> Run:
        """The run with all states of these latents.

        :param run_at: the model at given values of them; also told the number of each one's state, by dim.
        :param apart: continuous latents have other values in other states.
        """
        return self._run(run_at, self.latents, {}, {}, apart)

    def _run(
        self,
        run_at: RunAt,
        rest: Sequence[IndexedLatent],
        values: dict[str, Tensor],
        states: dict[int, int],
        apart: bool,
    ) -> Run:
        if not rest:
            return run_at(values, states)
        latent, later = rest[0], rest[1:]
        runs = []
        for k in range(len(latent.states)):
            own = {**values, latent.name: latent.at(torch.tensor(k))}
            runs.append(self._run(run_at, later, own, {**states, latent.dim: k}, apart))
        first = runs[0]
        sites = dict(first.sites)
        for name in first.sites:
            parts = [run.sites[name] for run in runs]
            if name == latent.name:
                sites[name] = self._own(latent, parts[0])
            elif name in latent.readers or (apart and not all(_alike(parts[0], other) for other in parts[1:])):
                sites[name] = self._stacked(latent, parts)
        leaves = {n: v for n, v in first.leaves.items() if n != latent.name}
        return dataclasses.replace(first, sites=sites, leaves=leaves)

    def _own(self, latent: IndexedLatent, site: SiteRecord) -> SiteRecord:
        """The latent as an enumerated site; its own distribution does not depend on its state."""
        event = latent.states.shape[1:]
        return dataclasses.replace(
            site,
            value=latent.states.reshape(-1, *(1,) * (-latent.dim - 1), *event),
            arguments=self._narrowed(site),
            enumerated=True,
            integrated=False,
            symbol=latent.symbol,
            symbols={**site.symbols, latent.dim: latent.symbol},
        )

    def _stacked(self, latent: IndexedLatent, parts: Sequence[SiteRecord]) -> SiteRecord:
        first, dim = parts[0], latent.dim
        for other in parts[1:]:
            if not (_same(first.mask, other.mask) and _same(first.element_mask, other.element_mask)):
                raise Refusal(
                    first.name,
                    f"its mask depends on the discrete latent '{latent.name}', which it reads by an index.",
                    "let the states choose its arguments instead, and the mask depend on data alone.",
                )
        same = all(torch.equal(first.value, s.value) for s in parts[1:])  # data, or a latent's one value in all states
        value = first.value if same else behind([s.value for s in parts], dim, first.fn.event_dim)
        site = dataclasses.replace(first, value=value, symbols={**first.symbols, dim: latent.symbol})
        if first.family is None or first.arguments is None:
            table = behind([log_density(s, masked=False) for s in parts], dim, 0)
            return _wider(dataclasses.replace(site, fn=Tabulated(first.fn, table)), [table], dim)
        trailing = {a: first.family.arguments[a] + first.element_dims for a in first.arguments}
        together = {a: behind([(s.arguments or {})[a] for s in parts], dim, trailing[a]) for a in first.arguments}
        site = dataclasses.replace(site, arguments=together)
        arguments = self._narrowed(site)
        assert arguments is not None
        batches = [v.reshape((*v.shape[: v.dim() - trailing[a]], -1))[..., 0] for a, v in arguments.items()]
        return _wider(dataclasses.replace(site, arguments=arguments), batches, dim)

    def _narrowed(self, site: SiteRecord) -> dict[str, Tensor] | None:
        if site.arguments is None or site.family is None:
            return site.arguments
        found = {}
        for name, value in site.arguments.items():
            trailing = site.family.arguments[name] + site.element_dims
            for dim in self.constant.get((site.name, name), ()):
                # (In other states continuous latents may have other values than they had when this was found.)
                if _is_constant(value, value.dim() - trailing + dim):
                    value = value.narrow(value.dim() - trailing + dim, 0, 1)
            while value.dim() > trailing and value.shape[0] == 1 and self.constant:
                value = value.squeeze(0)
            found[name] = value
        return found

    def with_constants(self, run: Run) -> Indexed:
        """The same, told along which dims arguments do not vary in a run at random parameters without this."""
        found = {}
        for name in {n for latent in self.latents for n in (latent.name, *latent.readers)}:
            site = run.sites[name]
            dims = {p.dim for p in site.plates} | {latent.dim for latent in self.latents}
            for argument, value in (site.arguments or {}).items():
                assert site.family is not None
                trailing = site.family.arguments[argument] + site.element_dims
                found[name, argument] = frozenset(d for d in dims if _is_constant(value, value.dim() - trailing + d))
        return dataclasses.replace(self, constant=found)


def run_enumerated(
    indexed: Indexed | None,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    params: Mapping[str, Tensor],
    latents: Callable[[dict[int, int]], Mapping[str, Tensor]] = lambda _: {},
    *,
    apart: bool = False,
    integrated: Collection[str] = (),
    **options: Any,
) -> Run:
    """`run_model` with all discrete latents enumerated, those read by an index from outside.

    :param latents: values of the continuous latents, given the number of the state of each indexed latent by dim.
    :param apart: these values are others in other states.
    """
    if indexed is None:
        return run_model(model, args, kwargs, {**params, **latents({})}, integrated=integrated, **options)
    given = (*integrated, *indexed.names)

    def run_at(own: dict[str, Tensor], states: dict[int, int]) -> Run:
        return run_model(model, args, kwargs, {**params, **latents(states), **own}, integrated=given, **options)

    return indexed.run(run_at, apart)


def indexed_latents(
    capture: Capture, discrete: Sequence[str], continuous: Collection[str], first: int
) -> Indexed | None:
    """The discrete latents that some site outside of their plates depends on; None if there are none.

    (A site also does so through a continuous latent that it reads by an index.)
    :param discrete: the discrete latents of the model, `continuous` the others.
    :param first: the (negative) dim of the first one's states; others stand left of it.
    """
    found: list[IndexedLatent] = []
    for name in discrete:
        plates = {p.name for p in capture.sites[name].plates}
        readers = {n for n, site in capture.sites.items() if name in site.upstream}
        through, last = set[str](), -1
        while len(through) > last:
            last, between = len(through), (readers | through) & set(continuous)
            through |= {n for n, site in capture.sites.items() if site.upstream & between} - readers
        if not plates or all(plates <= {p.name for p in capture.sites[n].plates} for n in readers | through):
            continue
        for loop in capture.loops:
            if name in loop.names and (outside := [n for n in capture.sites if n in readers and n not in loop.names]):
                raise read_outside(outside[0], name)
        if capture.loops or len(found) == len(SYMBOLS):
            raise Refusal(
                name,
                "sites outside of its plates read it by an index, beside a pyro_em.markov loop."
                if capture.loops
                else f"more than {len(SYMBOLS)} latents are read by an index from outside of their plates.",
                "write the groups as rows of a table, with a mask where they are shorter"
                + ("; or the loop as `for t in pyro.markov(range(T))`." if capture.loops else "."),
            )
        states, batch = states_of(capture.sites[name])
        own = first - len(found), SYMBOLS[len(found)], states, batch, frozenset(readers), frozenset(through)
        found.append(IndexedLatent(name, *own))
    return Indexed(tuple(found)) if found else None


def states_of(site: PlainSite) -> tuple[Tensor, torch.Size]:
    """States of a discrete latent, (K,) + event, and the shape of its plates."""
    support = site.fn.enumerate_support(expand=False)
    event = support.shape[support.dim() - site.fn.event_dim :]
    return support.reshape(len(support), *event), site.shapes[0]


def _wider(site: SiteRecord, batches: Sequence[Tensor], dim: int) -> SiteRecord:
    """The site with this dim in its batch, where some argument varies along it."""
    sizes = [b.shape[b.dim() + dim] for b in batches if b.dim() >= -dim]
    batch = list((1,) * (-dim - len(site.batch_shape)) + site.batch_shape)
    batch[dim] = max([1, *sizes])
    return dataclasses.replace(site, batch_shape=tuple(batch))


def _is_constant(value: Tensor, axis: int) -> bool:
    if axis < 0 or value.shape[axis] == 1:
        return False
    value = value.detach()
    return torch.equal(value, value.narrow(axis, 0, 1).expand_as(value))


def _alike(a: SiteRecord, b: SiteRecord) -> bool:
    """Whether a site, that does not read the discrete latent itself, is the same in two of its states."""
    if a.arguments is None or b.arguments is None:
        return torch.equal(a.value, b.value) and torch.equal(log_density(a), log_density(b))
    return torch.equal(a.value, b.value) and all(torch.equal(v, b.arguments[n]) for n, v in a.arguments.items())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
