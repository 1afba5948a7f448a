"""Models whose continuous latents are inside of observed sites: the model is not run again.

    log p(x|θ) = Σ_sites log p(x_site | arguments_site(θ)),        or, with discrete latents k around them,
    log p(x|θ) = log Σ_k p(k|θ) Π_sites p(x_site | arguments_site(k, θ))

Where every argument is recognised, new parameter values are written into the recorded arguments. A site with
latents inside (`GaussianHMM`, a folded loop) gives its log-evidence and the moments for the M-step in one pass; what
the data alone contribute at the other sites is computed by their families. Where discrete latents choose its arguments
it comes in two: the log-evidence in every state is a factor of the graph like any other, and the moments are weighted
by the posterior of the states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_em.e_step.base import Expectation, NotCompiled, Unread
from pyro_em.e_step.interpreted import read
from pyro_em.e_step.vanishing import NEXT_TO_NOTHING, vanishing
from pyro_em.errors import NonFiniteError
from pyro_em.evidence.discrete import evaluate, weighted_sum
from pyro_em.evidence.integrated import Integrated, integrate, integrates, opened
from pyro_em.model.compat import dims_of, pack, with_dims
from pyro_em.model.density import packed_log_density
from pyro_em.model.trace import Run
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors, SiteMoments, argument_cells, expected_moments, site_center, site_weight
from pyro_em.sufficient import Sufficient, raw_arguments
from pyro_em.types import Params


class Inside:
    """The engine; made by `compile_inside`."""

    name = "inside"
    reason = "the latents are inside of the sites' distributions, their arguments recognised"

    def __init__(self, problem: Problem) -> None:
        if not problem.recognised:
            raise NotCompiled("an argument is not recognised")
        self.problem = problem
        sites = problem.replayed(problem.start).sites
        self._weights = {n: site_weight(s, problem.graph.factors[n], None) for n, s in sites.items() if integrates(s)}
        if not self._weights:
            raise NotCompiled("no site has latents inside")
        self._centers: dict[str, Tensor | None] = {}
        if problem.graph.components:
            latents = ", ".join(f"'{name}'" for name in problem.graph.latents)
            self.reason = f"the other latents are inside of the sites' distributions, one for each state of {latents}"

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`; raises `NonFiniteError` as `Problem.evidence` does."""
        return read(self.problem, params, self.unread(params))

    def unread(self, params: Params) -> Unread:
        """The same before any of its numbers is read."""
        graph = self.problem.graph
        with torch.no_grad():
            run = self.problem.replayed(params)
            totals, posterior = (self._around if graph.components else self._alone)(run)

        def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
            site = run.sites[name]
            if name not in self._centers:
                self._centers[name] = (
                    None if name in self._weights else site_center(site, argument_cells(site, arguments))
                )
            return expected_moments(site, graph.factors[name], posterior.get(name), arguments, self._centers[name])

        sufficient = Sufficient(self.problem, run.sites, raw_arguments(run.sites), moments_of)
        return Unread(totals, sufficient, lambda: posterior)

    def vanishing(self, params: Params) -> dict[str, bool]:
        """Noises whose estimate is 0, see vanishing.py."""

        def evidence(at: Params) -> tuple[float, float]:
            try:
                likelihood, _, magnitude, _ = self.unread(at).totals.tolist()
            except NonFiniteError:  # without any noise the data are impossible
                return -math.inf, 0.0
            return likelihood, magnitude

        return vanishing(self.problem, params, evidence, NEXT_TO_NOTHING)

    def _alone(self, run: Run) -> tuple[Tensor, Posteriors]:
        """Totals (see `Unread`) and posteriors of sites that no discrete latent reaches."""
        graph = self.problem.graph
        inside = {name: integrate(run.sites[name], weight) for name, weight in self._weights.items()}
        likelihood = prior = magnitude = zero = torch.zeros((), dtype=torch.float64)
        for name, site in run.sites.items():
            terms = pack(inside[name].log_density, site.symbols) if name in inside else packed_log_density(site)
            total = weighted_sum(terms, graph.factors[name].weight)
            if name in graph.priors:
                prior = prior + total
            else:
                likelihood = likelihood + total
                size = with_dims(terms.abs(), dims_of(terms))
                magnitude = magnitude + weighted_sum(size, graph.factors[name].weight)
        return torch.stack([likelihood, prior, magnitude, zero]), inside

    def _around(self, run: Run) -> tuple[Tensor, Posteriors]:
        """The same with discrete latents around."""
        graph = self.problem.graph
        inside = {name: opened(run.sites[name]) for name in self._weights}
        factors = {
            name: pack(inside[name][0], site.symbols) if name in inside else packed_log_density(site)
            for name, site in run.sites.items()
        }
        evidence = evaluate(graph, factors)
        posterior: dict[str, Tensor | Integrated] = dict(evidence.weights)
        for name, (_, given) in inside.items():
            own = evidence.weights.get(name)
            site = run.sites[name]
            posterior[name] = given(self._weights[name] if own is None else site_weight(site, graph.factors[name], own))
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack([evidence.log_likelihood, evidence.log_prior, evidence.magnitude, zero]), posterior


def compile_inside(problem: Problem) -> Inside:
    """:raises NotCompiled: if no site has latents inside, or an argument is not recognised."""
    return Inside(problem)
