"""Ordered categories: a logistic variable cut at K − 1 points (proportional odds, McCullagh 1980; Samejima 1969).

    P(y ≤ k) = σ(c_k − η),      log P(y = k) = log σ(u) + log σ(−l) + log(1 − e^{l−u}),   l = c_{k−1} − η < u = c_k − η

with l = −∞ for the first category and u = ∞ for the last. The second form keeps the digits of a difference of
probabilities. It is concave in (c, η): Newton's method moves the cut points of the rows, of which the predictor is a
part (equivalents.py writes η into them), on this density. There is no kernel.

Shapes: predictor U, cutpoints U + (K − 1,), increasing.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_em.families.base import Arguments, Family
from pyro_em.families.numerics import floats
from pyro_em.shapes import broadcast_shapes

CUTS = "cutpoints"
ROUNDINGS = 8  # of the largest cut point, from which a predictor was subtracted


class OrderedLogisticFamily(Family):
    """One draw, given as its index."""

    distribution = dist.OrderedLogistic
    arguments: ClassVar = {"predictor": 0, CUTS: 1}
    by_row = frozenset({CUTS})

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        cuts, eta = floats(args[CUTS], args["predictor"])
        cuts = cuts - eta.unsqueeze(-1)
        last = cuts.shape[-1]
        shape = broadcast_shapes(value.shape, cuts.shape[:-1])
        k, cuts = value.long().expand(shape), cuts.expand(*shape, last)
        upper, lower = (cuts.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (k.clamp(max=last - 1), (k - 1).clamp(0)))
        inside = (k > 0) & (k < last)
        gap = torch.where(inside, upper - lower, 1.0)
        found = torch.where(k < last, logsigmoid(upper), 0.0) + torch.where(k > 0, logsigmoid(-lower), 0.0)
        return found + torch.where(inside, _log_one_minus_exp(gap), 0.0)

    def bounded(self, argument: str) -> bool:
        return argument == CUTS

    def at_edge(self, argument: str, value: Tensor, share: float) -> bool:
        return bool((value.diff() <= share * value.abs().amax()).any())

    def outside(self, args: Arguments) -> Tensor | None:
        """Cut points that decrease. They may be equal, up to rounding: the category between them has probability 0."""
        cuts: Any = args.get(CUTS)
        if cuts is None:
            return None
        rounding = ROUNDINGS * torch.finfo(cuts.dtype).eps * cuts.abs().amax(-1, keepdim=True)
        return (cuts.diff() < -rounding).any(-1) | cuts.isnan().any(-1)


def _log_one_minus_exp(gap: Tensor) -> Tensor:
    """log(1 − e^{−gap}), −∞ from a gap of 0 on."""
    positive = gap > 0
    safe = torch.where(positive, gap, 1.0)
    return torch.where(positive, torch.log(-torch.expm1(-safe)), -torch.inf)
