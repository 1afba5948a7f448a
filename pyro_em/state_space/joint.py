"""Density of the states and the data of a chain together, at given states.

    log p(x, y) = log N(x_0; m, P) + Σ_t log N(x_t; A x_{t-1} + b, Q) + Σ_t log N(y_t; C x_t + d, R)

Coordinates without noise (zero rows of a covariance: lagged states) are functions of the others and count nothing, as
do cells of y that are not seen. Shapes: see linear_gaussian.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.state_space.linear_gaussian import Chain, outer
from pyro_em.state_space.steps import LOG_2PI


def log_joint(chain: Chain, x: Tensor) -> Tensor:
    """At states x (S, T, D); shape (S,)."""

    def moved(matrix: Tensor, states: Tensor, offset: Tensor) -> Tensor:
        return (matrix @ states.unsqueeze(-1)).squeeze(-1) + offset

    seen = torch.ones((), dtype=torch.bool) if chain.seen is None else chain.seen
    residual = torch.where(seen, chain.y - moved(chain.C, x, chain.d), 0.0)
    observed = _log_normal(residual, chain.R, seen.expand(residual.shape))
    initial = _log_normal((x[:, 0] - chain.mean).unsqueeze(1), chain.covariance.unsqueeze(1), None)
    later = _log_normal(x[:, 1:] - moved(chain.A, x[:, :-1], chain.b), chain.Q, None)
    return initial.sum(1) + later.sum(1) + observed.sum(1)


def _log_normal(residual: Tensor, covariance: Tensor, seen: Tensor | None) -> Tensor:
    """Of the coordinates that are seen and have noise, dims (S, T)."""
    counted = covariance.diagonal(dim1=-2, dim2=-1) > 0
    counted = (counted if seen is None else counted & seen).to(covariance.dtype)
    square = covariance * outer(counted, counted) + torch.diag_embed(1 - counted)
    factor = torch.linalg.cholesky(square)
    z = torch.linalg.solve_triangular(factor, (residual * counted).unsqueeze(-1), upper=False).squeeze(-1)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (z * z).sum(-1) - log_det - 0.5 * LOG_2PI * counted.sum(-1)
