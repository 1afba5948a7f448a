"""v | s ~ N(M s + o, Σ) with latent parents s: expected log density, and its kernels in M, o and Σ.

Given E Σ over n of r, r rᵀ, r sᵀ, s, s sᵀ with r = v - M₀ s - o₀, and with δM = M - M₀, δo = o - o₀, W = Σ⁻¹:

    matrix       h = W (R_rs - δM S_ss - δo S_sᵀ),   Λ[(i,j),(k,l)] = W_ik S_ss,jl
    offset       h = W (R_r - δM S_s - n δo),        Λ = n W
    covariance   -½ n log|Σ| - ½ tr(B W),            B = E Σ (v - M s - o)(v - M s - o)ᵀ

A coordinate of v without noise (a zero on the diagonal of Σ) is deterministic: it has no density and counts
nothing, so entries of M and o that lead to it must be fixed.
Shapes: leading dims U; V dims of v, D of s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.numerics import symmetric
from pyro_em.kernels import Kernel, PowerKernel, QuadraticKernel, WishartKernel
from pyro_em.state_space.linear_gaussian import LinearMoments, outer

LOG_2PI = math.log(2 * math.pi)
NOISE = ("covariance_matrix", "scale_tril", "precision_matrix", "scale")


@dataclass(frozen=True)
class LinearSite:
    """Moments at (M₀, o₀), and the current arguments of the site."""

    moments: LinearMoments
    matrix0: Tensor  # U + (V, D)
    offset0: Tensor  # U + (V,)
    matrix: Tensor
    offset: Tensor
    noise: Mapping[str, Tensor]  # one of NOISE

    def moved(self) -> tuple[Tensor, Tensor, Tensor]:
        """E Σ of r, r rᵀ and r sᵀ for the residuals at the current arguments."""
        own = self.moments
        first, square, cross = own.residual, own.residual_squares, own.residual_parents
        if self.matrix is self.matrix0 and self.offset is self.offset0:  # nothing moved yet
            return first, square, cross
        if self.matrix is not self.matrix0:
            dM = self.matrix - self.matrix0
            half = cross @ dM.mT
            first = first - (dM @ own.parents.unsqueeze(-1)).squeeze(-1)
            cross = cross - dM @ own.parents_squares
            square = square - half - dM @ cross.mT
        if self.offset is not self.offset0:
            do, n = self.offset - self.offset0, own.count.unsqueeze(-1)
            square = square - outer(first, do) - outer(do, first) + n.unsqueeze(-1) * outer(do, do)
            cross = cross - outer(do, own.parents)
            first = first - n * do
        return first, symmetric(square), cross

    def expected_log_density(self) -> Tensor:
        """E Σ log p(v | s), shape U; differentiable in the current arguments."""
        _, square, _ = self.moved()
        covariance, real = _proper(noise_covariance(self.noise))
        factor = torch.linalg.cholesky(covariance)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        square = square * outer(real, real)
        trace = torch.cholesky_solve(square, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
        return -0.5 * (self.moments.count * (log_det + LOG_2PI * real.sum(-1)) + trace)

    def matrix_kernel(self, transposed: bool) -> QuadraticKernel:
        """Of all entries of M (of Mᵀ) in a row, event shape (V·D,)."""
        _, _, cross = self.moved()
        W = self._weight()
        h, S = W @ cross, self.moments.parents_squares
        M = self.matrix
        if transposed:
            h, M = h.mT, M.mT
            precision = S[..., :, None, :, None] * W[..., None, :, None, :]
        else:
            precision = W[..., :, None, :, None] * S[..., None, :, None, :]
        return QuadraticKernel(h.flatten(-2), precision.flatten(-2).flatten(-3, -2), M.flatten(-2), vector=True)

    def offset_kernel(self) -> QuadraticKernel:
        """Of the vector o."""
        first, _, _ = self.moved()
        W = self._weight()
        linear = (W @ first.unsqueeze(-1)).squeeze(-1)
        return QuadraticKernel(linear, self.moments.count[..., None, None] * W, self.offset, vector=True)

    def cross_precision(self, transposed: bool) -> Tensor:
        """-∂²Q between the entries of M (of Mᵀ) in a row and those of o."""
        W, s = self._weight(), self.moments.parents
        if transposed:
            return (s[..., :, None, None] * W[..., None, :, :]).flatten(-3, -2)
        return (W[..., :, None, :] * s[..., None, :, None]).flatten(-3, -2)

    def noise_kernel(self, argument: str, block: Tensor | None = None) -> Kernel:
        """Of a covariance, a precision (or the square of a Cholesky factor), or of a vector of scales.

        :param block: rows of a matrix that zeros separate from its others, if it is not of the whole.
        """
        _, square, _ = self.moved()
        square = square if block is None else square[..., block[:, None], block]
        count = self.moments.count
        if argument == "scale":
            half = square.diagonal(dim1=-2, dim2=-1).clamp(min=0) / 2
            return PowerKernel(-count.unsqueeze(-1), torch.zeros_like(half), half, exponent=2.0)
        return WishartKernel(count / 2, square, inverse=argument == "precision_matrix")

    def diagonal_noise_kernel(self, argument: str) -> PowerKernel:
        """Of the diagonal entries of a diagonal matrix argument."""
        _, square, _ = self.moved()
        count = self.moments.count.unsqueeze(-1)
        half = square.diagonal(dim1=-2, dim2=-1).clamp(min=0) / 2
        zero = torch.zeros_like(half)
        if argument == "covariance_matrix":
            return PowerKernel(-count / 2, zero, half)
        if argument == "scale_tril":
            return PowerKernel(-count, zero, half, exponent=2.0)
        return PowerKernel(count / 2, half, zero)

    def _weight(self) -> Tensor:
        covariance, real = _proper(noise_covariance(self.noise))
        return torch.cholesky_inverse(torch.linalg.cholesky(covariance)) * outer(real, real)


def noise_covariance(noise: Mapping[str, Tensor]) -> Tensor:
    """Σ from whichever argument was given."""
    if "covariance_matrix" in noise:
        return noise["covariance_matrix"]
    if "scale_tril" in noise:
        return noise["scale_tril"] @ noise["scale_tril"].mT
    if "precision_matrix" in noise:
        return torch.cholesky_inverse(torch.linalg.cholesky(noise["precision_matrix"]))
    return torch.diag_embed(noise["scale"] ** 2)


def _proper(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Σ with ones in place of zero variances, and 1 for every coordinate that has noise, 0 for the others."""
    size = covariance.shape[-1]
    zero, one = covariance.new_zeros(()), covariance.new_ones(())
    noisy = covariance.diagonal(dim1=-2, dim2=-1) > 0
    gone = torch.where(noisy, zero, one).unsqueeze(-1) * torch.eye(size, dtype=covariance.dtype)
    return covariance + gone, torch.where(noisy, one, zero)


def pack(moments: LinearMoments, matrix: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    """Moments and the arguments that they belong to, as one flat tuple (`unpack` is its inverse)."""
    return (*vars(moments).values(), matrix, offset)


def unpack(parts: Sequence[Tensor], matrix: Tensor, offset: Tensor, noise: Mapping[str, Tensor]) -> LinearSite:
    """The site at its current arguments."""
    return LinearSite(LinearMoments(*parts[:6]), parts[6], parts[7], matrix, offset, noise)


PACKED = 8  # tensors in the tuple of one site
