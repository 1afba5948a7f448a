"""A log θ − B₊ θ^q − B₋ θ^−q for θ > 0: rates, scales and variances.

This is the shape of a generalised inverse Gaussian. With x = θ^q and a = A/q the maximum solves

    B₊ x² − a x − B₋ = 0,      x = (a + √(a² + 4 B₊B₋)) / 2B₊ = 2B₋ / (√(a² + 4 B₊B₋) − a)

and the form without cancellation is taken for either sign of a. Assumes B₊ ≥ 0 and B₋ ≥ 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.kernels.base import times
from pyro_em.kernels.positive import PositiveKernel


@dataclass(frozen=True, eq=False)
class PowerKernel(PositiveKernel):
    """Elementwise A log θ − B₊ θ^q − B₋ θ^−q.

    `log_coefficient` A, `rising` B₊ ≥ 0 and `falling` B₋ ≥ 0 have shape U (elementwise); `exponent`
    is q > 0. The argmax is exactly 0 when nothing holds θ away from 0 (a rate without events, a
    variance without spread), infinite when nothing holds it back, NaN where all three are 0.

    >>> one = torch.ones(())
    >>> PowerKernel(6 * one, 3 * one, 0 * one).argmax()      # Poisson: 6 events in 3 intervals
    tensor(2.)
    """

    log_coefficient: Tensor
    rising: Tensor
    falling: Tensor
    exponent: float = 1.0

    names: ClassVar[tuple[str, ...]] = ("log_coefficient", "rising", "falling")

    @property
    def form(self) -> str:
        # Twelve digits: an exponent that went through two reciprocal powers is still the same.
        return f"A log t - B t^{self.exponent:.12g} - C t^-{self.exponent:.12g}"

    def value(self, theta: Tensor) -> Tensor:
        power = theta**self.exponent
        return (
            torch.xlogy(self.log_coefficient, theta)
            - times(self.rising, power)
            - times(self.falling, power.reciprocal())
        )

    def relative_gradient(self, theta: Tensor) -> Tensor:
        total, (rises, falls) = self.log_coefficient, self._terms
        if rises:
            total = total - self.exponent * _times_power(self.rising, theta, self.exponent)
        if falls:
            total = total + self.exponent * _times_power(self.falling, theta, -self.exponent)
        return total

    def gradient(self, theta: Tensor) -> Tensor:
        q = self.exponent
        return (
            times(self.log_coefficient, theta.reciprocal())
            - q * times(self.rising, theta ** (q - 1))
            + q * times(self.falling, theta ** (-q - 1))
        )

    def log_slope(self, log_theta: Tensor) -> tuple[Tensor, Tensor]:
        q = self.exponent
        up, down = times(self.rising, (q * log_theta).exp()), times(self.falling, (-q * log_theta).exp())
        return self.log_coefficient - q * up + q * down, -(q**2) * (up + down)

    def argmax(self) -> Tensor:
        return self._argmax

    @cached_property
    def _argmax(self) -> Tensor:
        a = self.log_coefficient / self.exponent
        rises, falls = self._terms
        if not rises:
            return _power(self.falling / -a, 1 / self.exponent)
        if not falls:
            return _power(a / self.rising, 1 / self.exponent)
        # hypot: a² and B₊B₋ overflow and underflow long before their root does.
        root = torch.hypot(a, 2 * self.rising.sqrt() * self.falling.sqrt())
        downhill = torch.where(self.falling == 0, torch.zeros_like(root), 2 * self.falling / (root - a))
        x = torch.where(a > 0, (a + root) / (2 * self.rising), downhill)
        return torch.where(self.is_empty(), torch.nan, x ** (1 / self.exponent))

    @cached_property
    def _terms(self) -> tuple[bool, bool]:
        """Whether B₊ and B₋ are there, as far as the sign of A lets the kernel do without: of a scale B₋ alone is, of a
        rate B₊. Of a recording (tape/) that is a constant, where no prior brings the other."""
        if self.is_scale:
            return bool(self.rising.any()), True
        return True, not self._is_rate or bool(self.falling.any())

    @cached_property
    def is_scale(self) -> bool:
        """A < 0 everywhere, as of scales and variances."""
        return bool((self.log_coefficient < 0).all())

    @cached_property
    def _is_rate(self) -> bool:
        return bool((self.log_coefficient > 0).all())

    @cached_property
    def is_informed(self) -> bool:
        return self.is_scale or self._is_rate or super().is_informed

    def is_empty(self) -> Tensor:
        return (self.log_coefficient == 0) & (self.rising == 0) & (self.falling == 0)

    def rescale(self, factor: Tensor) -> Self:
        return self.power(1.0, factor)

    def power(self, exponent: float, factor: Tensor | float = 1.0) -> Self:
        """The kernel in θ when the argument is factor · θ^exponent; exponent ≠ 0, factor ≥ 0.

        A standard deviation's kernel (q = 2) becomes a variance's (q = 1) by `power(0.5)`; a negative
        exponent, as in a precision, swaps B₊ and B₋.
        """
        if exponent == 0:
            raise ValueError(
                "PowerKernel.power got exponent 0, with which the argument no longer depends on the "
                "parameter: drop this use of the parameter instead."
            )
        scale = torch.as_tensor(factor, dtype=self.rising.dtype) ** self.exponent
        up, down = times(self.rising, scale), times(self.falling, scale.reciprocal())
        rising, falling = (up, down) if exponent > 0 else (down, up)
        return type(self)(exponent * self.log_coefficient, rising, falling, abs(exponent) * self.exponent)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent, by cheaper functions where there are some."""
    if exponent in (1, 2):
        return x if exponent == 1 else x * x
    return x.sqrt() if exponent == 0.5 else x**exponent


def _times_power(coefficient: Tensor, theta: Tensor, exponent: float) -> Tensor:
    """coefficient · θ^exponent at θ > 0, 0 where the coefficient is 0: factor by factor, of which none overflows."""
    if abs(exponent) not in (1, 2):
        return times(coefficient, theta**exponent)
    for _ in range(int(abs(exponent))):
        coefficient = coefficient * theta if exponent > 0 else coefficient / theta
    return coefficient
