"""Scores in free coordinates, without making the coordinates.

`charts.chart` picks out the free entries of a value, so that its shapes depend on the numbers. Here are all entries,
those that are not free put to zero, so that the largest is the same: a fixed list of operations, which tape/ can
record.
Where a kernel knows its slope in logarithms or in the factor of a matrix, the derivative in the value itself is not
made.
"""

from __future__ import annotations

import functools
import operator
from typing import Protocol

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_em import factors
from pyro_em.charts import BOUNDED, base_constraint, chart


class Differentiable(Protocol):
    """A function of the value."""

    @property
    def at_infinity(self) -> bool:
        """Whether the value may be infinite, as a logit of 0; it is not free there."""
        ...

    def gradient(self, theta: Tensor) -> Tensor:
        """Its derivative."""
        ...

    def relative_gradient(self, theta: Tensor) -> Tensor:
        """θ ∘ its derivative, at θ > 0."""
        ...

    def factor_gradient(self, factor: Tensor) -> Tensor | None:
        """Its derivative in L at θ = LLᵀ, on and below the diagonal, if that is not to be made of `gradient`."""
        ...


def free_slopes(constraint: Constraint, value: Tensor, function: Differentiable) -> Tensor:
    """Jᵀ gradient over the coordinates at `value` and zeros, in any shape: `chart(...).pull_back` without the chart."""
    base = base_constraint(constraint)
    if value.numel() == 0:
        return value
    if base is constraints.simplex:
        return _of_simplex(value, function.relative_gradient(value))
    if base is constraints.real or isinstance(base, BOUNDED):
        return _elementwise(base, value, function)
    if base in (constraints.positive_definite, constraints.positive_semidefinite):
        factor = factors.cholesky(value)
        slope = function.factor_gradient(factor)
        if slope is not None:
            return slope_of_factor(factor, slope)
    return chart(constraint, value).pull_back(value, function.gradient(value))


def _elementwise(constraint: Constraint, value: Tensor, function: Differentiable) -> Tensor:
    tiny = torch.finfo(value.dtype).tiny  # below, 1/θ in a gradient overflows: as good as on the boundary
    bounds = (getattr(constraint, name, None) for name in ("lower_bound", "upper_bound"))
    lower, upper = (b.to(value) if isinstance(b, Tensor) else b for b in bounds)
    zero = lower is not None and not bool(lower.any() if isinstance(lower, Tensor) else lower)
    above = None if lower is None else value if zero else value - lower
    below = None if upper is None else upper - value
    if above is value and below is None:
        slope = function.relative_gradient(value)
    else:
        slope = function.gradient(value)
        if above is not None and below is not None:
            slope = slope * above * (below / (above + below))
        elif above is not None:
            slope = slope * above
        elif below is not None:
            slope = slope * -below
    inside = [] if above is None else [above >= tiny]
    inside += [] if below is None else [below >= tiny]
    inside += [value - value == 0] if function.at_infinity else []  # finite
    return torch.where(functools.reduce(operator.and_, inside), slope, 0.0) if inside else slope


def _of_simplex(value: Tensor, weighted: Tensor) -> Tensor:
    """Rows of probabilities, of which the largest is the reference."""
    weighted = torch.where(value >= torch.finfo(value.dtype).tiny, weighted, torch.zeros_like(value))
    slope = weighted - value * weighted.sum(-1, keepdim=True)
    reference = torch.arange(value.shape[-1], device=value.device) == value.argmax(-1, keepdim=True)
    return torch.where(reference, 0.0, slope)


def slope_of_factor(factor: Tensor, slope: Tensor) -> Tensor:
    """Jᵀ slope: entries of a Cholesky factor below its diagonal, and the logarithms of those on it."""
    one = torch.ones(factor.shape[-2:], dtype=torch.bool, device=factor.device)
    diagonal = torch.eye(factor.shape[-1], dtype=torch.bool, device=factor.device)
    return torch.where(diagonal, factor, one.tril().to(factor)) * slope
