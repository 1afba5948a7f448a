"""Compiled E-step for latents that adaptive quadrature integrates: generalised linear mixed models, item response.

The model is not run again. At θ the predictors' coefficients B (node_rows.py) give modes, nodes and their weights of
every element (node_sets.py); Newton's method of the M-step reads its sums over nodes from the same tables
(node_location.py), and the latents' own sites are seen at the nodes, as the interpreted engine sees them.

Discrete latents that a set reads have an element, with a mode and nodes of its own, for every joint state
(node_probe.py), whose evidence is one more discrete factor (node_states.py).

The error of the rule is estimated at the E-steps number 1, 2, 4, 8, ..., as evidence/quadrature.py does.

Not handled: priors of latents that depend on latents of quadrature, densities of which latents move more than one
argument, latents of every row inside of an element's integral (evidence/quadrature_recognition.py refuses these).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.e_step.arguments import ArgumentsAt, Functions, check_served, opaque
from pyro_em.e_step.base import Expectation, NotCompiled, Unread
from pyro_em.e_step.interpreted import expectation
from pyro_em.e_step.node_dispersion import NodeDispersion
from pyro_em.e_step.node_location import NodeLocation, Place
from pyro_em.e_step.node_placed import Placed
from pyro_em.e_step.node_probe import check_prior, probe_of
from pyro_em.e_step.node_reading import read_rows
from pyro_em.e_step.node_rows import NodeRows
from pyro_em.e_step.node_sets import Nodes, NodeSet, Predictors, node_set
from pyro_em.e_step.node_several import Several
from pyro_em.e_step.node_states import NodeStates
from pyro_em.e_step.node_tables import Memory
from pyro_em.e_step.outside import Outside
from pyro_em.evidence.discrete import Evidence, weighted_sum
from pyro_em.evidence.quadrature import QuadratureRoute
from pyro_em.families.normal import NormalFamily
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.newton import Newton
from pyro_em.m_step.predictors import PredictorSite
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.trace import SiteRecord
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors, SiteMoments, argument_cells, expected_moments, site_weight
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

# Rows times nodes: recordings of more would be larger than they may be (tape/replay.py).
RECORDED, RECORDED_SEVERAL = 2**17, 2**14


class Adaptive:
    """The engine of large tables; made by `compile_adaptive`.

    The search for modes starts from those of the last E-step, where they are unique.
    """

    name = "adaptive"

    def __init__(self, problem: Problem, sets: tuple[NodeSet, ...], functions: Functions) -> None:
        self.problem, self.sets, self.run = problem, sets, problem.first
        self.inside = {site.name for own in sets for site in own.latents}
        self.reading = {rows.name: rows.slot for own in sets for rows in own.rows}
        check_served({p: n for p, n in opaque(problem).items() if p not in self.reading.items()}, functions)
        self._arguments = ArgumentsAt(problem, self.run, functions, lambda u: self.reading.get(u.site) == u.slot)
        self._outside = Outside(problem, self.run)
        self._discrete = NodeStates(problem) if problem.graph.symbol_sites else None
        self._count = 0
        self._modes: dict[NodeSet, Tensor] = {}
        self._counts: dict[str, Tensor | None] = {}  # of the elements of a latent
        places = sum(len(rows.panels.rows) for own in sets for rows in own.rows)
        states = max((own.states.numel() for own in sets), default=1)
        each = f"each element in each of {states} discrete states" if states > 1 else "each element"
        self.reason = f"predictors of {places // states} rows from their design, evaluated at the nodes of {each}"

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`; raises `NonFiniteError` as `Problem.evidence` does."""
        self._count += 1
        if self._count & (self._count - 1) == 0:
            self._check(params)
        found = self._unread(params).read()
        if math.isfinite(found.log_likelihood) and math.isfinite(found.log_prior):
            return found
        evidence, run = self.problem.evidence(params)  # names the site and the rows
        return expectation(self.problem, run, evidence)

    def _unread(self, params: Params) -> Unread:
        with torch.no_grad():
            sufficient = self._arguments(params)
            solved = {own: self._solved(own, params, sufficient) for own in self.sets}
            evidence: Evidence | None = None
            if self._discrete is None:
                totals = sum((self._evidence(own, nodes) for own, (_, nodes) in solved.items()), torch.zeros(()))
            else:
                evidence = self._discrete.evidence(sufficient, {own: nodes for own, (_, nodes) in solved.items()})
                totals = torch.stack([evidence.log_likelihood, evidence.magnitude])
                for own, (placed, nodes) in solved.items():
                    solved[own] = placed, self._discrete.weighted(own, nodes, evidence)
            totals = self._outside.totals(totals, sufficient)
            error = torch.tensor([sum(own.route.error for own in self.sets)], dtype=torch.float64)
            self._fill(sufficient, solved, evidence)
        return Unread(torch.cat([totals, error]), sufficient, lambda: self._weights(solved, evidence))

    def _solved(self, own: NodeSet, params: Params, sufficient: Sufficient) -> tuple[Predictors, Nodes]:
        at = {rows.name: self._placed(rows, params, sufficient.arguments[rows.name]) for rows in own.rows}
        nodes = own.solved(at, own.prior(sufficient.arguments), self._modes.get(own))
        self._keep(own, nodes.mode)
        return at, nodes

    @staticmethod
    def _placed(rows: NodeRows, params: Params, arguments: Mapping[str, Tensor]) -> Placed:
        b, cumulant = rows.coefficients(params), rows.cumulant
        if not isinstance(cumulant, Several):
            return Placed(rows, b)
        return Placed(rows, b, {slot: cumulant.placed(arguments[slot]) for slot in cumulant.others})

    def _keep(self, own: NodeSet, mode: Tensor) -> None:
        if own.concave:
            self._modes[own] = mode

    def _check(self, params: Params) -> None:
        """Estimate the error by doubling the nodes.

        :raises Refusal: if it exceeds the rule's tolerance.
        """
        with torch.no_grad():
            sufficient = self._arguments(params)
            for own in self.sets:
                placed, nodes = self._solved(own, params, sufficient)
                prior = own.prior(sufficient.arguments)
                _, joint, _ = own.integrated(own.route.rule.doubled(), nodes.mode, nodes.spread, placed, prior)
                own.route.judge(*(own.laid(x.unsqueeze(0)) for x in (joint.logsumexp(0), nodes.log_z)))

    def _evidence(self, own: NodeSet, nodes: Nodes) -> Tensor:
        """Σ log Z and Σ|log Z|, (2,)."""
        packed, symbol = own.packed(nodes.log_z), own.route.latents.symbol
        weight = next(c.weight for c in self.problem.graph.components if symbol in c.symbols)
        size = with_dims(packed.abs(), dims_of(packed))
        return torch.stack([weighted_sum(packed, weight), weighted_sum(size, weight)])

    def _fill(
        self, sufficient: Sufficient, solved: Mapping[NodeSet, tuple[Predictors, Nodes]], evidence: Evidence | None
    ) -> None:
        """Let the M-step see the latents at their nodes, and the sites that read them through these."""
        values: dict[str, Tensor] = {}
        at: dict[str, tuple[NodeSet, Nodes]] = {}
        places: dict[str, Place] = {}
        for own, (placed, nodes) in solved.items():
            z = torch.stack([own.laid(column) for column in nodes.z], -1)
            values |= own.route.layout.values(z, own.route.dtypes)
            at |= {site.name: (own, nodes) for site in own.latents}
            for rows in own.rows:
                places[rows.name] = Place(nodes, placed[rows.name], nodes.tables[rows.name])
        for name, value in values.items():
            sufficient.sites[name] = dataclasses.replace(sufficient.sites[name], value=value)
        sufficient.problem = self.problem.at_atoms(values)
        sites, discrete = sufficient.sites, self._discrete  # what follows does not hold the statistics, which hold it

        def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
            if evidence is not None and discrete is not None and name in discrete.names:
                return discrete.moments(name, arguments, evidence)
            if name not in at:
                return self._outside.moments(name, arguments)
            own, nodes = at[name]
            site, info = sites[name], self.problem.graph.factors[name]
            plain = type(site.family) is NormalFamily and not site.element_dims
            if plain and argument_cells(site, arguments).numel() == 1:
                return self._pooled_moments(site, own.laid(nodes.weights), arguments)
            return expected_moments(site, info, own.packed_weights(nodes), arguments)

        arguments = sufficient.arguments

        def predictors(own: PredictorSite, starts: Mapping[str, int], theta: Tensor) -> NodeLocation | None:
            if own.name not in places:
                return None
            place, size = places[own.name], len(theta)
            if not isinstance(place.placed.rows.cumulant, Several):
                return NodeLocation(place, starts, size)
            slots = [slot for slot in own.slots if slot.name != place.placed.rows.slot]
            return NodeDispersion(place, starts, size, slots, theta, arguments[own.name])

        sufficient._moments_of, sufficient.predictors = moments_of, predictors

    def _pooled_moments(self, site: SiteRecord, weights: Tensor, arguments: dict[str, Tensor]) -> SiteMoments:
        """Of a normal latent with one location and one scale: sums over all of its elements and nodes."""
        if site.name not in self._counts:
            often = site_weight(self.run.sites[site.name], self.problem.graph.factors[site.name], None)
            self._counts[site.name] = None if bool((often == 1).all()) else often.expand(site.value.shape)
        count = self._counts[site.name]
        x, cells = site.value.double(), argument_cells(site, arguments)
        w = weights.reshape(x.shape)
        w = w if count is None else w * count
        center = x.mean()
        away = x - center
        first = w * away
        moments = (w.sum(), first.sum(), (first * away).sum())
        return SiteMoments(tuple(m.reshape(cells) for m in moments), cells, center.reshape((1,) * len(cells)))

    def _weights(self, solved: Mapping[NodeSet, tuple[Predictors, Nodes]], evidence: Evidence | None) -> Posteriors:
        """Weights of the nodes at all factors, and those of discrete factors, packed."""
        found: dict[str, Tensor] = {}
        if evidence is not None and self._discrete is not None:
            found |= {name: evidence.weights[name] for name in self._discrete.names}
        for own, (_, nodes) in solved.items():
            packed, weights = own.packed_weights(nodes), own.laid(nodes.weights)
            for name in own.route.latents.factors:
                found[name] = packed if own.route.layout.rows[name] is None else own.route.at_rows(name, weights)
        return found


class AdaptiveRecorded(Adaptive):
    """The engine of small tables, whose E-steps are functions of the parameters alone and can be recorded (tape/)."""

    def unread(self, params: Params) -> Unread:
        """The E-step before any of its numbers is read."""
        return self._unread(params)

    def _keep(self, own: NodeSet, mode: Tensor) -> None:
        pass


def compile_adaptive(problem: Problem, m_step: MStep) -> Adaptive:
    """The engine for a problem.

    :raises NotCompiled: with the reason.
    """
    continuous = problem.continuous
    if continuous is None or not all(isinstance(route, QuadratureRoute) for route in continuous.routes):
        raise NotCompiled("latents that quadrature does not integrate")
    if m_step.is_iterated:
        raise NotCompiled(f"'{(*m_step.numeric, *m_step.gradient)[0]}' has no M-step by Newton's method")
    functions = m_step.reads.functions
    by_newton = {site.name for unit in m_step.units if isinstance(unit, Newton) for site in unit.sites}
    sets = []
    for route in continuous.routes:
        assert isinstance(route, QuadratureRoute)
        probe = probe_of(problem, route)
        for name in route.latents.names:
            check_prior(probe, name)
        rows = [read_rows(problem, route, n, probe) for n in route.latents.factors if n not in route.latents.names]
        for own in rows:
            if isinstance(own.cumulant, Several) and own.name not in by_newton:
                slots = ", ".join(sorted((own.slot, *own.cumulant.others)))
                raise NotCompiled(f"several arguments of '{own.name}' move, not by Newton's method: {slots}")
        sets.append(node_set(route, [problem.first.sites[name] for name in route.latents.names], rows, probe.states))
    several = any(isinstance(rows.cumulant, Several) for own in sets for rows in own.rows)
    small = sum(own.cells for own in sets) <= (RECORDED_SEVERAL if several else RECORDED)
    if small:
        return AdaptiveRecorded(problem, tuple(sets), functions)
    for site in (rows for own in sets for rows in own.rows):
        site.cumulant.memory = Memory()
    return Adaptive(problem, tuple(sets), functions)
