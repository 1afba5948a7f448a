"""Families of responses seen only in part (distributions/coarse.py): the latent response is integrated out.

With y the complete response and o what was observed of it, log p(o | args) = log ∫_{y ∈ o} p(y | args), and one
E-step for y at the current arguments gives the expected complete-data statistics

    Censored, IntervalCensored   E[T(y) | y in the set]                  (T(y) itself where y was seen)
    Truncated                    T(y) + E[number unseen] · E[T(Y) | unseen],   E[number unseen] = (1 − P) / P

(Dempster, Laird & Rubin 1977, section 4.2; Tobin 1958). They enter the kernels of the complete-data family, so the
M-step is that of the uncensored model; by Fisher's identity its gradient at the current arguments is that of
log p(o | args). Statistics therefore depend on the arguments, and are taken afresh at every E-step.

Not handled here: bases without expected statistics in moments.py; their arguments are maximised numerically.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pyro_em.distributions import Censored, Coarse, IntervalCensored, Truncated
from pyro_em.distributions.mass import log_mass
from pyro_em.families.base import Arguments, Family, Link, Moments, Statistic
from pyro_em.families.moments import EXPECTED, outside
from pyro_em.families.numerics import floats
from pyro_em.kernels import Kernel


class ResponseFamily(Family):
    """The family `complete`, seen through `coarse`; made by `families.family_for`."""

    latent_response = True

    def __init__(self, complete: Family, coarse: type[Coarse]) -> None:
        self.complete, self.coarse = complete, coarse
        self.distribution = coarse  # type: ignore[misc]
        self.arguments = complete.arguments  # type: ignore[misc]
        self.links = complete.links  # type: ignore[misc]
        self.closed = complete.closed  # type: ignore[misc]
        self.centered = complete.centered  # type: ignore[misc]
        self.event_dim = 1 if coarse is IntervalCensored else 0  # type: ignore[misc]

    @property
    def name(self) -> str:
        return f"{self.coarse.__name__} {self.complete.name}"

    def _base(self, args: Arguments) -> Any:
        kept = dict(zip(self.arguments, floats(*(args[n] for n in self.arguments)), strict=True))
        return self.complete.distribution(**kept, validate_args=False)

    def _limits(self, args: Arguments, like: Tensor) -> tuple[Tensor, Tensor]:
        found = (args.get("lower", -torch.inf), args.get("upper", torch.inf))
        lower, upper = (torch.as_tensor(x).to(like) for x in found)
        return lower, upper

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        base, make = self._base(args), cast(Any, self.coarse)
        limits = () if self.coarse is IntervalCensored else self._limits(args, base.mean)
        law: Coarse = make(base, *limits, validate_args=False)
        return law.log_prob(value)

    @property
    def location_dim(self) -> int:
        return self.complete.location_dim

    def location(self, value: Tensor) -> Tensor:
        """Where the observation lies: a limit, or the middle of an interval."""
        if self.coarse is not IntervalCensored:
            return self.complete.location(value)
        a, b = value[..., 0], value[..., 1]
        middle = torch.where(a.isfinite() & b.isfinite(), (a + b) / 2, torch.where(a.isfinite(), a, b))
        return self.complete.location(middle)

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        """Expected statistics of a complete observation: per one of `complete_count`."""
        args = args or {}
        names = tuple(self.arguments)
        own = dict(zip(names, floats(*(args[n] for n in names), torch.zeros((), dtype=value.dtype)), strict=False))
        if self.coarse is Truncated:
            return self._untruncated(value, own, *self._limits(args, value), center)
        if self.coarse is Censored:
            lower, upper = self._limits(args, value)
            low, high = value <= lower, value >= upper
            seen, shown = ~low & ~high, value
            a = torch.where(low, -torch.inf, torch.where(high, upper, -torch.inf))
            b = torch.where(high, torch.inf, torch.where(low, lower, torch.inf))
        else:
            a, b = value[..., 0], value[..., 1]
            seen, shown = a == b, a
            a, b = torch.where(seen, -torch.inf, a), torch.where(seen, torch.inf, b)
        # What was not seen is replaced by a value that has statistics, before the logarithm of some family meets it.
        complete = self.complete.statistics(torch.where(seen, shown, torch.ones_like(shown)), args, center)
        expected = EXPECTED[self.complete.name](own, a, b, center)
        pairs = zip(complete, expected, strict=True)
        return tuple(Statistic((torch.where(seen, c.dense(), e),)) for c, e in pairs)

    def complete_count(self, args: Arguments) -> Tensor | float:
        """1 / P of the limits under truncation."""
        if self.coarse is not Truncated:
            return 1.0
        base = self._base(args)
        return 1 + sum(unseen for _, _, unseen in self._unseen(base, *self._limits(args, base.mean)))

    def _unseen(self, base: Any, lower: Tensor, upper: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Below and above the limits: the interval, and the expected number there for each one that was seen."""
        batch = torch.broadcast_shapes(base.batch_shape, lower.shape, upper.shape)
        base, lower, upper = base.expand(batch), lower.expand(batch), upper.expand(batch)
        inside = log_mass(base, lower, upper)
        pieces = outside(self.complete.name, lower, upper)
        return [(a, b, (log_mass(base, a, b) - inside).exp()) for a, b in pieces]

    def _untruncated(
        self, value: Tensor, args: Arguments, lower: Tensor, upper: Tensor, center: Tensor | None
    ) -> tuple[Statistic, ...]:
        totals = [s.dense() for s in self.complete.statistics(value, args, center)]
        count: Tensor | float = 1.0
        for a, b, unseen in self._unseen(self._base(args), lower, upper):
            some = unseen > 0  # an empty piece has no moments
            count = count + unseen
            expected = EXPECTED[self.complete.name](args, a, b, center)
            zero = torch.zeros_like(unseen)
            totals = [t + torch.where(some, unseen * e, zero) for t, e in zip(totals, expected, strict=True)]
        return tuple(Statistic((total / count,)) for total in totals)

    def kernel(self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None) -> Kernel | None:
        return self.complete.kernel(argument, moments, args, center)

    def link(self, argument: str) -> Link:
        return self.complete.link(argument)
