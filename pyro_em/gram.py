"""Gram matrices of the same rows under several weightings: X diag(w_s) Xᵀ for every s.

    G_sij = Σ_n w_sn x_in x_jn

as one product of the weights (S, N) with the m (m + 1)/2 rows x_i x_j, which are formed chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.device import chunk_scale

CHUNK_BYTES = 4 * 2**20  # of products x_i x_j
MIN_STATES = 3  # fewer weightings than this are cheaper one by one


def gram_matrices(weight: Tensor, x: Tensor) -> Tensor:
    """X diag(w_s) Xᵀ for every row of weights: weight (S, N), x (m, N), result (S, m, m).

    >>> gram_matrices(torch.ones(1, 2, dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    tensor([[[5.]]], dtype=torch.float64)
    """
    states, size = weight.shape[0], x.shape[0]
    if states < MIN_STATES:
        return torch.stack([(x * w) @ x.mT for w in weight])
    i, j = torch.triu_indices(size, size)
    chunk = max(256, chunk_scale(x.device) * CHUNK_BYTES // (8 * len(i)))
    buffer = x.new_empty(len(i), min(chunk, x.shape[1]))
    total = x.new_zeros(states, len(i))
    for begin in range(0, x.shape[1], chunk):
        part = x[:, begin : begin + chunk]
        products, row = buffer[:, : part.shape[1]], 0
        for k in range(size):
            torch.mul(part[k:], part[k], out=products[row : row + size - k])
            row += size - k
        total.addmm_(weight[:, begin : begin + chunk], products.mT)
    full = x.new_empty(states, size, size)
    full[:, i, j] = total
    full[:, j, i] = total
    return full
