"""Families on a simplex: Σ_k x_k log p_k with x one-hot (as an index or a row) or a row of counts.

`probs` are normalised first, as torch does, so any positive multiple of a row is the same argument.
A probability of exactly 0 scores exactly −inf where it is needed (torch clamps it to about −36).
"""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.base import (
    NORMALISED,
    SOFTMAX,
    AnyStatistic,
    Arguments,
    Family,
    Moments,
    OneHotStatistic,
    Statistic,
)
from pyro_em.families.numerics import floats, real, weighted, weighted_log
from pyro_em.kernels import SimplexKernel
from pyro_em.shapes import broadcast_shapes
from pyro_em.softmax import log_softmax


class SimplexFamily(Family):
    """Σ_k x_k log p_k, for any of the three."""

    arguments: ClassVar = {"probs": 1, "logits": 1}
    links: ClassVar = {"probs": NORMALISED, "logits": SOFTMAX}
    closed = frozenset({"probs", "logits"})

    def kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> SimplexKernel | None:
        return SimplexKernel(moments[1]) if argument in self.closed else None


class CategoricalFamily(SimplexFamily):
    """One draw, given as its index."""

    distribution = dist.Categorical

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        table = NORMALISED.to_canonical(args["probs"]) if "probs" in args else log_softmax(args["logits"])
        shape = broadcast_shapes(value.shape, table.shape[:-1])
        index = value.long().expand(shape).unsqueeze(-1)
        picked = table.expand(shape + table.shape[-1:]).gather(-1, index).squeeze(-1)
        return weighted_log(torch.ones_like(picked), picked) if "probs" in args else picked

    def log_prob_of_all(self, args: Arguments, value: Tensor) -> Tensor:
        table = NORMALISED.to_canonical(args["probs"]).log() if "probs" in args else log_softmax(args["logits"])
        depth = max(value.dim(), table.dim() - 1)
        table = table.reshape((1,) * (depth + 1 - table.dim()) + tuple(table.shape))
        if table.shape[depth - value.dim()] != 1:  # the probabilities vary along the values' own dim
            return self.log_prob(args, value)
        return table.transpose(depth - value.dim(), -1).squeeze(-1)

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[AnyStatistic, ...]:
        """`args` must hold `probs` or `logits`, for the number of categories."""
        args = args or {}
        return (OneHotStatistic(value.long(), args["probs" if "probs" in args else "logits"].shape[-1]),)


class CountsFamily(SimplexFamily):
    """Rows of counts."""

    event_dim = 1

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        if "probs" in args:
            probs, value = floats(args["probs"], value)
            log_mass = weighted_log(value, NORMALISED.to_canonical(probs)).sum(-1)
        else:
            logits, value = floats(args["logits"], value)
            log_mass = weighted(value, log_softmax(logits)).sum(-1)
        # The number of arrangements: 0 in the log for a one-hot row.
        return log_mass + torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1)

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[AnyStatistic, ...]:
        return (Statistic((real(value),), factor_dim=1),)


class OneHotCategoricalFamily(CountsFamily):
    """One draw, given as a one-hot row."""

    distribution = dist.OneHotCategorical


class MultinomialFamily(CountsFamily):
    """Counts of several draws."""

    distribution = dist.Multinomial
