"""Locations with a prior that is not normal: h·(μ−o) − ½ Λ (μ−o)², elementwise, and one of

    LassoKernel     − r |μ − m|                        a Laplace prior, r = 1/scale
    StudentKernel   − c log(1 + (μ − m)²/t)            Student or Cauchy, c = (ν+1)/2, t = ν·scale²

Lasso: the maximum of the quadratic, moved towards m by r/Λ, and m itself if it would pass it (soft threshold).
Student: with x = μ − m, g the slope of the quadratic at m, the slope is 0 where

    Λ x³ − g x² + (Λ t + 2c) x − g t = 0,

a cubic whose real roots lie between 0 and g/Λ; of two maxima the higher one is taken.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.kernels.base import CoefficientMap, FlatKernel, IncompatibleKernels, Kernel, Scatter
from pyro_em.kernels.quadratic import QuadraticKernel

POLISH = 8  # Newton steps on the roots of the cubic


@dataclass(frozen=True, eq=False)
class HeavyKernel(Kernel):
    """A quadratic (`smooth`) and a prior; see the subclasses. Empty of a quadratic it is the prior alone."""

    smooth: QuadraticKernel
    center: Tensor

    names: ClassVar[tuple[str, ...]] = ()

    def is_empty(self) -> Tensor:
        return torch.zeros_like(self.center, dtype=torch.bool)

    def map(self, function: CoefficientMap) -> Self:
        return dataclasses.replace(self, smooth=self.smooth.map(function))

    def collect(self, scatter: Scatter, at: Tensor, onto: Tensor) -> Self:
        return dataclasses.replace(self, smooth=self.smooth.collect(scatter, at, onto))

    def __add__(self, other: Kernel) -> Kernel:
        if isinstance(other, FlatKernel):
            return self
        both = self.absorbed(other)
        if both is None:
            raise IncompatibleKernels.sum_of(self, other)
        return both

    def absorbed(self, other: Kernel) -> Kernel | None:
        if not isinstance(other, QuadraticKernel) or other.vector:
            return None
        smooth = self.smooth + other
        assert isinstance(smooth, QuadraticKernel)
        return dataclasses.replace(self, smooth=smooth)


@dataclass(frozen=True, eq=False)
class LassoKernel(HeavyKernel):
    """... − r |μ − m|, `rate` r.

    >>> one = torch.ones(())
    >>> LassoKernel(QuadraticKernel(5 * one, 2 * one), 0 * one, one).argmax()
    tensor(2.)
    """

    rate: Tensor

    @property
    def form(self) -> str:
        return "h.(m - o) - (m - o)'L(m - o)/2 - r |m - c|"

    def value(self, theta: Tensor) -> Tensor:
        return self.smooth.value(theta) - self.rate * (theta - self.center).abs()

    def gradient(self, theta: Tensor) -> Tensor:
        """At the kink the subgradient nearest to 0, which is 0 at a maximum there."""
        smooth = self.smooth.gradient(theta)
        at_center = smooth.sign() * (smooth.abs() - self.rate).clamp(min=0)
        return torch.where(theta == self.center, at_center, smooth - self.rate * (theta - self.center).sign())

    def argmax(self) -> Tensor:
        slope = self.smooth.gradient(self.center)
        kept = slope.sign() * (slope.abs() - self.rate).clamp(min=0)
        step = kept / self.smooth.precision
        return torch.where(kept == 0, self.center, self.center + step)


@dataclass(frozen=True, eq=False)
class StudentKernel(HeavyKernel):
    """... − c log(1 + (μ − m)²/t), `count` c and `spread` t."""

    count: Tensor
    spread: Tensor

    @property
    def form(self) -> str:
        return "h.(m - o) - (m - o)'L(m - o)/2 - c log(1 + (m - c)^2/t)"

    def value(self, theta: Tensor) -> Tensor:
        x = theta - self.center
        return self.smooth.value(theta) - self.count * torch.log1p(x * x / self.spread)

    def gradient(self, theta: Tensor) -> Tensor:
        x = theta - self.center
        return self.smooth.gradient(theta) - 2 * self.count * x / (self.spread + x * x)

    def argmax(self) -> Tensor:
        slope, precision = self.smooth.gradient(self.center), self.smooth.precision
        alone = precision == 0
        curve = torch.where(alone, torch.ones_like(precision), precision)
        a, b, c = -slope / curve, self.spread + 2 * self.count / curve, -slope * self.spread / curve
        found = []
        for x in _roots(*torch.broadcast_tensors(a, b, c)):
            for _ in range(POLISH):
                f, df = ((x + a) * x + b) * x + c, (3 * x + 2 * a) * x + b
                step = torch.where(df == 0, torch.zeros_like(f), f / torch.where(df == 0, torch.ones_like(df), df))
                x = x - step
            found.append(self.center + x)
        values = torch.stack([self.value(theta) for theta in found])
        best = torch.stack(found).gather(0, values.argmax(0, keepdim=True)).squeeze(0)
        return torch.where(alone & (slope == 0), self.center.expand(best.shape), best)


def _roots(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real roots of x³ + a x² + b x + c, the only one three times (Cardano; Viète where there are three)."""
    shift = a / 3
    p, q = b - a * a / 3, 2 * shift**3 - shift * b + c
    inner = (q / 2) ** 2 + (p / 3) ** 3
    three = inner < 0
    root = torch.where(three, 0.0, inner).sqrt()
    big = -q / 2 - torch.where(q > 0, root, -root)
    first = big.sign() * big.abs() ** (1 / 3)
    single = first - torch.where(first == 0, 0.0, p / (3 * torch.where(first == 0, 1.0, first)))
    radius = 2 * (torch.where(three, -p, 1.0) / 3).sqrt()
    angle = torch.acos((torch.where(three, -4 * q, 0.0) / radius**3).clamp(-1, 1)) / 3
    several = [radius * torch.cos(angle - 2 * math.pi * k / 3) for k in range(3)]
    first_root, second_root, third_root = (torch.where(three, s, single) - shift for s in several)
    return first_root, second_root, third_root
