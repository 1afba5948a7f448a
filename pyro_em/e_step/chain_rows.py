"""One loop over time whose observed sites are evaluated row by row: from packed log-densities to posteriors and counts.

    log p(x_t | s_t) for all steps from the sites' own densities,   s_t of lagged.py,   smoothed in blocks of time

Any family, any argument that varies from step to step (covariates, earlier data), any history. Expected transitions
are one product, as in scan_program.py; posteriors of single steps are kept for the observed sites only. The first h
steps' data are in the potential of the first joint state, where they say whatever they say.

Shapes: T steps, h of them first ones, n = T - h + 1 steps of the chain; C chains; S, E as in lagged.py; L, M blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em import settings
from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.lagged import Lagged, Packed, lagged
from pyro_em.e_step.scan_layout import dim_of, over
from pyro_em.e_step.scan_program import leaving_weight
from pyro_em.evidence.banded import Banded, blocks_of, is_short
from pyro_em.evidence.blocked import BlockedPosterior, Blocks, Scratch, smooth_blocked
from pyro_em.evidence.chain import smooth
from pyro_em.evidence.ring import logsumexp
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.trace import Run, SiteRecord

ARRAYS = 6  # of the joint states' size that an E-step keeps


@dataclass(frozen=True)
class Smoothed:
    """What an E-step makes of one loop."""

    evidence: Tensor  # (2,): Σ w ll, Σ |w ll|
    counts: Tensor  # (kinds, S, S) expected transitions
    first: Tensor  # (X, S, C) posterior of the first joint state, and of what only it has
    rows: Tensor  # (E, (n - 1)·C) posterior of what the observed sites read
    by_bands: bool = False  # by band solves, without certificates of blocks


class RowProgram:
    """Made by `compile_rows`."""

    def __init__(
        self,
        graph: FactorGraph,
        component: Component,
        loop: ChainedLoop,
        states: Lagged,
        lead: str,
        kinds: Mapping[str, int],
        weights: tuple[Tensor | None, ...],
        blocks: Blocks,
        banded: bool,
    ) -> None:
        self.graph, self.component, self.loop, self.states = graph, component, loop, states
        self.lead, self.kinds, self.weights, self.blocks = lead, kinds, weights, blocks
        self.sizes = [graph.plate_sizes[d] for d in lead]
        latent = {n for n in component.factors if graph.factors[n].enumerated}
        self.tables = [n for n in component.factors if n in latent and n in loop.rest]
        self.heads = [n for n in component.factors if n not in loop.rest]  # and what stands outside of the loop
        self.observed = [n for n in component.factors if n in loop.rest and n not in latent]
        self.banded = Banded(blocks, states.num) if banded else None
        self.chain_weight = over(component.weight, list(lead), self.sizes)
        self.scratch = Scratch()
        order = blocks.order().reshape(-1)
        rows = blocks.steps * blocks.chains
        self._order = torch.where(order < 0, rows, order)
        self._place = torch.empty(rows, dtype=torch.long)
        self._place[order[order >= 0]] = torch.nonzero(order >= 0).squeeze(1)

    @property
    def reason(self) -> str:
        """For the plan."""
        blocks = self.blocks
        how = f"in blocks of {blocks.length}" + (", joined by band solves" if self.banded is not None else "")
        joint = f" of {self.states.num} joint states" if len(self.states.slots) > 1 else ""
        return f"{blocks.chains} chains{joint} of {blocks.steps} steps, smoothed {how}, data row by row"

    def potentials(self, factors: Packed) -> tuple[Tensor, Tensor, Tensor]:
        """Log-potential of the first state (X, S, C), transition table (S, S), log-densities of the data (E, rows)."""
        states, steps = self.states, self.blocks.steps - 1
        first = states.first([factors[n] for n in self.heads], self.lead, self.sizes)
        table = states.table([_constant(factors[n], self.loop.plate + self.lead) for n in self.tables])
        lead, sizes = self.loop.plate + self.lead, [steps, *self.sizes]
        return first, table, states.rows([factors[n] for n in self.observed], lead, sizes)

    def smooth(self, first: Tensor, table: Tensor, rows: Tensor) -> Smoothed:
        """One E-step from `potentials`."""
        if self.banded is not None:
            solved = self._by_bands(self.banded, first, table, rows)
            if solved is not None:
                return solved
        blocks, states = self.blocks, self.states
        C, cells = blocks.chains, blocks.length * blocks.columns
        padded = self.scratch.array("rows", len(rows), blocks.steps * C + 1)
        padded[:, :C] = padded[:, -1:] = 0.0  # the first state's data are in its potential
        padded[:, C:-1] = rows
        density = self.scratch.array("likelihood", len(rows), cells)
        torch.index_select(padded, 1, self._order, out=density)
        start = logsumexp(first.movedim(0, -1))
        scales, shift = density.amax(0), start.amax(0)
        if not (bool(scales.isfinite().all()) and bool(shift.isfinite().all())):
            return self._impossible(len(rows), len(first))
        likelihood = density.sub_(scales).exp_()
        initial = (start - shift).exp()
        total = initial.sum(0)
        initial = initial / total
        if states.row_of is not None:
            likelihood = likelihood.index_select(0, states.row_of)
        likelihood = likelihood.reshape(states.num, blocks.length, blocks.columns)
        if self.banded is not None:
            found = self.banded.smooth(initial, table, likelihood, self.scratch)
        else:
            found = smooth_blocked(initial, table, likelihood, blocks, self.scratch)
        log_scale = scales.reshape(blocks.length, -1).sum(0).reshape(C, -1).sum(1) + shift + total.log()
        if found is None:
            return self._unblocked(first, start, table, padded)
        pairs = torch.stack([table * _transitions(found, weight) for weight in self.weights])
        posterior = found.states.reshape(states.num, -1)
        at_first = _given(first, start, found.states[:, 0, :: blocks.per_chain])
        seen = states.reduced(posterior).index_select(1, self._place[C:])
        return Smoothed(self._evidence(found.log_scale + log_scale), pairs, at_first, seen)

    def _by_bands(self, banded: Banded, first: Tensor, table: Tensor, rows: Tensor) -> Smoothed | None:
        """In operations that a recording can hold (tape/); None where messages leave the range of floats, or some step
        is impossible."""
        states, blocks, C = self.states, self.blocks, self.blocks.chains
        zero = rows.new_zeros(len(rows), 1)  # the first state's data are in its potential
        density = torch.cat([zero.expand(-1, C), rows, zero], 1).index_select(1, self._order)
        start = logsumexp(first.movedim(0, -1))
        scales, shift = density.amax(0), start.amax(0)
        if not (bool(scales.isfinite().all()) and bool(shift.isfinite().all())):
            return None
        likelihood, initial = (density - scales).exp(), (start - shift).exp()
        total = initial.sum(0)
        if states.row_of is not None:
            likelihood = likelihood.index_select(0, states.row_of)
        found = banded.solved(initial / total, table, likelihood.reshape(states.num, blocks.length, -1))
        if found is None:
            return None
        log_scale = scales.reshape(blocks.length, C, -1).sum((0, 2)) + shift + total.log()
        pairs = torch.stack([table * _transitions(found, weight) for weight in self.weights])
        at_first = _given(first, start, found.states[:, 0, :: blocks.per_chain])
        seen = states.reduced(found.states.reshape(states.num, -1)).index_select(1, self._place[C:])
        return Smoothed(self._evidence(found.log_scale + log_scale), pairs, at_first, seen, by_bands=True)

    def otherwise(self, first: Tensor, table: Tensor, rows: Tensor) -> Smoothed:
        """The same by another way, step after step over longer blocks or in log-space: what `smooth` is checked by."""
        C = self.blocks.chains
        padded = torch.cat([rows.new_zeros(len(rows), C), rows, rows.new_zeros(len(rows), 1)], 1)
        return self._unblocked(first, logsumexp(first.movedim(0, -1)), table, padded)

    def _evidence(self, terms: Tensor) -> Tensor:
        weight = self.chain_weight
        if weight is not None:
            terms = torch.where(weight == 0, terms.new_zeros(()), terms * weight)
        return torch.stack([terms.sum(), terms.abs().sum()])

    def _impossible(self, read: int, alone: int) -> Smoothed:
        S, blocks = self.states.num, self.blocks
        evidence = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
        counts = torch.zeros(len(self.weights), S, S, dtype=torch.float64)
        return Smoothed(
            evidence,
            counts,
            counts.new_zeros(S, blocks.chains),
            counts.new_zeros(read, len(self._place[blocks.chains :])),
        )

    def _unblocked(self, first: Tensor, start: Tensor, table: Tensor, padded: Tensor) -> Smoothed:
        """Through chain.py, which has a route in log-space."""
        states, (n, C) = self.states, (self.blocks.steps, self.blocks.chains)
        unary = padded[:, :-1] if states.row_of is None else padded[:, :-1].index_select(0, states.row_of)
        unary = unary.reshape(-1, n, C).permute(1, 2, 0).contiguous()
        unary[0] += start.mT
        found = smooth(unary, table.log()[None, None])
        if not bool(found.log_evidence.isfinite().all()):
            return self._impossible(len(padded), len(first))
        posterior = found.unary.permute(2, 0, 1).reshape(states.num, -1)
        pairs = torch.stack([found.total_pairs(self._by_step(weight)) for weight in self.weights])
        seen = states.reduced(posterior)[:, C:].contiguous()
        return Smoothed(self._evidence(found.log_evidence), pairs, _given(first, start, found.unary[0].mT), seen)

    def _by_step(self, weight: Tensor | None) -> Tensor | None:
        n, C = self.blocks.steps, self.blocks.chains
        return None if weight is None else weight.reshape(-1)[self._place].reshape(n, C)[:-1]

    def counts(self, name: str, site: SiteRecord, found: Smoothed) -> Tensor:
        """Expected transitions of a latent of the later steps and its parents in Pyro's dims, all steps together."""
        dims = "".join(site.symbols.values())
        counts, symbols = self.states.pairs(found.counts[self.kinds[name]], dims)
        at = [dim_of(site, symbol) for symbol in symbols]
        shape = [1] * -min(at)
        for dim, size in zip(at, counts.shape, strict=True):
            shape[dim] = size
        return counts.permute(sorted(range(len(at)), key=at.__getitem__)).reshape(shape)

    def posterior(self, name: str, found: Smoothed) -> Tensor:
        """Posterior weights of an observed site, or of a site of the first steps, packed."""
        dims = self.graph.factors[name].dims
        if name not in self.loop.rest:
            weight, symbols = self.states.of_first(found.first, dims)
            lead, sizes = self.lead, self.sizes
        else:
            weight, symbols = self.states.of_row(found.rows, dims)
            lead, sizes = self.loop.plate + self.lead, [self.blocks.steps - 1, *self.sizes]
        wide = weight.reshape(*weight.shape[:-1], *sizes)
        gone = [i for i, n in enumerate(wide.shape) if n == 1]
        names = "".join(d for i, d in enumerate("".join(symbols) + lead) if i not in gone)
        return with_dims(wide.reshape([n for n in wide.shape if n > 1]), names)


def _given(first: Tensor, start: Tensor, posterior: Tensor) -> Tensor:
    """Posterior (X, S, C) from that of the joint state (S, C), whose potentials are `first` and, summed, `start`."""
    share = (first - torch.where(start.isfinite(), start, 0.0)).exp()
    return share * posterior


def _transitions(found: BlockedPosterior, weight: Tensor | None) -> Tensor:
    left = found.left if weight is None else found.left * weight
    return left.flatten(1) @ found.right.flatten(1).mT


def _constant(factor: Tensor, lead: str) -> Tensor:
    """A packed table without dims along which it is only expanded."""
    dims = dims_of(factor)
    for d in lead:
        if d in dims:
            factor, dims = factor.select(dims.index(d), 0), dims.replace(d, "")
    return with_dims(factor, dims)


def compile_rows(graph: FactorGraph, component: Component, run: Run, factors: Packed) -> RowProgram:
    """The program of a component that is one loop whose latents share one table at all steps.

    :param factors: packed log-densities at some parameters.
    :raises NotCompiled: with the reason.
    """
    (loop, *more) = component.loops or (None,)
    if loop is None or more:
        raise NotCompiled("not one loop over time")
    sizes = {
        d: n for name in component.factors for d, n in zip(dims_of(factors[name]), factors[name].shape, strict=True)
    }
    states = lagged(graph, component, loop, factors, {s: sizes.get(s, 1) for s in component.symbols})
    latent = [n for n in component.factors if graph.factors[n].enumerated]
    tables = [n for n in latent if n in loop.rest]
    plates = graph.factors[tables[0]].plates - {loop.plate}
    if any(graph.factors[n].plates - {loop.plate} != plates for n in latent):
        raise NotCompiled("latents of a step in different plates")
    dims = {site.symbols[p.dim]: p.dim for site in run.sites.values() for p in site.plates}
    lead = "".join(sorted(plates, key=dims.__getitem__))
    for name in tables:
        own = factors[name]
        moving = [d for d in loop.plate + lead if d in dims_of(own) and own.stride(dims_of(own).index(d)) != 0]
        if moving:
            raise NotCompiled(f"the table of '{name}' varies with time or between chains")
    if not any(n in loop.rest and n not in latent for n in component.factors):
        raise NotCompiled("no observed site at the later steps")
    steps, chains = loop.loop.steps - loop.loop.history + 1, math.prod(graph.plate_sizes[d] for d in lead)
    if 8 * ARRAYS * states.num * steps * chains > settings.max_table_bytes:
        raise NotCompiled("the messages of its states do not fit")
    # The band solver is called through NumPy.
    banded = torch.get_default_device().type == "cpu" and is_short(steps, chains, states.num)
    blocks = (blocks_of if banded else Blocks.of)(steps, chains, states.num)
    kinds: dict[str, int] = {}
    weights: list[Tensor | None] = []
    for name in tables:
        weight = leaving_weight(graph, graph.factors[name].weight, loop.plate, list(lead), blocks)
        same = [i for i, other in enumerate(weights) if _equal(weight, other)]
        kinds[name] = same[0] if same else len(weights)
        weights += [] if same else [weight]
    return RowProgram(graph, component, loop, states, lead, kinds, tuple(weights), blocks, banded)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
