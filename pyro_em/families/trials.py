"""Families of Bernoulli trials: a successes and b failures, with log mass

    a log p + b log(1 − p) + base measure

    family            a      b
    Bernoulli         x      1 − x
    Binomial          x      n − x
    Geometric         1      x          (x failures before the first success)
    NegativeBinomial  x      n          (x successes before n failures, as in torch)

The total count n has no closed form; it enters the statistics at the level of the values.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_em.families.base import LOGIT, Arguments, Family, Moments, Statistic
from pyro_em.families.numerics import floats, log_rising, real, weighted, weighted_log, weighted_log1m
from pyro_em.kernels import BetaKernel


class TrialsFamily(Family):
    """a log p + b log(1 − p), for any of the four."""

    arguments: ClassVar = {"probs": 0, "logits": 0}
    links: ClassVar = {"logits": LOGIT}
    closed = frozenset({"probs", "logits"})

    @abstractmethod
    def trials(self, value: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
        """Successes a and failures b."""

    def log_base(self, value: Tensor, args: Arguments) -> Tensor:
        """The part of the log mass without p."""
        return torch.zeros_like(value)

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        name = "probs" if "probs" in args else "logits"
        argument, value = floats(args[name], value)
        successes, failures = self.trials(value, args)
        base = self.log_base(value, args)
        if name == "probs":
            return weighted_log(successes, argument) + weighted_log1m(failures, argument) + base
        return weighted(successes, logsigmoid(argument)) + weighted(failures, logsigmoid(-argument)) + base

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        successes, failures = self.trials(real(value), args or {})
        return Statistic((successes,)), Statistic((failures,))

    def kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> BetaKernel | None:
        return BetaKernel(moments[1], moments[2]) if argument in self.closed else None


class BernoulliFamily(TrialsFamily):
    """One trial."""

    distribution = dist.Bernoulli

    def trials(self, value: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
        return value, 1 - value


class GeometricFamily(TrialsFamily):
    """Failures before the first success."""

    distribution = dist.Geometric

    def trials(self, value: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
        return torch.ones_like(value), value


class BinomialFamily(TrialsFamily):
    """Successes among n trials."""

    distribution = dist.Binomial
    arguments: ClassVar = {"total_count": 0, "probs": 0, "logits": 0}

    def trials(self, value: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
        return value, _total_count(value, args) - value

    def log_base(self, value: Tensor, args: Arguments) -> Tensor:
        total = _total_count(value, args)
        return torch.lgamma(total + 1) - torch.lgamma(value + 1) - torch.lgamma(total - value + 1)


class NegativeBinomialFamily(TrialsFamily):
    """Successes before the n-th failure."""

    distribution = dist.NegativeBinomial
    arguments: ClassVar = {"total_count": 0, "probs": 0, "logits": 0}

    def trials(self, value: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
        successes, failures = torch.broadcast_tensors(value, _total_count(value, args))
        return successes, failures

    def log_base(self, value: Tensor, args: Arguments) -> Tensor:
        total = _total_count(value, args)
        # n = 0 is a point mass at x = 0, where lgamma(n + x) − lgamma(n) would be inf − inf.
        certain = (total + value) == 0
        total = torch.where(certain, torch.ones_like(total), total)
        return log_rising(total, value) - torch.lgamma(value + 1)


def _total_count(value: Tensor, args: Arguments) -> Tensor:
    # 1 is the default of torch's Binomial; NegativeBinomial has no default.
    return torch.as_tensor(args.get("total_count", 1), dtype=value.dtype)
