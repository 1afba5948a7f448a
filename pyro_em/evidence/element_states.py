"""Whether the discrete latent that a row meets is known from the element of the continuous one that it reads.

A mixture of mixed models in long format has y_n ~ N(a[z[g_n]] + b[g_n], s): row n reads element g_n of b and of z. The
evidence of element g is then a table over the states of one element of z, f(g) with f the same for all rows (the class
of the group, or of the school that the group lies in). Where rows of one element of b meet several elements of z, it
would be a table over the states of all of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.evidence.columns import Index
from pyro_em.evidence.elimination import Candidate
from pyro_em.model.trace import SiteRecord


def state_of_element(
    candidate: Candidate, layout: Sequence[int], indices: Mapping[str, Index], owner: SiteRecord
) -> bool:
    """Whether rows that read one element of the continuous latents read one element of the discrete latent `owner`.

    :param layout: sizes of the dims of the continuous latents' elements.
    :param indices: element that each row reads, by site; None for its own.
    """
    elements = torch.Size(layout).numel()
    known = torch.full((elements,), -1)
    for name, index in indices.items():
        site = candidate.first.sites[name]
        if owner.symbol not in {site.symbols[d] for d in site.symbols if d < candidate.dim}:
            continue
        read = candidate.maps.get(name, {}).get(owner.name)
        if index is None:
            index = torch.arange(elements).reshape(tuple(layout))
        state, element = torch.broadcast_tensors(_own(owner) if read is None else read, index)
        met = (state >= 0) & (element >= 0)
        state, element = state[met], element[met]
        before = known[element]
        if bool(((before >= 0) & (before != state)).any()):
            return False
        known[element] = state
        if not torch.equal(known[element], state):
            return False
    return True


def _own(owner: SiteRecord) -> Tensor:
    """Number of the element at each place of the latent's plates."""
    sizes = {p.dim: p.size for p in owner.plates}
    batch = [sizes.get(d, 1) for d in range(min([0, *sizes]), 0)]
    return torch.arange(torch.Size(batch).numel()).reshape(batch)
