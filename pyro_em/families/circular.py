"""von Mises: angles around a direction μ with concentration κ.

    log p(x) = κ cos(x − μ) − log(2π I₀(κ)) = −2κ sin²((x − μ)/2) − log(2π e^−κ I₀(κ))

The second form keeps its digits for large κ. The statistics are cos x and sin x, so that Q is a DirectionKernel in μ
and a ResultantKernel in κ; a von Mises prior of a direction is a DirectionKernel too.

The density that torch gives is that of an approximation of I₀ (1e-7); this one is right to rounding.
"""

from __future__ import annotations

import math
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.base import Arguments, Family, Moments, Statistic
from pyro_em.families.numerics import floats, real
from pyro_em.kernels import DirectionKernel, Kernel, ResultantKernel


class VonMisesFamily(Family):
    """Angles in radians, whole turns ignored."""

    distribution = dist.VonMises
    arguments: ClassVar = {"loc": 0, "concentration": 0}
    closed = frozenset({"loc", "concentration"})

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        loc, kappa, value = floats(args["loc"], args["concentration"], value)
        away = ((value - loc) / 2).sin()
        return -2 * kappa * away.square() - torch.special.i0e(kappa).log() - math.log(2 * math.pi)

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        value = real(value)
        return Statistic((value.cos(),)), Statistic((value.sin(),))

    def kernel(self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None) -> Kernel | None:
        loc, kappa, count, cosine, sine = floats(args["loc"], args["concentration"], *moments)
        if argument == "loc":
            return DirectionKernel(kappa * cosine, kappa * sine)
        if argument == "concentration":
            return ResultantKernel(count, cosine * loc.cos() + sine * loc.sin())
        return None

    def value_kernel(self, args: Arguments) -> DirectionKernel:
        loc, kappa = floats(args["loc"], args["concentration"])
        return DirectionKernel(kappa * loc.cos(), kappa * loc.sin())
