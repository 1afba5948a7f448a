"""Families with a rate: Poisson, Exponential, Gamma, InverseGamma. Each is a PowerKernel with q = 1.

    family         in the rate                    as a prior of its value
    Poisson        S₁ log λ − S₀ λ
    Exponential    S₀ log λ − S₁ λ                −λ x
    Gamma          S₀ a log λ − S₁ λ              (a − 1) log x − λ x
    InverseGamma   S₀ a log λ − S₁ λ              −(a + 1) log x − λ / x

with S₁ = Σ w x (InverseGamma: Σ w / x). The concentration a has no closed form.
"""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.base import Arguments, Family, Moments, Statistic
from pyro_em.families.numerics import floats, real, weighted_log
from pyro_em.kernels import PowerKernel


def _power(log_coefficient: Tensor, rising: Tensor, falling: Tensor | None = None) -> PowerKernel:
    zero = torch.zeros_like(rising)
    return PowerKernel(log_coefficient, rising, zero if falling is None else falling)


class PoissonFamily(Family):
    """Counts with rate λ."""

    distribution = dist.Poisson
    arguments: ClassVar = {"rate": 0}
    closed = frozenset({"rate"})

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        rate, value = floats(args["rate"], value)
        return weighted_log(value, rate) - rate - torch.lgamma(value + 1)

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        return (Statistic((real(value),)),)

    def kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> PowerKernel | None:
        return _power(moments[1], moments[0]) if argument == "rate" else None


class ExponentialFamily(Family):
    """Waiting times with rate λ."""

    distribution = dist.Exponential
    arguments: ClassVar = {"rate": 0}
    closed = frozenset({"rate"})

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        rate, value = floats(args["rate"], value)
        return weighted_log(torch.ones_like(rate), rate) - rate * value

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        return (Statistic((real(value),)),)

    def kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> PowerKernel | None:
        return _power(moments[0], moments[1]) if argument == "rate" else None

    def value_kernel(self, args: Arguments) -> PowerKernel:
        (rate,) = floats(args["rate"])
        return _power(torch.zeros_like(rate), rate)


class GammaFamily(Family):
    """Gamma with concentration a and rate λ."""

    distribution = dist.Gamma
    arguments: ClassVar = {"concentration": 0, "rate": 0}
    closed = frozenset({"rate"})

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        shape, rate, value = floats(args["concentration"], args["rate"], value)
        return shape * rate.log() - torch.lgamma(shape) + weighted_log(shape - 1, value) - rate * value

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        return (Statistic((real(value),)),)

    def kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> PowerKernel | None:
        return _rate_kernel(moments, args) if argument == "rate" else None

    def value_kernel(self, args: Arguments) -> PowerKernel:
        shape, rate = floats(args["concentration"], args["rate"])
        return _power(shape - 1, rate)


class InverseGammaFamily(Family):
    """The reciprocal of a Gamma with concentration a and rate λ."""

    distribution = dist.InverseGamma
    arguments: ClassVar = {"concentration": 0, "rate": 0}
    closed = frozenset({"rate"})

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        shape, rate, value = floats(args["concentration"], args["rate"], value)
        # At x = 0 the two terms below are +inf and −inf; the density there is 0.
        zero = value <= 0
        inside = torch.where(zero, torch.ones_like(value), value)
        log_density = shape * rate.log() - torch.lgamma(shape) - (shape + 1) * inside.log() - rate / inside
        return torch.where(zero, -torch.inf, log_density)

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        return (Statistic((real(value).reciprocal(),)),)

    def kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> PowerKernel | None:
        return _rate_kernel(moments, args) if argument == "rate" else None

    def value_kernel(self, args: Arguments) -> PowerKernel:
        shape, rate = floats(args["concentration"], args["rate"])
        return _power(-(shape + 1), torch.zeros_like(rate), rate)


def _rate_kernel(moments: Moments, args: Arguments) -> PowerKernel:
    weight, total, shape = floats(moments[0], moments[1], args["concentration"])
    return _power(shape * weight, total)
