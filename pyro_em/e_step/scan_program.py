"""One component of the scanned engine: a chain of (joint) states with its data in blocks, and one E-step of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.e_step.base import IMPOSSIBLE, NotCompiled
from pyro_em.e_step.product import Prepared
from pyro_em.e_step.scan_data import NARROW, Emissions
from pyro_em.e_step.scan_groups import Grouped
from pyro_em.e_step.scan_layout import alike, by_dim, over, whole_site
from pyro_em.e_step.scan_short import ChainSums, Short, Weights
from pyro_em.e_step.scan_states import StepStates, step_states
from pyro_em.e_step.scan_windows import Windowed
from pyro_em.evidence.banded import Banded, blocks_of, is_short
from pyro_em.evidence.blocked import BlockedPosterior, Blocks, Scratch, smooth_blocked
from pyro_em.evidence.chain import smooth
from pyro_em.evidence.windows import Groups, Windows, cut
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.problem import Problem

FEW = 16  # features up to which products take less time in pieces than look-ups in blocks


@dataclass(frozen=True)
class Found:
    """What an E-step makes of one component."""

    evidence: Tensor  # (2,): Σ w ll, Σ |w ll|
    initial: Tensor  # (kinds, K) expected first states
    pairs: Tensor  # (kinds, K, K) expected transitions
    totals: Tensor  # (K, F) sums of posterior weights times features
    whole: bool = False  # by one operation


@dataclass(frozen=True)
class ScanProgram:
    """One chain component: its states, its emissions, and the multiplicities of its counts."""

    component: Component
    states: StepStates
    emissions: Emissions
    blocks: Blocks
    pieces: Windows | Groups | None  # that the emissions lie in, instead of the blocks
    chain_weight: Tensor | None  # (C,) weights of the chains
    initial_weights: tuple[Tensor | None, ...]  # (C,) each
    pair_weights: tuple[Tensor | None, ...]  # (L, M) each; zero where there is no next step
    kinds: Mapping[str, int]  # which of these multiplicities a latent's counts have
    banded: Banded | None  # for short chains
    whole: ChainSums | None  # for chains that are short or cut into pieces, without looked up rows
    plain: Callable[[], ScanProgram] | None  # in blocks, for chains cut into pieces
    scratch: Scratch = field(default_factory=Scratch)

    def smooth(self, initial: Tensor, table: Tensor, prepared: Prepared) -> Found:
        """One E-step, from the initial distribution (K, 1), the transition table (K, K) and W."""
        blocks, emissions = self.blocks, self.emissions
        if self.whole is not None:
            sums = self.whole.smooth(initial, table, prepared.coefficients, emissions.differences(prepared))
            if sums is not None:
                return Found(*sums, whole=True)
        if self.plain is not None:
            return self.plain().smooth(initial, table, prepared)
        given = emissions.likelihood(prepared, self.scratch)
        if given is None:
            return self._impossible()
        likelihood, log_scale = given
        if self.banded is not None:
            found = self.banded.smooth(initial, table, likelihood, self.scratch)
        else:
            found = smooth_blocked(initial, table, likelihood, blocks, self.scratch)
        if found is None:
            return self._unblocked(initial, table, prepared)
        first = found.states[:, 0, :: blocks.per_chain]
        pairs = torch.stack([table * self._transitions(found, weight) for weight in self.pair_weights])
        return self._found(found.log_scale + log_scale, first, pairs, found.states)

    def _transitions(self, found: BlockedPosterior, weight: Tensor | None) -> Tensor:
        left = found.left
        if weight is not None:  # in place where nobody reads it afterwards
            left = left.mul_(weight) if len(self.pair_weights) == 1 else left * weight
        return left.flatten(1) @ found.right.flatten(1).mT

    def _found(self, terms: Tensor, first: Tensor, pairs: Tensor, states: Tensor) -> Found:
        weight = self.chain_weight
        start = torch.stack([(first if w is None else first * w).sum(-1) for w in self.initial_weights])
        if weight is not None:
            states *= weight.repeat_interleave(self.blocks.per_chain)
            terms = torch.where(weight == 0, terms.new_zeros(()), terms * weight)
        evidence = torch.stack([terms.sum(), terms.abs().sum()])
        return Found(evidence, start, pairs, self.emissions.totals(states))

    def _impossible(self) -> Found:
        K, F = self.emissions.states.num, len(self.emissions.phi)
        nothing = torch.zeros(K, K, dtype=torch.float64)
        evidence = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
        initial, pairs = nothing[0].expand(len(self.initial_weights), K), nothing.expand(len(self.pair_weights), K, K)
        return Found(evidence, initial, pairs, torch.zeros(K, F, dtype=torch.float64))

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
        terms = found.log_evidence + emissions.base
        pairs = torch.stack([found.total_pairs(self._leaving(weight)) for weight in self.pair_weights])
        return self._found(terms, found.unary[0].mT, pairs, states)

    def _leaving(self, weight: Tensor | None) -> Tensor | None:
        """Weights of pairs by steps and chains, (T-1, C)."""
        if weight is None:
            return None
        blocks, emissions = self.blocks, self.emissions
        inside = emissions.order < emissions.num_rows
        rows = weight.new_empty(emissions.num_rows)
        rows[emissions.order[inside]] = weight.reshape(-1)[inside]
        return rows.reshape(blocks.steps, blocks.chains)[:-1]


def compile_scan(
    problem: Problem, run: Run, component: Component, in_pieces: bool = True
) -> tuple[ScanProgram, set[str]]:
    """The program of a component, and the sites of the first step that were joined with others.

    :param in_pieces: chains may be cut into windows or groups.
    :raises NotCompiled: with the reason.
    """
    graph = problem.graph
    (loop, *more) = component.loops or (None,)
    if loop is None or more or loop.loop.history != 1:
        raise NotCompiled("not every component is one loop that looks one step back")
    own = step_states(run, component, loop)
    states, z0, z1 = own.states, next(iter(own.first)), next(iter(own.later))
    plates = graph.factors[z0].plates
    order = [d for d in by_dim(run.sites[z1]) if d in plates]
    steps, chains = loop.loop.steps, math.prod(graph.plate_sizes[d] for d in order)
    on_cpu = torch.get_default_device().type == "cpu"  # LAPACK's band solver, called through NumPy
    pieces = cut(steps, chains, states.num) if in_pieces and on_cpu else None
    short = on_cpu and in_pieces and pieces is None and is_short(steps, chains, states.num)
    blocks = (blocks_of if short else Blocks.of)(steps, chains, states.num)
    layout = pieces or blocks
    sites, joined = _observed(problem, run, component, loop, own)
    sizes = {**graph.plate_sizes, loop.plate: steps}
    virtual = Component(tuple(site.name for site in sites), frozenset(own.now), plates | {loop.plate}, None)
    chain_weight = over(component.weight, order, [graph.plate_sizes[d] for d in order])
    widths = [graph.plate_sizes[d] for d in order]
    first = {name: over(graph.factors[name].weight, order, widths) for name in own.first}
    later = {n: leaving_weight(graph, graph.factors[n].weight, loop.plate, order, layout) for n in own.later}
    kinds: dict[str, int] = {}
    initial: list[Tensor | None] = []
    pairs: list[Tensor | None] = []
    for weights, distinct in ((first, initial), (later, pairs)):
        for name, weight in weights.items():
            kinds[name] = _place(weight, distinct)
    narrow = NARROW if short else FEW if pieces else 0
    emissions = Emissions(sites, virtual, dataclasses.replace(graph, plate_sizes=sizes), states, layout, narrow)
    if pieces and emissions.lookup is not None:
        return compile_scan(problem, run, component, in_pieces=False)
    counted = Weights(chain_weight, tuple(initial), tuple(pairs))
    data = (emissions.phi, emissions.base, states.num, counted, emissions.padding)
    banded = Banded(blocks, states.num) if short else None
    whole: ChainSums | None = None
    plain: Callable[[], ScanProgram] | None = None
    if pieces:
        whole = Windowed(pieces, *data) if isinstance(pieces, Windows) else Grouped(pieces, *data)
        plain = functools.cache(lambda: compile_scan(problem, run, component, in_pieces=False)[0])
    elif banded is not None and emissions.lookup is None:
        whole = Short(banded, *data)
    places = (blocks, pieces, chain_weight, tuple(initial), tuple(pairs), kinds)
    return ScanProgram(component, own, emissions, *places, banded, whole, plain), joined


def _place(weight: Tensor | None, among: list[Tensor | None]) -> int:
    """Where a weight stands among the distinct ones, to which it is added if it is new."""
    for i, other in enumerate(among):
        if weight is other or (weight is not None and other is not None and torch.equal(weight, other)):
            return i
    among.append(weight)
    return len(among) - 1


def _observed(
    problem: Problem, run: Run, component: Component, loop: ChainedLoop, states: StepStates
) -> tuple[list[SiteRecord], set[str]]:
    """The observed sites, at all steps; at the first step they must be of the same form."""
    found: list[SiteRecord] = []
    joined: set[str] = set()
    heads = {n for n in component.factors if n in loop.heads and not run.sites[n].enumerated}
    for name in component.factors:
        rest = run.sites[name]
        if name in heads or rest.enumerated:
            continue
        head = loop.rest[name].name(0, loop.loop) if name in loop.rest else ""
        if head not in heads or not alike(run.sites[head], rest, states.start, states.now, problem):
            raise NotCompiled(f"'{name}' is of another form at the first step, or outside of the loop")
        heads.remove(head)
        joined.add(head)
        found.append(whole_site(run.sites[head], rest, loop, problem.graph.plate_sizes))
    if heads or not found:
        raise NotCompiled("sites that are observed at the first step only, or none at all")
    return found, joined


def leaving_weight(
    graph: FactorGraph, weight: Tensor | None, plate: str, order: list[str], blocks: Blocks | Windows | Groups
) -> Tensor | None:
    """Multiplicity of the transition that leaves each step, (L, M), zero where there is no next step.

    :param weight: packed over the plate of all steps but the first, and the chains' plates `order`.
    """
    if weight is None and not blocks.padded:
        return None  # what leaves the last step is zero anyway
    sizes = [blocks.steps - 1, *(graph.plate_sizes[d] for d in order)]
    leaving = over(weight, [plate, *order], sizes)
    if leaving is None:
        leaving = torch.ones((blocks.steps - 1) * blocks.chains, dtype=torch.float64)
    rows = torch.cat([leaving, leaving.new_zeros(blocks.chains + 1)])  # the last step's, and the padding's
    at = blocks.order()
    return rows[torch.where(at < 0, len(rows) - 1, at)]
