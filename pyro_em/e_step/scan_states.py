"""The latents of one step of a loop over time as one joint state, their tables as one table, and the way back.

    T(s', s) = Π_v p(z_v | parents of z_v in s' and s),      s = (z_1, ..., z_V) now, s' the same a step before

Several chains side by side or coupled (factorial, semi-Markov by its state and what is left of it) are one chain of
product states, and a latent that no later step reads (the component of a mixture of emissions) is part of the state
without being looked back at. Expected transitions of joint states are summed to the dims of each latent's table.

Not here: tables that vary with time or between chains, and latents that are not Categorical.

Shapes: V latents in a step, S joint states (leftmost of Pyro's dims first).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.scan_layout import dim_of, num_states, placed
from pyro_em.e_step.states import JointStates
from pyro_em.families.base import NORMALISED
from pyro_em.families.categorical import CategoricalFamily
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.graph import Component
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.sufficient import Arguments

MAX_STATES = 256  # joint states; their transitions are one table


@dataclass(frozen=True)
class StepStates:
    """`first` are the latents' sites at the first step, `later` those of the other steps, with their symbols in the
    order of the joint state; `before` are the later ones' symbols as seen one step on (None where they are not)."""

    states: JointStates
    first: Mapping[str, SiteRecord]
    later: Mapping[str, SiteRecord]
    start: tuple[str, ...]
    before: tuple[str | None, ...]
    now: tuple[str, ...]

    def initial(self, arguments: Arguments) -> Tensor:
        """Distribution of the first joint state, (S, 1)."""
        total = _product(_spread(_probs(arguments[n]), site, self.start) for n, site in self.first.items())
        return total.expand(self.states.sizes).reshape(-1, 1)

    def table(self, arguments: Arguments) -> Tensor:
        """Transition table of joint states, (S, S), rows to columns."""
        order = (*self.before, *self.now)
        total = _product(_spread(_probs(arguments[n]), site, order) for n, site in self.later.items())
        num = self.states.num
        return total.expand(*self.states.sizes, *self.states.sizes).reshape(num, num)

    def weight(self, name: str, counts: Tensor) -> Tensor:
        """Expected counts of a latent and its parents in Pyro's dims.

        :param counts: of joint states, (S,) for a latent of the first step, or of their transitions, (S, S).
        """
        site = self.first.get(name)
        if site is not None:
            return _marginal(counts.reshape(self.states.sizes), site, self.start)
        wide = counts.reshape(*self.states.sizes, *self.states.sizes)
        return _marginal(wide, self.later[name], (*self.before, *self.now))


def step_states(run: Run, component: Component, loop: ChainedLoop) -> StepStates:
    """The latents of a component of one loop that looks one step back.

    :raises NotCompiled: with the reason.
    """
    enumerated = [name for name in component.factors if run.sites[name].enumerated]
    later = {name: run.sites[name] for name in enumerated if name in loop.rest}
    first = {loop.rest[name].name(0, loop.loop): site for name, site in later.items()}
    if set(first) != {name for name in enumerated if name in loop.heads} or len(first) + len(later) < len(enumerated):
        raise NotCompiled("latents of the first step that the others do not have, or outside of the loop")
    dims = {site.symbol: dim_of(site, site.symbol) for site in later.values()}
    order = sorted(later, key=lambda name: dims[later[name].symbol])
    states = JointStates(
        tuple(dims[later[name].symbol] for name in order), tuple(num_states(later[name]) for name in order)
    )
    if states.num > MAX_STATES:
        raise NotCompiled(f"{math.prod(states.sizes)} joint states of one step")
    seen = {carried.current: carried.previous for carried in loop.carried}
    heads = {name: loop.rest[name].name(0, loop.loop) for name in order}
    found = StepStates(
        states,
        {heads[name]: run.sites[heads[name]] for name in later},
        later,
        tuple(str(run.sites[heads[name]].symbol) for name in order),
        tuple(seen.get(str(later[name].symbol)) for name in order),
        tuple(str(later[name].symbol) for name in order),
    )
    for own, symbols in ((found.first, found.start), (found.later, (*found.before, *found.now))):
        _check(own, symbols)
    for name in later:
        if run.sites[heads[name]].plate_dims | {loop.plate} != later[name].plate_dims:
            raise NotCompiled(f"'{name}' is in other plates than '{heads[name]}'")
    return found


def _check(sites: Mapping[str, SiteRecord], order: Sequence[str | None]) -> None:
    (name, one), *others = sites.items()
    for other, site in others:
        if site.plate_dims != one.plate_dims:
            raise NotCompiled(f"'{other}' is in other plates than '{name}'")
    for own, site in sites.items():
        if type(site.family) is not CategoricalFamily or site.arguments is None or site.element_dims:
            raise NotCompiled(f"'{own}' is no Categorical")
        for argument, value in site.arguments.items():
            symbols = _axes(value, site)
            if not set(symbols) <= set(order):
                raise NotCompiled(f"argument '{argument}' of '{own}' varies with time or between chains")


def _axes(x: Tensor, site: SiteRecord) -> dict[str | None, int]:
    """Symbols of the dims of an argument along which it varies; its last dim is the site's own."""
    rank = x.dim()
    found = {site.symbols.get(i - rank + 1): i for i, n in enumerate(x.shape[:-1]) if n > 1}
    return {**found, site.symbol: rank - 1}


def _spread(probs: Tensor, site: SiteRecord, order: Sequence[str | None]) -> Tensor:
    """A table with its dims at the places of `order`, 1 where it has none."""
    axes = _axes(probs, site)
    kept = [axes[s] for s in order if s in axes]
    ones = [i for i in range(probs.dim()) if i not in kept]
    shape = [probs.shape[axes[s]] if s in axes else 1 for s in order]
    return probs.permute([*kept, *ones]).reshape(shape)


def _product(tables: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.mul, tables)


def _marginal(counts: Tensor, site: SiteRecord, order: Sequence[str | None]) -> Tensor:
    """Counts over `order` summed to the dims that the site's table has, in Pyro's layout."""
    assert site.arguments is not None
    own = set().union(*(_axes(value, site) for value in site.arguments.values()))
    gone = [i for i, s in enumerate(order) if s not in own]
    return placed(counts.sum(gone) if gone else counts, site, tuple(s for s in order if s in own))


def _probs(arguments: dict[str, Tensor]) -> Tensor:
    if "probs" in arguments:
        return NORMALISED.to_canonical(arguments["probs"])
    return arguments["logits"].softmax(-1)
