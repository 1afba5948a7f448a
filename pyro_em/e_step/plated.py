"""Compiled E-step for latents that live in the data plate: mixtures, latent classes, factorial mixtures.

If no argument varies along the data plate, log p(x_n, z=j) = Σ_f W_jf Φ_fn with Φ the sufficient statistics
of the data and W the natural parameters of joint state j. One E-step is then, chunk by chunk,

    L = W Φ,   R = softmax(L, over j),   S += (R·w) Φᵀ

and S holds the moments of every site at once. The small dimension comes first, data are centred, rows that
are equal (discrete data) are collapsed with their counts. Latents are summed out jointly, so that several of
them in one plate (a factorial mixture) are one softmax over their joint states.

Structural zeros: a log-probability of -inf enters the product as `IMPOSSIBLE`; a row whose best state is that
low goes to the reference path, which names it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.base import Expectation, NotCompiled
from pyro_em.e_step.collapse import collapse
from pyro_em.e_step.direct import centered_log_density
from pyro_em.e_step.features import Features
from pyro_em.e_step.interpreted import expectation
from pyro_em.e_step.layout import SiteLayout, site_layouts, weights_of
from pyro_em.e_step.natural import NATURAL
from pyro_em.e_step.states import JointStates, joint_states
from pyro_em.evidence.discrete import weighted_sum
from pyro_em.model import compat
from pyro_em.model.density import packed_log_density
from pyro_em.model.graph import Component
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments, argument_cells, site_center, site_moments, site_weight
from pyro_em.sufficient import Arguments, Sufficient, raw_arguments
from pyro_em.types import Params

IMPOSSIBLE = -1e30
MAX_STATES = 1024  # joint states of the latents of one row


@dataclass
class _Program:
    """One component: its joint states, its data as features, and where each site's moments lie."""

    component: Component
    states: JointStates
    layouts: list[SiteLayout]
    features: Features
    row_weight: Tensor | None  # (rows,) weights x counts of collapsed rows
    base: Tensor | None  # (rows,) log base measure
    magnitude: float = 0.0  # Σ|ll_n| of the last E-step


@dataclass(frozen=True)
class _Sums:
    log_likelihood: float
    magnitude: float
    totals: Tensor  # (J, F) sums of weighted responsibilities times features


class Plated:
    """The engine; made by `compile_plated`."""

    name = "plated"
    reason = "latents of the data plate: one matrix product on sufficient statistics per E-step"

    def __init__(self, problem: Problem) -> None:
        graph = problem.graph
        if not graph.components:
            raise NotCompiled("the model has no latents")
        if graph.loops:
            raise NotCompiled("a pyro_em.markov loop")
        for name, uses in problem.uses.items():
            if any(use.index is None for use in uses):
                raise NotCompiled(f"the arguments that '{name}' enters are not recognised")
        with torch.no_grad():
            run = problem.run(problem.start)
        self.problem, self.run = problem, run
        self.start: Arguments = raw_arguments(run.sites)
        self.programs = [self._compile(component) for component in graph.components]
        self.owner = {n: i for i, p in enumerate(self.programs) for n in p.component.factors}
        self._fixed: dict[str, SiteMoments] = {}

    def _compile(self, component: Component) -> _Program:
        run, graph = self.run, self.problem.graph
        states = joint_states(component, run, MAX_STATES)
        layouts, blocks, base, num_rows = site_layouts(component, run, graph, states)
        weight = self._row_weight(component, num_rows)
        blocks, weight, base, num_rows = collapse(blocks, weight, base, num_rows)
        layouts = [dataclasses.replace(x, block=block) for x, block in zip(layouts, blocks, strict=True)]
        return _Program(component, states, layouts, Features(blocks, num_rows), weight, base)

    def _row_weight(self, component: Component, num_rows: int) -> Tensor | None:
        """Weights of the rows; rows whose latents are barren (all data masked) count nothing."""
        graph, run = self.problem.graph, self.run
        found = []
        for name in component.factors:
            if graph.factors[name].enumerated:
                weight = graph.factors[name].weight
                found.append(None if weight is None else SiteLayout.over_root(weight, component, run, graph))
        first = found[0]
        for other in found[1:]:
            same = other is first or (other is not None and first is not None and torch.equal(other, first))
            if not same:
                raise NotCompiled("latents of one row are informed by different parts of the data")
        return None if first is None else first.double().expand(num_rows).contiguous()

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`."""
        sufficient = self._arguments(params)
        sums = [self._sums(program, sufficient.arguments) for program in self.programs]
        if not all(math.isfinite(s.log_likelihood) for s in sums):
            evidence, run = self.problem.evidence(params)  # names the site and the rows
            return expectation(self.problem, run, evidence)
        sufficient._moments_of = lambda name, arguments: self._moments(name, arguments, sums)
        constants, size, prior = self._outside(sufficient)
        return Expectation(
            log_likelihood=sum(s.log_likelihood for s in sums) + constants,
            log_prior=prior,
            magnitude=sum(s.magnitude for s in sums) + size,
            sufficient=sufficient,
            posterior=lambda: self.problem.evidence(params)[0].weights,
        )

    def spot_check(self, params: Params) -> tuple[float, float]:
        """Log-likelihood of the first rows (unweighted) by this engine, and by the families' own log-densities."""
        sufficient = self._arguments(params)
        found, reference = 0.0, 0.0
        for program in self.programs:
            w, direct = self._prepared(program, sufficient.arguments)
            end = min(program.features.chunk, program.features.num_rows)
            log_joint = w @ program.features.rows(0, end)
            for layout in direct:
                own = sufficient.arguments[layout.site.name]
                log_joint += centered_log_density(layout, own, program.states, 0, end)
            expected = w.new_zeros(program.states.num, end)
            for name in program.component.factors:
                if self.run.sites[name].enumerated:
                    expected += self._latent_log_mass(name, program, sufficient.arguments[name]).unsqueeze(1)
            for layout in program.layouts:
                expected += layout.log_density(sufficient.arguments[layout.site.name], program.states, end)
            found += float(log_joint.logsumexp(0).sum())
            reference += float(expected.logsumexp(0).sum())
        return found, reference

    def _arguments(self, params: Params) -> Sufficient:
        """Arguments of all sites at `params`."""
        arguments = {site: dict(own) for site, own in self.start.items()}
        sufficient = Sufficient(self.problem, self.run.sites, arguments, self._never)
        for name, theta in params.items():
            sufficient.put(theta, self.problem.uses[name])
        return sufficient

    def _never(self, name: str, arguments: dict[str, Tensor]) -> SiteMoments:
        raise AssertionError(f"moments of '{name}' were asked for before the E-step")

    def _coefficients(self, program: _Program, arguments: Arguments, without: Sequence[SiteLayout]) -> Tensor:
        """W (J, F): natural parameters of every joint state, the first column the bias; zeros for some sites."""
        states, run = program.states, self.run
        bias = torch.zeros(states.num, dtype=torch.float64)
        columns = [bias]
        for name in program.component.factors:
            site = run.sites[name]
            if site.enumerated:
                bias = bias + self._latent_log_mass(name, program, arguments[name])
        for layout in program.layouts:
            site = layout.site
            if layout in without:
                columns.append(bias.new_zeros(states.num, layout.block.num_features))
                continue
            coefficients = NATURAL[type(site.family)](arguments[site.name], layout.center)  # type: ignore[index]
            own, own_bias = weights_of(coefficients, layout, states)
            columns.append(own)
            bias = bias + own_bias
        columns[0] = bias.unsqueeze(1)
        w = torch.cat(columns, 1)
        return torch.where(w == -torch.inf, torch.full((), IMPOSSIBLE, dtype=w.dtype), w)

    def _latent_log_mass(self, name: str, program: _Program, arguments: dict[str, Tensor]) -> Tensor:
        """log p(z | its parents) of one latent over all joint states, (J,)."""
        site, states = self.run.sites[name], program.states
        assert site.family is not None
        value = site.fn.enumerate_support(expand=False) if site.value is None else site.value
        log_mass = site.family.log_prob({**site.constants, **arguments}, value)
        depth = -min(states.dims)
        log_mass = log_mass.reshape((1,) * max(0, depth - log_mass.dim()) + tuple(log_mass.shape))
        target = [1] * log_mass.dim()
        for dim, size in zip(states.dims, states.sizes, strict=True):
            target[dim] = size
        return log_mass.expand(target).reshape(-1)

    def _sums(self, program: _Program, arguments: Arguments) -> _Sums:
        w, direct = self._prepared(program, arguments)
        features, weight, base = program.features, program.row_weight, program.base
        totals = torch.zeros(program.states.num, features.num_features, dtype=torch.float64)
        likelihood, magnitude = 0.0, 0.0
        for begin in range(0, features.num_rows, features.chunk):
            end = min(begin + features.chunk, features.num_rows)
            phi = features.rows(begin, end)
            log_joint = w @ phi
            for layout in direct:
                log_joint += centered_log_density(layout, arguments[layout.site.name], program.states, begin, end)
            r = torch.softmax(log_joint, 0)
            # softmax leaves max R = exp(max L - lse), so that lse costs no second pass over exp.
            lse = log_joint.amax(0).sub_(r.amax(0).log_())
            if base is not None:
                lse += base[begin:end]
            if weight is not None:
                own = weight[begin:end]
                r *= own
                lse = torch.where(own == 0, lse.new_zeros(()), lse * own)
            likelihood += float(lse.sum())
            magnitude += float(lse.abs().sum())
            totals.addmm_(r, phi.mT)
        program.magnitude = magnitude
        if not likelihood > 0.1 * IMPOSSIBLE:
            likelihood = -math.inf
        return _Sums(likelihood, magnitude, totals)

    def _prepared(self, program: _Program, arguments: Arguments) -> tuple[Tensor, list[SiteLayout]]:
        """W, and the normal sites which it leaves out because rounding would show: they are evaluated directly.

        The rounding of the product is about eps·sqrt(N)·max_j Σ_f |W_jf|·rms(Φ_f), against the eps·Σ|ll_n| that
        a monotone objective may lose.
        """
        w = self._coefficients(program, arguments, ())
        normal = [x for x in program.layouts if x.site.family is not None and x.site.family.centered]
        if normal:
            size = torch.where(w <= 0.1 * IMPOSSIBLE, torch.zeros_like(w), w).abs() @ program.features.rms
            if float(size.max()) * math.sqrt(program.features.num_rows) > program.magnitude:
                return self._coefficients(program, arguments, normal), normal
        return w, []

    def _moments(self, name: str, arguments: dict[str, Tensor], sums: list[_Sums]) -> SiteMoments:
        if name not in self.owner:
            return self._moments_outside(name, arguments)
        program, totals = self.programs[self.owner[name]], sums[self.owner[name]].totals
        for layout in program.layouts:
            if layout.site.name == name:
                return layout.moments(totals, program.states)
        states = program.states
        dims = dict(zip(states.dims, states.sizes, strict=True))
        weight = totals[:, 0].reshape([dims.get(d, 1) for d in range(min(states.dims), 0)])
        return site_moments(self.run.sites[name], arguments, weight, None)

    def _moments_outside(self, name: str, arguments: dict[str, Tensor]) -> SiteMoments:
        """Sites that no latent reaches have the same moments at every E-step."""
        if name not in self._fixed:
            site = self.run.sites[name]
            weight = site_weight(site, self.problem.graph.factors[name], None)
            center = site_center(site, argument_cells(site, arguments))
            self._fixed[name] = site_moments(site, arguments, weight, center)
        return self._fixed[name]

    def _outside(self, sufficient: Sufficient) -> tuple[float, float, float]:
        """Log-density of sites that no latent reaches, its magnitude, and the log prior."""
        graph = self.problem.graph
        total, size, prior = 0.0, 0.0, 0.0
        for name in (*graph.constants, *graph.priors):
            site = dataclasses.replace(sufficient.sites[name], arguments=sufficient.arguments[name])
            packed = packed_log_density(site)
            own = float(weighted_sum(packed, graph.factors[name].weight))
            if name in graph.priors:
                prior += own
            else:
                total += own
                size += float(
                    weighted_sum(compat.with_dims(packed.abs(), compat.dims_of(packed)), graph.factors[name].weight)
                )
        return total, size, prior


def compile_plated(problem: Problem) -> Plated:
    """The engine for a problem, or `NotCompiled` with the reason."""
    return Plated(problem)
