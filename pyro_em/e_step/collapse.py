"""Equal rows of discrete data are one row with a count: a latent class model has few distinct patterns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_em.e_step.features import Block

WORTH = 0.8  # collapse only if that share of the rows, or less, is distinct


def collapse(
    blocks: list[Block], weight: Tensor | None, base: Tensor | None, num_rows: int
) -> tuple[list[Block], Tensor | None, Tensor | None, int]:
    """Equal rows of discrete data become one row with their total weight, where that pays."""
    found = None if num_rows < 64 else distinct(blocks, num_rows, WORTH * num_rows)
    if found is None:
        return blocks, weight, base, num_rows
    first, number = found
    ones = torch.ones(num_rows, dtype=torch.float64) if weight is None else weight
    total = torch.zeros(len(first), dtype=torch.float64).index_add_(0, number, ones)
    return [b.take(first) for b in blocks], total, None if base is None else base[first], len(first)


def distinct(blocks: Sequence[Block], num_rows: int, most: float) -> tuple[Tensor, Tensor] | None:
    """The first of each kind of equal rows, and of every row the number of its kind.

    None where data are not discrete, or there are more kinds than `most`.
    """
    codes = [block.codes for block in blocks if block.codes is not None]
    if not codes or len(codes) < len(blocks):
        return None
    table = torch.cat(codes)
    table = table - table.amin(1, keepdim=True)
    radix = (table.amax(1) + 1).tolist()
    if math.prod(radix) >= 2**62:  # a row's code is one number of 64 bits
        return None
    number = torch.zeros(num_rows, dtype=torch.long)
    for row, size in zip(table, radix, strict=True):
        number = number * size + row
    _, first, inverse = np.unique(number.cpu().numpy(), return_index=True, return_inverse=True)
    return None if len(first) > most else (torch.as_tensor(first), torch.as_tensor(inverse.reshape(-1)))
