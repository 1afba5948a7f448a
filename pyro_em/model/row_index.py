"""Data that index a parameter or a latent out of range (`b[group]`, `z[group]`): the row is named.

Torch says which index it met, on a processor only, and not where. Indices below 0 count from the end where Python lets
them; whether they matter is another question (below_zero.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.ops.provenance import ProvenanceTensor, extract_provenance
from torch import Tensor

from pyro_em.errors import InputError

BY_DIM = {"index_select", "gather", "take_along_dim"}


def check_range(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise `InputError` if a call of torch indexes its first argument, which has provenance, by data out of range."""
    name = getattr(function, "__name__", "")
    if name != "__getitem__" and name not in BY_DIM:
        return
    value: Any
    value, names = extract_provenance(args[0])
    parts = _by_position(value, args[1]) if name == "__getitem__" else _by_dim(value, *args[1:], **kwargs)
    for index, size, least in parts:
        bad = (index < least) | (index >= size)
        if bool(bad.any()):
            rows = bad.reshape(len(bad), -1).any(-1).nonzero().reshape(-1).tolist()
            more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
            raise InputError(
                f"What follows from {', '.join(map(repr, sorted(names)))} has {size} elements, 0 to {size - 1}, and is "
                f"indexed by {int(index[bad][0])} in row {rows[0]}{more} of the index. Groups count from 0; the size "
                "of their plate is the largest number plus one."
            )


def _by_position(value: Tensor, index: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Index tensors of `value[index]`, with the size of the dim of each and the least index that it may have."""
    parts = index if isinstance(index, tuple) else (index,)
    taken = [0 if x is None or x is Ellipsis else x.dim() if _is_mask(x) else 1 for x in parts]
    place = 0
    for x, count in zip(parts, taken, strict=True):
        if x is Ellipsis:
            place += value.dim() - sum(taken)
        elif _is_rows(x) and place < value.dim():
            # (Steps of a loop compare as one number.)
            yield x.as_subclass(Tensor), value.shape[place], -value.shape[place]
        place += count


def _by_dim(value: Tensor, dim: Any = None, index: Any = None, **_: Any) -> Iterator[tuple[Tensor, int, int]]:
    """The index of `index_select`, `gather`, and (dim last) `take_along_dim`."""
    if isinstance(dim, Tensor):
        dim, index = index, dim
    if isinstance(dim, int) and _is_rows(index) and value.dim():
        yield index.as_subclass(Tensor), value.shape[dim], 0


def _is_rows(x: Any) -> bool:
    plain = isinstance(x, Tensor) and not isinstance(x, ProvenanceTensor) and not _is_mask(x)
    return plain and x.dim() > 0 and x.numel() > 0


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)
