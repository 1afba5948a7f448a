"""Expected sufficient statistics of a response that is only known to lie in an interval [a, b].

    Normal       E y = μ + σ(h_α − h_β),   E (y−μ)² = σ² (1 + α h_α − β h_β),   h_x = φ(x) / (Φ(β) − Φ(α))
    LogNormal    the same for log y, at log a and log b
    Exponential  E y = a + 1/λ − w / (exp(λw) − 1),   w = b − a
    Poisson      E y = λ P(a−1 <= Y <= b−1) / P(a <= Y <= b)

For a conjugate-truncated response these are all that the M-step of the complete data needs. Narrow intervals, where
differences of Φ have no digits, go through the same quadrature as their probability (distributions/mass.py).

Shapes: arguments and limits broadcast over U.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions.mass import (
    narrow,
    narrow_weights,
    normal_limits,
    normal_log_density,
    normal_log_mass,
    poisson_log_mass,
)

Arguments = Mapping[str, Any]
Expected = Callable[[Arguments, Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]


def normal_moments(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """E z and E z² of a standard normal in [alpha, beta]."""
    alpha, beta = torch.broadcast_tensors(alpha, beta)
    log_mass = normal_log_mass(alpha, beta)
    at_alpha = (normal_log_density(alpha) - log_mass).exp()
    at_beta = (normal_log_density(beta) - log_mass).exp()
    first = at_alpha - at_beta
    second = 1 + _times(alpha, at_alpha) - _times(beta, at_beta)
    close = narrow(alpha, beta)
    if bool(close.any()):
        a, b = alpha[close], beta[close]
        offset, w = narrow_weights(a, b)
        z = (a + b).unsqueeze(-1) / 2 + offset
        total = w.sum(-1)
        first, second = first.clone(), second.clone()
        first[close], second[close] = (w * z).sum(-1) / total, (w * z * z).sum(-1) / total
    return first, second


def _times(limit: Tensor, density: Tensor) -> Tensor:
    return torch.where(limit.isfinite(), limit * density, torch.zeros_like(density))


def _normal(args: Arguments, lower: Tensor, upper: Tensor, center: Tensor | None) -> tuple[Tensor, ...]:
    loc, scale = args["loc"], args["scale"]
    first, second = normal_moments(*normal_limits(loc, scale, lower, upper))
    shift = loc if center is None else loc - center
    return shift + scale * first, shift * shift + 2 * shift * scale * first + scale * scale * second


def _log_normal(args: Arguments, lower: Tensor, upper: Tensor, center: Tensor | None) -> tuple[Tensor, ...]:
    return _normal(args, lower.clamp(min=0).log(), upper.log(), center)


def _exponential(args: Arguments, lower: Tensor, upper: Tensor, center: Tensor | None) -> tuple[Tensor, ...]:
    rate, lower = args["rate"], lower.clamp(min=0)
    width = upper - lower
    x = rate * width
    # 1/λ − w / (exp(λw) − 1) cancels for small λw, where it is w (1/2 − λw/12 + (λw)³/720 − ...).
    small = x < 0.1
    mean = torch.where(x.isfinite(), (1 - x / torch.expm1(x)) / rate, 1 / rate)
    series = 0.5 - x / 12 + x**3 / 720 - x**5 / 30_240 + x**7 / 1_209_600
    return (lower + torch.where(small, width * series, mean),)


def _poisson(args: Arguments, lower: Tensor, upper: Tensor, center: Tensor | None) -> tuple[Tensor, ...]:
    rate = args["rate"]
    mass = poisson_log_mass(rate, lower, upper)
    return (rate * (poisson_log_mass(rate, lower - 1, upper - 1) - mass).exp(),)


EXPECTED: dict[str, Expected] = {
    "Normal": _normal,
    "LogNormal": _log_normal,
    "Exponential": _exponential,
    "Poisson": _poisson,
}
"""E[T(Y) | lower <= Y <= upper] by the name of the distribution: `args`, lower, upper, center (families/base.py)."""

GAPS: dict[str, float] = {"Poisson": 1.0}
"""Distance from the last value outside of an interval to its limit: 0 for continuous distributions."""


def outside(name: str, lower: Tensor, upper: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The intervals below and above [lower, upper]; empty ones have their ends in the wrong order."""
    gap = GAPS.get(name, 0.0)
    infinite = torch.full_like(lower, math.inf)
    return [(-infinite, lower - gap), (upper + gap, infinite)]
