"""Families that are mostly priors here: half-Cauchy, Laplace, Student (a number or a vector), Cauchy.

Of their own arguments the scale of a Laplace has a closed form at its location, which is a weighted median
(m_step/median.py).

HalfCauchy    −log(1 + x²/s²)                            x > 0
Laplace       −|x − m| / b
Student       −½(ν+1) log(1 + (x − m)²/(ν s²));          Cauchy has ν = 1
"""

from __future__ import annotations

import math
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.factors import inverse
from pyro_em.families.base import Arguments, Family, Moments, Statistic
from pyro_em.families.numerics import floats, log_gamma_half, log_rising
from pyro_em.kernels import HalfCauchyKernel, LassoKernel, PowerKernel, QuadraticKernel, StudentKernel


class HalfCauchyFamily(Family):
    """Prior of a scale (Gelman 2006)."""

    distribution = dist.HalfCauchy
    arguments: ClassVar = {"scale": 0}

    def value_kernel(self, args: Arguments) -> HalfCauchyKernel:
        (scale,) = floats(args["scale"])
        return HalfCauchyKernel(torch.ones_like(scale), scale)


class LaplaceFamily(Family):
    """Prior of a location; its mode may lie on m exactly. As a response it has a closed scale at its location."""

    distribution = dist.Laplace
    arguments: ClassVar = {"loc": 0, "scale": 0}
    closed = frozenset({"scale"})

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        """Distances from the current location."""
        return (Statistic(((value - floats((args or {})["loc"], value)[0]).abs(),)),)

    def kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> PowerKernel | None:
        """Σ w (−log 2b − |x − m|/b)."""
        weight, distance = floats(moments[0], moments[1])
        return PowerKernel(-weight, torch.zeros_like(weight), distance) if argument == "scale" else None

    def value_kernel(self, args: Arguments) -> LassoKernel:
        loc, scale = torch.broadcast_tensors(*floats(args["loc"], args["scale"]))
        zero = torch.zeros_like(loc)
        return LassoKernel(QuadraticKernel(zero, zero), loc, scale.reciprocal())


class StudentTFamily(Family):
    """Prior of a location with heavy tails."""

    distribution = dist.StudentT
    arguments: ClassVar = {"df": 0, "loc": 0, "scale": 0}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        """As ν grows it is the normal's, where the difference of two log-gammas would be rounding alone."""
        df, loc, scale = floats(args["df"], args.get("loc", 0.0), args.get("scale", 1.0))
        square = ((value - loc) / scale).square() / df
        constant = log_gamma_half(df / 2) - 0.5 * (math.pi * df).log() - scale.log()
        return constant - (df + 1) / 2 * square.log1p()

    def value_kernel(self, args: Arguments) -> StudentKernel:
        df, loc, scale = torch.broadcast_tensors(*floats(args["df"], args.get("loc", 0.0), args.get("scale", 1.0)))
        zero = torch.zeros_like(loc)
        return StudentKernel(QuadraticKernel(zero, zero), loc, (df + 1) / 2, df * scale**2)


class MultivariateStudentTFamily(Family):
    """Student vectors: with u = L⁻¹(x − m), −½(ν + D) log(1 + |u|²/ν) − Σ log L_ii + constants of ν."""

    distribution = dist.MultivariateStudentT
    event_dim = 1
    arguments: ClassVar = {"df": 0, "loc": 1, "scale_tril": 2}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        """As `StudentTFamily.log_prob`."""
        df, loc, lower, x = floats(args["df"], args["loc"], args["scale_tril"], value)
        size = lower.shape[-1]
        square = (inverse(lower) @ (x - loc).unsqueeze(-1)).squeeze(-1).square().sum(-1) / df
        half = torch.as_tensor(size / 2, dtype=df.dtype)
        constant = log_rising(df / 2, half) - half * (math.pi * df).log()
        return constant - lower.diagonal(dim1=-2, dim2=-1).log().sum(-1) - (df + size) / 2 * square.log1p()


class CauchyFamily(Family):
    """Student with one degree of freedom."""

    distribution = dist.Cauchy
    arguments: ClassVar = {"loc": 0, "scale": 0}

    def value_kernel(self, args: Arguments) -> StudentKernel:
        loc, scale = torch.broadcast_tensors(*floats(args["loc"], args["scale"]))
        zero = torch.zeros_like(loc)
        return StudentKernel(QuadraticKernel(zero, zero), loc, torch.ones_like(loc), scale**2)
