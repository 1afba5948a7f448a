"""Flat (improper) priors: `ImproperUniform`, and distributions that are masked as a whole, `Normal(0, 1).mask(False)`.

Their log-density is 0 at every value, ∫ · dx has no normalising constant. As the start of a linear-Gaussian chain this
is the exact diffuse start (state_space/head.py). Coefficients with a flat prior beside random effects are integrated
out as Gaussian latents that the data alone inform: the evidence is the restricted likelihood then (Harville 1974).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.errors import Refusal
from pyro_em.model import compat


def is_flat(fn: Any) -> bool:
    """Whether the density of a sample statement is 1 whatever its value."""
    if isinstance(compat.base_distribution(fn), dist.ImproperUniform):
        return True
    while hasattr(fn, "base_dist"):
        if getattr(fn, "_mask", None) is False:
            return True
        fn = fn.base_dist
    return False


def some_value(fn: Any) -> Tensor | None:
    """A value of the support of a distribution that cannot be drawn from; None for all others."""
    if not isinstance(compat.base_distribution(fn), dist.ImproperUniform):
        return None
    return torch.distributions.transform_to(fn.support)(torch.zeros(fn.batch_shape + fn.event_shape))


class Looked(Protocol):
    """A first look at a model: sites by name."""

    @property
    def sites(self) -> Mapping[str, Any]: ...


def flat_values(seen: Looked, but: Collection[str]) -> dict[str, Tensor]:
    """Values of the first look for a run of the model that does not treat these latents, which it could not draw."""
    latents = ((name, site) for name, site in seen.sites.items() if name not in but and not site.observed)
    return {name: site.value for name, site in latents if is_flat(site.fn)}


def check_flat(seen: Looked, latents: Collection[str]) -> None:
    """:raises Refusal: for a flat latent inside of a loop; those that start a chain are latents no more."""
    for name in latents:
        site = seen.sites[name]
        if not (site.markov and is_flat(site.fn)):
            continue
        if not any(name in other.upstream for other in seen.sites.values()):
            raise Refusal(
                name,
                "its prior is flat (improper) and no other site reads it, so that the data say nothing about it.",
                "give it a proper prior, or a longer sequence if later steps read it (a slope shows from the second "
                "step on).",
            )
        raise Refusal(
            name,
            "its prior is flat (improper), and in a loop only flat starts of linear-Gaussian chains are integrated "
            "out.",
            "sample it before the loop, or at the first step of one whose states are normal, or give it a proper "
            f'prior; roles={{"{name}": "parameter"}} makes it a point estimate.',
        )
