"""Which elements of a latent have data at all.

Barren latents. A latent none of whose descendants is observed (its data are masked) sums to one and
adds nothing to log Z. Its expected counts are left out too: a row without data must not dilute the
M-step (it would change the iterates, though not the limit).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.model import compat
from pyro_em.model.chained import ChainedLoop, relevant_later, shifted
from pyro_em.model.packing import align
from pyro_em.model.trace import Run, SiteRecord

Lifted = Callable[[Tensor | None, str, str], Tensor | None]


def relevance_of(
    run: Run,
    packed: Mapping[str, Tensor],
    symbol_sites: Mapping[str, str],
    loops: Sequence[ChainedLoop] = (),
    lifted: Lifted = lambda flag, reader, latent: flag,
) -> dict[str, Tensor]:
    """For each latent with barren elements, a packed 0/1 tensor over its plates; absent = all relevant.

    In a loop whose steps are run together a latent's children are also the sites of later steps that read it.
    :param lifted: where a site makes a latent of other plates relevant, given where the site itself is.
    """
    children: dict[str, list[str]] = {name: [] for name in symbol_sites.values()}
    for name in run.sites:
        for symbol in set(compat.dims_of(packed[name])) & set(symbol_sites):
            if symbol_sites[symbol] != name:
                children[symbol_sites[symbol]].append(name)
    later = _later_children(packed, symbol_sites, loops)
    relevant: dict[str, Tensor | None] = {}  # None stands for all relevant
    while True:
        before = dict(relevant)
        for name in reversed(list(run.sites)):
            site = run.sites[name]
            if not site.enumerated:
                mask = None if site.mask is None else compat.pack(site.mask, site.symbols)
                relevant[name] = None if mask is None or bool(mask.all()) else mask
            elif site.symbol is None or site.symbol not in compat.dims_of(packed[name]):
                relevant[name] = None  # a single state has no dim, so that its children cannot be seen
            else:
                # A continuous latent may stand before the discrete one that its atoms depend on.
                own = [lifted(relevant.get(child), child, name) for child in children[name]]
                own += [
                    _steps_before(before.get(child, _nowhere()), run.sites[child], *how) for child, how in later[name]
                ]
                relevant[name] = _any(own, site.plate_dims)
        if not loops or _unchanged(before, relevant):
            break
    dtype = torch.get_default_dtype()
    return {
        name: compat.with_dims(flag.to(dtype), compat.dims_of(flag))
        for name, flag in relevant.items()
        if flag is not None and run.sites[name].enumerated
    }


_How = tuple[ChainedLoop, int]


def _nowhere() -> Tensor:
    return compat.with_dims(torch.zeros((), dtype=torch.bool), "")


def _later_children(
    packed: Mapping[str, Tensor], symbol_sites: Mapping[str, str], loops: Sequence[ChainedLoop]
) -> dict[str, list[tuple[str, _How]]]:
    """Of every latent in a loop's plate, the sites that read it some steps later, and how many."""
    found: dict[str, list[tuple[str, _How]]] = {name: [] for name in symbol_sites.values()}
    for loop in loops:
        for carried in loop.carried:
            readers = [name for name in loop.rest if carried.previous in compat.dims_of(packed[name])]
            found[symbol_sites[carried.current]] += [(name, (loop, carried.lag)) for name in readers]
    return found


def _steps_before(flag: Tensor | None, site: SiteRecord, loop: ChainedLoop, lag: int) -> Tensor:
    """Steps whose latent a child `lag` steps later makes relevant; through a latent also all steps before those."""
    size = loop.loop.steps - loop.loop.history
    if flag is None:
        flag = compat.with_dims(torch.ones((), dtype=torch.bool), "")
    if loop.plate not in compat.dims_of(flag):
        dims = loop.plate + compat.dims_of(flag)
        flag = compat.with_dims(align(flag, dims).expand(size, *flag.shape), dims)
    for _ in range(lag):
        flag = shifted(flag, loop.plate)
    return relevant_later(flag, loop.plate) if site.enumerated else flag


def _any(flags: Sequence[Tensor | None], plates: frozenset[str]) -> Tensor | None:
    """Where some flag is true, over the given plates."""
    total = _nowhere()
    for flag in flags:
        if flag is None:
            return None
        gone = [i for i, d in enumerate(compat.dims_of(flag)) if d not in plates]
        kept = "".join(d for d in compat.dims_of(flag) if d in plates)
        own = compat.with_dims(flag.amax(gone) if gone else flag, kept)
        dims = "".join(dict.fromkeys(compat.dims_of(total) + kept))
        total = compat.with_dims(align(total, dims) | align(own, dims), dims)
    return None if bool(total.all()) else total


def _unchanged(before: Mapping[str, Tensor | None], after: Mapping[str, Tensor | None]) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return before.keys() == after.keys() and all(same(before[name], after[name]) for name in after)
