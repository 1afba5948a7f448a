"""Spaces of single numbers: half-lines and intervals, and where arguments of a distribution lie outside of theirs.

Densities extend beyond the space of an argument without a sign of it: log Γ has values at negative concentrations,
and 0 · log λ − λ of a Poisson that saw no event *rises* as its rate falls below 0. Who climbs a density asks here.

Spaces that couple several entries (matrices, simplices but for the sign of their entries) are not looked at.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.charts import base_constraint

SLACK = 16  # roundings beside the end of a space that are no violation: 1 - p - q may be -1e-17


def bounds_of(constraint: Any) -> tuple[float, float]:
    """Bounds of every entry of a value, infinite where there are none.

    >>> bounds_of(constraints.positive), bounds_of(constraints.real_vector)
    ((0.0, inf), (-inf, inf))
    """
    base = base_constraint(constraint)
    if base is constraints.simplex:
        return 0.0, math.inf  # raw probabilities are not normalised yet
    low, high = getattr(base, "lower_bound", -math.inf), getattr(base, "upper_bound", math.inf)
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    return (low, high) if numbers else (-math.inf, math.inf)


@functools.cache
def bounded_arguments(distribution: type) -> dict[str, Any]:
    """Constraints of the arguments of a distribution whose entries have bounds."""
    known = getattr(distribution, "arg_constraints", None)
    everything = (-math.inf, math.inf)
    return {n: c for n, c in known.items() if bounds_of(c) != everything} if isinstance(known, dict) else {}


@functools.cache
def intervals(distribution: type) -> dict[str, tuple[float, float]]:
    """Their bounds."""
    return {name: bounds_of(constraint) for name, constraint in bounded_arguments(distribution).items()}


def beyond(value: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Entries that lie outside by more than rounding (NaN does not)."""
    slack = SLACK * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    low, high = bounds
    if high == math.inf:
        return value < low - slack
    return (value < low - slack) | (value > high + slack)


def some(mask: Tensor | None) -> bool:
    """Whether a mask is true somewhere, as far as can be asked (torch.func.vmap lets nobody ask)."""
    if mask is None:
        return False
    try:
        return bool(mask.any())
    except RuntimeError:
        return True
