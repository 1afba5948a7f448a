"""Which elements of a latent have data at all.

Barren latents. A latent none of whose descendants is observed (its data are masked) sums to one and
adds nothing to log Z. Its expected counts are left out too: a row without data must not dilute the
M-step (it would change the iterates, though not the limit).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.model import compat
from pyro_em.model.packing import align
from pyro_em.model.trace import Run


def relevance_of(run: Run, packed: Mapping[str, Tensor], symbol_sites: Mapping[str, str]) -> dict[str, Tensor]:
    """For each latent with barren elements, a packed 0/1 tensor over its plates; absent = all relevant."""
    children: dict[str, list[str]] = {name: [] for name in symbol_sites.values()}
    for name in run.sites:
        for symbol in set(compat.dims_of(packed[name])) & set(symbol_sites):
            if symbol_sites[symbol] != name:
                children[symbol_sites[symbol]].append(name)
    relevant: dict[str, Tensor | None] = {}  # None stands for all relevant
    for name in reversed(list(run.sites)):
        site = run.sites[name]
        if not site.enumerated:
            mask = None if site.mask is None else compat.pack(site.mask, site.symbols)
            relevant[name] = None if mask is None or bool(mask.all()) else mask
            continue
        if site.symbol is None or site.symbol not in compat.dims_of(packed[name]):
            relevant[name] = None  # a single state has no dim, so that its children cannot be seen
            continue
        flags: list[Tensor] | None = []
        for child in children.get(name, []):
            flag = relevant[child]
            if flag is None or flags is None:
                flags = None
                break
            gone = [i for i, d in enumerate(compat.dims_of(flag)) if d not in site.plate_dims]
            kept = "".join(d for d in compat.dims_of(flag) if d in site.plate_dims)
            flags.append(compat.with_dims(flag.amax(gone) if gone else flag, kept))
        if flags is None:
            relevant[name] = None
            continue
        total = compat.with_dims(torch.zeros((), dtype=torch.bool), "")
        for flag in flags:
            dims = "".join(dict.fromkeys(compat.dims_of(total) + compat.dims_of(flag)))
            total = compat.with_dims(align(total, dims) | align(flag, dims), dims)
        relevant[name] = total
    dtype = torch.get_default_dtype()
    return {
        name: compat.with_dims(flag.to(dtype), compat.dims_of(flag))
        for name, flag in relevant.items()
        if flag is not None and run.sites[name].enumerated
    }
