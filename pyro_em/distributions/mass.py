"""log P(a <= Y <= b) of a distribution, exact in the tails and for narrow intervals, twice differentiable.

    Normal       log(Φ(β) − Φ(α)) with α, β the standardised limits; ∂/∂β = φ(β) / (Φ(β) − Φ(α))
    Poisson      a..b inclusive; ∂/∂λ log P = (pmf(a−1) − pmf(b)) / P
    Exponential, Weibull    −H(a) + log(1 − exp(H(a) − H(b))), H the cumulative hazard
    LogNormal    the Normal's at log a, log b

The derivatives are quotients of two logarithms' exponentials, so nothing under- or overflows before it must.
Any other distribution goes through its `cdf`, which has no digits left in a far upper tail.

Not handled here: what was observed (coarse.py), and moments of Y in the interval (families/moments.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pyro.distributions as dist
import scipy  # its parts are imported when they are used first
import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
NODES = 12  # of the Gauss-Legendre rule on narrow intervals, where the integrand varies by a factor e at most
MAX_TERMS = 10_000


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(−x)) for x >= 0; −inf at 0, with gradients that are never NaN."""
    small = x < math.log(2)
    zero = x <= 0
    near = torch.where(small & ~zero, x, torch.ones_like(x))
    far = torch.where(small, torch.ones_like(x), x)
    value = torch.where(small, (-torch.expm1(-near)).log(), torch.log1p(-torch.exp(-far)))
    return torch.where(zero, torch.full_like(value, -math.inf), value)


def normal_log_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Φ(upper) − Φ(lower)) for lower <= upper, infinite ends allowed."""
    return _NormalMass.apply(*torch.broadcast_tensors(lower, upper))


def normal_log_density(x: Tensor) -> Tensor:
    """log φ(x); −inf without NaN gradients at ±inf."""
    finite = x.isfinite()
    inside = torch.where(finite, x, torch.zeros_like(x))
    return torch.where(finite, -0.5 * inside * inside - HALF_LOG_2PI, torch.full_like(x, -math.inf))


def narrow(lower: Tensor, upper: Tensor) -> Tensor:
    """Where differences of Φ lose digits: the density varies by less than a factor e over the interval."""
    width = upper - lower
    return width * (1 + torch.maximum(lower.abs(), upper.abs())) < 1


@lru_cache(maxsize=1)
def _nodes() -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(NODES)
    return torch.as_tensor(x), torch.as_tensor(w / 2)


def narrow_weights(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets t from the middle of narrow intervals, and w with ∫φ = φ(middle)·(upper − lower)·Σw."""
    x, w = (n.to(lower) for n in _nodes())
    middle, half = (lower + upper).unsqueeze(-1) / 2, (upper - lower).unsqueeze(-1) / 2
    offset = half * x
    return offset, w * torch.exp(-offset * (middle + offset / 2))


class _NormalMass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor) -> Tensor:
        ctx.save_for_backward(lower, upper)
        # Both ends on the left, where Φ keeps its digits.
        flip = lower > 0
        low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
        log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
        tail = log_high + log1mexp(torch.nan_to_num(log_high - log_low, nan=0.0, posinf=math.inf))
        middle = torch.log1p(-(torch.special.ndtr(low) + torch.special.ndtr(-high)))
        value = torch.where(high > 0, middle, tail)
        close = narrow(lower, upper)
        if bool(close.any()):
            a, b = lower[close], upper[close]
            _, w = narrow_weights(a, b)
            value[close] = normal_log_density((a + b) / 2) + (b - a).log() + w.sum(-1).log()
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        lower, upper = ctx.saved_tensors
        value = _NormalMass.apply(lower, upper)
        by_lower = -_ratio(normal_log_density(lower), value)
        by_upper = _ratio(normal_log_density(upper), value)
        return gradient * by_lower, gradient * by_upper


def _ratio(log_numerator: Tensor, log_denominator: Tensor) -> Tensor:
    """exp(difference), 0 where the numerator is 0 and where the denominator is."""
    empty = (log_numerator == -math.inf) | (log_denominator == -math.inf)
    difference = torch.where(empty, torch.zeros_like(log_numerator), log_numerator) - torch.where(
        empty, torch.zeros_like(log_denominator), log_denominator
    )
    return torch.where(empty, torch.zeros_like(difference), difference.exp())


def poisson_log_mass(rate: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """log P(lower <= Y <= upper), integers included; lower may be negative, upper infinite."""
    return _PoissonMass.apply(*torch.broadcast_tensors(rate, lower, upper))


def poisson_log_pmf(rate: Tensor, count: Tensor) -> Tensor:
    """log of the probability of a count; −inf below 0 and at infinity."""
    inside = (count >= 0) & count.isfinite()
    k = torch.where(inside, count, torch.zeros_like(count))
    value = torch.xlogy(k, rate) - rate - torch.lgamma(k + 1)
    return torch.where(inside, value, torch.full_like(value, -math.inf))


class _PoissonMass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rate: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        ctx.save_for_backward(rate, lower, upper)
        lower = lower.clamp(min=0)
        above = _poisson_at_least(rate, lower)
        beyond = _poisson_at_least(rate, upper + 1)
        at_most = _poisson_at_most(rate, upper)
        before = _poisson_at_most(rate, lower - 1)
        by_upper_tail = above + log1mexp((above - beyond).nan_to_num(nan=0.0))
        by_lower_tail = at_most + log1mexp((at_most - before).nan_to_num(nan=0.0))
        value = torch.where(lower > rate, by_upper_tail, by_lower_tail)
        empty = upper < lower
        few = ((upper - lower) < 64) & ~empty  # where one tail minus the other would cancel
        if bool(few.any()):
            value[few] = _poisson_sum(rate[few], lower[few], upper[few])
        return torch.where(empty, torch.full_like(value, -math.inf), value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        rate, lower, upper = ctx.saved_tensors
        value = _PoissonMass.apply(rate, lower, upper)
        enters = _ratio(poisson_log_pmf(rate, lower - 1), value)
        leaves = _ratio(poisson_log_pmf(rate, upper), value)
        return gradient * (enters - leaves), None, None


def _by_numpy(function: Any, shape: Tensor, rate: Tensor) -> Tensor:
    """scipy's incomplete gamma functions: torch's keep ten digits only."""
    return torch.as_tensor(function(shape.double().cpu().numpy(), rate.double().cpu().numpy())).to(rate)


def _poisson_at_least(rate: Tensor, count: Tensor) -> Tensor:
    """log P(Y >= count) = log of the regularised lower incomplete gamma function; a series where it underflows."""
    finite = torch.where(count.isfinite() & (count > 0), count, torch.ones_like(count))
    value = _by_numpy(scipy.special.gammainc, finite, rate).log()
    value = torch.where(finite == 1, log1mexp(rate), value)
    lost = (value < -600) & (rate > 0)
    if bool(lost.any()):
        k, r = finite[lost], rate[lost]
        value[lost] = poisson_log_pmf(r, k) + _series(lambda j: r / (k + j)).log()
    value = torch.where(count > 0, value, torch.zeros_like(value))
    return torch.where(count == math.inf, torch.full_like(value, -math.inf), value)


def _poisson_at_most(rate: Tensor, count: Tensor) -> Tensor:
    """log P(Y <= count)."""
    inside = (count >= 0) & count.isfinite()
    finite = torch.where(inside, count, torch.zeros_like(count))
    value = _by_numpy(scipy.special.gammaincc, finite + 1, rate).log()
    lost = value < -600
    if bool(lost.any()):
        k, r = finite[lost], rate[lost]
        value[lost] = poisson_log_pmf(r, k) + _series(lambda j: (k + 1 - j).clamp(min=0) / r).log()
    value = torch.where(inside, value, torch.full_like(value, -math.inf))
    return torch.where(count == math.inf, torch.zeros_like(value), value)


def _series(ratio: Callable[[int], Tensor]) -> Tensor:
    """1 + ratio(1) + ratio(1)·ratio(2) + ..., whose terms fall."""
    term = torch.ones_like(ratio(1))
    total = term.clone()
    for j in range(1, MAX_TERMS):
        term = term * ratio(j)
        total = total + term
        if bool((term <= 1e-17 * total).all()):
            break
    return total


def _poisson_sum(rate: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    total = poisson_log_pmf(rate, lower)
    for j in range(1, int((upper - lower).max()) + 1):
        term = poisson_log_pmf(rate, lower + j)
        total = torch.where(lower + j <= upper, torch.logaddexp(total, term), total)
    return total


def _standardised(limit: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """(limit − loc) / scale; an infinite limit passes no gradient (which would be 0·inf)."""
    finite = limit.isfinite()
    inside = (torch.where(finite, limit, torch.zeros_like(limit)) - loc) / scale
    return torch.where(finite, inside, limit.expand(inside.shape))


def _log(limit: Tensor) -> Tensor:
    """Logarithm of a limit, −inf at and below 0; limits are constants."""
    return limit.clamp(min=0).log()


def normal_limits(loc: Tensor, scale: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised limits."""
    return _standardised(lower, loc, scale), _standardised(upper, loc, scale)


def _by_hazard(below: Tensor, above: Tensor, unbounded: Tensor) -> Tensor:
    gap = torch.where(unbounded, torch.ones_like(above), above - below)
    return -below + torch.where(unbounded, torch.zeros_like(gap), log1mexp(gap))


def _exponential(base: Any, lower: Tensor, upper: Tensor) -> Tensor:
    lower, open_end = lower.clamp(min=0), upper == math.inf
    finite = torch.where(open_end, lower, upper)
    return _by_hazard(base.rate * lower, base.rate * finite, open_end)


def _weibull(base: Any, lower: Tensor, upper: Tensor) -> Tensor:
    open_end = upper == math.inf
    finite = torch.where(open_end, torch.ones_like(upper), upper)

    def hazard(limit: Tensor) -> Tensor:
        positive = limit > 0
        inside = torch.where(positive, limit, torch.ones_like(limit)) / base.scale
        return torch.where(positive, inside**base.concentration, torch.zeros_like(inside))

    return _by_hazard(hazard(lower), hazard(finite), open_end)


_MASSES: dict[type, Callable[[Any, Tensor, Tensor], Tensor]] = {
    dist.Normal: lambda base, a, b: normal_log_mass(*normal_limits(base.loc, base.scale, a, b)),
    dist.LogNormal: lambda base, a, b: normal_log_mass(*normal_limits(base.loc, base.scale, _log(a), _log(b))),
    dist.Exponential: _exponential,
    dist.Weibull: _weibull,
    dist.Poisson: lambda base, a, b: poisson_log_mass(base.rate, a, b),
}


def has_exact_mass(distribution: type) -> bool:
    """Whether probabilities of intervals of this class are exact, and twice differentiable in all arguments."""
    return distribution in _MASSES


def log_mass(base: Any, lower: Tensor, upper: Tensor) -> Tensor:
    """log P(lower <= Y <= upper) for Y ~ `base`, shape of its batch; infinite limits allowed.

    :raises NotImplementedError: if `base` is not in the table above and has no `cdf`.
    """
    own = _MASSES.get(type(base))
    if own is not None:
        return own(base, lower, upper)
    at_upper = _cdf(base, upper, upper == math.inf, 1.0)
    at_lower = _cdf(base, lower, lower == -math.inf, 0.0)
    mass = (at_upper - at_lower).clamp(min=0)
    positive = mass > 0
    return torch.where(positive, torch.where(positive, mass, 1.0).log(), -math.inf)


def _cdf(base: Any, limit: Tensor, infinite: Tensor, beyond: float) -> Tensor:
    """P(Y <= limit), with the value at an infinite limit put in (limits outside of the support clamp)."""
    some = base.mean.detach().expand(limit.shape)
    inside = torch.where(infinite, some, limit)
    low = getattr(base.support, "lower_bound", None)
    below = torch.zeros_like(infinite) if low is None else inside <= low
    inside = torch.where(below, some, inside)
    value: Tensor = base.cdf(inside)
    return torch.where(infinite, beyond, torch.where(below, 0.0, value))
