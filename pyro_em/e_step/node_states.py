"""Discrete latents beside those that quadrature integrates: log Z of every state c and element g is one more factor.

    log p(x) = Σ_g log Σ_c exp(log Z_cg + Σ of the discrete factors),        q(c | g) from its gradient (discrete.py)

as evidence/mixed.py has it; the nodes of element g in state c then have weights q(c | g) p(node | c, g).

Not handled: loops over time, sites with latents inside of their distribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.node_sets import Nodes, NodeSet
from pyro_em.evidence.discrete import Evidence, evaluate
from pyro_em.evidence.integrated import integrates
from pyro_em.latents import integral
from pyro_em.model.compat import dims_of, unpack
from pyro_em.model.density import packed_log_density
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments, argument_cells, expected_moments, site_center
from pyro_em.sufficient import Sufficient


class NodeStates:
    """The discrete factors of a problem, and those of its components that quadrature's latents do not reach."""

    def __init__(self, problem: Problem) -> None:
        """:raises NotCompiled: see the module docstring."""
        reduced = problem.reduced_graph
        self.problem, self.graph = problem, dataclasses.replace(reduced, constants=(), priors=())
        self.names = tuple(n for c in reduced.components for n in c.factors if n in problem.graph.factors)
        sites = problem.first.sites
        if problem.graph.loops:
            raise NotCompiled("a loop over time beside latents that quadrature integrates")
        inside = next((n for n in self.names if integrates(sites[n])), None)
        if inside is not None:
            raise NotCompiled(f"'{inside}' has states of its own beside other latents")
        self._centers: dict[str, Tensor | None] = {}

    def evidence(self, sufficient: Sufficient, solved: Mapping[NodeSet, Nodes]) -> Evidence:
        """log Z of all components, and the posterior weights of every factor that is left."""
        factors = {}
        for name in self.names:
            site = sufficient.sites[name]
            own = None if site.arguments is None else sufficient.arguments[name]
            factors[name] = packed_log_density(dataclasses.replace(site, arguments=own))
        for own_set, nodes in solved.items():
            factors[integral(own_set.route.latents)] = own_set.packed(nodes.log_z)
        return evaluate(self.graph, factors)

    def weighted(self, own: NodeSet, nodes: Nodes, evidence: Evidence) -> Nodes:
        """Nodes with the weights of their states."""
        route = own.route
        weights = evidence.weights[integral(route.latents)]
        if not set(dims_of(weights)) & self.problem.graph.symbol_sites.keys():
            return nodes  # the set reads none of them
        laid = unpack(weights, route.symbols).expand(*own.states, *route.layout.sizes)
        shares = laid.reshape(-1)
        return dataclasses.replace(nodes, weights=nodes.weights * shares, shares=shares)

    def moments(self, name: str, arguments: dict[str, Tensor], evidence: Evidence) -> SiteMoments:
        """Moments of a site of `names`."""
        site = self.problem.first.sites[name]
        if name not in self._centers:
            self._centers[name] = site_center(site, argument_cells(site, arguments))
        weights = evidence.weights[name]
        return expected_moments(site, self.problem.graph.factors[name], weights, arguments, self._centers[name])
