"""Families of responses seen only in part (distributions/coarse.py): the latent response is integrated out.

With y the complete response and o what was observed of it, log p(o | args) = log ∫_{y ∈ o} p(y | args), and one
E-step for y at the current arguments gives the expected complete-data statistics

    Censored, IntervalCensored   E[T(y) | y in the set]                  (T(y) itself where y was seen)
    Truncated                    T(y) + E[number unseen] · E[T(Y) | unseen],   E[number unseen] = (1 − P) / P

(Dempster, Laird & Rubin 1977, section 4.2; Tobin 1958). They enter the kernels of the complete-data family, so the
M-step is that of the uncensored model; by Fisher's identity its gradient at the current arguments is that of
log p(o | args). Statistics therefore depend on the arguments, and are taken afresh at every E-step.

A base without expected statistics in moments.py (Weibull) has no complete data here: `ObservedFamily` leaves Q with
log p(o | args), for Newton's method. Bases whose probabilities of intervals are not exact (mass.py) have no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pyro_em.distributions import Censored, Coarse, IntervalCensored, Truncated
from pyro_em.distributions.mass import log_mass
from pyro_em.families.base import Arguments, Family, Link, Moments, Statistic
from pyro_em.families.moments import EXPECTED, outside
from pyro_em.families.numerics import floats
from pyro_em.kernels import Kernel
from pyro_em.shapes import broadcast_shapes

_Function = Callable[[Mapping[str, Tensor], Tensor, Tensor], Sequence[Tensor]]


CENTER = "center"


@dataclass(frozen=True)
class _Hidden:
    """Cells of the data whose response was not seen: it lies in [lower, upper]."""

    mask: Tensor
    lower: Tensor
    upper: Tensor

    def filled(self, seen: Sequence[Tensor], args: Mapping[str, Tensor], hidden: _Function) -> list[Tensor]:
        """Tensors over the cells with what is so at those that were not seen; only there it is computed.

        :param hidden: of arguments and limits at these cells, one after the other.
        """
        shape = broadcast_shapes(self.mask.shape, *(x.shape for x in (*seen, *args.values())))
        index = self.mask.expand(shape).reshape(-1).nonzero().squeeze(-1)
        if not len(index):
            return list(seen)

        def at(x: Tensor) -> Tensor:
            return x.expand(shape).reshape(-1)[index]

        found = hidden({name: at(x) for name, x in args.items()}, at(self.lower), at(self.upper))
        pairs = zip(seen, found, strict=True)
        return [x.expand(shape).reshape(-1).index_copy(0, index, own.to(x)).reshape(shape) for x, own in pairs]


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
        return self.complete.distribution(**{n: args[n] for n in self.arguments}, validate_args=False)

    def _floats(self, args: Arguments, value: Tensor) -> dict[str, Tensor]:
        """The complete response's arguments in one floating type."""
        like = torch.zeros((), dtype=value.dtype)
        return dict(zip(self.arguments, floats(*(args[n] for n in self.arguments), like), strict=False))

    def _limits(self, args: Arguments, like: Tensor) -> tuple[Tensor, Tensor]:
        found = (args.get("lower", -torch.inf), args.get("upper", torch.inf))
        lower, upper = (torch.as_tensor(x).to(like) for x in found)
        return lower, upper

    def bounded(self, argument: str) -> bool:
        return self.complete.bounded(argument)

    def at_edge(self, argument: str, value: Tensor, share: float) -> bool:
        return self.complete.at_edge(argument, value, share)

    def outside(self, args: Arguments) -> Tensor | None:
        return self.complete.outside(args)

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        own = self._floats(args, value)
        if self.coarse is Truncated:
            base, make = self._base(own), cast(Any, self.coarse)
            law: Coarse = make(base, *self._limits(args, base.mean), validate_args=False)
            return law.log_prob(value)
        shown, hidden = self._split(args, value)
        density = self.complete.log_prob(args, shown)
        (found,) = hidden.filled([density], own, lambda at, a, b: [log_mass(self._base(at), a, b)])
        return found

    def _split(self, args: Arguments, value: Tensor) -> tuple[Tensor, _Hidden]:
        """Values that were seen (of the others one that has a density), and the sets of those that were not."""
        if self.coarse is Censored:
            lower, upper = self._limits(args, value)
            low, high = value <= lower, value >= upper
            a = torch.where(low, -torch.inf, torch.where(high, upper, -torch.inf))
            b = torch.where(high, torch.inf, torch.where(low, lower, torch.inf))
            seen, shown = ~low & ~high, value
        else:
            a, b = value[..., 0], value[..., 1]
            seen, shown = a == b, a
        return torch.where(seen, shown, torch.ones_like(shown)), _Hidden(~seen, a, b)

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
        own = self._floats(args, value)
        if self.coarse is Truncated:
            return self._untruncated(value, own, *self._limits(args, value), center)
        shown, hidden = self._split(args, value)
        complete = [statistic.dense() for statistic in self.complete.statistics(shown, args, center)]
        expected = EXPECTED[self.complete.name]
        around = {} if center is None else {CENTER: center}
        found = hidden.filled(complete, own | around, lambda at, a, b: expected(at, a, b, at.get(CENTER)))
        return tuple(Statistic((x,)) for x in found)

    def complete_count(self, args: Arguments) -> Tensor | float:
        """1 / P of the limits under truncation."""
        if self.coarse is not Truncated:
            return 1.0
        base = self._base(self._floats(args, torch.zeros(())))
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


class ObservedFamily(ResponseFamily):
    """The same where the complete response has no expected statistics: Q is that of what was observed."""

    latent_response = False

    def __init__(self, complete: Family, coarse: type[Coarse]) -> None:
        super().__init__(complete, coarse)
        self.closed, self.centered = frozenset(), False  # type: ignore[misc]

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        return ()

    def kernel(self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None) -> Kernel | None:
        return None
