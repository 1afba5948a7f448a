"""Directions and their concentration: what a von Mises density is of its arguments.

    DirectionKernel    C cos μ + S sin μ                 μ a direction: only its angle counts, not its turns
    ResultantKernel    R κ - n log I₀(κ)                 κ > 0, concave

C and S are weighted sums of cosines and sines, R = C cos μ + S sin μ the length of their sum along μ, n the sum of
weights. The first is highest at the direction of (C, S); of the angles that differ by whole turns the one nearest to
`origin` (the current μ) is taken, so that a direction moves on steadily past ±π. The second is where the mean
resultant length A(κ) = I₁(κ)/I₀(κ) is R/n: Newton's method from the start of Best and Fisher (1981, "The bias of the
maximum likelihood estimators of the von Mises-Fisher concentration parameters", section 2). It is 0 where R <= 0, and
infinite where all directions are alike.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_em.kernels.base import Kernel, Scatter

STEPS = 6  # of Newton's method, from a start that is right to 2 %
LARGE = 50.0  # concentrations above: a series, whose next term is below 1e-19
ALIKE = 64 * torch.finfo(torch.float64).eps  # 1 - R/n is rounding


@dataclass(frozen=True, eq=False)
class DirectionKernel(Kernel):
    """Elementwise; `cosine` C and `sine` S have shape U, `origin` broadcasts against μ.

    >>> DirectionKernel(torch.tensor(0.0), torch.tensor(2.0), torch.tensor(6.2832)).argmax()
    tensor(7.8540)
    """

    cosine: Tensor
    sine: Tensor
    origin: Tensor = field(default_factory=lambda: torch.zeros(()))

    names: ClassVar[tuple[str, ...]] = ("cosine", "sine")

    @property
    def form(self) -> str:
        return "C cos m + S sin m"

    def value(self, theta: Tensor) -> Tensor:
        return self.cosine * theta.cos() + self.sine * theta.sin()

    def gradient(self, theta: Tensor) -> Tensor:
        return self.sine * theta.cos() - self.cosine * theta.sin()

    def argmax(self) -> Tensor:
        best = self.origin + torch.atan2(self.gradient(self.origin), self.value(self.origin))
        return torch.where(self.is_empty(), torch.nan, best)

    def is_empty(self) -> Tensor:
        return (self.cosine == 0) & (self.sine == 0)

    def within(self, value: Tensor, lower: Any, upper: Any) -> Tensor:
        """Turned into the interval, else the end of it where the kernel is higher."""
        turn = 2 * math.pi
        if lower is None:
            return value if upper is None else value - turn * ((value - upper) / turn).ceil().clamp(min=0)
        turned = value + turn * ((lower - value) / turn).ceil().clamp(min=0)
        if upper is None:
            return turned
        turned = turned - turn * ((turned - lower) / turn).floor() * (turned > upper)
        ends = (
            torch.as_tensor(lower).to(value).expand(value.shape),
            torch.as_tensor(upper).to(value).expand(value.shape),
        )
        nearest = torch.where(self.value(ends[0]) >= self.value(ends[1]), *ends)
        return torch.where(turned > upper, nearest, turned)

    def collect(self, scatter: Scatter, at: Tensor, onto: Tensor) -> Self:
        return dataclasses.replace(self.map(scatter), origin=onto)


@dataclass(frozen=True, eq=False)
class ResultantKernel(Kernel):
    """Elementwise; `count` n and `resultant` R have shape U.

    >>> kernel = ResultantKernel(torch.tensor(1.0), torch.tensor(0.5))
    >>> kernel.argmax()
    tensor(1.1593)
    """

    count: Tensor
    resultant: Tensor

    names: ClassVar[tuple[str, ...]] = ("count", "resultant")

    @property
    def form(self) -> str:
        return "R k - n log I0(k)"

    def value(self, theta: Tensor) -> Tensor:
        return (self.resultant - self.count) * theta - self.count * torch.special.i0e(theta).log()

    def gradient(self, theta: Tensor) -> Tensor:
        return self.count * _deficit(theta)[0] - (self.count - self.resultant)

    def argmax(self) -> Tensor:
        deficit = 1 - self.resultant / torch.where(self.is_empty(), 1.0, self.count)
        inside = (deficit > ALIKE) & (deficit < 1)
        s = torch.where(inside, deficit, 0.5)
        r = 1 - s
        low = 2 * r + r**3 + 5 / 6 * r**5
        high = torch.where(r < 0.85, -0.4 + 1.39 * r + 0.43 / s, 1 / (r * s * (3 - r)))
        kappa = torch.where(r < 0.53, low, high)
        for _ in range(STEPS):
            now, slope = _deficit(kappa)
            moved = kappa + (now - s) / slope
            kappa = torch.where(moved > 0, moved, kappa / 2)
        kappa = torch.where(inside, kappa, torch.where(deficit >= 1, 0.0, torch.inf))
        return torch.where(self.is_empty(), torch.nan, kappa)

    def is_empty(self) -> Tensor:
        return self.count <= 0


def _coefficients(number: int) -> list[float]:
    """c_n of 1 - A(κ) = Σ_n c_n κ⁻ⁿ, from A' = 1 - A/κ - A²: the difference itself loses its digits."""
    c = [0.0, 0.5]
    for n in range(2, number + 1):
        c.append(((n - 2) * c[n - 1] + sum(c[i] * c[n - i] for i in range(1, n))) / 2)
    return c[1:]


SERIES = _coefficients(14)


def _deficit(kappa: Tensor) -> tuple[Tensor, Tensor]:
    """1 - A(κ), and A'(κ), for κ >= 0."""
    large = kappa > LARGE
    near, y = torch.where(large, 1.0, kappa), torch.where(large, kappa, LARGE).reciprocal()
    length = torch.special.i1e(near) / torch.special.i0e(near)
    ratio = torch.where(near > 0, length / torch.where(near > 0, near, 1.0), 0.5)
    series, slope = torch.zeros_like(y), torch.zeros_like(y)
    for n, c in reversed(tuple(enumerate(SERIES, 1))):
        series, slope = (series + c) * y, (slope + n * c) * y
    return torch.where(large, series, 1 - length), torch.where(large, slope * y, 1 - ratio - length.square())
