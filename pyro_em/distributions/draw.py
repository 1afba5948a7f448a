"""Draws of a distribution given that the value lies in an interval.

    Normal        Y = μ + σ Φ⁻¹(u Φ(β) + (1−u) Φ(α)), by logarithms and on the side where Φ keeps its digits
    LogNormal     the exponential of a Normal within the logarithms of the limits
    Exponential   Y = a − log(1 − u (1 − exp(−λ(b − a)))) / λ
    others        rejection

Not handled here: an interval that `base` hits less than once in MAX_ROUNDS draws (a RuntimeError).
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import scipy  # its parts are imported when they are used first
import torch
from torch import Tensor

MAX_ROUNDS = 10_000


def draw_within(base: Any, lower: Tensor, upper: Tensor, sample_shape: torch.Size) -> Tensor:
    """Draws of shape sample_shape + batch.

    :raises RuntimeError: if the interval has so little probability that rejection finds nothing in it.
    """
    shape = sample_shape + torch.broadcast_shapes(base.batch_shape, lower.shape, upper.shape)
    lower, upper = lower.expand(shape), upper.expand(shape)
    if isinstance(base, dist.Normal):
        return base.loc + base.scale * _normal((lower - base.loc) / base.scale, (upper - base.loc) / base.scale)
    if isinstance(base, dist.LogNormal):
        within = ((x.clamp(min=0).log() - base.loc) / base.scale for x in (lower, upper))
        return (base.loc + base.scale * _normal(*within)).exp()
    if isinstance(base, dist.Exponential):
        below = lower.clamp(min=0)
        uniform = torch.rand(shape, dtype=base.rate.dtype)
        return below - torch.log1p(uniform * torch.expm1(-base.rate * (upper - below))) / base.rate
    return _rejection(base, lower, upper, shape)


def _normal(lower: Tensor, upper: Tensor) -> Tensor:
    """Standard normal draws; log(u e^p + (1 − u) e^q) of the two log-probabilities, then Φ⁻¹ of its exponential."""
    flip = lower > 0
    low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    u = torch.rand(low.shape, dtype=torch.float64)
    at_high = torch.as_tensor(scipy.special.log_ndtr(high.double().cpu().numpy())) + u.log()
    at_low = torch.as_tensor(scipy.special.log_ndtr(low.double().cpu().numpy())) + torch.log1p(-u)
    x = torch.as_tensor(scipy.special.ndtri_exp(torch.logaddexp(at_high, at_low).cpu().numpy())).to(low)
    x = torch.minimum(torch.maximum(x, low), high)
    return torch.where(flip, -x, x)


def _rejection(base: Any, lower: Tensor, upper: Tensor, shape: torch.Size) -> Tensor:
    wide = base.expand(shape)
    value = wide.sample()
    for _ in range(MAX_ROUNDS):
        outside = (value < lower) | (value > upper)
        if not bool(outside.any()):
            return value
        value = torch.where(outside, wide.sample(), value)
    raise RuntimeError(
        f"No draw of {type(base).__name__} fell into the interval of row {outside.nonzero()[0].tolist()} in "
        f"{MAX_ROUNDS} rounds: it has hardly any probability. Check the parameters and the limits."
    )
