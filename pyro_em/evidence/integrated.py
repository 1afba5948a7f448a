"""Sites whose distribution has latents inside, integrated out by the distribution's own `log_prob`.

    log p(y|θ) = log ∫ p(y, s|θ) ds

(`GaussianHMM` and its states). Such a site is an ordinary factor of the model; only the M-step needs to know what
is inside: Q(θ) = E[log p(y, s|θ) | y, θ_old] is a function of a few moments of s, and these stand where other
sites have posterior weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.families import family_for
from pyro_em.model.compat import base_distribution
from pyro_em.model.density import clean_value, naming_singular_steps
from pyro_em.model.trace import SiteRecord


@dataclass(frozen=True)
class Integrated:
    """Log density of a site, and the moments of the latents inside of it given the data.

    It stands in the place of the site's posterior weights.
    """

    log_density: Tensor  # batch shape, unweighted
    moments: tuple[Tensor, ...]

    def expected_log_density(self, site: SiteRecord) -> Tensor:
        """E[log p(y, s|θ)] at the site's arguments, differentiable in them."""
        assert site.family is not None and site.arguments is not None
        arguments = {name: value.double() for name, value in site.arguments.items()}
        return site.family.expected_log_density({**site.constants, **arguments}, self.moments)


def integrates(site: SiteRecord) -> bool:
    """Whether the site's distribution has latents inside."""
    return site.family is not None and site.family.integrates


def has_states(distribution: Any) -> bool:
    """The same of a distribution that was not recorded: without a run of the model."""
    family = family_for(base_distribution(distribution))
    return family is not None and family.integrates


def opened(site: SiteRecord) -> tuple[Tensor, Callable[[Tensor], Integrated]]:
    """Log density at the site's own arguments (batch shape, masked), and the posterior for given weights.

    For weights that depend on the log density: posterior weights of discrete latents which choose the arguments.
    """
    assert site.family is not None and site.arguments is not None
    with naming_singular_steps(site.name):
        density, moments = site.family.posterior({**site.constants, **site.arguments}, clean_value(site))
    if site.mask is not None:
        density = torch.where(site.mask, density, density.new_zeros(()))
    return density, lambda weight: Integrated(density, moments(weight))


def integrate(site: SiteRecord, weight: Tensor) -> Integrated:
    """Posterior at the site's own arguments; `weight` (batch shape) multiplies the moments of its elements."""
    assert site.family is not None and site.arguments is not None
    with naming_singular_steps(site.name):
        found = site.family.posterior_moments({**site.constants, **site.arguments}, clean_value(site), weight)
    return Integrated(*found)
