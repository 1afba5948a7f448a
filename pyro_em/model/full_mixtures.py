"""Mixtures with the batch shape of all their arguments: weights (K, 1, M) beside parts (M,) make it (K, 1).

torch gives `MixtureSameFamily` the batch shape of its parts alone. Where only the weights read a latent, all states of
which are there at once, no plate can expand it.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch


def whole(distribution: Any) -> Any:
    """The distribution itself, or the same mixture with expanded parts."""
    if not isinstance(distribution, dist.MixtureSameFamily):
        return distribution
    weights, parts = distribution.mixture_distribution, distribution.component_distribution
    shape = torch.broadcast_shapes(weights.batch_shape, parts.batch_shape[:-1])
    if shape == parts.batch_shape[:-1]:
        return distribution
    return type.__call__(type(distribution), weights, parts.expand((*shape, parts.batch_shape[-1])))
