"""Priors of matrices: InverseWishart of a covariance Σ, Wishart of a precision P.

    InverseWishart(ν, Ψ)   −½(ν+D+1) log|Σ| − ½ tr(Ψ Σ⁻¹)
    Wishart(ν, V)           ½(ν−D−1) log|P| − ½ tr(V⁻¹ P)

Conjugate to the matrix of a MultivariateNormal. Their own arguments have no closed form.
"""

from __future__ import annotations

import math
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.distributions import InverseWishart
from pyro_em.families.base import Arguments, Family
from pyro_em.families.numerics import floats, log_det, precision_matrix
from pyro_em.kernels import WishartKernel


class InverseWishartFamily(Family):
    """Prior of a covariance matrix."""

    distribution = InverseWishart
    event_dim = 2
    arguments: ClassVar = {"df": 0, "scale_matrix": 2}

    def value_kernel(self, args: Arguments) -> WishartKernel:
        scale, df = floats(args["scale_matrix"], args["df"])
        return WishartKernel((df + scale.shape[-1] + 1) / 2, scale)


class WishartFamily(Family):
    """Prior of a precision matrix."""

    distribution = dist.Wishart
    event_dim = 2
    arguments: ClassVar = {"df": 0, "covariance_matrix": 2, "scale_tril": 2, "precision_matrix": 2}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        # torch builds its sampler first, and warns below ν = D although the density is proper.
        inverse_scale, df, value = floats(precision_matrix(args), args["df"], value)
        size = value.shape[-1]
        return (
            (df - size - 1) / 2 * log_det(value)
            - (inverse_scale * value).sum((-2, -1)) / 2
            + df / 2 * log_det(inverse_scale)
            - df * size / 2 * math.log(2)
            - torch.mvlgamma(df / 2, size)
        )

    def value_kernel(self, args: Arguments) -> WishartKernel:
        inverse_scale, df = floats(precision_matrix(args), args["df"])
        return WishartKernel((df - inverse_scale.shape[-1] - 1) / 2, inverse_scale, inverse=True)
