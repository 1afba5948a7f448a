"""Priors of probabilities: Beta (a−1) log p + (b−1) log(1−p), and Dirichlet Σ_k (a_k−1) log p_k.

The concentration of a Dirichlet has a kernel in the mean logarithms (kernels/concentration.py); those of a Beta are two
arguments, which Newton's method moves together. On the boundary the density is 0, finite or infinite as
a is above, at or below 1; at exactly 1 it is flat, with gradient 0 where torch gives NaN.
"""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.base import Arguments, Family, Moments, Statistic
from pyro_em.families.numerics import floats, weighted_log, weighted_log1m
from pyro_em.kernels import BetaKernel, DirichletKernel, SimplexKernel


class BetaFamily(Family):
    """Prior of a probability."""

    distribution = dist.Beta
    arguments: ClassVar = {"concentration1": 0, "concentration0": 0}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        a, b, value = floats(args["concentration1"], args["concentration0"], value)
        log_norm = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        return weighted_log(a - 1, value) + weighted_log1m(b - 1, value) + log_norm

    def value_kernel(self, args: Arguments) -> BetaKernel:
        a, b = floats(args["concentration1"], args["concentration0"])
        return BetaKernel(a - 1, b - 1)


class DirichletFamily(Family):
    """A row of probabilities."""

    distribution = dist.Dirichlet
    event_dim = 1
    arguments: ClassVar = {"concentration": 1}
    closed = frozenset({"concentration"})
    by_row = frozenset({"concentration"})

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        a, value = floats(args["concentration"], value)
        log_norm = torch.lgamma(a.sum(-1)) - torch.lgamma(a).sum(-1)
        return weighted_log(a - 1, value).sum(-1) + log_norm

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[Statistic, ...]:
        return (Statistic((value.log(),), 1),)

    def kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> DirichletKernel | None:
        return DirichletKernel(*floats(moments[0], moments[1])) if argument == "concentration" else None

    def value_kernel(self, args: Arguments) -> SimplexKernel:
        (a,) = floats(args["concentration"])
        return SimplexKernel(a - 1)
