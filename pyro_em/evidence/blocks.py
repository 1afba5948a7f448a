"""Gaussian systems of many small blocks that share a few common unknowns.

The unknowns are z = (z_A, z_B): z_A has k entries in each element of a plate (independent of each other given
z_B), z_B has n_B entries in all. For the energy h·z - ½ zᵀJz

    J_AA[j] = L Lᵀ,   G = J_AA⁻¹ J_AB,   C = J_BB - Σ_j J_ABᵀ G   (Schur complement, a dense n_B x n_B matrix)

so the cost is that of one small Cholesky factor per element and one dense one. B is empty where the plates
factorise (factor analysis, one grouping factor); it holds the smaller grouping factors where they cross or nest.

Shapes: `layout` dims (states of discrete latents, one dim for atoms, plates) lead; then (k,), (k, k) or (k, n_B).
Layout dims along which nothing varies have size 1: a covariance shared by all elements is kept once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class System:
    """h and J; `linear_b`, `cross` and `common` are None where B is empty."""

    linear: Tensor
    precision: Tensor
    linear_b: Tensor | None = None
    cross: Tensor | None = None
    common: Tensor | None = None


@dataclass(frozen=True)
class Factored:
    """A system's factors: L of J_AA, and with B the gain G and the factor of C."""

    lower: Tensor
    gain: Tensor | None
    cross: Tensor | None
    lower_b: Tensor | None

    def solve(self, linear: Tensor, linear_b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """J⁻¹h, in its two parts."""
        own = _solve(self.lower, linear)
        if self.gain is None or self.cross is None or self.lower_b is None or linear_b is None:
            return own, None
        layout = tuple(range(linear.dim() - 1))
        reduced = linear_b - (self.cross.mT @ own.unsqueeze(-1)).squeeze(-1).sum(layout)
        z_b = _solve(self.lower_b, reduced)
        return own - (self.gain @ z_b.unsqueeze(-1)).squeeze(-1), z_b

    def log_det(self) -> tuple[Tensor, Tensor]:
        """log|J_AA[j]| over the layout, and log|C| (0 without B)."""
        own = 2 * self.lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if self.lower_b is None:
            return own, own.new_zeros(())
        return own, 2 * self.lower_b.diagonal().log().sum()

    def rounding(self, precision: Tensor) -> Tensor:
        """In units of machine precision, what rounding of J_AA may do to its log-determinants: Σ |J⁻¹| ∘ |J|.

        It is the number of unknowns where they are told apart well, and large where J is nearly singular.
        """
        if precision.shape[-1] == 1:
            return torch.ones_like(precision[..., 0, 0])
        return (torch.cholesky_inverse(self.lower).abs() * precision.abs()).sum((-2, -1))

    def covariance(self) -> tuple[Tensor, Tensor | None]:
        """Marginal covariances: of z_A in each element (k, k), and of z_B (n_B, n_B)."""
        own = torch.cholesky_inverse(self.lower)
        if self.gain is None or self.lower_b is None:
            return own, None
        common = torch.cholesky_inverse(self.lower_b)
        return own + self.gain @ common @ self.gain.mT, common

    def spread(self, standard: Tensor, standard_b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Deviations of z with the system's covariance, from standard normal (or moment-matched) numbers.

        :param standard: layout + (k,), may broadcast; with more leading dims for more draws.
        :param standard_b: (more,) + (n_B,).
        """
        own = _back_solve(self.lower, standard)
        if self.gain is None or self.lower_b is None or standard_b is None:
            return own, None
        common = _back_solve(self.lower_b, standard_b)
        # One product for all draws: broadcast, the gain would be copied for each.
        product = common @ self.gain.reshape(-1, common.shape[-1]).mT
        product = product.reshape(*common.shape[:-1], *self.gain.shape[:-1])
        while product.dim() > own.dim():  # draws stand in the first dim of the layout, where the gain has size 1
            product = product.squeeze(common.dim() - 1)
        return own - product, common


def least_pivot(system: System, factored: Factored) -> float:
    """The smallest squared pivot as a share of its diagonal entry: what the others leave of an unknown's precision."""
    pairs = [(factored.lower, system.precision)]
    if factored.lower_b is not None and system.common is not None:
        pairs.append((factored.lower_b, system.common))
    shares = [lower.diagonal(dim1=-2, dim2=-1) ** 2 / J.diagonal(dim1=-2, dim2=-1) for lower, J in pairs]
    return min(float(share.detach().min()) for share in shares)


def factor(system: System) -> Factored | None:
    """Cholesky factors, or None if the system is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(system.precision)
    if bool(failed.any()):
        return None
    if system.cross is None or system.common is None:
        return Factored(lower, None, None, None)
    shape = torch.broadcast_shapes(lower.shape[:-2], system.cross.shape[:-2])
    gain = torch.cholesky_solve(system.cross, lower.expand(*shape, *lower.shape[-2:]))
    # One product over all elements: a matrix for each of them would be as large as n_B of the system's own tables.
    size = gain.shape[-1]
    reduced = system.common - system.cross.expand(gain.shape).reshape(-1, size).mT @ gain.reshape(-1, size)
    lower_b, failed = torch.linalg.cholesky_ex((reduced + reduced.mT) / 2)
    return None if bool(failed.any()) else Factored(lower, gain, system.cross, lower_b)


def simplex(size: int) -> Tensor:
    """size + 1 equally weighted points with mean 0 and covariance I, shape (size + 1, size)."""
    basis = torch.cat([torch.ones(size + 1, 1, dtype=torch.float64), torch.eye(size + 1, size, dtype=torch.float64)], 1)
    q, _ = torch.linalg.qr(basis)
    return q[:, 1:] * math.sqrt(size + 1)


def _solve(lower: Tensor, linear: Tensor) -> Tensor:
    column = linear.unsqueeze(-1)
    if lower.dim() > 2 and lower.shape[:-2].numel() == 1 and linear.dim() > 2:
        # One factor for all elements: a single solve with many right hand sides.
        flat = lower.reshape(lower.shape[-2:])
        return torch.cholesky_solve(linear.reshape(-1, linear.shape[-1]).mT, flat).mT.reshape(linear.shape)
    lead = torch.broadcast_shapes(lower.shape[:-2], column.shape[:-2])
    return torch.cholesky_solve(
        column.expand(*lead, *column.shape[-2:]), lower.expand(*lead, *lower.shape[-2:])
    ).squeeze(-1)


def _back_solve(lower: Tensor, standard: Tensor) -> Tensor:
    """L⁻ᵀu."""
    column = standard.unsqueeze(-1)
    lead = torch.broadcast_shapes(lower.shape[:-2], column.shape[:-2])
    upper = lower.mT.expand(*lead, *lower.shape[-2:])
    return torch.linalg.solve_triangular(upper, column.expand(*lead, *column.shape[-2:]), upper=True).squeeze(-1)
