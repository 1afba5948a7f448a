"""Compiled E-step for latents that adaptive quadrature integrates: generalised linear mixed models, item response.

The model is not run again. At θ the predictors' coefficients B (node_rows.py) give modes, nodes and their weights of
every element (node_sets.py); Newton's method of the M-step reads its sums over nodes from the same tables
(node_location.py), and the latents' own sites are seen at the nodes, as the interpreted engine sees them.

The error of the rule is estimated at the E-steps number 1, 2, 4, 8, ..., as evidence/quadrature.py does.

Not handled: discrete latents beside the others, priors of latents that depend on latents, densities of which latents
move more than one argument (a Beta by mean and precision).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.device import seeded_normal
from pyro_em.e_step.arguments import ArgumentsAt, Functions, check_served, opaque
from pyro_em.e_step.base import Expectation, NotCompiled, Unread
from pyro_em.e_step.interpreted import expectation
from pyro_em.e_step.node_dispersion import NodeDispersion
from pyro_em.e_step.node_location import NodeLocation, Place
from pyro_em.e_step.node_placed import Placed
from pyro_em.e_step.node_reading import Probe, read_rows
from pyro_em.e_step.node_rows import NodeRows
from pyro_em.e_step.node_sets import Nodes, NodeSet, Predictors, node_set
from pyro_em.e_step.node_several import Several
from pyro_em.e_step.node_tables import Memory
from pyro_em.e_step.outside import Outside
from pyro_em.evidence.discrete import weighted_sum
from pyro_em.evidence.quadrature import QuadratureRoute
from pyro_em.families.normal import NormalFamily
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.newton import Newton
from pyro_em.m_step.predictors import PredictorSite
from pyro_em.model.compat import dims_of, pack, with_dims
from pyro_em.model.recognise import second_point
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
        self._count = 0
        self._modes: dict[NodeSet, Tensor] = {}
        self._counts: dict[str, Tensor | None] = {}  # of the elements of a latent
        places = sum(len(rows.panels.rows) for own in sets for rows in own.rows)
        self.reason = f"predictors of {places} rows from their design, evaluated at the nodes of each element"

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
            solved = [self._solved(own, params, sufficient) for own in self.sets]
            totals = torch.zeros(2, dtype=torch.float64)
            for own, (_, nodes) in zip(self.sets, solved, strict=True):
                totals = totals + self._evidence(own, nodes)
            totals = self._outside.totals(totals, sufficient)
            error = torch.tensor([sum(own.route.error for own in self.sets)], dtype=torch.float64)
            self._fill(sufficient, solved)
        return Unread(torch.cat([totals, error]), sufficient, lambda: self._weights(solved))

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
                own.route.judge(*(x.reshape(own.route.layout.sizes) for x in (joint.logsumexp(0), nodes.log_z)))

    def _evidence(self, own: NodeSet, nodes: Nodes) -> Tensor:
        """Σ log Z and Σ|log Z|, (2,)."""
        packed, symbol = own.route.packed(nodes.log_z.reshape(own.route.layout.sizes)), own.route.latents.symbol
        weight = next(c.weight for c in self.problem.graph.components if symbol in c.symbols)
        size = with_dims(packed.abs(), dims_of(packed))
        return torch.stack([weighted_sum(packed, weight), weighted_sum(size, weight)])

    def _fill(self, sufficient: Sufficient, solved: list[tuple[Predictors, Nodes]]) -> None:
        """Let the M-step see the latents at their nodes, and the sites that read them through these."""
        values: dict[str, Tensor] = {}
        at: dict[str, tuple[NodeSet, Nodes]] = {}
        places: dict[str, Place] = {}
        for own, (placed, nodes) in zip(self.sets, solved, strict=True):
            layout = own.route.layout
            z = nodes.z.permute(1, 2, 0).reshape(-1, *layout.sizes[1:], layout.num_columns)
            values |= layout.values(z, own.route.dtypes)
            at |= {site.name: (own, nodes) for site in own.latents}
            for rows in own.rows:
                places[rows.name] = Place(nodes, placed[rows.name], nodes.tables[rows.name])
        for name, value in values.items():
            sufficient.sites[name] = dataclasses.replace(sufficient.sites[name], value=value)
        sufficient.problem = self.problem.at_atoms(values)
        sites = sufficient.sites  # what follows does not hold the statistics, which hold it

        def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
            if name not in at:
                return self._outside.moments(name, arguments)
            own, nodes = at[name]
            site, info = sites[name], self.problem.graph.factors[name]
            plain = type(site.family) is NormalFamily and not site.element_dims
            if plain and argument_cells(site, arguments).numel() == 1:
                return self._pooled_moments(site, nodes, arguments)
            return expected_moments(site, info, _packed_weights(own, nodes), arguments)

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

    def _pooled_moments(self, site: SiteRecord, nodes: Nodes, arguments: dict[str, Tensor]) -> SiteMoments:
        """Of a normal latent with one location and one scale: sums over all of its elements and nodes."""
        if site.name not in self._counts:
            often = site_weight(self.run.sites[site.name], self.problem.graph.factors[site.name], None)
            self._counts[site.name] = None if bool((often == 1).all()) else often.expand(site.value.shape)
        count = self._counts[site.name]
        x, cells = site.value.double(), argument_cells(site, arguments)
        w = nodes.weights.reshape(x.shape)
        w = w if count is None else w * count
        center = x.mean()
        away = x - center
        first = w * away
        moments = (w.sum(), first.sum(), (first * away).sum())
        return SiteMoments(tuple(m.reshape(cells) for m in moments), cells, center.reshape((1,) * len(cells)))

    def _weights(self, solved: list[tuple[Predictors, Nodes]]) -> Posteriors:
        """Weights of the nodes at all factors, packed."""
        found: dict[str, Tensor] = {}
        for own, (_, nodes) in zip(self.sets, solved, strict=True):
            route = own.route
            packed, m = _packed_weights(own, nodes), len(route.layout.sizes)
            weights = nodes.weights.reshape(-1, *route.layout.sizes[1:])
            for name in route.latents.factors:
                index = route.layout.rows[name]
                if index is None:
                    found[name] = packed
                else:
                    symbols = {**route.row_symbols[name], -m: route.latents.symbol}
                    found[name] = pack(route.layout.to_rows(weights, index), symbols)
        return found


class AdaptiveRecorded(Adaptive):
    """The engine of small tables, whose E-steps are functions of the parameters alone and can be recorded (tape/)."""

    def unread(self, params: Params) -> Unread:
        """The E-step before any of its numbers is read."""
        return self._unread(params)

    def _keep(self, own: NodeSet, mode: Tensor) -> None:
        pass


def _packed_weights(own: NodeSet, nodes: Nodes) -> Tensor:
    route = own.route
    m = len(route.layout.sizes)
    full = nodes.weights.reshape(-1, *route.layout.sizes[1:])
    return pack(full, {**route.symbols, -m: route.latents.symbol})


def compile_adaptive(problem: Problem, m_step: MStep) -> Adaptive:
    """The engine for a problem.

    :raises NotCompiled: with the reason.
    """
    continuous = problem.continuous
    if continuous is None or not all(isinstance(route, QuadratureRoute) for route in continuous.routes):
        raise NotCompiled("latents that quadrature does not integrate")
    if problem.graph.symbol_sites:
        raise NotCompiled("discrete latents beside the others")
    if m_step.is_iterated:
        raise NotCompiled(f"'{(*m_step.numeric, *m_step.gradient)[0]}' has no M-step by Newton's method")
    functions = m_step.reads.functions
    by_newton = {site.name for unit in m_step.units if isinstance(unit, Newton) for site in unit.sites}
    sets = []
    for route in continuous.routes:
        assert isinstance(route, QuadratureRoute)
        probe = _probe(problem, route)
        for name in route.latents.names:
            _check_prior(probe, name)
        rows = [read_rows(problem, route, n, probe) for n in route.latents.factors if n not in route.latents.names]
        for own in rows:
            if isinstance(own.cumulant, Several) and own.name not in by_newton:
                slots = ", ".join(sorted((own.slot, *own.cumulant.others)))
                raise NotCompiled(f"several arguments of '{own.name}' move, not by Newton's method: {slots}")
        sets.append(node_set(route, [problem.first.sites[name] for name in route.latents.names], rows))
    several = any(isinstance(rows.cumulant, Several) for own in sets for rows in own.rows)
    small = sum(own.cells for own in sets) <= (RECORDED_SEVERAL if several else RECORDED)
    if small:
        return AdaptiveRecorded(problem, tuple(sets), functions)
    for site in (rows for own in sets for rows in own.rows):
        site.cumulant.memory = Memory()
    return Adaptive(problem, tuple(sets), functions)


def _probe(problem: Problem, route: QuadratureRoute) -> Probe:
    """Runs of the model to be read off; latents of other sets stay where they are."""
    continuous = problem.continuous
    assert continuous is not None
    rest = continuous.runs.atom(continuous.values, 0)
    layout, dtypes = route.layout, route.dtypes
    num, size = layout.num_columns, torch.Size(layout.sizes).numel()

    def values(z: Tensor) -> dict[str, Tensor]:
        return {**rest, **layout.values(z.expand(size, num).reshape(*layout.sizes, num), dtypes)}

    units = []
    for k in range(num + 1):
        leaves = {n: v.detach().clone().requires_grad_(True) for n, v in problem.start.items()}
        z = torch.zeros(num, dtype=torch.float64)
        if k:
            z[k - 1] = 1.0
        with torch.enable_grad():
            units.append(continuous.runs.one(leaves, values(z)))
    generator = torch.Generator().manual_seed(4)
    other = {n: second_point(record, generator) for n, record in problem.parameters.items()}
    random = []
    for params in (problem.start, other):
        z = seeded_normal((size, num), generator)
        with torch.no_grad():
            random.append((continuous.runs.one(params, values(z)), z, params))
    return Probe(tuple(units), tuple(random))


def _check_prior(probe: Probe, name: str) -> None:
    """:raises NotCompiled: if the latent's own distribution depends on latents."""
    first = probe.units[0].sites[name].arguments
    if first is None:
        raise NotCompiled(f"the latent '{name}' hides its arguments")
    for run in (*probe.units[1:], probe.random[0][0]):
        other = run.sites[name].arguments or {}
        if any(not torch.equal(x.detach(), other[slot].detach()) for slot, x in first.items()):
            raise NotCompiled(f"the distribution of the latent '{name}' depends on a latent")
