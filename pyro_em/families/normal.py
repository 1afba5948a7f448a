"""Normal, LogNormal (a Normal in log x) and HalfNormal.

With d = μ − c and the moments S₁ = Σ w (y − c), S₂ = Σ w (y − c)², where y = x or log x:

    location   (S₁/σ²) (μ − c) − ½ (S₀/σ²) (μ − c)²
    scale      −S₀ log σ − ½ (S₂ − 2 d S₁ + d² S₀) / σ²

The residual sum of squares is as accurate as the center c is close to μ, in units of σ.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.base import Arguments, Family, Moments, Statistic
from pyro_em.families.numerics import floats, real
from pyro_em.kernels import Kernel, LogNormalKernel, Mean, PowerKernel, QuadraticKernel


def _scale_kernel(weight: Tensor, squares: Tensor) -> PowerKernel:
    # Rounding can leave a sum of squares a little below 0.
    falling = squares.clamp(min=0) / 2
    return PowerKernel(-weight, torch.zeros_like(falling), falling, exponent=2.0)


class LocationScaleFamily(Family):
    """Values which are normal in some coordinate."""

    arguments: ClassVar = {"loc": 0, "scale": 0}
    closed = frozenset({"loc", "scale"})
    centered = True

    @abstractmethod
    def coordinate(self, value: Tensor) -> Tensor:
        """The transformation of the value which is normal."""

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        shifted = self.coordinate(real(value))
        if center is not None:
            shifted = shifted - center
        return Statistic((shifted,)), Statistic((shifted, shifted))

    def kernel(self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None) -> Kernel | None:
        weight, first, second, *origin = floats(*moments, *(() if center is None else (center,)))
        if argument == "loc":
            _, scale = floats(weight, args["scale"])
            around = origin[0] if origin else weight.new_zeros(())
            return QuadraticKernel.of_mean(Mean(weight, first, scale.square().reciprocal(), vector=False), around)
        if argument == "scale":
            if not origin and isinstance(args["loc"], float) and args["loc"] == 0:  # residuals
                return _scale_kernel(weight, second)
            _, loc = floats(weight, args["loc"])
            shift = loc - origin[0] if origin else loc
            return _scale_kernel(weight, second - shift * (first + (first - weight * shift)))
        return None


class NormalFamily(LocationScaleFamily):
    """Normal in x; as a prior, quadratic in its value."""

    distribution = dist.Normal

    def coordinate(self, value: Tensor) -> Tensor:
        return value

    def value_kernel(self, args: Arguments) -> QuadraticKernel:
        loc, scale = floats(args["loc"], args["scale"])
        return QuadraticKernel(torch.zeros_like(loc), scale**-2, loc)


class LogNormalFamily(LocationScaleFamily):
    """Normal in log x; as a prior, −log x − ½ (log x − μ)²/σ²."""

    distribution = dist.LogNormal

    def coordinate(self, value: Tensor) -> Tensor:
        return value.log()

    def value_kernel(self, args: Arguments) -> LogNormalKernel:
        loc, scale = torch.broadcast_tensors(*floats(args["loc"], args["scale"]))
        return LogNormalKernel(torch.ones_like(loc), scale**-2, loc)


class HalfNormalFamily(Family):
    """|x| of a Normal around 0; as a prior, −x² / 2σ²."""

    distribution = dist.HalfNormal
    arguments: ClassVar = {"scale": 0}
    closed = frozenset({"scale"})

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        value = real(value)
        return (Statistic((value, value)),)

    def kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> PowerKernel | None:
        return _scale_kernel(moments[0], moments[1]) if argument == "scale" else None

    def value_kernel(self, args: Arguments) -> PowerKernel:
        (scale,) = floats(args["scale"])
        rising = scale**-2 / 2
        return PowerKernel(torch.zeros_like(rising), rising, torch.zeros_like(rising), exponent=2.0)
