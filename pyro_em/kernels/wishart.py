"""−A log|Σ| − ½ tr(B Σ⁻¹): covariance matrices, or the same function of the precision P = Σ⁻¹.

    covariance  −A log|Σ| − ½ tr(B Σ⁻¹)      Σ* = B / 2A
    precision    A log|P| − ½ tr(B P)        P* = 2A B⁻¹

It does not enforce structure (diagonal, low rank): a diagonal matrix has a `PowerKernel` per entry, and so has the
factor of a known matrix, Σ = c·C:  −A D log c − ½ tr(B C⁻¹) / c.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em import factors
from pyro_em.kernels.base import Kernel
from pyro_em.kernels.power import PowerKernel


@dataclass(frozen=True, eq=False)
class WishartKernel(Kernel):
    """−A log|Σ| − ½ tr(B Σ⁻¹), or with `inverse=True` A log|P| − ½ tr(B P).

    `log_coefficient` A has shape U, `matrix` B (symmetric) U + (D, D). `value` and `gradient` raise
    `torch.linalg.LinAlgError` at a matrix which is not positive definite. The argmax is NaN where
    A = 0 and B = 0, singular where B is and infinite where a singular B leaves the precision unbounded.

    >>> WishartKernel(torch.tensor(5.0), 10 * torch.eye(2)).argmax()
    tensor([[1., 0.],
            [0., 1.]])
    """

    log_coefficient: Tensor
    matrix: Tensor
    inverse: bool = False

    names: ClassVar[tuple[str, ...]] = ("log_coefficient", "matrix")

    @property
    def event_dim(self) -> int:
        return 2

    @property
    def event_dims(self) -> tuple[int, ...]:
        return (0, 2)

    @property
    def form(self) -> str:
        return "A log|P| - tr(B P)/2" if self.inverse else "-A log|S| - tr(B S^-1)/2"

    def value(self, theta: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(theta)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if self.inverse:
            return self.log_coefficient * log_det - (self.matrix * theta).sum((-2, -1)) / 2
        trace = torch.cholesky_solve(self.matrix, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
        return -self.log_coefficient * log_det - trace / 2

    def gradient(self, theta: Tensor) -> Tensor:
        inverse = torch.cholesky_inverse(factors.cholesky(theta))
        log_part = self.log_coefficient[..., None, None] * inverse
        if self.inverse:
            return log_part - self.matrix / 2
        return inverse @ self.matrix @ inverse / 2 - log_part

    def factor_value(self, factor: Tensor) -> Tensor:
        """The kernel at Σ = LLᵀ (or P = LLᵀ), L with a positive diagonal."""
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if self.inverse:
            return self.log_coefficient * log_det - (factor * (self.matrix @ factor)).sum((-2, -1)) / 2
        lower, matrix = torch.broadcast_tensors(factor, self.matrix)
        half = torch.linalg.solve_triangular(lower, matrix, upper=False)
        whole = torch.linalg.solve_triangular(lower, half.mT, upper=False)
        return -self.log_coefficient * log_det - whole.diagonal(dim1=-2, dim2=-1).sum(-1) / 2

    def factor_gradient(self, factor: Tensor) -> Tensor:
        """Derivative in L of Σ = LLᵀ (or P = LLᵀ), of which the entries on and below the diagonal count.

        With F = L⁻¹ it is Fᵀ(F B Fᵀ − 2A) in the covariance, 2A Fᵀ − B L in the precision.
        """
        inverse, twice = factors.inverse(factor), 2 * self.log_coefficient[..., None, None]
        if self.inverse:
            return twice * inverse.mT - self.matrix @ factor
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return inverse.mT @ (inverse @ self.matrix @ inverse.mT - twice * identity)

    def factor_rounding(self, factor: Tensor) -> Tensor:
        """The size of what cancels in `factor_gradient`: large where the matrix is close to a singular one."""
        inverse, twice = factors.inverse(factor).abs(), 2 * self.log_coefficient[..., None, None].abs()
        if self.inverse:
            return twice * inverse.mT + self.matrix.abs() @ factor.abs()
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return inverse.mT @ (inverse @ self.matrix.abs() @ inverse.mT + twice * identity)

    def argmax(self) -> Tensor:
        twice = 2 * self.log_coefficient[..., None, None]
        if not self.inverse:
            return self.matrix / twice
        factor, failed = torch.linalg.cholesky_ex(self.matrix)
        unbounded = torch.where(self.is_empty(), torch.nan, torch.inf).to(self.matrix)[..., None, None]
        bounded = (failed == 0)[..., None, None]
        safe = torch.where(bounded, factor, torch.eye(factor.shape[-1]).to(factor))
        return torch.where(bounded, twice * torch.cholesky_inverse(safe), unbounded)

    @cached_property
    def is_informed(self) -> bool:
        return bool((self.log_coefficient > 0).all()) or super().is_informed

    def is_empty(self) -> Tensor:
        return (self.log_coefficient == 0) & (self.matrix == 0).flatten(-2).all(-1)

    def rescale(self, factor: Tensor) -> Self:
        scale = factor if self.inverse else factor.reciprocal()
        return dataclasses.replace(self, matrix=self.matrix * scale)

    def along(self, matrix: Tensor) -> PowerKernel:
        """The kernel in c > 0 when the argument is c · matrix, up to a constant; `matrix` is U + (D, D).

        >>> sums = WishartKernel(torch.tensor(5.0), torch.tensor([[20.0, 0.0], [0.0, 40.0]]))
        >>> sums.along(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).argmax()
        tensor(2.)
        """
        count = matrix.shape[-1] * self.log_coefficient
        if self.inverse:
            spread = (self.matrix * matrix).sum((-2, -1)) / 2
            return PowerKernel(count, spread, torch.zeros_like(spread))
        spread = torch.cholesky_solve(self.matrix, factors.cholesky(matrix)).diagonal(dim1=-2, dim2=-1).sum(-1) / 2
        return PowerKernel(-count, torch.zeros_like(spread), spread)

    def inverted(self) -> Self:
        """The same function of the inverse matrix: of P = Σ⁻¹ if this is one of Σ, and back."""
        return dataclasses.replace(self, inverse=not self.inverse)
