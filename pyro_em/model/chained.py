"""What a loop over time (timeline.py) is in the factor graph: which symbols of its factors are one step back.

The factors of the steps that are run together have the plate's symbol τ, those of the first h steps have not.
A latent v of the body has one symbol for "now" (of its site in the plate) and, where the body looks back, the
symbols of its first h sites, which stand for "ℓ steps back": that of step h - ℓ for lag ℓ = 1, ..., h.

Refused here: factors outside of the loop that read a latent from inside of it, since what they read would be
the latent of one particular step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.errors import Refusal
from pyro_em.model import compat
from pyro_em.model.timeline import Loop, Template, read_outside
from pyro_em.model.trace import Run


@dataclass(frozen=True)
class Carried:
    """A latent that the next steps read: its symbol now, and its symbol as seen `lag` steps later."""

    current: str
    previous: str
    lag: int


@dataclass(frozen=True)
class ChainedLoop:
    """A loop whose steps are run together: its sites, and the latents that chain them.

    `heads` are the sites of the first steps, `rest` maps those in the plate (of symbol `plate`) to their names.
    """

    loop: Loop
    plate: str
    heads: frozenset[str]
    rest: Mapping[str, Template]
    carried: tuple[Carried, ...]

    def part(self, factors: tuple[str, ...], symbols: frozenset[str]) -> ChainedLoop | None:
        """The loop as far as one component has it, None if that has no chain of it."""
        rest = {name: template for name, template in self.rest.items() if name in factors}
        carried = tuple(c for c in self.carried if c.previous in symbols)
        return ChainedLoop(self.loop, self.plate, self.heads & set(factors), rest, carried) if carried else None

    def steps(self, site: str) -> list[str]:
        """Names of a site of the plate at every step."""
        return [self.rest[site].name(t, self.loop) for t in range(self.loop.steps)]


def chained_loops(run: Run, packed: Mapping[str, Tensor]) -> tuple[ChainedLoop, ...]:
    """The loops of an enumerated run that were run together.

    :param packed: packed log-density of every site, or a tensor of its shape.
    :raises Refusal: see the module docstring.
    """
    symbol_sites = {site.symbol: name for name, site in run.sites.items() if site.symbol is not None}
    found = []
    for loop in run.loops:
        if not loop.together:
            continue
        names = [name for name in loop.names if name in run.sites]
        rest = {n: Template.of(n, loop) for n in names if any(p.name == loop.plate for p in run.sites[n].plates)}
        heads = frozenset(names) - rest.keys()
        own = {run.sites[n].symbol for n in names} - {None}
        for name, tensor in packed.items():
            read = set(compat.dims_of(tensor)) & own
            if read and name not in names:
                raise read_outside(name, symbol_sites[sorted(read)[0]])
        found.append(ChainedLoop(loop, run.plate_symbols[loop.plate], heads, rest, _carried(run, loop, rest, packed)))
    return tuple(found)


def _carried(run: Run, loop: Loop, rest: Mapping[str, Template], packed: Mapping[str, Tensor]) -> tuple[Carried, ...]:
    read = set("".join(compat.dims_of(packed[name]) for name in rest))
    lags: dict[str, dict[int, str]] = {}  # of the symbols now, the symbols of the first steps by lag
    for name, template in rest.items():
        now = run.sites[name].symbol
        for step in range(loop.history):
            head = run.sites.get(template.name(step, loop))
            if now is not None and head is not None and head.symbol is not None:
                lags.setdefault(now, {})[loop.history - step] = head.symbol
    known = {symbol for own in lags.values() for symbol in own.values()}
    strange = [n for n in loop.names if n not in rest and run.sites[n].symbol in read - known]
    if strange:
        raise Refusal(
            strange[0],
            "later steps of its pyro_em.markov loop read it, but have no site of their own under that name.",
            "sample it before the loop, if it is the same for all steps.",
        )
    carried = []
    for now, own in lags.items():
        longest = max((lag for lag, symbol in own.items() if symbol in read), default=0)
        carried += [Carried(now, own[lag], lag) for lag in range(1, longest + 1)]
    return tuple(carried)


def relevant_later(flags: Tensor, plate: str) -> Tensor:
    """Packed 0/1 `flags` of the steps, true also where any later step's is."""
    dims = compat.dims_of(flags)
    if plate not in dims:
        return flags
    axis = dims.index(plate)
    later = torch.flip(torch.cummax(torch.flip(flags.to(torch.uint8), [axis]), axis).values, [axis])
    return compat.with_dims(later.bool(), dims)


def shifted(flags: Tensor, plate: str) -> Tensor:
    """Packed 0/1 `flags` of the steps, each moved to the step before; the last is false."""
    dims = compat.dims_of(flags)
    if plate not in dims:
        return flags
    axis = dims.index(plate)
    moved = torch.zeros_like(flags)
    moved.narrow(axis, 0, flags.shape[axis] - 1).copy_(flags.narrow(axis, 1, flags.shape[axis] - 1))
    return compat.with_dims(moved, dims)
