"""Cholesky factors L of Σ = LLᵀ and their inverses, of matrices as one list (n, D, D).

Views of one matrix that differ in dims of size 1 (a parameter, the argument that takes it) are the same list, so that
a recording (tape/) factorises each matrix once, whoever asks. Shapes: (..., D, D) in and out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky(matrix: Tensor) -> Tensor:
    """L, lower triangular.

    :raises torch.linalg.LinAlgError: at a matrix that is not positive definite.

    >>> cholesky(4 * torch.eye(2).reshape(1, 1, 2, 2)).squeeze()
    tensor([[2., 0.],
            [0., 2.]])
    """
    return torch.linalg.cholesky(_listed(matrix)).reshape(matrix.shape)


def inverse(factor: Tensor) -> Tensor:
    """L⁻¹ of a lower triangular L, so that L⁻ᵀL⁻¹ = Σ⁻¹.

    >>> inverse(2 * torch.eye(2))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    own = _listed(factor)
    identity = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device).expand_as(own)
    return torch.linalg.solve_triangular(own, identity, upper=False).reshape(factor.shape)


def _listed(matrix: Tensor) -> Tensor:
    return matrix.reshape(-1, *matrix.shape[-2:])
