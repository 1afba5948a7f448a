"""Counts whose rate or probabilities were integrated out: negative binomial, beta-binomial, Dirichlet-multinomial.

With the rising factorial a⁽ˣ⁾ = Γ(a + x)/Γ(a) and n the total of a row

    GammaPoisson            a⁽ˣ⁾ / x!  (b/(1+b))^a (1+b)^−x                    concentration a, rate b
    BetaBinomial            C(n, x)  a⁽ˣ⁾ b⁽ⁿ⁻ˣ⁾ / (a+b)⁽ⁿ⁾                     concentrations a, b
    DirichletMultinomial    n!/Π x_k!  Π_k α_k⁽ˣᵏ⁾ / (Σα)⁽ⁿ⁾                     concentration α

No statistic of fixed size holds the data, so that there is no kernel: Newton's method moves the concentrations on these
densities (m_step/predictors.py). They are written so that they keep their digits as concentrations grow and the family
tends to its limit (Poisson, binomial, multinomial), where the maximum may lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.base import Arguments, Family
from pyro_em.families.numerics import floats

LARGE = 30.0  # above which Stirling's series, five terms of it, is exact in float64


class GammaPoissonFamily(Family):
    """Poisson counts whose rate is Gamma distributed."""

    distribution = dist.GammaPoisson
    arguments: ClassVar = {"concentration": 0, "rate": 0}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        a, b, x = floats(args["concentration"], args["rate"], value)
        return log_rising(a, x) - torch.lgamma(x + 1) - a * torch.log1p(1 / b) - x * torch.log1p(b)


class BetaBinomialFamily(Family):
    """Successes among n trials whose probability is Beta distributed."""

    distribution = dist.BetaBinomial
    arguments: ClassVar = {"concentration1": 0, "concentration0": 0, "total_count": 0}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        a, b, n, x = floats(args["concentration1"], args["concentration0"], args.get("total_count", 1), value)
        choose = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        return choose + log_rising(a, x) + log_rising(b, n - x) - log_rising(a + b, n)


class DirichletMultinomialFamily(Family):
    """Counts of categories whose probabilities are Dirichlet distributed."""

    distribution = dist.DirichletMultinomial
    event_dim = 1
    arguments: ClassVar = {"concentration": 1}
    by_row = frozenset({"concentration"})

    def accepts(self, raw: Mapping[str, Any]) -> bool:
        return not raw.get("is_sparse", False)

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        a, x = floats(args["concentration"], value)
        total = x.sum(-1)
        choose = torch.lgamma(total + 1) - torch.lgamma(x + 1).sum(-1)
        return choose + log_rising(a, x).sum(-1) - log_rising(a.sum(-1), total)


def log_rising(a: Tensor, x: Tensor) -> Tensor:
    """log Γ(a + x) − log Γ(a) for a > 0, x ≥ 0, whose difference would lose its digits as a grows.

    Above `LARGE` both are Stirling's, subtracted term by term:
    (a − ½) log(1 + x/a) + x log(a + x) − x + s(a + x) − s(a), s(z) = 1/(12 z) − 1/(360 z³) + ...
    """
    a, x = torch.broadcast_tensors(a, x)
    large = a > LARGE
    near, far = torch.where(large, 1.0, a), torch.where(large, a, LARGE)
    series = (far - 0.5) * torch.log1p(x / far) + x * (far + x).log() - x + _stirling(far + x) - _stirling(far)
    return torch.where(large, series, torch.lgamma(near + x) - torch.lgamma(near))


def _stirling(z: Tensor) -> Tensor:
    inverse = z.reciprocal()
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188))))
