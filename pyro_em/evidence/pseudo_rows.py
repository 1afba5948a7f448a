"""A few rows with the mean and covariance of many: the corners of a simplex, put where the data are.

    x_s = mean + F u_s / √N,     F Fᵀ = Σ_n (x_n - mean)(x_n - mean)ᵀ,     Σ_s u_s u_sᵀ = (Q + 1) I

Every row is read once. Letters: N rows, Q cells of a row.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # its parts are imported when they are used first
import torch
from torch import Tensor

from pyro_em.evidence.blocks import simplex

CHUNK = 1024  # rows, which stay in the cache of a processor
BESIDE = 16  # rows that are summed as one long row: vectors of few cells are added slowly
LOOK = 1000  # rows that say where the others are
NEAR = 4.0  # squared mean, in variances, up to which it need not be taken off


def pseudo_rows(parts: list[Tensor], weight: Tensor | None = None) -> Tensor | None:
    """(Q + 1, Q) rows with the mean and covariance of the rows (N, Q), given in parts; None if these are not finite.

    :param weight: how often each row counts, (N,).

    >>> pseudo_rows([torch.tensor([[1.0], [3.0], [5.0]], dtype=torch.float64)]).var(0, correction=0)
    tensor([2.6667], dtype=torch.float64)
    """
    count, step = len(parts[0]), max(1, len(parts[0]) // LOOK)
    total = float(count if weight is None else weight.sum())
    if weight is None:
        few = torch.cat([part[::step] for part in parts], -1)
        center = few.mean(0)
        # Of rows around 0 sums of squares lose nothing; others are shifted to where they are, which need not be exact.
        shifted = len(parts) > 1 or not bool((center.square() <= NEAR / (1 + NEAR) * few.square().mean(0)).all())
        center = center if shifted else torch.zeros_like(center)
    else:  # a few of the rows may be all that counts
        center, shifted = torch.cat([(weight @ part) / total for part in parts]), True
    size = len(center)
    scatter, rest = _moments(parts, center if shifted else None, weight)
    if not (bool(rest.isfinite().all()) and bool(scatter.isfinite().all())):
        return None
    rest /= total  # what is left of the mean
    scatter -= total * torch.outer(rest, rest)
    root, failed = torch.linalg.cholesky_ex(scatter)
    if bool(failed):  # cells that are constant, or combinations of others
        values, vectors = torch.linalg.eigh(scatter)
        root = vectors * values.clamp(min=0).sqrt()
    if not bool(root.isfinite().all()):
        return None
    return center + rest + simplex(size) @ root.mT / math.sqrt(total)


def _moments(parts: list[Tensor], center: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ (Q, Q) and Σ x of rows less a center, chunk by chunk: each is read once, and is still in the cache when
    its columns are summed.

    BLAS adds to what is there, and of a matrix that meets itself makes one triangle, which is half of the work.
    """
    count, size = len(parts[0]), sum(part.shape[1] for part in parts)
    scatter, rest = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    buffer = None if center is None else torch.empty(min(CHUNK, count), size, dtype=torch.float64)

    def rows(begin: int) -> Tensor:
        if buffer is None or center is None:
            return parts[0][begin : begin + CHUNK]
        own = buffer[: min(CHUNK, count - begin)]
        torch.cat([part[begin : begin + CHUNK] for part in parts], -1, out=own)
        return own.sub_(center)

    if weight is not None or scatter.device.type != "cpu":
        for begin in range(0, count, CHUNK):
            block = rows(begin)
            heavy = block if weight is None else block * weight[begin : begin + CHUNK].unsqueeze(-1)
            scatter += heavy.mT @ block
            rest += heavy.sum(0)
        return scatter, rest
    first, one, upper = parts[0].numpy(), np.ones(CHUNK), np.zeros((size, size), order="F")
    sums = {width: np.zeros(width * size) for width in (1, BESIDE)}  # of so many rows beside each other
    add_squares, add_product = scipy.linalg.blas.dsyrk, scipy.linalg.blas.dgemv
    for begin in range(0, count, CHUNK):
        own = first[begin : begin + CHUNK] if buffer is None else rows(begin).numpy()
        upper = add_squares(1.0, own.T, beta=1.0, c=upper, overwrite_c=True)
        width = BESIDE if own.flags.c_contiguous and not len(own) % BESIDE else 1
        own = own if width == 1 else own.reshape(-1, width * size)
        sums[width] = add_product(1.0, own.T, one[: len(own)], beta=1.0, y=sums[width], overwrite_y=True)
    total = sums[1] + sums[BESIDE].reshape(BESIDE, size).sum(0)
    return torch.from_numpy(np.triu(upper) + np.triu(upper, 1).T), torch.from_numpy(total)
