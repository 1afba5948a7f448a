"""Log-densities as inner products: log p(x|args) = Σ_j <η_j(args), T_j(x)> - A(args) + h(x).

T_j are the family's own sufficient statistics (families/), so that one matrix product gives the log-density
of every row under every cell of arguments, and its transpose the moments that the M-step needs. A family
that is missing here is served by another engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.families import Family
from pyro_em.families.categorical import CategoricalFamily, MultinomialFamily, OneHotCategoricalFamily
from pyro_em.families.circular import VonMisesFamily
from pyro_em.families.multivariate_normal import MultivariateNormalFamily
from pyro_em.families.normal import LogNormalFamily, NormalFamily
from pyro_em.families.numerics import half_log_det, precision_matrix
from pyro_em.families.positive import ExponentialFamily, PoissonFamily
from pyro_em.families.trials import BernoulliFamily, BinomialFamily, GeometricFamily

Coefficients = tuple[tuple[Tensor, ...], Tensor]
Arguments = Mapping[str, Tensor]


def _normal(args: Arguments, center: Tensor | None) -> Coefficients:
    loc, scale = args["loc"], args["scale"]
    shift = loc if center is None else loc - center
    precision = scale.square().reciprocal()
    linear = shift * precision
    normalizer = 0.5 * (shift * linear) + (scale.log() + 0.5 * math.log(2 * math.pi))
    return (linear, -0.5 * precision), normalizer


def _multivariate_normal(args: Arguments, center: Tensor | None) -> Coefficients:
    precision = precision_matrix(args)
    shift = args["loc"] if center is None else args["loc"] - center
    linear = (precision @ shift.unsqueeze(-1)).squeeze(-1)
    size = precision.shape[-1]
    normalizer = 0.5 * (linear * shift).sum(-1) + half_log_det(args) + 0.5 * size * math.log(2 * math.pi)
    return (linear, -0.5 * precision), normalizer


def _trials(args: Arguments, center: Tensor | None) -> Coefficients:
    if "probs" in args:
        success, failure = args["probs"].log(), torch.log1p(-args["probs"])
    else:
        success = torch.nn.functional.logsigmoid(args["logits"])
        failure = torch.nn.functional.logsigmoid(-args["logits"])
    return (success, failure), torch.zeros_like(success)


def _simplex(args: Arguments, center: Tensor | None) -> Coefficients:
    if "probs" in args:
        log_probs = (args["probs"] / args["probs"].sum(-1, keepdim=True)).log()
    else:
        log_probs = args["logits"].log_softmax(-1)
    return (log_probs,), log_probs.new_zeros(log_probs.shape[:-1])


def _poisson(args: Arguments, center: Tensor | None) -> Coefficients:
    return (args["rate"].log(),), args["rate"]


def _exponential(args: Arguments, center: Tensor | None) -> Coefficients:
    return (-args["rate"],), -args["rate"].log()


def _von_mises(args: Arguments, center: Tensor | None) -> Coefficients:
    loc, kappa = args["loc"], args["concentration"]
    normalizer = kappa + (2 * math.pi * torch.special.i0e(kappa)).log()
    return (kappa * loc.cos(), kappa * loc.sin()), normalizer


NATURAL: dict[type[Family], Callable[[Arguments, Tensor | None], Coefficients]] = {
    NormalFamily: _normal,
    LogNormalFamily: _normal,
    MultivariateNormalFamily: _multivariate_normal,
    BernoulliFamily: _trials,
    BinomialFamily: _trials,
    GeometricFamily: _trials,
    CategoricalFamily: _simplex,
    OneHotCategoricalFamily: _simplex,
    MultinomialFamily: _simplex,
    PoissonFamily: _poisson,
    ExponentialFamily: _exponential,
    VonMisesFamily: _von_mises,
}


def log_base_measure(family: Family, value: Tensor, args: Mapping[str, Any]) -> Tensor | None:
    """h(x) over the batch dims of `value`, None where it is zero."""
    if isinstance(family, PoissonFamily):
        return -torch.lgamma(value.double() + 1)
    if isinstance(family, LogNormalFamily):
        return -value.double().log()
    if isinstance(family, BinomialFamily):
        return family.log_base(value.double(), args)
    if isinstance(family, MultinomialFamily):
        counts = value.double()
        return torch.lgamma(counts.sum(-1) + 1) - torch.lgamma(counts + 1).sum(-1)
    return None
