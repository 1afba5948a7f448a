"""The last states of a loop's latents as one joint state, so that looking back any number of steps is a plain chain.

    s_t = (z_v[t - ℓ] : latents v, lags ℓ = 0, ..., m_v),      T(s', s) = Π_v p(z_v[t] | s', s) · 1[s is s' shifted]

m_v is as long as any table (less one) or observed site looks back at z_v, and as the first steps of the loop, which
are all in the first joint state. A lag that reaches before the first step is a slot fixed at state 0, which nothing
reads. One table serves all steps and chains.

The symbols of the loop's first h latents stand for "k steps back" in the factors of the later steps (model/chained.py);
they also name the slots of the first joint state, s_{h-1}, of lag k - 1, and so those of the state before.

A latent outside of the loop that its later steps read (the kind of a sequence) is a slot that never changes; its lag
is `SAME`. Latents of the first steps alone, and those outside that only these read (the state before the first one),
stand left of the first joint state and are summed out of it. Not here: tables that vary with time or between chains.

Shapes: X states of latents of the first steps alone (often 1), S joint states, S' the same a step before, E states of
what the observed sites read of s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.compat import dims_of
from pyro_em.model.graph import Component, FactorGraph

MAX_STATES = 128  # joint states; their transitions are one table
SAME = -1

Packed = Mapping[str, Tensor]


def laid(x: Tensor, names: Sequence[str | None], lead: str) -> Tensor:
    """A packed tensor over `names` and then the dims `lead`, size 1 where it has none; summed over all others."""
    own = dims_of(x)
    wanted = [*names, *lead]
    gone = [i for i, d in enumerate(own) if d not in wanted]
    x, own = (x.sum(gone), "".join(d for d in own if d in wanted)) if gone else (x, own)
    x = x.permute([own.index(d) for d in wanted if d is not None and d in own])
    sizes = iter(x.shape)
    return x.reshape([next(sizes) if d is not None and d in own else 1 for d in wanted])


@dataclass(frozen=True)
class Lagged:
    """Slots (latent, lag) of the joint state in order, latents by their symbol now; `back` are the symbols of a latent
    k = 1, ..., h steps back; `read` the slots that observed sites read; `alone` latents of the first steps alone, with
    their numbers of states."""

    slots: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]
    back: Mapping[tuple[str, int], str]
    read: tuple[int, ...]
    alone: Mapping[str, int]

    @property
    def num(self) -> int:
        """S."""
        return math.prod(self.sizes)

    @cached_property
    def now(self) -> tuple[str, ...]:
        """Symbols of the slots in the factors of a step."""
        return tuple(v if lag <= 0 else self.back[v, lag] for v, lag in self.slots)

    @cached_property
    def before(self) -> tuple[str | None, ...]:
        """Symbols of the slots of the state a step before, which are those of the first state too."""
        return tuple(v if lag == SAME else self.back.get((v, lag + 1)) for v, lag in self.slots)

    @cached_property
    def _places(self) -> Tensor:
        """State of every slot in each joint state, (slots, S)."""
        grid = torch.meshgrid(*(torch.arange(n) for n in self.sizes), indexing="ij")
        return torch.stack(grid).reshape(len(self.sizes), -1)

    @cached_property
    def _possible(self) -> Tensor:
        """1[s is s' shifted], (S', S)."""
        allowed = torch.ones(self.num, self.num, dtype=torch.bool)
        for i, (v, lag) in enumerate(self.slots):
            if lag != 0:
                earlier = i if lag == SAME else self.slots.index((v, lag - 1))
                allowed &= self._places[earlier].unsqueeze(1) == self._places[i]
        return allowed.double()

    @cached_property
    def _latest(self) -> Tensor:
        """Which configuration of the latents now each joint state has, (S,)."""
        found = torch.zeros(self.num, dtype=torch.long)
        for place, size, (_, lag) in zip(self._places, self.sizes, self.slots, strict=True):
            if lag == 0:
                found = found * size + place
        return found

    @cached_property
    def row_of(self) -> Tensor | None:
        """Which configuration of what is read each joint state has, (S,); None if all of it is."""
        if len(self.read) == len(self.slots):
            return None
        found = torch.zeros(self.num, dtype=torch.long)
        for i in self.read:
            found = found * self.sizes[i] + self._places[i]
        return found

    def table(self, factors: Sequence[Tensor]) -> Tensor:
        """Transition table (S', S) of the latents' packed log-densities, which have no other dims."""
        current = [d for (d, lag) in self.slots if lag == 0]
        sizes = [n for n, (_, lag) in zip(self.sizes, self.slots, strict=True) if lag == 0]
        total = torch.zeros((), dtype=torch.float64)
        for factor in factors:
            total = total + laid(factor, [*self.before, *current], "")
        wide = total.exp().expand(*self.sizes, *sizes).reshape(self.num, -1)
        return wide.index_select(1, self._latest) * self._possible

    def first(self, factors: Sequence[Tensor], lead: str, sizes: Sequence[int]) -> Tensor:
        """Log-potential of the first joint state of every chain, (X, S, C), of all packed factors of the first steps.

        :param lead: the chains' plates, of those sizes.
        """
        fixed = [i for i, name in enumerate(self.before) if name is None]
        total = torch.zeros((), dtype=torch.float64)
        for factor in factors:
            total = total + laid(factor, [*self.alone, *self.before], lead)
        total = total.expand(*self.alone.values(), *self.sizes, *sizes).reshape(-1, self.num, math.prod(sizes))
        if not fixed:
            return total
        outside = (self._places[fixed] > 0).any(0).unsqueeze(1)
        return torch.where(outside, -torch.inf, total)

    def rows(self, factors: Sequence[Tensor], lead: str, sizes: Sequence[int]) -> Tensor:
        """Log-densities of the observed sites of all later steps, (E, rows).

        :param lead: the plate over the steps and those of the chains, of those sizes.
        """
        names = [self.now[i] for i in self.read]
        total = torch.zeros((), dtype=torch.float64)
        for factor in factors:
            total = total + laid(factor, names, lead)
        return total.expand(*(self.sizes[i] for i in self.read), *sizes).reshape(-1, math.prod(sizes))

    def reduced(self, posterior: Tensor) -> Tensor:
        """Posterior of joint states (S, n) summed to what is read, (E, n)."""
        gone = [i for i in range(len(self.slots)) if i not in self.read]
        if not gone:
            return posterior
        return posterior.reshape(*self.sizes, -1).sum(gone).reshape(-1, posterior.shape[1])

    def pairs(self, counts: Tensor, dims: str) -> tuple[Tensor, tuple[str, ...]]:
        """Expected transitions (S', S) summed to the latents that a packed table of those dims has, and their order."""
        names = [*self.before, *(v if lag == 0 else None for v, lag in self.slots)]
        return _marginal(counts.reshape(*self.sizes, *self.sizes), names, dims)

    def of_first(self, posterior: Tensor, dims: str) -> tuple[Tensor, tuple[str, ...]]:
        """Posterior of the first state (X, S, C) summed to the latents of a factor, chains last, and their order."""
        wide = posterior.reshape(*self.alone.values(), *self.sizes, -1)
        return _marginal(wide, [*self.alone, *self.before], dims)

    def of_row(self, posterior: Tensor, dims: str) -> tuple[Tensor, tuple[str, ...]]:
        """Posterior of what is read (E, rows) summed to the latents of a factor, rows last, and their order."""
        names = [self.now[i] for i in self.read]
        return _marginal(posterior.reshape(*(self.sizes[i] for i in self.read), -1), names, dims)


def _marginal(x: Tensor, names: Sequence[str | None], dims: str) -> tuple[Tensor, tuple[str, ...]]:
    gone = [i for i, name in enumerate(names) if name is None or name not in dims]
    return x.sum(gone) if gone else x, tuple(name for name in names if name is not None and name in dims)


def lagged(
    graph: FactorGraph, component: Component, loop: ChainedLoop, factors: Packed, sizes: Mapping[str, int]
) -> Lagged:
    """The joint state of a component that is one loop.

    :param factors: packed log-densities of the component's sites.
    :param sizes: number of states of every latent, by symbol.
    :raises NotCompiled: with the reason.
    """
    h = loop.loop.history
    symbol = {name: graph.factors[name].symbol for name in component.factors if graph.factors[name].enumerated}
    later = [name for name in symbol if name in loop.rest]
    back: dict[tuple[str, int], str] = {}
    for name in later:
        for k in range(1, h + 1):
            head = symbol.get(loop.rest[name].name(h - k, loop.loop))
            if head is None:
                raise NotCompiled(f"a first step without the latent '{name}' of the later ones")
            back[str(symbol[name]), k] = head
    inside = {d for n in component.factors if n in loop.rest for d in dims_of(factors[n])}
    same = [str(own) for name, own in symbol.items() if name not in loop.heads and name not in later and own in inside]
    known = {*back.values(), *(symbol[name] for name in later), *same}
    alone = {str(own): sizes[str(own)] for own in symbol.values() if own not in known}
    emissions = [n for n in component.factors if n in loop.rest and n not in symbol]
    slots: list[tuple[str, int]] = [(v, SAME) for v in same]
    read = [i for i, v in enumerate(same) if any(v in dims_of(factors[n]) for n in emissions)]
    for name in later:
        v = str(symbol[name])

        def furthest(among: list[str], v: str = v) -> int:
            return max((k for k in range(1, h + 1) if any(back[v, k] in dims_of(factors[n]) for n in among)), default=0)

        tables = [n for n in later if n in factors]
        seen = furthest(emissions)
        for lag in range(max(furthest(tables) - 1, seen, h - 1) + 1):
            named = v if lag == 0 else back[v, lag]
            if any(named in dims_of(factors[n]) for n in emissions):
                read.append(len(slots))
            slots.append((v, lag))
    found = Lagged(tuple(slots), tuple(sizes[v] for v, _ in slots), back, tuple(read), alone)
    if found.num * math.prod(alone.values()) > MAX_STATES:
        raise NotCompiled(f"{found.num} joint states of the steps that a step looks back at")
    return found
