"""Arithmetic of packed tensors, whose dims are named by symbols (see compat.py)."""

from __future__ import annotations

from torch import Tensor

from pyro_em.model import compat


def multiply(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Product of two packed tensors over the union of their dims; None stands for one."""
    if a is None or b is None:
        return b if a is None else a
    dims = "".join(dict.fromkeys(compat.dims_of(a) + compat.dims_of(b)))
    return compat.with_dims(align(a, dims) * align(b, dims), dims)


def onto(weight: Tensor | None, dims: str) -> Tensor | None:
    """Sum a packed weight over dims that a factor does not have (it is constant along them)."""
    if weight is None:
        return None
    own = compat.dims_of(weight)
    gone = [i for i, d in enumerate(own) if d not in dims]
    return compat.with_dims(weight.sum(gone), "".join(d for d in own if d in dims)) if gone else weight


def align(x: Tensor, dims: str) -> Tensor:
    """A packed tensor permuted to `dims`, size 1 where it has no such dim."""
    own = compat.dims_of(x)
    x = x.permute([own.index(d) for d in dims if d in own])
    shape, sizes = [], iter(x.shape)
    for d in dims:
        shape.append(next(sizes) if d in own else 1)
    return x.reshape(shape)
