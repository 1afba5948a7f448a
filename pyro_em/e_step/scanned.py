"""Compiled E-step for a `pyro_em.markov` loop over chains of states: blocks of time, all run side by side.

    z_t ~ Categorical(A[z_{t-1}]),  x_t ~ emissions of exponential families given z_t,  in plates of C chains

Emission likelihoods are matrix products on sufficient statistics (scan_data.py), the chains are smoothed in
blocks (evidence/blocked.py), expected transitions are one product of what comes out, and so are the moments of
the emissions. Memory is O(T·K). Where the blocks cannot be certified the chains go through chain.py.

Several latents in a step are one joint state (scan_states.py): factorial and coupled chains, semi-Markov states,
mixtures of emissions.

Longer histories, tables or emission parameters that vary with time, and emissions that look back are timed_rows.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_em.e_step.base import Expectation, NotCompiled, Stage
from pyro_em.e_step.direct import NUM_PREPARED
from pyro_em.e_step.interpreted import from_totals
from pyro_em.e_step.outside import Outside
from pyro_em.e_step.product import Prepared
from pyro_em.e_step.scan_program import Found, compile_scan
from pyro_em.evidence.chain import smooth
from pyro_em.model.recognise import Use
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments, site_moments
from pyro_em.sufficient import Arguments, Sufficient, raw_arguments
from pyro_em.types import Params

CHECKED_STEPS = 256  # of the first chains, by the spot check


class Scanned:
    """The engine; made by `compile_scanned`."""

    name = "scanned"
    generation = 0
    compact = False  # the last E-step was one operation a component

    def __init__(self, problem: Problem) -> None:
        graph = problem.graph
        if not graph.loops or not graph.components:  # without a choice of states nothing is chained
            raise NotCompiled("no pyro_em.markov loop")
        for name, uses in problem.uses.items():
            if any(use.index is None for use in uses):
                raise NotCompiled(f"the arguments that '{name}' enters are not recognised")
        self.problem, self.run = problem, (run := problem.first)
        self.start: Arguments = raw_arguments(run.sites)
        self.outside = Outside(problem, run)
        self._magnitude = torch.zeros((), dtype=torch.float64)  # Σ|ll| of the last E-step
        compiled = [compile_scan(problem, run, component) for component in graph.components]
        self.programs = [program for program, _ in compiled]
        joined = set().union(*(sites for _, sites in compiled))
        self.uses: dict[str, tuple[Use, ...]] = {
            name: tuple(use for use in uses if use.site not in joined) for name, uses in problem.uses.items()
        }
        self.counted = {
            name: tuple(u for u in uses if problem.with_prior or u.site not in graph.priors)
            for name, uses in self.uses.items()
        }
        first, pieces = self.programs[0], self.programs[0].pieces
        how = f"in blocks of {(pieces or first.blocks).length}"
        if first.banded or pieces:
            how += ", joined by band solves"
        if pieces:
            how = f"in {pieces.count} {pieces.name}, {how}"
        self.reason = (
            f"{first.blocks.chains} chains of {first.blocks.steps} steps, smoothed {how}, "
            "emissions by matrix products on sufficient statistics"
        )

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`."""
        (sums,) = self.core([self.before(params, self._magnitude)])
        return self.expectation(params, sums)

    def expectation(self, params: Params, sums: Sequence[Tensor]) -> Expectation:
        """The E-step whose `core` gave `sums`."""
        totals, sufficient = self.after(params, sums)
        self._magnitude = totals[2]
        return from_totals(self.problem, params, totals, sufficient)

    def before(self, params: Params, magnitude: Tensor) -> Stage:
        """W, initial distribution and transition table of every component."""
        with torch.no_grad():
            arguments = self._arguments(params).arguments
            tensors, kind = [], []
            for program in self.programs:
                own = program.emissions.prepared(arguments, magnitude)
                states = program.states
                tensors += [states.initial(arguments), states.table(arguments), own.coefficients, *own.normal]
                kind.append(own.direct)
            return Stage(tuple(tensors), tuple(kind))

    def core(self, stages: Sequence[Stage]) -> list[tuple[Tensor, ...]]:
        """Sums over the data for every start, one after the other."""
        with torch.no_grad():
            return [self._sums(stage) for stage in stages]

    def _sums(self, stage: Stage) -> tuple[Tensor, ...]:
        sums: list[Tensor] = []
        compact = True
        for program, (initial, table, own) in zip(self.programs, self._unpacked(stage), strict=True):
            found = program.smooth(initial, table, own)
            compact = compact and found.whole
            sums += [found.evidence, found.initial, found.pairs, found.totals]
        self.compact = compact
        return tuple(sums)

    @staticmethod
    def _unpacked(stage: Stage) -> list[tuple[Tensor, Tensor, Prepared]]:
        tensors, found = iter(stage.tensors), []
        for sites in stage.kind:
            initial, table, w = next(tensors), next(tensors), next(tensors)
            normal = tuple(next(tensors) for _ in range(NUM_PREPARED * len(sites)))
            found.append((initial, table, Prepared(w, sites, normal)))
        return found

    def after(self, params: Params, sums: Sequence[Tensor]) -> tuple[Tensor, Sufficient]:
        """log p(x|θ), log p(θ) and Σ|ll_n| as a tensor (3,), and the statistics behind them."""
        own = [Found(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]) for i in range(0, len(sums), 4)]
        sufficient = self._arguments(params)
        sufficient._moments_of = lambda name, arguments: self._moments(name, arguments, own)
        evidence = torch.stack([x.evidence for x in own]).sum(0) if len(own) > 1 else own[0].evidence
        return self.outside.totals(evidence, sufficient), sufficient

    def _arguments(self, params: Params) -> Sufficient:
        arguments = {site: dict(own) for site, own in self.start.items()}
        sufficient = Sufficient(self.problem, self.run.sites, arguments, self._never, self.counted)
        for name, theta in params.items():
            sufficient.put(theta, self.uses[name])
        return sufficient

    def _never(self, name: str, arguments: dict[str, Tensor]) -> SiteMoments:
        raise AssertionError(f"moments of '{name}' were asked for before the E-step")

    def _moments(self, name: str, arguments: dict[str, Tensor], found: list[Found]) -> SiteMoments:
        for program, own in zip(self.programs, found, strict=True):
            states = program.states
            if name in program.kinds:
                counts = (own.initial if name in states.first else own.pairs)[program.kinds[name]]
                return site_moments(self.run.sites[name], arguments, states.weight(name, counts), None)
            for layout in program.emissions.layouts:
                if layout.site.name == name:
                    return layout.moments(own.totals, program.emissions.states)
        return self.outside.moments(name, arguments)

    def spot_check(self, params: Params) -> tuple[float, float]:
        """Log-likelihood of the first steps (unweighted) by this engine, and by the families' own log-densities."""
        arguments = self._arguments(params).arguments
        total = [0.0, 0.0]
        stage = self.before(params, self._magnitude)
        for program, (initial, table, own) in zip(self.programs, self._unpacked(stage), strict=True):
            emissions, blocks = program.emissions, program.blocks
            steps = max(1, min(blocks.steps, CHECKED_STEPS * 8 // blocks.chains))
            for i, density in enumerate(emissions.first_rows(arguments, own, steps * blocks.chains)):
                unary = density.mT.reshape(steps, blocks.chains, -1).clone()
                unary[0] += initial.log().mT
                total[i] += float(smooth(unary, table.log().unsqueeze(0).unsqueeze(0)).log_evidence.sum())
        return total[0], total[1]


def compile_scanned(problem: Problem) -> Scanned:
    """The engine for a problem, or `NotCompiled` with the reason."""
    return Scanned(problem)
