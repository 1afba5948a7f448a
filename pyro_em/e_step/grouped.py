"""Compiled E-step for discrete latents of any shape, above all chains: the model is not run again.

The raw arguments follow from the parameters by their recognised uses, isomorphic sites are evaluated as one
(groups.py), components that are chains are smoothed all steps and sequences at once (chains.py), any others
are contracted as the reference does. The M-step sees one site per group, in a plate of its copies, so its
work does not grow with the number of sites either.

A parameter that does not move may enter in any way: when it has another value than in the run that the
arguments come from, the model is run once more. Where the data are impossible the reference path says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.base import Expectation, NotCompiled, Unread
from pyro_em.e_step.chains import Bundle, Chain, find_chain
from pyro_em.e_step.groups import Group, make_groups
from pyro_em.e_step.interpreted import read
from pyro_em.evidence.chain import ChainPosterior
from pyro_em.evidence.discrete import evaluate, weighted_sum
from pyro_em.families.base import AnyStatistic
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.density import packed_log_density
from pyro_em.model.graph import FactorGraph
from pyro_em.model.packing import align
from pyro_em.model.recognise import Use
from pyro_em.model.trace import SiteRecord
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments, argument_cells, site_center, site_moments, site_statistics
from pyro_em.sufficient import Arguments, Sufficient, raw_arguments
from pyro_em.types import Params


@dataclass(frozen=True)
class _Program:
    """What one run of the model told: its sites in groups, and where each group's posterior comes from.

    `bundles` of chains; `rest`, the graph of the other components, with their groups in `general`;
    `constant`, the groups that no latent reaches; `priors`, the sites of parameters, which stay single.
    `uses` are all uses of a parameter, `counted` those that enter Q.
    """

    groups: Mapping[str, Group]
    bundles: tuple[Bundle, ...]
    rest: FactorGraph
    general: tuple[Group, ...]
    constant: tuple[Group, ...]
    priors: Mapping[str, SiteRecord]
    sites: Mapping[str, SiteRecord]
    uses: Mapping[str, tuple[Use, ...]]
    counted: Mapping[str, tuple[Use, ...]]
    arguments: Arguments


@dataclass(frozen=True)
class _Posterior:
    """The evidence, and what posterior weights are made of."""

    log_likelihood: Tensor
    magnitude: Tensor
    chains: Mapping[str, tuple[Bundle, ChainPosterior]]
    general: Mapping[str, Tensor]


class Grouped:
    """The engine; made by `compile_grouped`."""

    name = "grouped"

    def __init__(self, problem: Problem) -> None:
        graph = problem.graph
        if not graph.components:
            raise NotCompiled("the model has no latents")
        if graph.loops:
            raise NotCompiled("a pyro_em.markov loop")
        self.problem = problem
        self._opaque = [n for n, uses in problem.uses.items() if any(use.index is None for use in uses)]
        self._load(problem.start)
        chained = len(graph.components) - len(self._program.rest.components)
        self.reason = (
            f"{len(graph.factors)} sites evaluated as {len(self._program.sites)}, "
            f"{chained} of {len(graph.components)} components smoothed as chains"
        )

    def _load(self, params: Params) -> None:
        self._at = {name: params[name].detach().clone() for name in self._opaque}
        self._program = _compile(self.problem, params)
        self._centers: dict[str, Tensor | None] = {}
        self._statistics: dict[str, tuple[AnyStatistic, ...]] = {}

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`; raises `NonFiniteError` as `Problem.evidence` does."""
        return read(self.problem, params, self.unread(params))

    def unread(self, params: Params) -> Unread:
        """The same before any of its numbers is read."""
        if any(not torch.equal(params[name], self._at[name]) for name in self._opaque):
            self._load(params)
        with torch.no_grad():
            return self._unread(params)

    def _unread(self, params: Params) -> Unread:
        problem, program = self.problem, self._program
        arguments = {name: dict(own) for name, own in program.arguments.items()}

        def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
            group = program.groups[name]
            if name not in self._centers:
                center = site_center(group.record, argument_cells(group.record, arguments))
                self._centers[name] = center
                if group.record.family is None or not group.record.family.latent_response:
                    self._statistics[name] = site_statistics(group.record, arguments, center)
            weight = _weight(group, posterior)
            return site_moments(group.record, arguments, weight, self._centers[name], self._statistics.get(name))

        sufficient = Sufficient(problem, program.sites, arguments, moments_of, program.counted)
        for name, theta in params.items():
            sufficient.put(theta, program.uses[name])
        posterior = self._posterior(arguments)
        log_prior = self._log_prior(sufficient)
        error = torch.zeros((), dtype=torch.float64)
        totals = torch.stack([posterior.log_likelihood, log_prior, posterior.magnitude, error])
        return Unread(totals, sufficient, lambda: problem.evidence(params)[0].weights)

    def _posterior(self, arguments: Arguments) -> _Posterior:
        program, graph = self._program, self.problem.graph
        factors = {name: group.log_factor(arguments[name]) for name, group in program.groups.items()}
        likelihood = magnitude = torch.zeros((), dtype=torch.float64)
        chains: dict[str, tuple[Bundle, ChainPosterior]] = {}
        for bundle in program.bundles:
            found = bundle.smooth(factors)
            chains.update({group.name: (bundle, found) for group in bundle.groups})
            terms, weight = bundle.terms(found, graph)
            likelihood = likelihood + _total(terms, weight)
            magnitude = magnitude + _total(terms.abs(), weight)
        for group in program.constant:
            terms = factors[group.name].expand(group.shape)
            likelihood = likelihood + _total(terms, group.weight)
            magnitude = magnitude + _total(terms.abs(), group.weight)
        if not program.general:
            return _Posterior(likelihood, magnitude, chains, {})
        packed = {}
        for group in program.general:
            copies = factors[group.name].expand(group.shape).unbind(0)
            for name, dims, copy in zip(group.sites, group.dims, copies, strict=True):
                packed[name] = with_dims(copy, dims)
        with torch.enable_grad():
            evidence = evaluate(program.rest, packed)
        likelihood = likelihood + evidence.log_likelihood
        return _Posterior(likelihood, magnitude + evidence.magnitude, chains, evidence.weights)

    def _log_prior(self, sufficient: Sufficient) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name in self._program.priors:
            site = dataclasses.replace(sufficient.sites[name], arguments=sufficient.arguments[name])
            total = total + weighted_sum(packed_log_density(site), self.problem.graph.factors[name].weight)
        return total


def _total(terms: Tensor, weight: Tensor | None) -> Tensor:
    """Σ w·x; what has weight zero counts nothing, even where x is -inf."""
    if weight is None:
        return terms.sum()
    return torch.where(weight == 0, terms.new_zeros(()), weight * terms).sum()


def _weight(group: Group, posterior: _Posterior) -> Tensor:
    """Expected multiplicity of the copies of a group."""
    if group.name in posterior.chains:
        bundle, found = posterior.chains[group.name]
        return bundle.weight(group, found)
    if group.name in posterior.general:
        own = [align(posterior.general[n], d) for n, d in zip(group.sites, group.dims, strict=True)]
        return group.expected_weight(torch.stack(own).double())
    return group.expected_weight(torch.ones((1,) * len(group.shape), dtype=torch.float64))


def _compile(problem: Problem, params: Params) -> _Program:
    graph = problem.graph
    with torch.no_grad():
        run = problem.run(params)
        factors = problem.factors(run)
    sizes = dict.fromkeys((*graph.plate_names, *graph.symbol_sites), 1)
    sizes.update((d, n) for x in factors.values() for d, n in zip(dims_of(x), x.shape, strict=True))
    program = {name: i for i, name in enumerate(run.sites)}
    order = {d: program[name] for d, name in graph.symbol_sites.items()}
    chains = [find_chain(graph, component, sizes, order) for component in graph.components]
    owner = {name: i for i, component in enumerate(graph.components) for name in component.factors}
    priors = {name: run.sites[name] for name in graph.priors}
    by_site: dict[str, list[Use]] = {name: [] for name in run.sites}
    for uses in problem.uses.values():
        for use in uses:
            by_site[use.site].append(use)

    def place(name: str) -> Hashable:
        if name not in owner:
            return "constant"
        chain = chains[owner[name]]
        return "general" if chain is None else chain.kind

    sites = {name: site for name, site in run.sites.items() if name not in priors}
    roots = {name: graph.components[i].root for name, i in owner.items()}
    orders = {name: _layout_order(graph, name, roots.get(name, frozenset()), order) for name in sites}
    groups = make_groups(sites, factors, graph.factors, by_site, orders, {name: place(name) for name in sites})
    known = [use for group in groups for use in group.uses]
    known += [use for name in priors for use in by_site[name]]
    places = {group.name: place(group.name) for group in groups}
    uses_of = {name: tuple(u for u in known if u.parameter == name) for name in problem.uses}
    records = {**{group.name: group.record for group in groups}, **priors}
    rest = tuple(c for c, chain in zip(graph.components, chains, strict=True) if chain is None)
    return _Program(
        groups={group.name: group for group in groups},
        bundles=_bundles([g for g in groups if places[g.name] not in ("constant", "general")], chains, owner),
        rest=dataclasses.replace(graph, components=rest, constants=(), priors=()),
        general=tuple(g for g in groups if places[g.name] == "general"),
        constant=tuple(g for g in groups if places[g.name] == "constant"),
        priors=priors,
        sites=records,
        uses=uses_of,
        counted={
            name: tuple(use for use in uses if problem.with_prior or use.site not in priors)
            for name, uses in uses_of.items()
        },
        arguments=raw_arguments(records),
    )


def _layout_order(graph: FactorGraph, name: str, root: frozenset[str], order: Mapping[str, int]) -> tuple[str, int]:
    """Packed dims of a site: root plates, other plates, enumeration dims; and how many are of the last kind."""
    dims = graph.factors[name].dims
    plates = [d for d in graph.plate_names if d in dims]
    latents = sorted((d for d in dims if d in graph.symbol_sites), key=order.__getitem__)
    plates.sort(key=lambda d: d not in root)
    return "".join([*plates, *latents]), len(latents)


def _bundles(groups: list[Group], chains: list[Chain | None], owner: Mapping[str, int]) -> tuple[Bundle, ...]:
    found: dict[Hashable, Bundle] = {}
    for chain in chains:
        if chain is not None and chain.kind not in found:
            members = [i for i, other in enumerate(chains) if other is not None and other.kind == chain.kind]
            found[chain.kind] = Bundle(chain.kind, members)
    for group in groups:
        components = [owner[name] for name in group.sites]
        steps, kind = [], None
        for component, dims in zip(components, group.dims, strict=True):
            chain = chains[component]
            assert chain is not None
            kind = chain.kind
            steps.append(chain.step_of(dims[len(dims) - group.num_enumerated :]))
        found[kind].add(group, steps, components)
    return tuple(found.values())


def compile_grouped(problem: Problem) -> Grouped:
    """The engine for a problem, or `NotCompiled` with the reason."""
    return Grouped(problem)
