"""Compiled E-step for latents that live in the data plate: mixtures, latent classes, factorial mixtures.

If no argument varies along the data plate, log p(x_n, z=j) = Σ_f W_jf Φ_fn with Φ the sufficient statistics
of the data and W the natural parameters of joint state j (linear predictors of the state included: the items of an
ability on a grid of nodes). One E-step is then two matrix products (product.py),
and their result holds the moments of every site at once. The small dimension comes first, data are centred, rows
that are equal (discrete data) are collapsed with their counts. Latents are summed out jointly, so that several of
them in one plate (a factorial mixture) are one softmax over their joint states.

An E-step has three stages, of which only the second touches the data: `before` (parameters -> W), `core`,
`after` (sums -> statistics).

Structural zeros: a log-probability of -inf enters the product as `IMPOSSIBLE`; a row whose best state is that
low goes to the reference path, which names it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_em.e_step import direct
from pyro_em.e_step.arguments import ArgumentsAt, Functions, check_served, never, opaque
from pyro_em.e_step.base import Expectation, NotCompiled, OtherLayout, Stage, is_possible
from pyro_em.e_step.interpreted import from_totals
from pyro_em.e_step.outside import Outside
from pyro_em.e_step.product import Prepared, Sums
from pyro_em.e_step.program import compile_program
from pyro_em.families.base import AnyStatistic
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments, site_moments, site_statistics
from pyro_em.sufficient import Sufficient, raw_arguments
from pyro_em.types import Params


class Plated:
    """The engine; made by `compile_plated`.

    `generation` counts how often the data were laid out: what was prepared for one layout fits no other.
    """

    name = "plated"
    reason = "latents of the data plate: one matrix product on sufficient statistics per E-step"

    def __init__(self, problem: Problem, functions: Functions | None = None) -> None:
        graph = problem.graph
        if not graph.components:
            raise NotCompiled(graph.nothing_to_sum)
        if graph.loops:
            raise NotCompiled("a pyro_em.markov loop")
        check_served(opaque(problem), functions or {})
        self.problem, self.run = problem, (run := problem.first)
        self._arguments = ArgumentsAt(problem, run, functions or {})
        self.generation = 0
        predicted = self._arguments.predicted
        self.programs = [
            compile_program(problem, run, component, complement=True, absolute=predicted)
            for component in graph.components
        ]
        if any(layout.groups is not None for program in self.programs for layout in program.layouts):
            self.reason += ", of rows in long format summed to their groups once"
        self.owner = {n: i for i, p in enumerate(self.programs) for n in p.component.factors}
        self._outside = Outside(problem, run)
        self._statistics: dict[str, tuple[AnyStatistic, ...]] = {}
        self._magnitude = torch.zeros((), dtype=torch.float64)  # Σ|ll_n| of the last E-step

    @property
    def compact(self) -> bool:
        """The data are one chunk."""
        return all(p.product.num_chunks == 1 for p in self.programs)

    def _lay_out_everything(self) -> None:
        self.generation += 1
        self.programs = [
            compile_program(self.problem, self.run, program.component, complement=False) for program in self.programs
        ]

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`."""
        try:
            stage = self.before(params, self._magnitude)
            (sums,) = self.core([stage])
            if not self._magnitude:  # the first one is known now, and may ask for another evaluation
                again = self.before(params, self.after(params, sums)[0][2])
                if again.kind != stage.kind:
                    (sums,) = self.core([again])
            return self.expectation(params, sums)
        except OtherLayout:
            self._lay_out_everything()
            return self.e_step(params)

    def expectation(self, params: Params, sums: Sequence[Tensor]) -> Expectation:
        """The E-step whose `core` gave `sums`."""
        totals, sufficient = self.after(params, sums)
        self._magnitude = totals[2]
        return from_totals(self.problem, params, totals, sufficient)

    def before(self, params: Params, magnitude: Tensor) -> Stage:
        """W of every component. `magnitude` () is Σ|ll_n| near `params`, the rounding that is allowed; 0 is any.

        :raises OtherLayout: where another layout of the data is needed, as `after` does.
        """
        arguments = self._arguments(params).arguments
        prepared = [program.prepared(arguments, magnitude) for program in self.programs]
        tensors = [x for p in prepared for x in (p.coefficients, *p.normal)]
        return Stage(tuple(tensors), tuple(p.direct for p in prepared))

    def core(self, stages: Sequence[Stage]) -> list[tuple[Tensor, ...]]:
        """Sums over the data for every start; those that evaluate the same sites directly go together."""
        found: dict[int, tuple[Tensor, ...]] = {}
        for kind, rough in dict.fromkeys((stage.kind, stage.rough) for stage in stages):
            members = [i for i, stage in enumerate(stages) if (stage.kind, stage.rough) == (kind, rough)]
            unpacked = [self._unpacked(stages[i]) for i in members]
            products = [program.rough if rough and not any(kind) else program.product for program in self.programs]
            sums = [product.sums([own[place] for own in unpacked]) for place, product in enumerate(products)]
            for place, i in enumerate(members):
                found[i] = tuple(x for own in sums for x in (own[place].totals, own[place].evidence))
        return [found[i] for i in range(len(stages))]

    @staticmethod
    def _unpacked(stage: Stage) -> list[Prepared]:
        tensors, found = iter(stage.tensors), []
        for sites in stage.kind:
            coefficients = next(tensors)
            normal = tuple(next(tensors) for _ in range(direct.NUM_PREPARED * len(sites)))
            found.append(Prepared(coefficients, sites, normal))
        return found

    def after(self, params: Params, sums: Sequence[Tensor]) -> tuple[Tensor, Sufficient]:
        """log p(x|θ) (`is_possible` or not), log p(θ) and Σ|ll_n| as a tensor (3,), and the statistics behind them."""
        own = [Sums(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
        sufficient = self._arguments(params)
        known = {
            layout.site.name: layout.moments(x.totals, program.states)
            for program, x in zip(self.programs, own, strict=True)
            for layout in program.layouts
        }
        sufficient._moments_of = lambda name, arguments: known.get(name) or self._moments(name, arguments, own)
        evidence = torch.stack([x.evidence for x in own]).sum(0) if len(own) > 1 else own[0].evidence
        return self._outside.totals(evidence, sufficient), sufficient

    def spot_check(self, params: Params) -> tuple[float, float]:
        """Log-likelihood of the first rows (unweighted) by this engine, and by the families' own log-densities."""
        arguments = self._arguments(params).arguments
        try:
            stage = self.before(params, self._magnitude)
        except OtherLayout:
            self._lay_out_everything()
            return self.spot_check(params)
        pairs = [
            program.spot_check(prepared, arguments)
            for program, prepared in zip(self.programs, self._unpacked(stage), strict=True)
        ]
        return sum(found for found, _ in pairs), sum(reference for _, reference in pairs)

    def _moments(self, name: str, arguments: dict[str, Tensor], sums: list[Sums]) -> SiteMoments:
        """Moments of a latent (the counts of its states), or of a site that no latent reaches."""
        if name not in self.owner:
            return self._outside.moments(name, arguments)
        program, totals = self.programs[self.owner[name]], sums[self.owner[name]].totals
        states = program.states
        dims = dict(zip(states.dims, states.sizes, strict=True))
        weight = totals[:, 0].reshape([dims.get(d, 1) for d in range(min(states.dims), 0)])
        site = self.run.sites[name]
        if name not in self._statistics:
            self._statistics[name] = site_statistics(site, arguments, None)
        return site_moments(site, arguments, weight, None, self._statistics[name])


def compile_plated(problem: Problem, functions: Functions | None = None) -> Plated:
    """The engine for a problem, or `NotCompiled` with the reason."""
    return Plated(problem, functions)


def log_likelihood(problem: Problem, params: Params) -> float:
    """log p(x|params) from one run of the model, whatever its parameters do, without a table of states times data.

    :raises NotCompiled: if the arguments vary along the data, or a row is impossible.
    """
    with torch.no_grad():
        run = problem.run(params)
    arguments, total = raw_arguments(run.sites), 0.0
    for component in problem.graph.components:
        program = compile_program(problem, run, component, complement=False)
        (sums,) = program.product.sums([program.prepared(arguments, torch.zeros((), dtype=torch.float64))])
        total += float(sums.evidence[0])
    if not is_possible(total):
        raise NotCompiled("impossible data")
    constants, _, _ = Outside(problem, run).log_density(Sufficient(problem, run.sites, arguments, never))
    return total + float(constants)
