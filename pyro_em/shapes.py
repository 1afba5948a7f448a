"""Shapes that broadcast, for plain integers, and positions within a shape."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


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


def places(mask: Tensor) -> Tensor:
    """Flat positions where a mask holds. Those of a full one do not depend on its values: that can be recorded."""
    if bool(mask.all()):
        return torch.arange(mask.numel(), device=mask.device)
    return mask.flatten().nonzero().squeeze(-1)
