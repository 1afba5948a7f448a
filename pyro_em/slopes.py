"""The size of a score in free coordinates, without making the coordinates.

`charts.chart` picks out the free entries of a value, so that its shapes depend on the numbers. The same maximum is
taken here over all entries, those that are not free put to zero: a fixed list of operations, which tape/ can record.
"""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_em.charts import BOUNDED, base_constraint, bounds_of, chart


def largest_slope(constraint: Constraint, value: Tensor, gradient: Tensor) -> Tensor:
    """max|Jᵀ gradient| over the coordinates at `value`, (): `chart(...).pull_back` without making the chart."""
    base = base_constraint(constraint)
    tiny = torch.finfo(value.dtype).tiny  # below, 1/θ in a gradient overflows: as good as on the boundary
    if value.numel() == 0:
        return value.new_zeros(())
    if base is constraints.real or isinstance(base, BOUNDED):
        lower, upper = bounds_of(base, value)
        slope, free = gradient, value - value == 0  # finite
        if lower is not None and upper is not None:
            slope = slope * (value - lower) * ((upper - value) / (upper - lower))
        elif lower is not None:
            slope = slope * (value - lower)
        elif upper is not None:
            slope = slope * (value - upper)
        free = free if lower is None else free & (value - lower >= tiny)
        free = free if upper is None else free & (upper - value >= tiny)
        return torch.where(free, slope, 0.0).abs().amax()
    if base is constraints.simplex:
        weighted = torch.where(value >= tiny, value * gradient, torch.zeros_like(value))
        slope = weighted - value * weighted.sum(-1, keepdim=True)
        reference = torch.arange(value.shape[-1], device=value.device) == value.argmax(-1, keepdim=True)
        return torch.where(reference, 0.0, slope).abs().amax()
    slope = chart(constraint, value).pull_back(value, gradient)
    return slope.abs().amax() if slope.numel() else value.new_zeros(())
