"""Compiled E-step for Gaussian latents of a plate: factor analysis, PPCA, mixed models, from moments formed once.

Rows enter through the pseudo-elements of their classes (pooled_data.py), whatever their number. Latents are written
z = a + B u with u ~ N(0, I) from their own sites, so that a variance of 0 is a value like any other. With residuals
r = d + T u of the observed sites of an element, divided by their noise, L Lᵀ = I + TᵀT (K x K, which is Woodbury's side
where K is small), and w elements in a class,

    m = -L⁻ᵀ L⁻¹ Tᵀ d,     log p(x) = c - ½ |d + T m|² - ½ |m|² - w log|L|,     u = m and the columns of √w L⁻ᵀ,

these *atoms* having the posterior's second moments, summed over all elements of the class. From there on everything
is least squares on a few pseudo-rows (pooled_location.py). The model is not run again.

Not handled: latents coupled across elements (crossed or nested effects), discrete latents beside them, missing cells.
Letters: U classes, K latents of an element, c pseudo-elements of a class.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.arguments import ArgumentsAt, Functions, check_served, opaque
from pyro_em.e_step.base import Expectation, Stage
from pyro_em.e_step.coupled_location import CoupledLocation
from pyro_em.e_step.coupled_posterior import coupled_posterior
from pyro_em.e_step.coupled_sets import CoupledSet, coupled_set
from pyro_em.e_step.interpreted import at_atoms, from_totals
from pyro_em.e_step.outside import Outside
from pyro_em.e_step.pooled_location import PooledLocation, PooledSite
from pyro_em.e_step.pooled_posterior import Whitener, posterior, whitener
from pyro_em.e_step.pooled_sets import PooledSet, at_units, pooled_routes, pooled_set
from pyro_em.e_step.vanishing import vanishing
from pyro_em.errors import NonFiniteError
from pyro_em.m_step.location import Location, total_moments
from pyro_em.model.trace import Run
from pyro_em.model.use import Use
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params


@dataclass(frozen=True)
class _State:
    """Arguments of all sites, and coefficients of those of the sets, at some parameters."""

    sufficient: Sufficient
    coefficients: Mapping[str, Tensor]


class Pooled:
    """The engine; made by `compile_pooled`."""

    name = "pooled"
    generation = 0
    compact = True

    def __init__(self, problem: Problem) -> None:
        self.sets, self.run = _sets(problem)
        self.problem = problem
        self.place: dict[str, tuple[int, PooledSite]] = {}  # where a site's rows or atoms are among those of `core`
        self.coupled = {s.site.name for own in self.sets if isinstance(own, CoupledSet) for s in own.sites}
        begin = 0
        for own in self.sets:
            coupled = isinstance(own, CoupledSet)  # each of its sites has rows of its own
            for site in own.sites:
                self.place[site.site.name] = (begin, site)
                begin += 1 if coupled else 0
            begin += 0 if coupled else 1
        self._outside, self.arguments = Outside(problem, self.run), ArgumentsAt(problem, self.run, {}, self._reads)
        moved = {use.site for own in problem.uses.values() for use in own if use.slot != "loc"}
        self._unmoved = self.place.keys() - moved  # sites whose noise is a number
        self._known: dict[str, Whitener] = {}  # of these
        self._first: tuple[Params, Expectation] | None = None
        self._totals = {n: self._total(own) for n, (_, own) in self.place.items() if not own.site.latent}
        self.reason = f"Gaussian latents: {'; '.join(own.text for own in self.sets)}"

    def serve(self, functions: Functions) -> None:
        """Take the arguments that no rule recognises from functions of the parameters.

        :raises NotCompiled: if one has none.
        """
        check_served(opaque(self.problem, self.place), functions)
        self.arguments = ArgumentsAt(self.problem, self.run, functions, self._reads)

    def _reads(self, use: Use) -> bool:
        """Locations that vary are read off by their forms."""
        return use.site in self.place and use.predictor is not None

    def _total(self, own: PooledSite) -> SiteMoments:
        return total_moments(self.run.sites[own.site.name], own.vector)

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`."""
        known, self._first = self._first, None
        if known is not None and all(_same(params[name], x) for name, x in known[0].items()):
            return known[1]
        state = self._state(params)
        return self._expectation(params, self._core(self._stage(state)), state)

    def at_start(self) -> Expectation:
        """The E-step at the model's own start; kept for the next one, which mostly is that of a fit there."""
        found = self.e_step(self.problem.start)
        self._first = self.problem.start, found
        return found

    def expectation(self, params: Params, sums: Sequence[Tensor]) -> Expectation:
        """The E-step whose `core` gave `sums`."""
        return self._expectation(params, sums, self._state(params))

    def _expectation(self, params: Params, sums: Sequence[Tensor], state: _State) -> Expectation:
        totals, sufficient = self._after(sums, state)
        return from_totals(self.problem, params, totals, sufficient, at_atoms(self.problem, params, sufficient))

    def vanishing(self, params: Params) -> dict[str, bool]:
        """Spreads of latents whose estimate is 0, see vanishing.py."""

        def evidence(at: Params) -> tuple[float, float]:
            try:
                ((*_, found),) = self.core([self.before(at, torch.zeros((), dtype=torch.float64))])
            except NonFiniteError:  # rows that read several elements: a variance of 0 has no basis there
                return -math.inf, 0.0
            return float(found[0]), float(found[1])

        return vanishing(self.problem, params, evidence)

    def before(self, params: Params, magnitude: Tensor) -> Stage:
        """Coefficients of all residuals, and the noise."""
        return self._stage(self._state(params))

    def _stage(self, state: _State) -> Stage:
        tensors: list[Tensor] = []
        for own in self.sets:
            for site in own.sites:
                name = site.site.name
                noise = self._known.get(name) or whitener(site, state.sufficient.arguments[name])
                if name in self._unmoved:
                    self._known[name] = noise
                tensors += [state.coefficients[name], noise.root, noise.log_det]
        return Stage(tuple(tensors), None)

    def _state(self, params: Params) -> _State:
        forms = {name: site.form for name, (_, site) in self.place.items()}
        return _State(self.arguments(params), {name: form.coefficients(params) for name, form in forms.items()})

    def core(self, stages: Sequence[Stage]) -> list[tuple[Tensor, ...]]:
        """For every start the atoms ζ of each set, log p(x|θ) and its magnitude."""
        return [self._core(stage) for stage in stages]

    def _core(self, stage: Stage) -> tuple[Tensor, ...]:
        tensors = iter(stage.tensors)
        found: list[Tensor] = []
        totals = []
        for own in self.sets:
            noise = [(next(tensors), Whitener(next(tensors), next(tensors))) for _ in own.sites]
            if isinstance(own, CoupledSet):
                rows, likelihood, magnitude = coupled_posterior(own, noise)
                found += rows
            else:
                zeta, likelihood, magnitude = posterior(own, noise)
                found.append(zeta)
            totals.append(torch.stack([likelihood, magnitude]))
        return (*found, totals[0] if len(totals) == 1 else torch.stack(totals).sum(0))

    def after(self, params: Params, sums: Sequence[Tensor]) -> tuple[Tensor, Sufficient]:
        """log p(x|θ), log p(θ) and its magnitude as a tensor (3,), and the statistics behind them."""
        return self._after(sums, self._state(params))

    def _after(self, sums: Sequence[Tensor], state: _State) -> tuple[Tensor, Sufficient]:
        *found, evidence = sums
        sufficient, coefficients = state.sufficient, state.coefficients
        made: dict[str, PooledLocation] = {}
        known = weakref.proxy(sufficient)  # which holds these functions: no cycle, as in `opened`

        def location(name: str) -> PooledLocation:
            if name not in made:
                at, site = self.place[name]
                C = coefficients[name]
                if name in self.coupled:
                    made[name] = CoupledLocation(site, C, found[at], known, self._totals.get(name))
                else:
                    made[name] = PooledLocation(site, C, site.rows(found[at]), known, self._totals.get(name))
            return made[name]

        def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
            if name not in self.place:
                return self._outside.moments(name, arguments)
            own = location(name)
            return own.value_moments() if own.own.site.latent and not own.own.moves else own.moments()

        def opens(name: str, starts: Mapping[str, int], size: int) -> Location | None:
            return location(name).opened(starts, size) if name in self.place else None

        def spread_of(name: str, cells: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
            return location(name).spread(cells, center)

        sufficient._moments_of, sufficient.opens, sufficient.spread_of = moments_of, opens, spread_of
        return self._outside.totals(evidence, sufficient), sufficient


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _sets(problem: Problem) -> tuple[list[PooledSet | CoupledSet], Run]:
    """The sets of a problem, and a run of the model with every latent at one value."""
    routes = pooled_routes(problem)
    plain, run = at_units(problem, routes)
    components = {c.symbols: c for c in problem.graph.components}
    sets: list[PooledSet | CoupledSet] = []
    for route in routes:
        component = components[frozenset({route.latents.symbol})]
        made = coupled_set if route.geometry.num_b else pooled_set
        sets.append(made(problem, route, component, plain, run))
    return sets, plain


def compile_pooled(problem: Problem, functions: Functions) -> Pooled:
    """The engine for a problem, or `NotCompiled` with the reason."""
    engine = Pooled(problem)
    engine.serve(functions)
    return engine
