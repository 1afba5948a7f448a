"""Equal rows of discrete data are one row with a count: a latent class model has few distinct patterns."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyro_em.e_step.features import Block

WORTH = 0.8  # collapse only if that share of the rows, or less, is distinct


def collapse(
    blocks: list[Block], weight: Tensor | None, base: Tensor | None, num_rows: int
) -> tuple[list[Block], Tensor | None, Tensor | None, int]:
    """Equal rows of discrete data become one row with their total weight, where that pays."""
    codes = [block.codes for block in blocks]
    if num_rows < 64 or not codes or any(code is None for code in codes):
        return blocks, weight, base, num_rows
    table = torch.cat([code for code in codes if code is not None])
    table = table - table.amin(1, keepdim=True)
    radix = (table.amax(1) + 1).tolist()
    if math.prod(radix) >= 2**62:
        return blocks, weight, base, num_rows
    number = torch.zeros(num_rows, dtype=torch.long)
    for row, size in zip(table, radix, strict=True):
        number = number * size + row
    _, first, inverse = np.unique(number.cpu().numpy(), return_index=True, return_inverse=True)
    if len(first) > WORTH * num_rows:
        return blocks, weight, base, num_rows
    ones = torch.ones(num_rows, dtype=torch.float64) if weight is None else weight
    total = torch.zeros(len(first), dtype=torch.float64).index_add_(0, torch.as_tensor(inverse.reshape(-1)), ones)
    columns = torch.as_tensor(first)
    return [b.take(columns) for b in blocks], total, None if base is None else base[columns], len(first)
