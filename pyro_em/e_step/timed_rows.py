"""Compiled E-step for loops over time whose densities are evaluated row by row: switching regressions, long histories.

    L_t(s) = Σ_sites log p(x_t | arguments(θ, t, s)),     arguments from recognised uses, as in predicted.py

A loop whose latents share one transition table is smoothed in blocks over joint states of its last steps
(chain_rows.py): a chain of any order, emissions of any family, with covariates, autoregressive ones, ones that look
back at earlier states. Where the table itself moves with time (gated by covariates) or latents lie in other plates,
the loop is contracted as the reference does (evidence/timed.py), in blocks as well but with a table for every step.
The model is not run again. The M-step takes its posterior weights from here (`Weights`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.arguments import Functions
from pyro_em.e_step.base import Expectation, NotCompiled, Stage, Unread
from pyro_em.e_step.chain_rows import RowProgram, Smoothed, compile_rows
from pyro_em.e_step.outside import Outside
from pyro_em.e_step.predicted import Predicted
from pyro_em.evidence.discrete import evaluate
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors, SiteMoments, argument_cells, site_center, site_moments, site_weight
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params


@dataclass(frozen=True)
class Contracted:
    """A component that is contracted as the reference does; `dims` are those of its packed factors."""

    graph: FactorGraph
    dims: Mapping[str, str]

    def evaluated(self, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(Σ w ll, Σ |w ll|), then the posterior weights of every factor, packed alike."""
        packed = {n: with_dims(x, d) for (n, d), x in zip(self.dims.items(), factors, strict=True)}
        with torch.enable_grad():
            found = evaluate(self.graph, packed)
        return (
            torch.stack([found.log_likelihood, found.magnitude]),
            *(found.weights[n].contiguous() for n in self.dims),
        )


class Weights(Mapping[str, Tensor]):
    """Posterior weights by site: those that an E-step has, all others by the reference path when somebody asks."""

    def __init__(self, own: Callable[[str], Tensor | None], reference: Callable[[], Posteriors]) -> None:
        self._own, self._reference = own, reference
        self._all: Posteriors | None = None

    def __getitem__(self, name: str) -> Tensor:
        found = self._own(name)
        return self._rest[name] if found is None else found  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._own(name) is not None or name in self._rest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rest)

    def __len__(self) -> int:
        return len(self._rest)

    @property
    def _rest(self) -> Posteriors:
        if self._all is None:
            self._all = self._reference()
        return self._all


class TimedRows(Predicted):
    """The engine; made by `compile_timed_rows`."""

    name = "scanned"
    generation = 0
    compact = False  # the last E-step was by band solves alone

    def __init__(self, problem: Problem, functions: Functions | None = None) -> None:
        if not problem.graph.loops:
            raise NotCompiled("no pyro_em.markov loop")
        super().__init__(problem, functions)
        self.outside = Outside(problem, self.run)
        with torch.no_grad():
            arguments, etas = self._arguments(problem.start)
            factors = {n: self._density(self.run.sites[n], arguments[n], etas, set()) for n in self._inside}
        self.programs = [self._compiled(component, factors) for component in problem.graph.components]
        self._program_of = {
            name: i for i, component in enumerate(problem.graph.components) for name in component.factors
        }
        parts = [p.reason if isinstance(p, RowProgram) else "a table for every step" for p in self.programs]
        self.reason = "; ".join(dict.fromkeys(parts))

    def _admit(self, component: Component) -> None:
        """Components of any shape are served."""

    @property
    def _inside(self) -> list[str]:
        return [name for component in self.problem.graph.components for name in component.factors]

    def _compiled(self, component: Component, factors: Mapping[str, Tensor]) -> RowProgram | Contracted:
        graph = self.problem.graph
        try:
            return compile_rows(graph, component, self.run, factors)
        except NotCompiled:
            own = dataclasses.replace(graph, components=(component,), constants=(), priors=())
            return Contracted(own, {name: dims_of(factors[name]) for name in component.factors})

    def unread(self, params: Params) -> Unread:
        """The E-step before any of its numbers is read."""
        zero = torch.zeros((), dtype=torch.float64)
        (sums,) = self.core([self.before(params, zero)])
        totals, sufficient = self.after(params, sums)
        assert sufficient.posterior is not None
        return Unread(torch.cat([totals, zero.reshape(1)]), sufficient, sufficient.posterior)

    def expectation(self, params: Params, sums: Sequence[Tensor]) -> Expectation:
        """The E-step whose `core` gave `sums`."""
        totals, sufficient = self.after(params, sums)
        if not math.isfinite(float(totals[0])):
            return self.e_step(params)  # says what is impossible
        assert sufficient.posterior is not None
        likelihood, prior, magnitude = totals.tolist()
        return Expectation(likelihood, prior, magnitude, sufficient, sufficient.posterior)

    def before(self, params: Params, magnitude: Tensor) -> Stage:
        """What every component is made of: potentials of its chains, or its factors."""
        with torch.no_grad():
            arguments, etas = self._arguments(params)
            factors = {n: self._density(self.run.sites[n], arguments[n], etas, set()) for n in self._inside}
            tensors: list[Tensor] = []
            for program in self.programs:
                rows = isinstance(program, RowProgram)
                tensors += program.potentials(factors) if rows else [factors[n].contiguous() for n in program.dims]  # type: ignore[union-attr]
        return Stage(tuple(tensors), None)

    def core(self, stages: Sequence[Stage]) -> list[tuple[Tensor, ...]]:
        """Evidence and posteriors for every start, one after the other."""
        with torch.no_grad():
            return [self._smoothed(iter(stage.tensors)) for stage in stages]

    def _smoothed(self, tensors: Iterator[Tensor]) -> tuple[Tensor, ...]:
        sums: list[Tensor] = []
        self.compact = all(isinstance(program, RowProgram) for program in self.programs)
        for program in self.programs:
            if isinstance(program, RowProgram):
                found = program.smooth(next(tensors), next(tensors), next(tensors))
                self.compact &= found.by_bands
                sums += [found.evidence, found.counts, found.first, found.rows]
            else:
                sums += program.evaluated([next(tensors) for _ in program.dims])
        return tuple(sums)

    def after(self, params: Params, sums: Sequence[Tensor]) -> tuple[Tensor, Sufficient]:
        """log p(x|θ), log p(θ) and Σ|ll_n|, and the statistics."""
        given, evidence = iter(sums), torch.zeros(2, dtype=torch.float64)
        parts: list[Smoothed | dict[str, Tensor]] = []
        for program in self.programs:
            own = next(given)
            evidence = evidence + own
            if isinstance(program, RowProgram):
                parts.append(Smoothed(own, next(given), next(given), next(given)))
            else:
                parts.append({name: with_dims(next(given), dims) for name, dims in program.dims.items()})
        with torch.no_grad():
            arguments, _ = self._arguments(params)
        sites = self._sites(params)

        def weight_of(name: str) -> Tensor | None:
            place = self._program_of.get(name)
            if place is None:
                return None
            program, part = self.programs[place], parts[place]
            if not isinstance(part, Smoothed):
                return part[name]
            return None if name in program.tables else program.posterior(name, part)  # type: ignore[union-attr]

        def moments_of(name: str, own: dict[str, Tensor]) -> SiteMoments:
            place = self._program_of.get(name)
            if place is None:
                return self.outside.moments(name, own)
            program, part, site = self.programs[place], parts[place], sites[name]
            if isinstance(part, Smoothed) and name in program.tables:  # type: ignore[union-attr]
                return site_moments(site, own, program.counts(name, site, part), None)  # type: ignore[union-attr]
            if name not in self._centers:
                self._centers[name] = site_center(site, argument_cells(site, own))
            weight = site_weight(site, self.problem.graph.factors[name], weight_of(name))
            return site_moments(site, own, weight, self._centers[name])

        sufficient = Sufficient(self.problem, sites, arguments, moments_of)
        weights = Weights(weight_of, lambda: self.problem.evidence(params)[0].weights)
        sufficient.posterior = lambda: weights
        return self.outside.totals(evidence, sufficient), sufficient

    def spot_check(self, params: Params) -> tuple[float, float]:
        """Log-likelihood of the components by this engine, and with the chains smoothed by another way."""
        tensors = iter(self.before(params, torch.zeros((), dtype=torch.float64)).tensors)
        found = reference = 0.0
        with torch.no_grad():
            for program in self.programs:
                if isinstance(program, RowProgram):
                    own = [next(tensors) for _ in range(3)]
                    found += float(program.smooth(*own).evidence[0])
                    reference += float(program.otherwise(*own).evidence[0])
                else:
                    evidence = float(program.evaluated([next(tensors) for _ in program.dims])[0][0])
                    found, reference = found + evidence, reference + evidence
        return found, reference


def compile_timed_rows(problem: Problem, functions: Functions | None = None) -> TimedRows:
    """:raises NotCompiled: if there is no loop over time, or an argument is not recognised."""
    return TimedRows(problem, functions)
