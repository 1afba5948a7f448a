"""Finds the block structure of a set of Gaussian latents and makes its route.

A is the family of latents (all those in the same plates) with the most elements among those of which every row
reads a single element; all others form B (blocks.py). Where no family is like that (a row that reads two elements
of one plate, home and away team) all elements are unknowns of one dense system.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.errors import NonFiniteError, Refusal
from pyro_em.evidence.assembly import Geometry, Reading, Rows
from pyro_em.evidence.columns import Column, Index, readings_of
from pyro_em.evidence.element_states import state_of_element
from pyro_em.evidence.elimination import Candidate, NotMine, Values
from pyro_em.evidence.gaussian import GaussianRoute, check_memory, undetermined
from pyro_em.evidence.normal_sites import normal_parts
from pyro_em.evidence.shared_plates import shared_dims
from pyro_em.model.flat import is_flat
from pyro_em.model.trace import Run

FEW = 2**26  # bytes of a site at all atoms, above which a route gives two
Reads = Mapping[str, Mapping[Column, Index]]


def recognise_gaussian(candidate: Candidate) -> GaussianRoute:
    """The route of a set of real-valued latents.

    :raises NotMine: if some latent is not real-valued.
    :raises Refusal: if the joint density is not Gaussian in the latents, naming the site.
    :raises ResourceError: if the system would be too large.
    """
    for name in candidate.latents.names:
        support = candidate.first.sites[name].fn.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is not constraints.real and support is not constraints.real_vector:
            raise NotMine(f"'{name}' is not real-valued")
    parts, others = normal_parts(candidate)

    def residuals(run: Run, names: Sequence[str]) -> list[Tensor]:
        return [w for w, _ in parts[0 if run is candidate.first else 1]]

    columns, reads, tangents = readings_of(candidate, residuals)
    _check_read(candidate, columns, reads)
    families = _families(candidate, columns)
    chosen = next((key for key in families if _single(families[key], reads)), None)
    if chosen is None:
        columns, reads, tangents = readings_of(candidate, residuals, split=frozenset(candidate.latents.names))
        in_a, in_b = columns, []
    else:
        in_a = families[chosen]
        in_b = [c for c in columns if c not in set(in_a)]
    geometry = _geometry(candidate, in_a, in_b)
    _check_moves(candidate, reads, geometry)
    cells = _cells(candidate)
    few = bool(geometry.num_b) and 8 * (len(geometry.columns_a) + geometry.num_b + 1) * cells > FEW
    needed = check_memory(geometry, candidate.latents.names, 0 if few else cells)
    made = tuple(_reading(candidate, name, reads[name], geometry) for name in candidate.latents.factors)
    symbols, plates = plate_symbols(candidate, geometry, in_a, made)
    shared = shared_dims(candidate, geometry, made) if geometry.num_b else ()
    if shared:
        latent = candidate.first.sites[candidate.latents.names[0]]
        symbols = {**symbols, **{dim: latent.symbols[dim] for dim in shared}}
        plates = frozenset(symbols[dim] for dim in shared)
    reason, cost = _words(candidate, geometry, in_a, in_b, needed)
    dtypes = {n: candidate.leaves[0][n].dtype for n in candidate.latents.names}
    flat = tuple(n for n in candidate.latents.names if is_flat(candidate.first.sites[n].fn))
    route = GaussianRoute(candidate.latents, geometry, made, symbols, plates, reason, cost, dtypes, few, flat, shared)
    rows = [route.known_rows(*known) for known in zip(parts, tangents, candidate.leaves, strict=True)]
    for own, other, (values, _) in zip(rows, others, candidate.others, strict=True):
        route.certify(own, other, values)
    return dataclasses.replace(route, at_start=_first_atoms(route, candidate, rows))


def _first_atoms(route: GaussianRoute, candidate: Candidate, rows: Sequence[Sequence[Rows]]) -> Values:
    """Those of the start, if there are none yet; residuals are certified once more, around the posterior there."""
    try:
        found = route.certified(candidate.run_at[0], rows[0])
    except NonFiniteError:  # a start that the caller may have replaced
        return route.certified(candidate.run_at[1], rows[1]).atoms.values
    known = candidate.atoms
    return found.atoms.values if known is None else {name: known[name] for name in candidate.latents.names}


def _check_read(candidate: Candidate, columns: Sequence[Column], reads: Reads) -> None:
    """:raises Refusal: for a flat latent of which no density reads some entry."""
    for column in columns:
        flat = is_flat(candidate.first.sites[column.site].fn)
        if flat and not any(column in own for own in reads.values()):
            raise undetermined(column.site)


def _check_moves(candidate: Candidate, reads: Reads, geometry: Geometry) -> None:
    """:raises Refusal: for rows of which nothing says to which elements they belong, as they move with none."""
    own = candidate.latents
    for name in own.factors:
        sizes = zip(reversed(candidate.first.sites[name].batch_shape), reversed(geometry.layout), strict=False)
        fits = all(size in (1, d) or d == 1 for size, d in sizes)
        if not fits and not reads[name]:
            latents = ", ".join(repr(latent) for latent in own.names)
            raise Refusal(
                name,
                f"it is written with {latents}, but its location moves with none of them: what multiplies them is 0 in "
                "every row.",
                "leave the effect out, or give it a covariate that varies.",
            )


def _cells(candidate: Candidate) -> int:
    """Of the largest site at one value of the latents."""
    sites = (candidate.first.sites[name] for name in candidate.latents.factors)
    return max(torch.Size((*site.batch_shape, *site.fn.event_shape)).numel() for site in sites)


def one_family(candidate: Candidate, columns: Sequence[Column], reads: Reads) -> tuple[Geometry, tuple[Reading, ...]]:
    """The geometry of a set of latents that all stand in A, and what its factors read.

    :raises Refusal: if a row reads several elements.
    """
    if columns[0].element is not None or not _single(columns, reads):
        raise Refusal(
            candidate.latents.factors[-1],
            f"a row reads several elements of the latent '{columns[0].site}', whose posterior then does not factorise.",
            "let every row read one element, or use algorithm='svi' with a guide for the latent.",
        )
    geometry = _geometry(candidate, columns, [])
    return geometry, tuple(_reading(candidate, name, reads[name], geometry) for name in candidate.latents.factors)


def _families(candidate: Candidate, columns: Sequence[Column]) -> dict[tuple[str, ...], list[Column]]:
    """Columns by the plates of their latents, the family with most elements first."""
    found: dict[tuple[str, ...], list[Column]] = {}
    for column in columns:
        site = candidate.first.sites[column.site]
        key = tuple(plate.name for plate in site.plates if plate.size > 1) if column.element is None else ()
        found.setdefault(key, []).append(column)

    def elements(key: tuple[str, ...]) -> int:
        return max((candidate.latents.shapes[c.site][0].numel() if c.element is None else 1) for c in found[key])

    return {key: found[key] for key in sorted(found, key=lambda key: (-elements(key), key))}


def _single(family: Sequence[Column], reads: Reads) -> bool:
    """Every row reads one element of the family, the same in all of its columns."""
    for own in reads.values():
        indices = [own[c] for c in family if c in own]
        if any(not _compatible(indices[0], other) for other in indices[1:]):
            return False
    return True


def _compatible(a: Index, b: Index) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | (a < 0) | (b < 0)).all())


def _geometry(candidate: Candidate, in_a: Sequence[Column], in_b: Sequence[Column]) -> Geometry:
    m = -candidate.dim
    layout: tuple[int, ...] = (1,) * m
    if in_a[0].element is None:
        batch = candidate.latents.shapes[in_a[0].site][0]
        layout = (1,) * (m - len(batch)) + tuple(batch)
    offsets, total = {}, 0
    for column in in_b:
        offsets[column] = total
        total += candidate.latents.shapes[column.site][0].numel() if column.element is None else 1
    return Geometry(layout, tuple(in_a), offsets, total)


def _reading(candidate: Candidate, name: str, own: Mapping[Column, Index], geometry: Geometry) -> Reading:
    a = [c for c in geometry.columns_a if c in own]
    b = [c for c in own if c in geometry.offsets_b]
    index: Index = None
    for column in a:
        found = own[column]
        if found is not None:
            index = found if index is None else torch.maximum(index, found)
    entries: Tensor | None = None
    if b:
        m = len(geometry.layout)
        parts = []
        for column in b:
            offset, found = geometry.offsets_b[column], own[column]
            if column.element is not None:
                found = torch.zeros((1,) * m, dtype=torch.long)
            elif found is None:
                batch = candidate.latents.shapes[column.site][0]
                found = torch.arange(batch.numel()).reshape((1,) * (m - len(batch)) + tuple(batch))
            parts.append(found.clamp(min=0) + offset)
        entries = torch.stack(torch.broadcast_tensors(*parts), -1)
    positions = torch.tensor([geometry.columns_a.index(c) for c in a], dtype=torch.long)
    return Reading(name, (*a, *b), len(a), positions, index, entries)


def plate_symbols(
    candidate: Candidate, geometry: Geometry, in_a: Sequence[Column], made: Sequence[Reading]
) -> tuple[dict[int, str], frozenset[str]]:
    """Names of the layout's dims, and the plates over which the evidence is a sum of terms."""
    site = candidate.first.sites[in_a[0].site]
    symbols = dict(candidate.symbols)
    sites = [candidate.first.sites[name] for name in candidate.latents.factors]
    read = {d for s in sites for d in s.symbols if d < candidate.dim}
    apart = geometry.num_b == 0 and in_a[0].element is None
    if apart:
        symbols.update({p.dim: site.symbols[p.dim] for p in site.plates if p.size > 1})
        if any(r.index is not None and bool((r.index < 0).any()) for r in made):
            apart = False  # rows that read no element belong to none
    sibling = any(r.index is not None for r in made)
    meets = {s.symbols[d] for s in sites for d in s.symbols if d < candidate.dim}
    owners = [s for s in candidate.first.sites.values() if s.symbol in meets]
    own = {p.name for p in site.plates}
    elsewhere = any(p.size > 1 and p.name not in own for owner in owners for p in owner.plates)
    met = elsewhere or (geometry.elements > 1 and (geometry.num_b or sibling or not apart))
    indices = {r.site: r.index for r in made}
    known = (state_of_element(candidate, geometry.layout, indices, own) for own in owners)
    if read and met and not (apart and all(known)):
        states = ", ".join(sorted(s.name for s in sites if any(d < candidate.dim for d in s.symbols)))
        raise Refusal(
            candidate.latents.names[0],
            f"its posterior depends on the states of discrete latents in other plates (read by {states}): exact "
            "elimination would be exponential in the number of elements.",
            f"let the discrete latent share the plate of '{candidate.latents.names[0]}', or use algorithm='svi'.",
        )
    return symbols, frozenset(s for d, s in symbols.items() if d > candidate.dim) if apart else frozenset()


def _words(
    candidate: Candidate, geometry: Geometry, in_a: Sequence[Column], in_b: Sequence[Column], needed: int
) -> tuple[str, str]:
    names = ", ".join(dict.fromkeys(c.site for c in in_a))
    k, n = len(geometry.columns_a), geometry.elements
    text = f"normal sites, affine in {names}: {n} blocks of {k} x {k}" if n > 1 else f"one block of {k} x {k}"
    if in_b:
        others = ", ".join(dict.fromkeys(c.site for c in in_b))
        text += f", coupled through {geometry.num_b} entries of {others} (dense Cholesky)"
    return text, f"{needed / 2**20:.3g} MiB"
