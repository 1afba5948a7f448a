"""What values in one run of a model were made of: tensors that carry the names of parameters and sites.

    names(f(x, y, ...)) = names(x) ∪ names(y) ∪ ...        for every function f of torch

These are Pyro's tensors with provenance (`pyro.ops.provenance`, after Wingate et al., 2011), read and taken off by its
functions. Pyro flattens and rebuilds all arguments of an operation twice, with a dispatch by type for each; here they
are walked through once, which takes a third less time in a first run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from pyro.ops.provenance import ProvenanceTensor, extract_provenance, track_provenance
from torch import Tensor

from pyro_em.model.row_index import check_range

PLAIN = frozenset((Tensor, torch.nn.Parameter, int, float, bool, str, type(None), torch.Size, torch.dtype, slice))
INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64})

_met: ContextVar[set[str] | None] = ContextVar("_met", default=None)


@contextlib.contextmanager
def meeting_below_zero() -> Iterator[set[str]]:
    """Gives the names of what is indexed by data below 0 within the context (see below_zero.py)."""
    found: set[str] = set()
    token = _met.set(found)
    try:
        yield found
    finally:
        _met.reset(token)


class _Traced(ProvenanceTensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names: set[str] = set()
        met = _met.get() if func is Tensor.__getitem__ else None
        if met is not None and has_below_zero(args[1]):
            met.update(extract_provenance(args[0])[1])
        if isinstance(args[0] if args else None, ProvenanceTensor):
            check_range(func, args, kwargs or {})
        found = func(*_taken_off(args, names), **_taken_off(kwargs or {}, names))
        return _with(found, frozenset(names))


def has_below_zero(index: Any) -> bool:
    """Whether an index holds a tensor of integers, one for each of several rows, some of them below 0."""
    return any(counts_from_end(part) for part in (index if isinstance(index, tuple) else (index,)))


def counts_from_end(part: Any) -> bool:
    """The same of a part of an index; a latent (its state less 1) is none of the data's."""
    rows = isinstance(part, Tensor) and part.dtype in INTEGERS and part.dim() > 0
    return rows and not isinstance(part, ProvenanceTensor) and bool((part.as_subclass(Tensor) < 0).any())


def traced(value: Tensor, name: str) -> Tensor:
    """The value, of which all that follows from it will have the name.

    >>> from pyro.ops.provenance import get_provenance
    >>> sorted(get_provenance(traced(torch.ones(2), "a") * traced(torch.zeros(2), "b")))
    ['a', 'b']
    """
    return _with(value, frozenset({name}))


def _taken_off(x: Any, names: set[str]) -> Any:
    """The same without names, which are added to a set."""
    kind = type(x)
    if kind in PLAIN:
        return x
    if kind is tuple or kind is list:
        return kind([_taken_off(y, names) for y in x])
    if kind is dict:
        return {key: _taken_off(y, names) for key, y in x.items()}
    value, own = extract_provenance(x)
    names.update(own)
    return value


def _with(x: Any, names: frozenset[str]) -> Any:
    kind = type(x)
    if kind is Tensor or kind is torch.nn.Parameter:
        return _Traced(x, names)
    if kind in PLAIN or not names:
        return x
    return kind([_with(y, names) for y in x]) if kind is tuple or kind is list else track_provenance(x, names)
