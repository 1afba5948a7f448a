"""Responses that are seen only in part: censored, interval-censored, truncated.

Y has the distribution `base`, with density or mass p and P(A) the probability of a set:

    Censored          the value is Y clamped to [lower, upper]:  p(y) inside,  P(Y <= lower) at the lower limit,
                      P(Y >= upper) at the upper one (a tobit response; right-censored survival times)
    IntervalCensored  the value is a pair (a, b) with a <= Y <= b:  p(a) if a = b,  otherwise P(a <= Y <= b)
    Truncated         Y is seen only if lower <= Y <= upper:  p(y) / P(lower <= Y <= upper)

Limits are constants, one number or one per row (a row without one has ∓inf), and belong to the interval; for counts
they are the first and last count. Probabilities come from mass.py, exact in the tails for Normal, LogNormal,
Exponential, Weibull and Poisson; other bases need a `cdf`.

Not handled here: sets other than intervals, and censoring that says more about Y than that it lies in the set.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_em.distributions.draw import draw_within
from pyro_em.distributions.mass import log_mass

Limit = Tensor | float


class _Clamped(constraints.Constraint):
    """Values of `base` within limits, the limits themselves included."""

    def __init__(self, base: Any, lower: Tensor, upper: Tensor) -> None:
        self.base, self.lower, self.upper = base, lower, upper
        self.is_discrete = base.is_discrete
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        inside = (value > self.lower) & (value < self.upper)
        return (value == self.lower) | (value == self.upper) | (inside & self.base.check(value))

    def __repr__(self) -> str:
        return f"{self.base} within the limits of the site"


class _Interval(constraints.Constraint):
    """Pairs a <= b; equal ends are a value of `base`."""

    event_dim = 1

    def __init__(self, base: Any) -> None:
        self.base = base
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        a, b = value[..., 0], value[..., 1]
        exact = (a == b) & self.base.check(a) & a.isfinite()
        return exact | ((a < b) & (a < math.inf) & (b > -math.inf))

    def __repr__(self) -> str:
        return f"pairs (a, b) with a <= b, and of {self.base} where they are equal"


class Coarse(TorchDistribution):
    """What the three have in common: a base distribution with a batch shape of its own or of the limits.

    >>> isinstance(Truncated(torch.distributions.Exponential(1.0), upper=2.0), Coarse)
    True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    infinite_values: ClassVar[bool] = False
    """Values may be infinite."""

    def _set_up(self, base: Any, lower: Limit, upper: Limit, event_shape: tuple[int, ...], validate: Any) -> None:
        if base.event_shape:
            raise ValueError(
                f"{type(self).__name__} got a {type(base).__name__} with event shape {tuple(base.event_shape)}; "
                "give a univariate one, and write .to_event outside."
            )
        like = base.mean if base.mean.is_floating_point() else torch.empty(())
        lower, upper = (torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in (lower, upper))
        batch = torch.broadcast_shapes(base.batch_shape, lower.shape, upper.shape)
        self.base, self.lower, self.upper = base.expand(batch), lower.expand(batch), upper.expand(batch)
        if validate is not False and not bool((self.lower < self.upper).all()):
            raise ValueError(f"{type(self).__name__} got a lower limit that is not below the upper one.")
        super().__init__(batch, torch.Size(event_shape), validate_args=validate)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        batch = torch.Size(batch_shape)
        new.base, new.lower, new.upper = self.base.expand(batch), self.lower.expand(batch), self.upper.expand(batch)
        super(Coarse, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._log_prob(value)

    def _log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _density(self, value: Tensor, where: Tensor) -> Tensor:
        """log p(value) where asked; elsewhere the value is replaced by one that has a density."""
        some = next(x for x in (1.0, 0.5, 0.0) if bool(self.base.support.check(value.new_tensor(x)).all()))
        result: Tensor = self.base.log_prob(torch.where(where, value, some))
        return result


class _Between(Coarse):
    """A number with a lower and an upper limit."""

    def __init__(
        self, base: Any, lower: Limit = -math.inf, upper: Limit = math.inf, validate_args: bool | None = None
    ) -> None:
        self._set_up(base, lower, upper, (), validate_args)

    @property
    def support(self) -> Any:
        return _Clamped(self.base.support, self.lower, self.upper)


class Censored(_Between):
    """`base` clamped to [lower, upper] (Tobin 1958).

    A value at a limit says no more than that Y lies there or beyond. Right-censored durations have
    `upper=torch.where(failed, math.inf, duration)`, with the duration as the value of every row.

    >>> import pyro.distributions as dist
    >>> Censored(dist.Normal(0.0, 1.0), lower=0.0).log_prob(torch.tensor([0.0, 1.0]))
    tensor([-0.6931, -1.4189])

    :raises ValueError: if `base` is not univariate, or a lower limit is not below the upper one.
    """

    def _log_prob(self, value: Tensor) -> Tensor:
        low, high = value <= self.lower, value >= self.upper
        infinite = torch.full_like(self.lower, math.inf)
        result = self._density(value, ~low & ~high)
        # A limit that is not reached may be infinite, where derivatives are no numbers: the value stands in for it.
        if bool(low.any()):
            result = torch.where(low, log_mass(self.base, -infinite, torch.where(low, self.lower, value)), result)
        if bool(high.any()):
            result = torch.where(high, log_mass(self.base, torch.where(high, self.upper, value), infinite), result)
        return result

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            drawn: Tensor = self.base.sample(sample_shape)
            return torch.minimum(torch.maximum(drawn, self.lower), self.upper)


class Truncated(_Between):
    """`base` given that its value lies in [lower, upper]; a zero-truncated count has `lower=1`.

    >>> import pyro.distributions as dist
    >>> Truncated(dist.Poisson(1.0), lower=1).log_prob(torch.tensor([1.0, 2.0]))
    tensor([-0.5413, -1.2345])

    :raises ValueError: if `base` is not univariate, or a lower limit is not below the upper one.
    """

    def _log_prob(self, value: Tensor) -> Tensor:
        inside = (value >= self.lower) & (value <= self.upper)
        result = self._density(value, inside) - log_mass(self.base, self.lower, self.upper)
        return torch.where(inside, result, -math.inf)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return draw_within(self.base, self.lower, self.upper, torch.Size(sample_shape))


class IntervalCensored(Coarse):
    """`base` of which an interval (a, b) around the value was recorded, a pair in the last dim.

    Equal ends are an exact value, infinite ones are allowed: (−inf, b) is left-censored, (a, inf) right-censored.
    A draw has equal ends, as nothing is said here of how intervals come about.

    >>> import pyro.distributions as dist
    >>> IntervalCensored(dist.Normal(0.0, 1.0)).log_prob(torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
    tensor([-0.3817, -0.9189])
    """

    infinite_values = True

    def __init__(self, base: Any, validate_args: bool | None = None) -> None:
        self._set_up(base, -math.inf, math.inf, (2,), validate_args)

    @property
    def support(self) -> Any:
        return _Interval(self.base.support)

    def _log_prob(self, value: Tensor) -> Tensor:
        a, b = value[..., 0], value[..., 1]
        exact = a == b
        a, b = torch.where(exact, -math.inf, a), torch.where(exact, math.inf, b)
        return torch.where(exact, self._density(value[..., 0], exact), log_mass(self.base, a, b))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            drawn: Tensor = self.base.sample(sample_shape)
            return torch.stack([drawn, drawn], -1)
