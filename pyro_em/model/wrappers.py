"""Distributions with something changed below their wrappers: `.to_event`, `.mask` and `.expand` stay around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_em.model import compat


def rewrapped(fn: Any, change: Callable[[Any], Any]) -> Any:
    """The same wrappers around a changed base distribution."""
    if isinstance(fn, dist.Independent):
        return dist.Independent(rewrapped(fn.base_dist, change), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return dist.MaskedDistribution(rewrapped(fn.base_dist, change), fn._mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return dist.ExpandedDistribution(rewrapped(fn.base_dist, change), fn.batch_shape)
    return change(fn)


def mask_elements(fn: Any, keep: Tensor) -> Any:
    """The distribution with single elements of its `.to_event` dims masked, true where they count."""
    return rewrapped(fn, lambda base: base.mask(keep))


def replace_base(fn: Any, cls: Any) -> Any:
    """The distribution with its base made anew as a `cls`, a class that takes the same arguments."""

    def change(base: Any) -> Any:
        raw = compat.own_arguments(base)
        if raw is None:
            raw = {name: base.__dict__[name] for name in base.arg_constraints if name in base.__dict__}
        return cls(**raw, validate_args=base._validate_args).expand(base.batch_shape)

    return rewrapped(fn, change)
