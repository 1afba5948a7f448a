"""One component of the scanned engine: a chain of states with its data in blocks, and one E-step of it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.product import Prepared
from pyro_em.e_step.program import IMPOSSIBLE
from pyro_em.e_step.scan_data import Emissions
from pyro_em.e_step.scan_layout import alike, by_dim, dim_of, num_states, over, whole_site
from pyro_em.e_step.states import JointStates
from pyro_em.evidence.blocked import Blocks, Scratch, smooth_blocked
from pyro_em.evidence.chain import smooth
from pyro_em.families.categorical import CategoricalFamily
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.graph import Component
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.problem import Problem


@dataclass(frozen=True)
class Found:
    """What an E-step makes of one component."""

    evidence: Tensor  # (2,): Σ w ll, Σ |w ll|
    initial: Tensor  # (K,) expected first states
    pairs: Tensor  # (K, K) expected transitions
    totals: Tensor  # (K, F) sums of posterior weights times features


@dataclass(frozen=True)
class ScanProgram:
    """One chain component: its latent's two sites, its emissions, and the multiplicities of its counts."""

    component: Component
    initial: str
    transition: str
    emissions: Emissions
    blocks: Blocks
    chain_weight: Tensor | None  # (C,) weights of the chains
    initial_weight: Tensor | None  # (C,)
    pair_weight: Tensor | None  # (L, M); zero where there is no next step
    scratch: Scratch = field(default_factory=Scratch)

    def smooth(self, initial: Tensor, table: Tensor, prepared: Prepared) -> Found:
        """One E-step, from the initial distribution (K, 1), the transition table (K, K) and W."""
        blocks, emissions = self.blocks, self.emissions
        given = emissions.likelihood(prepared, self.scratch)
        if given is None:
            return self._impossible()
        likelihood, log_scale = given
        found = smooth_blocked(initial, table, likelihood, blocks, self.scratch)
        if found is None:
            return self._unblocked(initial, table, prepared)
        first = found.states[:, 0, :: blocks.per_chain]
        left = found.left if self.pair_weight is None else found.left.mul_(self.pair_weight)
        pairs = table * (left.flatten(1) @ found.right.flatten(1).mT)
        return self._found(found.log_scale + log_scale, first, pairs, found.states)

    def _found(self, terms: Tensor, first: Tensor, pairs: Tensor, states: Tensor) -> Found:
        weight = self.chain_weight
        start = (first if self.initial_weight is None else first * self.initial_weight).sum(-1)
        if weight is not None:
            states *= weight.repeat_interleave(self.blocks.per_chain)
            terms = torch.where(weight == 0, terms.new_zeros(()), terms * weight)
        evidence = torch.stack([terms.sum(), terms.abs().sum()])
        return Found(evidence, start, pairs, self.emissions.totals(states))

    def _impossible(self) -> Found:
        K, F = self.emissions.states.num, len(self.emissions.phi)
        nothing = torch.zeros(K, K, dtype=torch.float64)
        evidence = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
        return Found(evidence, nothing[0], nothing, torch.zeros(K, F, dtype=torch.float64))

    def _unblocked(self, initial: Tensor, table: Tensor, prepared: Prepared) -> Found:
        """Through chain.py, which has a route in log-space."""
        blocks, emissions, K = self.blocks, self.emissions, len(initial)
        density = emissions.log_likelihood(prepared, self.scratch)
        inside = emissions.order < emissions.num_rows
        where = emissions.order[inside]
        unary = density.new_empty(emissions.num_rows, K)
        unary[where] = density.flatten(1).mT[inside]
        unary = unary.reshape(blocks.steps, blocks.chains, K)
        unary = torch.where(unary <= 0.1 * IMPOSSIBLE, -torch.inf, unary)
        unary[0] += initial.log().mT
        found = smooth(unary, table.log().reshape(1, 1, K, K))
        if not bool(found.log_evidence.isfinite().all()):
            return self._impossible()
        states = torch.zeros_like(density)
        states.view(K, -1)[:, inside] = found.unary.reshape(-1, K)[where].mT
        weight = None if self.pair_weight is None else self._leaving()
        terms = found.log_evidence + emissions.base
        return self._found(terms, found.unary[0].mT, found.total_pairs(weight), states)

    def _leaving(self) -> Tensor:
        """The pairs' weights by steps and chains, (T-1, C)."""
        assert self.pair_weight is not None
        blocks, emissions = self.blocks, self.emissions
        inside = emissions.order < emissions.num_rows
        rows = self.pair_weight.new_empty(emissions.num_rows)
        rows[emissions.order[inside]] = self.pair_weight.reshape(-1)[inside]
        return rows.reshape(blocks.steps, blocks.chains)[:-1]


def compile_scan(problem: Problem, run: Run, component: Component) -> tuple[ScanProgram, set[str]]:
    """The program of a component, and the sites of the first step that were joined with others.

    :raises NotCompiled: with the reason.
    """
    graph = problem.graph
    (loop, *more) = component.loops or (None,)
    if loop is None or more or loop.loop.history != 1 or len(loop.carried) != 1:
        raise NotCompiled("not every component is one chain of one latent")
    latents = [name for name in component.factors if run.sites[name].enumerated]
    initial = [n for n in latents if n in loop.heads]
    transition = [n for n in latents if n in loop.rest]
    if len(latents) != 2 or len(initial) != 1 or len(transition) != 1:
        raise NotCompiled("a chain has other latents beside its states")
    (z0,), (z1,) = initial, transition
    _check_latents(run, z0, z1, loop)
    plates = graph.factors[z0].plates
    order = [d for d in by_dim(run.sites[z1]) if d in plates]
    steps, chains = loop.loop.steps, math.prod(graph.plate_sizes[d] for d in order)
    dim = dim_of(run.sites[z1], loop.carried[0].current)
    states = JointStates((dim,), (num_states(run.sites[z1]),))
    blocks = Blocks.of(steps, chains, states.num)
    sites, joined = _observed(problem, run, component, loop)
    sizes = {**graph.plate_sizes, loop.plate: steps}
    virtual = Component(
        tuple(site.name for site in sites), frozenset({loop.carried[0].current}), plates | {loop.plate}, None
    )
    emissions = Emissions(sites, virtual, dataclasses.replace(graph, plate_sizes=sizes), states, blocks)
    chain_weight = over(component.weight, order, [graph.plate_sizes[d] for d in order])
    own = graph.factors[z0].weight
    initial_weight = over(own, order, [graph.plate_sizes[d] for d in order])
    pair_weight = _pair_weight(problem, z1, loop, order, blocks)
    return ScanProgram(component, z0, z1, emissions, blocks, chain_weight, initial_weight, pair_weight), joined


def _check_latents(run: Run, z0: str, z1: str, loop: ChainedLoop) -> None:
    first, later = run.sites[z0], run.sites[z1]
    for site, dims in ((first, ()), (later, (dim_of(first, loop.carried[0].previous),))):
        if type(site.family) is not CategoricalFamily or site.arguments is None or site.element_dims:
            raise NotCompiled(f"'{site.name}' is no Categorical")
        for name, value in site.arguments.items():
            if any(n > 1 and i - value.dim() + 1 not in dims for i, n in enumerate(value.shape[:-1])):
                raise NotCompiled(f"argument '{name}' of '{site.name}' varies with time or between chains")
    if first.plate_dims | {loop.plate} != later.plate_dims:
        raise NotCompiled(f"'{z1}' is in other plates than '{z0}'")


def _observed(problem: Problem, run: Run, component: Component, loop: ChainedLoop) -> tuple[list[SiteRecord], set[str]]:
    """The observed sites, at all steps; at the first step they must be of the same form."""
    found: list[SiteRecord] = []
    joined: set[str] = set()
    heads = {n for n in component.factors if n in loop.heads and not run.sites[n].enumerated}
    for name in component.factors:
        rest = run.sites[name]
        if name in heads or rest.enumerated:
            continue
        head = loop.rest[name].name(0, loop.loop) if name in loop.rest else ""
        if head not in heads or not alike(run.sites[head], rest, loop, problem):
            raise NotCompiled(f"'{name}' is of another form at the first step, or outside of the loop")
        heads.remove(head)
        joined.add(head)
        found.append(whole_site(run.sites[head], rest, loop, problem.graph.plate_sizes))
    if heads or not found:
        raise NotCompiled("sites that are observed at the first step only, or none at all")
    return found, joined


def _pair_weight(problem: Problem, name: str, loop: ChainedLoop, order: list[str], blocks: Blocks) -> Tensor | None:
    """Multiplicity of the transition that leaves each step, (L, M)."""
    weight = problem.graph.factors[name].weight
    if weight is None and blocks.length * blocks.per_chain == blocks.steps:
        return None  # what leaves the last step is zero anyway
    sizes = [blocks.steps - 1, *(problem.graph.plate_sizes[d] for d in order)]
    leaving = over(weight, [loop.plate, *order], sizes)
    if leaving is None:
        leaving = torch.ones((blocks.steps - 1) * blocks.chains, dtype=torch.float64)
    rows = torch.cat([leaving, leaving.new_zeros(blocks.chains + 1)])  # the last step's, and the padding's
    at = blocks.order()
    return rows[torch.where(at < 0, len(rows) - 1, at)]
