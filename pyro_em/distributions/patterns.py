"""Rows grouped by which of their cells are missing, and the algebra of normal vectors that the groups share.

With o the observed cells of a row and d = x − μ there and 0 elsewhere, let S be Σ with the rows and columns of
missing cells replaced by those of the identity, and S = LLᵀ. Then

    (x_o − μ_o)ᵀ Σ_oo⁻¹ (x_o − μ_o) = |L⁻¹d|²,      log|Σ_oo| = 2 Σ log L_ii
    E[x | x_o] = μ + Σ S⁻¹d,      cov[x | x_o] = (Σ − Σ P S⁻¹ P Σ) on the missing cells, P the observed ones

so that rows of any pattern are one batch, and one Cholesky factor serves all rows of a pattern.

Shapes: N rows, G patterns, D cells; O other leading dims (components), which all arguments may have or lack.
Assumes that missing cells are marked NaN. Nothing here depends on how Σ was given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
MAX_BITS = 62  # cells whose pattern fits into one integer
SHARED = 8  # rows a pattern, on average, from which a loop over patterns beats a table for every row


@dataclass(frozen=True, eq=False)
class Patterns:
    """`observed` (G, D) are the patterns, `index` (N,) says which one each row has."""

    index: Tensor
    observed: Tensor

    @classmethod
    def of(cls, missing: Tensor, *, grouped: bool) -> Patterns:
        """Patterns of rows (N, D); every row is one of its own if not `grouped`."""
        if not grouped:
            return cls(torch.arange(len(missing)), ~missing)
        cells = missing.shape[-1]
        if cells > MAX_BITS:
            kinds, index = torch.unique(missing, dim=0, return_inverse=True)
            return cls(index, ~kinds)
        bits = 2 ** torch.arange(cells)
        codes, index = torch.unique((missing * bits).sum(-1), return_inverse=True)
        return cls(index, (codes.unsqueeze(-1) & bits) == 0)

    def apply(self, table: Tensor, vectors: Tensor) -> Tensor:
        """Every row's matrix times its vector: (O, G, D, D), (O, N, D) -> (O, N, D)."""
        groups, rows = len(self.observed), len(self.index)
        if groups * SHARED > rows:
            return (self.rows(table, 2) @ vectors.unsqueeze(-1)).squeeze(-1)
        order = self.index.argsort(stable=True)
        parts = vectors.index_select(-2, order).split(torch.bincount(self.index, minlength=groups).tolist(), -2)
        found = [part @ table[..., g, :, :].mT for g, part in enumerate(parts)]
        lead = torch.broadcast_shapes(*(f.shape[:-2] for f in found))
        return torch.cat([f.expand(*lead, *f.shape[-2:]) for f in found], -2).index_select(-2, order.argsort())

    def rows(self, table: Tensor, event_dim: int) -> Tensor:
        """A table over patterns (O, G) + event as one over rows (O, N) + event."""
        return table.index_select(table.dim() - event_dim - 1, self.index)


@dataclass(frozen=True, eq=False)
class Conditional:
    """Rows of a normal vector given their observed cells, for Σ that all rows of a pattern share.

    `mean` (O, N, D) and `covariance` (O, G, D, D) are of the whole vector: observed cells have their own value and
    covariance 0.
    """

    mean: Tensor
    covariance: Tensor


def _factors(covariance: Tensor, observed: Tensor) -> Tensor:
    """L of every pattern, (O, G, D, D), from Σ (O, G or 1, D, D)."""
    both = observed.unsqueeze(-1) & observed.unsqueeze(-2)
    eye = torch.eye(observed.shape[-1], dtype=covariance.dtype)
    return torch.linalg.cholesky(torch.where(both, covariance, eye))


def whitened(x: Tensor, loc: Tensor, covariance: Tensor, patterns: Patterns) -> tuple[Tensor, Tensor]:
    """Residuals w = L⁻¹d (O, N, D), 0 in missing cells, and c (O, N) with log p(x_o) = c − ½|w|².

    :param x: (N, D), NaN where missing.
    :param loc: (O, N or 1, D).
    :param covariance: (O, G or 1, D, D).
    """
    observed = patterns.observed
    lower = _factors(covariance, observed)
    eye = torch.eye(observed.shape[-1], dtype=covariance.dtype).expand_as(lower)
    white = patterns.apply(torch.linalg.solve_triangular(lower, eye, upper=False), _deviation(x, loc))
    constant = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * LOG_2PI * observed.sum(-1)
    return white, -patterns.rows(constant, 0)


def log_density(x: Tensor, loc: Tensor, covariance: Tensor, patterns: Patterns) -> Tensor:
    """log p(x_o) of every row, (O, N); 0 for a row without an observed cell. Arguments as in `whitened`."""
    white, log_norm = whitened(x, loc, covariance, patterns)
    return log_norm - 0.5 * (white * white).sum(-1)


def conditional(x: Tensor, loc: Tensor, covariance: Tensor, patterns: Patterns) -> Conditional:
    """Mean and covariance of every row given its observed cells; arguments as in `log_density`."""
    observed = patterns.observed
    inverse = torch.cholesky_inverse(_factors(covariance, observed))
    gone = ~observed
    # Σ_mo Σ_oo⁻¹ on (missing, observed) cells, zero elsewhere.
    gain = (covariance * gone.unsqueeze(-1) * observed.unsqueeze(-2)) @ inverse
    gain = gain * observed.unsqueeze(-2)
    deviation = _deviation(x, loc)
    mean = torch.where(x.isnan(), loc + patterns.apply(gain, deviation), x)
    both = gone.unsqueeze(-1) & gone.unsqueeze(-2)
    spread = torch.where(both, covariance - gain @ covariance, torch.zeros((), dtype=covariance.dtype))
    return Conditional(mean, (spread + spread.mT) / 2)


def _deviation(x: Tensor, loc: Tensor) -> Tensor:
    missing = x.isnan()
    return torch.where(missing, torch.zeros((), dtype=x.dtype), torch.where(missing, loc.detach(), x) - loc)
