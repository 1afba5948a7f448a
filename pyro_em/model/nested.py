"""Which plates of a model are nested in others, from the elements that rows read of latents in other plates.

A site of plate `rows` that reads element e(n) of a latent in plate `groups` (row_maps.py) nests the rows in the groups
(nests.py). Where rows read latents of two plates, pupils and schools, one of these is nested in the other if every one
of its elements is met with a single element of the other; else their latents are coupled.

Refused: latents of two plates that cross in the rows of a site, rows whose element depends on two of their plates.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.errors import Refusal
from pyro_em.model import compat
from pyro_em.model.nests import Nests, sum_over
from pyro_em.model.packing import align
from pyro_em.model.trace import Run, SiteRecord

SAME_ROWS = "write the data in long format, one row of one plate for each cell, and index the latent by a vector."


class Nesting:
    """The nests of a run: `links[site, latent]` are those that one site says."""

    def __init__(self, run: Run, sizes: Mapping[str, int], maps: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.run, self.sizes = run, sizes
        self.links: dict[tuple[str, str], dict[str, dict[str, Tensor]]] = {}
        for site, own in maps.items():
            for latent, element in own.items():
                self.links[site, latent] = nests_of(run.sites[site], run.sites[latent], element)

    def of(self, members: Sequence[str], symbols: frozenset[str]) -> Nests:
        """The nests among the sites of a component.

        :raises Refusal: where latents of two plates cross.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for (site, latent), own in self.links.items():
            if site not in members or self.run.sites[latent].symbol not in symbols:
                continue
            for child, parents in own.items():
                for parent, index in parents.items():
                    found.setdefault(child, {})
                    found[child][parent] = self._agreed(site, latent, found[child].get(parent), index)
        known = {child: {p: i.clamp(min=0) for p, i in own.items()} for child, own in found.items()}
        for child in list(known):
            self._order(child, known, members)
        return known

    def _agreed(self, site: str, latent: str, before: Tensor | None, index: Tensor) -> Tensor:
        if before is None:
            return index
        if bool(((before != index) & (before >= 0) & (index >= 0)).any()):
            raise Refusal(
                site,
                f"its rows read another element of '{latent}' than those of another site in the same plate, so that "
                "elements are coupled through the rows.",
                "let all sites of a plate read the same element in each row, or use algorithm='svi'.",
            )
        return torch.maximum(before, index)

    def _order(self, child: str, known: dict[str, dict[str, Tensor]], members: Sequence[str]) -> None:
        """Parents of one plate that are nested in each other."""
        for a, b in itertools.permutations(list(known[child]), 2):
            if self._of_one_latent(a, b, members) or b in known.get(a, {}) or a in known.get(b, {}):
                continue
            inner = _function(known[child][a], known[child][b], self.sizes[a])
            if inner is not None:
                known.setdefault(a, {})[b] = inner
        for a, b in itertools.combinations(known[child], 2):
            if not (self._of_one_latent(a, b, members) or b in known.get(a, {}) or a in known.get(b, {})):
                raise self._crossing(child, a, b, members)

    def _of_one_latent(self, a: str, b: str, members: Sequence[str]) -> bool:
        own = (self.run.sites[name] for name in members)
        return any(site.enumerated and {a, b} <= site.plate_dims for site in own)

    def _crossing(self, child: str, a: str, b: str, members: Sequence[str]) -> Refusal:
        site = next(s for s, _ in self.links if s in members and child in self.run.sites[s].plate_dims)
        own = [s for s in members if self.run.sites[s].enumerated]
        first = next(s for s in own if a in self.run.sites[s].plate_dims)
        second = next(s for s in own if b in self.run.sites[s].plate_dims)
        return Refusal(
            site,
            f"its rows read the discrete latents '{first}' ({self.sizes[a]} elements) and '{second}' ({self.sizes[b]} "
            "elements) in pairs that cross, which couples all of them: an exact sum is exponential in the smaller of "
            "these numbers.",
            "use algorithm='svi' with a guide for one of them, or give one of them as data.",
        )

    def lifted(self, flag: Tensor | None, reader: str, latent: str) -> Tensor | None:
        """Where a site makes a latent relevant, given where the site itself is: in the rows that read its elements."""
        own = self.links.get((reader, latent))
        if own is None:
            return flag
        site = self.run.sites[reader]
        dims = "".join(site.symbols[p.dim] for p in site.plates)
        rows = torch.ones([p.size for p in site.plates], dtype=torch.bool)
        if flag is not None:
            gone = [i for i, d in enumerate(compat.dims_of(flag)) if d not in dims]
            kept = "".join(d for d in compat.dims_of(flag) if d in dims)
            rows = rows & align(compat.with_dims(flag.amax(gone) if gone else flag, kept), dims)
        for child, parents in own.items():
            along = [-1 if d == child else 1 for d in dims]
            for index in parents.values():
                rows = rows & (index >= 0).reshape(along)
        clamped = {c: {p: i.clamp(min=0) for p, i in parents.items()} for c, parents in own.items()}
        count = sum_over(compat.with_dims(rows.double(), dims), own.keys(), clamped, self.sizes)
        return compat.with_dims(count > 0, compat.dims_of(count))


def nests_of(site: SiteRecord, latent: SiteRecord, element: Tensor) -> dict[str, dict[str, Tensor]]:
    """Index of each plate of the latent that the site does not stand in, along one plate of the site."""
    found: dict[str, dict[str, Tensor]] = {}
    stride = 1
    for plate in reversed(latent.plates):
        own = torch.where(element < 0, element, element // stride % plate.size)
        stride *= plate.size
        symbol = latent.symbols[plate.dim]
        if symbol in site.plate_dims:
            here = torch.arange(plate.size).reshape([-1 if d == plate.dim else 1 for d in range(-element.dim(), 0)])
            if bool(((own != here) & (own >= 0)).any()):
                raise Refusal(
                    site.name,
                    f"it stands in plate '{plate.name}' of the latent '{latent.name}', but reads other elements of it "
                    "than its own.",
                    "give the rows a plate of their own.",
                )
            continue
        child, index = _along_one(site, latent, own)
        found.setdefault(child, {})[symbol] = index
    return found


def _along_one(site: SiteRecord, latent: SiteRecord, own: Tensor) -> tuple[str, Tensor]:
    """The plate of the site along which an index varies, and the index along it."""
    free = [p for p in site.plates if site.symbols[p.dim] not in latent.plate_dims]
    if not free:
        raise Refusal(
            site.name,
            f"it reads one element of the latent '{latent.name}' and stands in no plate of its own.",
            "put it into a plate (of size 1, if need be), whose elements read the latent by an index.",
        )
    for plate in sorted(free, key=lambda p: -p.size):
        gone = [i for i in range(own.dim()) if i - own.dim() != plate.dim]
        index = own.amax(gone) if gone else own
        wide = index.reshape([-1 if d == plate.dim else 1 for d in range(-own.dim(), 0)])
        if bool(((own == wide) | (own < 0)).all()):
            return site.symbols[plate.dim], index
    names = ", ".join(f"'{p.name}'" for p in free)
    raise Refusal(
        site.name, f"the element of '{latent.name}' that it reads depends on several plates, {names}.", SAME_ROWS
    )


def merged(nests: Nests, more: Nests) -> dict[str, Mapping[str, Tensor]]:
    """Both together; what is known of a plate in both is the same."""
    return {child: {**more.get(child, {}), **nests.get(child, {})} for child in {**nests, **more}}


def _function(a: Tensor, b: Tensor, size: int) -> Tensor | None:
    """f with b = f(a), (size,), 0 where a does not go; None if b is no function of a."""
    found = torch.zeros(size, dtype=torch.long).scatter(0, a, b)
    return found if torch.equal(found[a], b) else None
