"""Compiled E-step for discrete latents of any shape, above all chains: the model is not run again.

The raw arguments follow from the parameters by their recognised uses, entries of parameters or linear predictors,
isomorphic sites are evaluated as one (groups.py), components that are chains are smoothed all steps and sequences at
once (chains.py), any others are contracted as the reference does. The M-step sees one site per group, in a plate of its
copies (`stacked`), so its work does not grow with the number of sites either.

A parameter that does not move may enter in any way: when it has another value than in the run that the
arguments come from, the model is run once more. Where the data are impossible the reference path says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.base import Expectation, NotCompiled, Unread
from pyro_em.e_step.chains import Bundle
from pyro_em.e_step.group_program import group_program
from pyro_em.e_step.groups import Group
from pyro_em.e_step.interpreted import read
from pyro_em.evidence.chain import ChainPosterior
from pyro_em.evidence.discrete import evaluate, weighted_sum
from pyro_em.families.base import AnyStatistic
from pyro_em.model.compat import with_dims
from pyro_em.model.density import packed_log_density
from pyro_em.model.packing import align
from pyro_em.model.trace import Run
from pyro_em.model.use import VALUE
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments, argument_cells, site_center, site_moments, site_statistics
from pyro_em.sufficient import Arguments, Sufficient
from pyro_em.types import Params


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
            raise NotCompiled(graph.nothing_to_sum)
        if graph.loops:
            raise NotCompiled("a pyro_em.markov loop")
        self.problem = problem
        self._opaque = [n for n, uses in problem.uses.items() if not all(use.known for use in uses)]
        self._load(problem.start)
        chained = len(graph.components) - len(self._program.rest.components)
        self.reason = (
            f"{len(graph.factors)} sites evaluated as {len(self._program.sites)}, "
            f"{chained} of {len(graph.components)} components smoothed as chains"
        )

    def _load(self, params: Params) -> None:
        self._at = {name: params[name].detach().clone() for name in self._opaque}
        self._program = group_program(self.problem, params)
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

    def stacked(self) -> Problem:
        """The problem with groups as its sites, as the M-step of this engine sees it; it is not to be run."""
        problem, program = self.problem, self._program
        found = dataclasses.replace(problem, uses=dict(program.uses))
        vars(found)["first"] = Run(dict(program.sites), {}, problem.first.plate_symbols)
        return found

    def _unread(self, params: Params) -> Unread:
        problem = self.problem
        arguments = self._program.arguments_at(params)
        posterior = self._posterior(arguments)
        sufficient = self._sufficient(params, arguments, posterior)
        error = torch.zeros((), dtype=torch.float64)
        log_prior = self._log_prior(sufficient)
        totals = torch.stack([posterior.log_likelihood, log_prior, posterior.magnitude, error])
        return Unread(totals, sufficient, lambda: problem.evidence(params)[0].weights)

    def _sufficient(self, params: Params, arguments: Arguments, posterior: _Posterior) -> Sufficient:
        """Statistics of a posterior, at the arguments of any parameters."""
        program = self._program

        def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
            group = program.groups[name]
            if name not in self._centers:
                center = site_center(group.record, argument_cells(group.record, arguments))
                self._centers[name] = center
                if group.record.family is None or not group.record.family.latent_response:
                    self._statistics[name] = site_statistics(group.record, arguments, center)
            weight = _weight(group, posterior)
            return site_moments(group.record, arguments, weight, self._centers[name], self._statistics.get(name))

        sufficient = Sufficient(self.problem, program.sites, arguments, moments_of, program.counted)
        for name, theta in params.items():
            sufficient.put(theta, tuple(use for use in program.uses[name] if use.slot == VALUE))
        sufficient.weight_of = lambda name: _weight(program.groups[name], posterior)
        sufficient.at = lambda others: self._sufficient(others, program.arguments_at(others), posterior)
        return sufficient

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


def compile_grouped(problem: Problem) -> Grouped:
    """The engine for a problem, or `NotCompiled` with the reason."""
    return Grouped(problem)
