"""MultivariateNormal with a covariance, a Cholesky factor or a precision matrix.

With d = μ − c, S₁ = Σ w (x − c) and S₂ = Σ w (x − c)(x − c)ᵀ:

    location     (Σ⁻¹S₁)·(μ − c) − ½ (μ − c)ᵀ (S₀Σ⁻¹) (μ − c)
    covariance   −½ S₀ log|Σ| − ½ tr(B Σ⁻¹),     B = S₂ − S₁dᵀ − dS₁ᵀ + S₀ddᵀ

`scale_tril` L has the covariance kernel at Σ = LLᵀ, `precision_matrix` the same in P = Σ⁻¹. A matrix
known to be diagonal has one PowerKernel per entry (`diagonal_kernel`). LowRankMultivariateNormal is
not covered.
"""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.base import CHOLESKY, AnyStatistic, Arguments, Family, Moments, Statistic
from pyro_em.families.numerics import floats, precision_factor, precision_matrix, real
from pyro_em.kernels import Kernel, Mean, PowerKernel, QuadraticKernel, WishartKernel

_MATRICES = frozenset({"covariance_matrix", "scale_tril", "precision_matrix"})


class MultivariateNormalFamily(Family):
    """Normal vectors with a full covariance."""

    distribution = dist.MultivariateNormal
    event_dim = 1
    arguments: ClassVar = {"loc": 1, "covariance_matrix": 2, "scale_tril": 2, "precision_matrix": 2}
    links: ClassVar = {"scale_tril": CHOLESKY}
    closed = frozenset({"loc"}) | _MATRICES
    diagonal = _MATRICES
    centered = True

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[AnyStatistic, ...]:
        shifted = real(value) if center is None else real(value) - center
        return Statistic((shifted,), factor_dim=1), Statistic((shifted, shifted), factor_dim=1)

    def kernel(self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None) -> Kernel | None:
        weight, first, second = moments
        if argument == "loc":
            origin = torch.zeros_like(first) if center is None else center
            return QuadraticKernel.of_mean(Mean(weight, first, precision_factor(args), vector=True), origin)
        if argument in _MATRICES:
            shift = _shift(args, moments, center)
            # S₀ddᵀ/2 − S₁dᵀ, whose symmetric part is half of what is added to S₂; the sum is symmetric to the last bit.
            half = (weight[..., None] / 2 * shift - first)[..., :, None] * shift[..., None, :]
            scatter = second + (half + half.mT)
            return WishartKernel(weight / 2, scatter, inverse=argument == "precision_matrix")
        return None

    def diagonal_kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> PowerKernel | None:
        if argument not in _MATRICES:
            return None
        _, first, second = moments
        weight, shift = moments[0].unsqueeze(-1), _shift(args, moments, center)
        squares = second.diagonal(dim1=-2, dim2=-1) - shift * (2 * first - shift * weight)
        half = squares.clamp(min=0) / 2
        zero = torch.zeros_like(half)
        if argument == "covariance_matrix":
            return PowerKernel(-weight / 2, zero, half)
        if argument == "scale_tril":
            return PowerKernel(-weight, zero, half, exponent=2.0)
        return PowerKernel(weight / 2, half, zero)

    def value_kernel(self, args: Arguments) -> QuadraticKernel:
        (loc,) = floats(args["loc"])
        return QuadraticKernel(torch.zeros_like(loc), precision_matrix(args), loc, vector=True)


def _shift(args: Arguments, moments: Moments, center: Tensor | None) -> Tensor:
    _, loc = floats(moments[0], args["loc"])
    return loc if center is None else loc - center
