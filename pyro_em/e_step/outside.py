"""What a compiled engine does about sites that no latent reaches: constants of the data, and priors."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.evidence.discrete import weighted_sum
from pyro_em.evidence.integrated import integrates
from pyro_em.model import compat
from pyro_em.model.density import packed_log_density
from pyro_em.model.trace import Run
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments, argument_cells, site_center, site_moments, site_weight
from pyro_em.sufficient import Sufficient


class Outside:
    """Sites without latents of one run of the model."""

    def __init__(self, problem: Problem, run: Run) -> None:
        """:raises NotCompiled: if one has latents inside, of which the moments are not the data's."""
        inside = next((n for n in problem.graph.constants if integrates(run.sites[n])), None)
        if inside is not None:
            raise NotCompiled(f"'{inside}' has states of its own beside other latents")
        self.problem, self.run = problem, run
        self._fixed: dict[str, SiteMoments] = {}
        self._none = torch.zeros((), dtype=torch.float64)

    def moments(self, name: str, arguments: dict[str, Tensor]) -> SiteMoments:
        """Moments of a site; they are the same at every E-step, unless its response is latent."""
        site = self.run.sites[name]
        assert site.family is not None
        if name not in self._fixed or site.family.latent_response:
            weight = site_weight(site, self.problem.graph.factors[name], None)
            center = site_center(site, argument_cells(site, arguments))
            self._fixed[name] = site_moments(site, arguments, weight, center)
        return self._fixed[name]

    def totals(self, evidence: Tensor, sufficient: Sufficient) -> Tensor:
        """log p(x|θ), log p(θ) and Σ|ll_n| of all sites, (3,).

        :param evidence: Σ ll_n and Σ |ll_n| of the components, (2,).
        """
        likelihood, magnitude = evidence.unbind()
        graph = self.problem.graph
        if not graph.constants and not graph.priors:
            return torch.stack([likelihood, self._none, magnitude])
        constants, size, prior = self.log_density(sufficient)
        if graph.constants:
            likelihood, magnitude = likelihood + constants, magnitude + size
        return torch.stack([likelihood, prior, magnitude])

    def log_density(self, sufficient: Sufficient) -> tuple[Tensor, Tensor, Tensor]:
        """Log-density of data that no latent reaches, its magnitude, and the log prior."""
        graph = self.problem.graph
        total, size, prior = torch.zeros(3, dtype=torch.float64).unbind()
        for name in (*graph.constants, *graph.priors):
            site = dataclasses.replace(sufficient.sites[name], arguments=sufficient.arguments[name])
            packed, weight = packed_log_density(site), graph.factors[name].weight
            own = weighted_sum(packed, weight)
            if name in graph.priors:
                prior = prior + own
            else:
                total = total + own
                size = size + weighted_sum(compat.with_dims(packed.abs(), compat.dims_of(packed)), weight)
        return total, size, prior
