"""Steps of Newton's method for many small problems at once: the modes of all elements (node_sets.py).

    step = |H|⁻¹ g,     L Lᵀ = H⁻¹

with |H| of the absolute eigenvalues where some H is not positive definite, L along the axes of H, as the nodes of
evidence/quadrature.py have it. Letters: G elements, K columns; g (K, G), H (K, K, G).
"""

from __future__ import annotations

import torch
from torch import Tensor


def newton(g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Steps (K, G) along |H|⁻¹ g, and what they promise (G,)."""
    if len(g) == 1:
        size = h[0].abs().clamp(min=1e-10)
        step = g / size
        return step, (step * g).squeeze(0)
    matrix = h.movedim(-1, 0).expand(g.shape[1], -1, -1)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if not bool((failed != 0).any()):
        step = torch.cholesky_solve(g.mT.unsqueeze(-1), lower).squeeze(-1).mT
        return step, (step * g).sum(0)
    values, vectors = torch.linalg.eigh(matrix)
    size = values.abs().clamp(min=1e-10)
    rotated = (vectors.mT @ g.mT.unsqueeze(-1)).squeeze(-1)
    step = (vectors @ (rotated / size).unsqueeze(-1)).squeeze(-1)
    return step.mT, (rotated * rotated / size).sum(-1)


def root(h: Tensor) -> Tensor | None:
    """L (K, K, G) with L Lᵀ = H⁻¹, along the axes of H; None if some H is not positive definite."""
    if len(h) == 1:
        return h.rsqrt() if bool((h > 0).all()) else None
    values, vectors = torch.linalg.eigh(h.movedim(-1, 0))
    if bool((values <= 0).any()):
        return None
    return (vectors * values.clamp(min=1e-10).rsqrt().unsqueeze(-2)).movedim(0, -1)
