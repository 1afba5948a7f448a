"""Distributions that are written in another way than the family that they are.

    TransformedDistribution(Normal(a, b), [AffineTransform(m, s), ...])       Normal(m + s a, |s| b)
    ... followed by ExpTransform()                                            LogNormal
    LowRankMultivariateNormal(loc, W, D) as a latent                          MultivariateNormal(loc, W Wᵀ + D)
    any distribution that is masked as a whole, as a latent                   ImproperUniform
    OrderedLogistic(predictor, cutpoints)                                     OrderedLogistic(0, cutpoints - predictor)

The density is the same at every value, so that closed forms, Gaussian elimination and kernels serve both. (Observed
low-rank vectors are unfolded instead, unfold.py.) Wrappers (`.to_event`, `.mask`, `.expand`) stay around them.

Not handled: other transforms and bases; the distribution then stays what it is.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms

from pyro_em.model import compat
from pyro_em.model.flat import is_flat
from pyro_em.model.wrappers import rewrapped


def plain_form(fn: Any, observed: bool, in_loop: bool = False) -> Any:
    """The same distribution as its family writes it, or `fn` itself (a flat one in a loop may start a chain).

    >>> fn = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.AffineTransform(2.0, -3.0)])
    >>> plain_form(fn, True)
    Normal(loc: 2.0, scale: 3.0)
    """
    kind = type(compat.base_distribution(fn))
    if kind is not dist.ImproperUniform and not observed and not in_loop and is_flat(fn):
        return dist.ImproperUniform(fn.support, fn.batch_shape, fn.event_shape)
    if kind is dist.OrderedLogistic:
        return rewrapped(fn, _cut)
    if kind is dist.TransformedDistribution or (kind is dist.LowRankMultivariateNormal and not observed):
        return rewrapped(fn, _of_transforms if kind is dist.TransformedDistribution else _dense)
    return fn


def _of_transforms(fn: Any) -> Any:
    inner = compat.own_arguments(fn)
    base = fn.base_dist if inner is None else inner.get("base_distribution")
    raw = compat.raw_arguments(base) if type(base) is dist.Normal else None
    if raw is None:
        return fn
    loc, scale = (torch.as_tensor(raw[name]) for name in ("loc", "scale"))
    centred = isinstance(raw["loc"], int | float) and raw["loc"] == 0  # then it is no function of the factor
    steps = _flat(fn.transforms)
    exponential = bool(steps) and type(steps[-1]) is transforms.ExpTransform
    for step in steps[:-1] if exponential else steps:
        if type(step) is not transforms.AffineTransform or step.event_dim:
            return fn
        shift, factor = torch.as_tensor(step.loc), torch.as_tensor(step.scale)
        loc, scale, centred = shift if centred else shift + loc * factor, scale * factor.abs(), False
    found: Any = (dist.LogNormal if exponential else dist.Normal)(loc, scale, validate_args=fn._validate_args)
    return found.expand(fn.batch_shape)


def _flat(steps: Any) -> list[Any]:
    """Compositions written out."""
    found: list[Any] = []
    for step in steps:
        found += _flat(step.parts) if isinstance(step, transforms.ComposeTransform) else [step]
    return found


def _dense(fn: Any) -> Any:
    raw = compat.raw_arguments(fn)
    if raw is None:
        return fn
    covariance = raw["cov_factor"] @ raw["cov_factor"].mT + torch.diag_embed(raw["cov_diag"])
    found: Any = dist.MultivariateNormal(raw["loc"], covariance, validate_args=fn._validate_args)
    return found.expand(fn.batch_shape)


def _cut(fn: Any) -> Any:
    raw = compat.own_arguments(fn)
    if raw is None:
        return fn
    cuts = raw["cutpoints"] - raw["predictor"].unsqueeze(-1)
    found: Any = dist.OrderedLogistic(torch.zeros((), dtype=cuts.dtype), cuts, validate_args=fn._validate_args)
    return found.expand(fn.batch_shape)
