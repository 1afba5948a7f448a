"""Counts with more zeros than they should have: ZeroInflatedPoisson where it stays one density.

    p(0) = π + (1 − π) e^−λ,        p(x) = (1 − π) λ^x e^−λ / x!

The zeros of a row are summed in closed form. Mostly the site is unfolded into a latent of every row instead
(model/unfold.py), for which the M-step is closed; beside latents that quadrature integrates it stays whole, so that the
sum is inside of the integral, row by row at every node. No kernel: Newton's method moves gate and rate on this density.
"""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_em.families.base import Arguments, Family
from pyro_em.families.numerics import floats, weighted_log, weighted_log1m


class ZeroInflatedPoissonFamily(Family):
    """Poisson counts, and a zero instead with probability `gate`."""

    distribution = dist.ZeroInflatedPoisson
    arguments: ClassVar = {"rate": 0, "gate": 0, "gate_logits": 0}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        if args.get("gate_logits") is not None:
            rate, logits, x = floats(args["rate"], args["gate_logits"], value)
            gate, rest = torch.sigmoid(logits), logsigmoid(-logits)
        else:
            rate, gate, x = floats(args["rate"], args["gate"], value)
            rest = weighted_log1m(torch.ones_like(gate), gate)
        counted = rest + weighted_log(x, rate) - rate - torch.lgamma(x + 1)
        return torch.where(x == 0, _zero(rate, gate), counted)


def _zero(rate: Tensor, gate: Tensor) -> Tensor:
    """log(π + (1 − π) e^−λ), and −λ for π = 0 however large it is."""
    some = gate > 0
    share = torch.where(some, gate, 0.5)
    return torch.where(some, (share + (1 - share) * torch.exp(-rate)).log(), -rate)
