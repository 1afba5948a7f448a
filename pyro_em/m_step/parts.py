"""A linear system that falls into parts: which entries are coupled, and where each part stands when they lie in a row.

Letters: P entries, B parts of n entries each.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def parts_of(coupling: Tensor, size: int) -> list[Tensor]:
    """Connected entries among `size` ones, of pairs (2, n) that are coupled: blocks of each size, (B, size of each).

    >>> parts_of(torch.tensor([[0, 1], [2, 1]]), 3)
    [tensor([[1]]), tensor([[0, 2]])]
    """
    one, other = coupling.cpu().numpy()
    labels, before = np.arange(size), None
    while before is None or (labels != before).any():  # to import scipy.sparse takes longer than a small fit
        before = labels.copy()
        np.minimum.at(labels, one, before[other])
        np.minimum.at(labels, other, before[one])
        labels = labels[labels]
    labels = np.unique(labels, return_inverse=True)[1]
    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    return [torch.tensor(order[np.repeat(counts == n, counts)].reshape(-1, n)) for n in np.unique(counts)]


def cells_of(parts: list[Tensor], size: int) -> list[Tensor]:
    """Where the entry (i, j) of a block stands among the cells of all blocks: rows[i] + columns[j].

    >>> cells_of([torch.tensor([[1]]), torch.tensor([[0, 2]])], 3)
    [tensor([1, 0, 3]), tensor([0, 0, 1])]
    """
    rows, columns, begin = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long), 0
    for part in parts:
        count, width = part.shape
        number = torch.arange(width).expand(count, width)
        rows[part] = begin + torch.arange(count).unsqueeze(1) * width**2 + number * width
        columns[part] = number
        begin += count * width**2
    return [rows, columns]
