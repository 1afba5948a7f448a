"""Beta and beta-binomial data by mean and precision: the same densities in the arguments that regressions move.

    μ = a / (a + b),    φ = a + b,        a = μ φ,    b = (1 − μ) φ           (Ferrari and Cribari-Neto 2004)

A regression for the mean moves both concentrations, each a product of parameters; μ is a link of something linear and φ
an entry of a parameter. Which sites are seen so is decided by what enters their arguments (model/by_mean.py).

Derivatives of φ in a parameter that enters μ alone are sums of two terms that cancel up to rounding, and so are those
of μ in one that enters φ alone: what a difference of two terms leaves within their rounding is 0 here, so that what
does not reach an argument has no derivative in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.families.base import Arguments, Family
from pyro_em.families.dirichlet import BetaFamily
from pyro_em.families.numerics import floats, weighted_log, weighted_log1m
from pyro_em.families.overdispersed import BetaBinomialFamily, log_rising

MARK = "_pyro_em_by_mean"  # in `infer` of such a site: the dims that its precision loses
ROUNDING = 64  # units in the last place of the terms of a difference


class Beta:
    """What the family below is called, and the spaces of its arguments."""

    arg_constraints: ClassVar = {"mean": constraints.unit_interval, "precision": constraints.positive}


class BetaBinomial:
    """The same of counts."""

    arg_constraints: ClassVar = {
        "mean": constraints.unit_interval,
        "precision": constraints.positive,
        "total_count": constraints.nonnegative_integer,
    }


class BetaByMeanFamily(Family):
    """Shares with mean and precision; what depends on the precision alone is evaluated once for each of its entries."""

    distribution = Beta
    arguments: ClassVar = {"mean": 0, "precision": 0}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        mean, precision, x = floats(args["mean"], args["precision"], value)
        a, b = mean * precision, (1 - mean) * precision
        log_norm = torch.lgamma(precision) - torch.lgamma(a) - torch.lgamma(b)
        return weighted_log(a - 1, x) + weighted_log1m(b - 1, x) + log_norm


class BetaBinomialByMeanFamily(Family):
    """Overdispersed successes with mean and precision."""

    distribution = BetaBinomial
    arguments: ClassVar = {"mean": 0, "precision": 0, "total_count": 0}

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        mean, precision, n, x = floats(args["mean"], args["precision"], args.get("total_count", 1), value)
        choose = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        failures = log_rising((1 - mean) * precision, n - x)
        return choose + log_rising(mean * precision, x) + failures - log_rising(precision, n)


BY_MEAN: dict[type[Family], Family] = {
    BetaFamily: BetaByMeanFamily(),
    BetaBinomialFamily: BetaBinomialByMeanFamily(),
}


def seen_so(
    family: Family, raw: Mapping[str, Any], infer: Mapping[str, Any], elements: int
) -> tuple[Family, Mapping[str, Any]]:
    """Family and arguments of a site, by mean and precision if `infer` has the mark.

    :param elements: dims that `.to_event` declares.
    """
    if MARK not in infer:
        return family, raw
    a, b = torch.broadcast_tensors(*floats(raw["concentration1"], raw["concentration0"]))
    precision: Tensor = _Sum.apply(a, b)
    for dim in infer[MARK]:
        if (axis := precision.dim() - elements + dim) >= 0:
            precision = precision.narrow(axis, 0, 1)
    while precision.dim() > elements and precision.shape[0] == 1:
        precision = precision.squeeze(0)
    rest = {name: value for name, value in raw.items() if not name.startswith("concentration")}
    return BY_MEAN[type(family)], {"mean": _Mean.apply(a, b), "precision": precision, **rest}


def _left(one: Tensor, two: Tensor) -> Tensor:
    """one − two, and 0 where that is their rounding."""
    found = one - two
    small = ROUNDING * torch.finfo(found.dtype).eps * (one.abs() + two.abs())
    return torch.where(found.abs() <= small, 0.0, found)


class _Mean(torch.autograd.Function):
    """a / (a + b)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a / (a + b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _MeanBack.apply(g, *ctx.saved_tensors)


class _MeanBack(torch.autograd.Function):
    """g b / (a + b)² and −g a / (a + b)², whose own derivative in g is where terms cancel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        scaled = g / (a + b) ** 2
        return scaled * b, -scaled * a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, da: Tensor, db: Tensor) -> Any:
        g, a, b = ctx.saved_tensors
        total = a + b
        along = _left(da * b, db * a) / total**2
        return along, g * (-db / total**2 - 2 * along / total), g * (da / total**2 - 2 * along / total)


class _Sum(torch.autograd.Function):
    """a + b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a + b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _SumBack.apply(g)


class _SumBack(torch.autograd.Function):
    """g twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor) -> tuple[Tensor, Tensor]:
        return g.clone(), g.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, da: Tensor, db: Tensor) -> Any:
        return _left(da, -db)
