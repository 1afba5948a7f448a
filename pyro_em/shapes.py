"""Shapes that broadcast, for plain integers, and positions within a shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_TORCH_BROADCAST_SHAPES = torch.broadcast_shapes


@lru_cache(maxsize=1024)
def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """`torch.broadcast_shapes`, which takes longer than the arithmetic of a small site and imports sympy."""
    rank = max(map(len, shapes), default=0)
    sizes = []
    for dim in range(-rank, 0):
        larger = {shape[dim] for shape in shapes if len(shape) >= -dim and shape[dim] != 1}
        if len(larger) > 1:
            raise ValueError(f"Shapes {', '.join(str(tuple(shape)) for shape in shapes)} do not broadcast.")
        sizes.append(larger.pop() if larger else 1)
    return torch.Size(sizes)


def _broadcast_shapes(*shapes: Any) -> torch.Size:
    """`torch.broadcast_shapes` for plain integers; what it would refuse, it refuses itself."""
    try:
        return broadcast_shapes(*(torch.Size((s,) if isinstance(s, int) else s) for s in shapes))
    except ValueError:
        return _TORCH_BROADCAST_SHAPES(*shapes)


@contextlib.contextmanager
def quick_shapes() -> Iterator[None]:
    """Within this context `torch.broadcast_shapes`, which MultivariateNormal calls, knows integers only.

    torch's own goes through symbolic shapes: it takes longer than the arithmetic of a small site, and a third of a
    second to import at its first call. Both give the same (tests/test_shapes.py).
    """
    before = torch.broadcast_shapes
    torch.broadcast_shapes = _broadcast_shapes
    try:
        yield
    finally:
        torch.broadcast_shapes = before


def places(mask: Tensor) -> Tensor:
    """Flat positions where a mask holds. Those of a full one do not depend on its values: that can be recorded."""
    if bool(mask.all()):
        return torch.arange(mask.numel(), device=mask.device)
    return mask.flatten().nonzero().squeeze(-1)
