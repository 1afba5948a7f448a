"""Functions of θ > 0 that are concave in u = log θ, and their sums.

    PowerKernel       A u − B₊ e^{qu} − B₋ e^{−qu}
    LogNormalKernel   C (−u − ½ p (u − m)²)              a LogNormal prior
    HalfCauchyKernel  −C log(1 + e^{2u} / s²)            a half-Cauchy prior

A sum of such functions is concave again, so it has one maximum: the root of its slope in u, found by Newton steps
that are kept inside of a shrinking bracket. So a scale with a Gamma, LogNormal or half-Cauchy prior, a rate with a
half-Cauchy prior, or several priors at once are one rule.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.kernels.base import CoefficientMap, FlatKernel, IncompatibleKernels, Kernel

SMALLEST, LARGEST = -700.0, 700.0  # log θ beyond which θ counts as 0 and as infinite
STEPS, LONGEST = 30, 2.0  # Newton steps, and the longest in log θ: exponentials are no parabolas farther away


class PositiveKernel(Kernel):
    """Elementwise and concave in log θ."""

    @abstractmethod
    def log_slope(self, log_theta: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative in u = log θ."""

    def __add__(self, other: Kernel) -> Kernel:
        if isinstance(other, FlatKernel):
            return self
        if not isinstance(other, PositiveKernel):
            raise IncompatibleKernels.sum_of(self, other)
        parts = _merged([*_parts(self), *_parts(other)])
        return parts[0] if len(parts) == 1 else PositiveSum(parts)

    def merged(self, other: PositiveKernel) -> PositiveKernel | None:
        """The sum as one kernel of this form, None if there is none."""
        if self.form != other.form:
            return None
        pairs = zip(self.coefficients, other.coefficients, strict=True)
        return self.from_coefficients([mine + theirs for mine, theirs in pairs])


def _parts(kernel: PositiveKernel) -> tuple[PositiveKernel, ...]:
    return kernel.parts if isinstance(kernel, PositiveSum) else (kernel,)


def _merged(parts: Sequence[PositiveKernel]) -> tuple[PositiveKernel, ...]:
    found: list[PositiveKernel] = []
    for part in parts:
        for i, other in enumerate(found):
            both = other.merged(part)
            if both is not None:
                found[i] = both
                break
        else:
            found.append(part)
    return tuple(found)


@dataclass(frozen=True, eq=False)
class PositiveSum(PositiveKernel):
    """A sum of kernels of different forms. The argmax is exactly 0 or infinite where the sum has no maximum."""

    parts: tuple[PositiveKernel, ...]

    names: ClassVar[tuple[str, ...]] = ()

    @property
    def form(self) -> str:
        return " + ".join(part.form for part in self.parts)

    def value(self, theta: Tensor) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*(part.value(theta) for part in self.parts))).sum(0)

    def gradient(self, theta: Tensor) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*(part.gradient(theta) for part in self.parts))).sum(0)

    def log_slope(self, log_theta: Tensor) -> tuple[Tensor, Tensor]:
        slopes = [part.log_slope(log_theta) for part in self.parts]
        first, second = (torch.stack(torch.broadcast_tensors(*s)).sum(0) for s in zip(*slopes, strict=True))
        return first, second

    def argmax(self) -> Tensor:
        start = self._start()
        falls = self.log_slope(torch.full_like(start, SMALLEST))[0] < 0
        rises = self.log_slope(torch.full_like(start, LARGEST))[0] > 0
        u, low, high = start, torch.full_like(start, -math.inf), torch.full_like(start, math.inf)
        for _ in range(STEPS):  # always all of them: no branch depends on the numbers, so that tape/ can record it
            first, second = self.log_slope(u)
            low, high = torch.where(first > 0, u, low), torch.where(first < 0, u, high)
            following = u - (first / second).clamp(-LONGEST, LONGEST)
            middle = (low + high) / 2
            outside = ((following < low) | (following > high)) & middle.isfinite()
            u = torch.where(first == 0, u, torch.where(outside, middle, following))
        theta = torch.where(falls, torch.zeros_like(u), torch.where(rises, torch.full_like(u, math.inf), u.exp()))
        return torch.where(self.is_empty(), torch.nan, theta)

    def _start(self) -> Tensor:
        """Mean of the parts' own maxima, where they are finite and positive."""
        tops = torch.stack(torch.broadcast_tensors(*(part.argmax().log() for part in self.parts)))
        known = tops.isfinite()
        mean = torch.where(known, tops, 0.0).sum(0) / known.sum(0).clamp(min=1)
        shape = torch.broadcast_shapes(mean.shape, self.log_slope(mean)[0].shape)
        return mean.expand(shape).clamp(SMALLEST + 1, LARGEST - 1)

    def is_empty(self) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*(part.is_empty() for part in self.parts))).all(0)

    def rescale(self, factor: Tensor) -> Self:
        return type(self)(tuple(part.rescale(factor) for part in self.parts))

    def map(self, function: CoefficientMap) -> Self:
        return type(self)(tuple(part.map(function) for part in self.parts))

    def merged(self, other: PositiveKernel) -> PositiveKernel | None:
        return None


@dataclass(frozen=True, eq=False)
class LogNormalKernel(PositiveKernel):
    """C (−u − ½ p (u − m)²) with u = log θ: `count` C of shape U; precision p and mean m broadcast against it.

    >>> one = torch.ones(())
    >>> LogNormalKernel(one, 4 * one, one).argmax().log()
    tensor(0.7500)
    """

    count: Tensor
    precision: Tensor
    mean: Tensor

    names: ClassVar[tuple[str, ...]] = ("count",)

    @property
    def form(self) -> str:
        return "-log t - p (log t - m)^2/2"

    def value(self, theta: Tensor) -> Tensor:
        u = theta.log()
        return -self.count * (u + self.precision * (u - self.mean) ** 2 / 2)

    def gradient(self, theta: Tensor) -> Tensor:
        return self.log_slope(theta.log())[0] / theta

    def log_slope(self, log_theta: Tensor) -> tuple[Tensor, Tensor]:
        first = -self.count * (1 + self.precision * (log_theta - self.mean))
        return first, (-self.count * self.precision).expand(first.shape)

    def argmax(self) -> Tensor:
        return torch.where(self.is_empty(), torch.nan, (self.mean - 1 / self.precision).exp())

    def is_empty(self) -> Tensor:
        return self.count == 0

    def rescale(self, factor: Tensor) -> Self:
        return type(self)(self.count, self.precision, self.mean - factor.log())

    def merged(self, other: PositiveKernel) -> PositiveKernel | None:
        same = isinstance(other, LogNormalKernel) and _equal(self.precision, other.precision)
        return super().merged(other) if same and _equal(self.mean, other.mean) else None  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class HalfCauchyKernel(PositiveKernel):
    """−C log(1 + θ²/s²): `count` C of shape U; the scale s broadcasts against it. It falls everywhere."""

    count: Tensor
    scale: Tensor

    names: ClassVar[tuple[str, ...]] = ("count",)

    @property
    def form(self) -> str:
        return "-log(1 + t^2/s^2)"

    def value(self, theta: Tensor) -> Tensor:
        return -self.count * torch.log1p((theta / self.scale) ** 2)

    def gradient(self, theta: Tensor) -> Tensor:
        return -2 * self.count * theta / (self.scale**2 + theta**2)

    def log_slope(self, log_theta: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.sigmoid(2 * (log_theta - self.scale.log()))
        return -2 * self.count * share, -4 * self.count * share * (1 - share)

    def argmax(self) -> Tensor:
        return torch.where(self.is_empty(), torch.nan, torch.zeros_like(self.count))

    def is_empty(self) -> Tensor:
        return self.count == 0

    def rescale(self, factor: Tensor) -> Self:
        return type(self)(self.count, self.scale / factor)

    def merged(self, other: PositiveKernel) -> PositiveKernel | None:
        same = isinstance(other, HalfCauchyKernel) and _equal(self.scale, other.scale)
        return super().merged(other) if same else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())
