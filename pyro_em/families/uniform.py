"""Uniform: a flat prior of its value. Its bounds are no smooth arguments and have no kernel.

The flat kernel does not know the bounds: a caller who adds it to another must check that the argmax
lies between them.
"""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist

from pyro_em.families.base import Arguments, Family
from pyro_em.kernels import FlatKernel


class UniformFamily(Family):
    """Constant between `low` and `high`."""

    distribution = dist.Uniform
    arguments: ClassVar = {"low": 0, "high": 0}

    def value_kernel(self, args: Arguments) -> FlatKernel:
        return FlatKernel()
