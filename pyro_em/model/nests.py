"""Plates whose elements belong to elements of other plates by an index that the model applies to a latent.

In long format the rows lie in a plate of their own and read a latent of another one by its number, `z[group]`. The rows
are then nested in the groups as if they stood inside: a sum over the rows of a term is one sum for each group,

    out[.., g] = Σ_{n: group[n] = g} term[.., n],         and the other way round      at rows: x[.., group[n]].

`Nests[child][parent]` (n,) is the element of plate `parent` that each element of plate `child` belongs to, both plates
by their symbols in packed tensors (compat.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_em.model import compat
from pyro_em.model.packing import align

Nests = Mapping[str, Mapping[str, Tensor]]


def closure(plates: Iterable[str], nests: Nests) -> frozenset[str]:
    """The plates and all those that they are nested in."""
    found, open_ones = set(plates), list(plates)
    while open_ones:
        for parent in nests.get(open_ones.pop(), {}):
            if parent not in found:
                found.add(parent)
                open_ones.append(parent)
    return frozenset(found)


def direct(child: str, parents: Iterable[str], nests: Nests) -> list[str]:
    """Those of the parents of a plate that no other one of them is nested in already."""
    own = [p for p in nests[child] if p in set(parents)]
    return [p for p in own if not any(p in nests.get(q, {}) for q in own)]


def sum_over(term: Tensor, frames: Iterable[str], nests: Nests, sizes: Mapping[str, int]) -> Tensor:
    """A packed term summed over the plates `frames`; those nested in other plates are summed into these."""
    frames = set(frames)
    for child in [c for c in nests if c in frames]:
        own = set(nests[child]) - frames
        parents = [p for p in direct(child, own, nests) if sizes[p] > 1]
        if parents:
            term = _into(term, child, parents, nests[child], sizes)
    dims = compat.dims_of(term)
    gone = [i for i, d in enumerate(dims) if d in frames]
    return compat.with_dims(term.sum(gone), "".join(d for d in dims if d not in frames)) if gone else term


def _joint(parents: list[str], index: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Number of the element of all parents together, the last one counting fastest."""
    total = torch.zeros_like(index[parents[0]])
    for p in parents:
        total = total * sizes[p] + index[p]
    return total


def _into(
    term: Tensor, child: str, parents: list[str], index: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> Tensor:
    element = _joint(parents, index, sizes)
    rest = "".join(d for d in compat.dims_of(term) if d != child)
    rows = align(term, rest + child)
    rows = rows.expand(*rows.shape[:-1], len(element))
    count = torch.Size(sizes[p] for p in parents)
    out = rows.new_zeros(*rows.shape[:-1], count.numel()).index_add(-1, element, rows)
    return compat.with_dims(out.reshape(*rows.shape[:-1], *count), rest + "".join(parents))


def at_rows(x: Tensor, plates: Iterable[str], nests: Nests, sizes: Mapping[str, int]) -> Tensor:
    """A packed tensor at the elements of `plates`: dims of plates that these are nested in become theirs."""
    plates = set(plates)
    for child in [c for c in nests if c in plates]:
        parents = [p for p in nests[child] if p in compat.dims_of(x) and p not in plates]
        if not parents:
            continue
        rest = "".join(d for d in compat.dims_of(x) if d not in parents)
        flat = align(x, rest + "".join(parents)).flatten(len(rest))
        x = compat.with_dims(flat.index_select(-1, _joint(parents, nests[child], sizes)), rest + child)
    return x
