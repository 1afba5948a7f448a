"""Weibull: log p(y) = log k − log s + (k − 1) log(y/s) − (y/s)^k,  y > 0, scale s, concentration k.

Given k, y^k is Exponential(s^−k), but k is free nearly always, and no closed form of both: Newton's method moves the
two together (m_step/newton.py), behind linear predictors too (accelerated failure times).
"""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.base import Arguments, Family
from pyro_em.families.numerics import floats


class WeibullFamily(Family):
    """Durations with a rising or falling hazard."""

    distribution = dist.Weibull
    arguments: ClassVar = {"scale": 0, "concentration": 0}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        scale, shape, value = floats(args["scale"], args["concentration"], value)
        inside = value > 0
        log_ratio = torch.where(inside, value, 1.0).log() - scale.log()
        density = shape.log() - scale.log() + (shape - 1) * log_ratio - (shape * log_ratio).exp()
        return torch.where(inside, density, -torch.inf)
