"""Compiled E-step for arguments that vary from row to row: mixtures of regressions, mixtures of experts.

Where every argument is known as a function of the parameters (recognise.py, affine.py) the model is not run again: a
linear predictor of all joint states and rows is one matrix product with the design, which was read off once. With J
joint states of the latents of one row and L (J, N) the sum of the sites' log-densities,

    R = softmax(L, over j),        log p(x) = Σ_n logsumexp_j L_jn,

and R, summed to the dims of each factor, is its posterior: no backward pass is needed. The M-step takes its Gram
matrices and Newton steps from R (m_step/linear.py, m_step/newton.py). What is impossible goes to the reference path,
which names it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.design import Design
from pyro_em.e_step.arguments import Functions, check_served, opaque
from pyro_em.e_step.base import Expectation, NotCompiled, Unread
from pyro_em.e_step.interpreted import read
from pyro_em.e_step.states import joint_states
from pyro_em.evidence.discrete import weighted_sum
from pyro_em.families.normal import NormalFamily
from pyro_em.families.positive import PoissonFamily
from pyro_em.model.compat import dims_of, pack, with_dims
from pyro_em.model.density import clean_value, packed_log_density
from pyro_em.model.graph import Component
from pyro_em.model.nests import at_rows, sum_over
from pyro_em.model.packing import align
from pyro_em.model.predictor import Predictor
from pyro_em.model.trace import SiteRecord
from pyro_em.model.use import VALUE
from pyro_em.problem import Problem
from pyro_em.shapes import broadcast_shapes
from pyro_em.softmax import softmax, softmax_
from pyro_em.statistics import SiteMoments, argument_cells, site_center, site_moments, site_weight
from pyro_em.sufficient import Arguments, Sufficient, raw_arguments
from pyro_em.types import Params
from pyro_em.vector_design import VectorDesign

MAX_STATES = 1024  # joint states of the latents of one row
LOG_2PI = math.log(2 * math.pi)
LARGE = 2**17  # cells of a table; recordings are of smaller ones


class Reader:
    """One predictor with all of its parameters as a block: its design, and where each parameter begins."""

    def __init__(self, predictor: Predictor, params: Params, shape: torch.Size, vector: bool) -> None:
        self.predictor, self.vector, self.names = predictor, vector, predictor.parameters
        starts, size = {}, 0
        for name in self.names:
            starts[name], size = size, size + params[name].numel()
        self.design: Design | VectorDesign = (
            VectorDesign(predictor.terms, starts, size, shape[-1], shape[:-1])
            if vector
            else Design(predictor.terms, starts, size, shape)
        )

    def eta(self, params: Params) -> Tensor:
        """The linear predictor at `params`."""
        values = self.predictor.coordinates({name: params[name].detach().double() for name in self.names})
        theta = torch.cat([values[name].reshape(-1) for name in self.names])
        eta = self.design.predict(theta)
        offset = self.predictor.offset
        assert offset is not None
        return eta if offset.numel() == 1 and float(offset) == 0 else eta + offset

    def argument(self, eta: Tensor) -> Tensor:
        """The argument at a linear predictor."""
        found, fixed = self.predictor.link.forward(eta), self.predictor.fixed
        return found if fixed is None else torch.where(fixed.isnan(), found, fixed)


@dataclass(frozen=True)
class _Posterior:
    log_likelihood: Tensor
    magnitude: Tensor
    weights: dict[str, Tensor]


class Predicted:
    """The engine; made by `compile_predicted`."""

    name = "predicted"
    reason = "linear predictors of all states and rows by one matrix product with the recorded design"

    def __init__(self, problem: Problem, functions: Functions | None = None) -> None:
        coarse = any(s.family is not None and s.family.latent_response for s in problem.sites)
        if not problem.graph.components and not coarse:
            raise NotCompiled(problem.graph.nothing_to_sum)
        self.functions = functions or {}
        check_served(opaque(problem), self.functions)
        self.run = problem.first
        if any(s.family is not None and s.family.integrates for s in problem.sites):
            raise NotCompiled("a site has latents inside")
        for component in problem.graph.components:
            self._admit(component)
        self.problem, self.start = problem, raw_arguments(self.run.sites)
        self.readers: dict[tuple[str, str], Reader] = {}
        for uses in problem.uses.values():
            for use in uses:
                key = (use.site, use.slot)
                if use.predictor is not None and key not in self.readers:
                    family = self.run.sites[use.site].family
                    assert family is not None
                    shape = self.start[use.site][use.slot].shape
                    vector = family.arguments[use.slot] == 1
                    self.readers[key] = Reader(use.predictor, problem.start, shape, vector)
        self._centers: dict[str, Tensor | None] = {}
        self._base: dict[str, Tensor] = {}

    def _admit(self, component: Component) -> None:
        """:raises NotCompiled: if the component's latents do not live in the plate of their data."""
        joint_states(component, self.run, MAX_STATES)

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`; raises `NonFiniteError` as `Problem.evidence` does."""
        return read(self.problem, params, self.unread(params))

    def unread(self, params: Params) -> Unread:
        """The same before any of its numbers is read."""
        graph, zero = self.problem.graph, torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            arguments, etas = self._arguments(params)
            sites = self._sites(params)
            ours: set[str] = set()
            factors = {n: self._density(s, arguments[n], etas, ours) for n, s in sites.items() if n not in graph.priors}
            found = [self._posterior(component, factors, ours) for component in graph.components]
            likelihood = sum((p.log_likelihood for p in found), zero)
            magnitude = sum((p.magnitude for p in found), zero)
            for name in graph.constants:
                factor, weight = factors[name], graph.factors[name].weight
                likelihood = likelihood + weighted_sum(factor, weight)
                magnitude = magnitude + weighted_sum(with_dims(factor.abs(), dims_of(factor)), weight)
            prior = zero
            for name in graph.priors:
                own = dataclasses.replace(sites[name], arguments=arguments[name])
                prior = prior + weighted_sum(packed_log_density(own), graph.factors[name].weight)
        weights = {name: weight for own in found for name, weight in own.weights.items()}

        def moments_of(name: str, own: dict[str, Tensor]) -> SiteMoments:
            site = sites[name]
            if name not in self._centers:
                self._centers[name] = site_center(site, argument_cells(site, own))
            weight = site_weight(site, graph.factors[name], weights.get(name))
            return site_moments(site, own, weight, self._centers[name])

        sufficient = Sufficient(self.problem, sites, arguments, moments_of)
        return Unread(torch.stack([likelihood, prior, magnitude, zero]), sufficient, lambda: weights)

    def _sites(self, params: Params) -> dict[str, SiteRecord]:
        """The sites, priors at the parameters' values."""
        sites = dict(self.run.sites)
        for name in self.problem.graph.priors:
            sites[name] = dataclasses.replace(sites[name], value=params[name].detach())
        return sites

    def _arguments(self, params: Params) -> tuple[Arguments, dict[tuple[str, str], Tensor]]:
        """Raw arguments of all sites at `params`, and the linear predictors behind them."""
        arguments = {site: dict(own) for site, own in self.start.items()}
        for name, theta in params.items():
            for use in self.problem.uses[name]:
                if use.slot != VALUE and use.index is not None:
                    old = arguments[use.site][use.slot]
                    arguments[use.site][use.slot] = use.argument(theta.detach().double(), old)
        for (site, slot), function in self.functions.items():
            arguments[site][slot] = function({name: theta.detach().double() for name, theta in params.items()})
        etas = {}
        for (site, slot), reader in self.readers.items():
            etas[site, slot] = eta = reader.eta(params)
            arguments[site][slot] = reader.argument(eta)
        return arguments, etas

    def _density(
        self, site: SiteRecord, arguments: Mapping[str, Tensor], etas: Mapping[tuple[str, str], Tensor], ours: set[str]
    ) -> Tensor:
        """Packed log-density of a site; `ours` collects those in memory that nothing else reads."""
        plain = site.mask is None and site.element_mask is None and not site.element_dims
        if plain and isinstance(site.family, NormalFamily) and (site.name, "loc") in etas:
            z, scale = clean_value(site) - arguments["loc"], arguments["scale"]
            z = z.div_(scale) if broadcast_shapes(z.shape, scale.shape) == z.shape else z / scale
            density = z.mul_(z).mul_(-0.5).sub_(scale.log() + 0.5 * LOG_2PI)
            ours.add(site.name)
            return pack(density.expand(site.batch_shape), site.symbols)
        reader = self.readers.get((site.name, "rate"))
        if plain and isinstance(site.family, PoissonFamily) and reader is not None and _is_exp(reader.predictor):
            value = clean_value(site).double()
            if site.name not in self._base:
                self._base[site.name] = torch.lgamma(value + 1)
            density = (value * etas[site.name, "rate"]).sub_(arguments["rate"]).sub_(self._base[site.name])
            ours.add(site.name)
            return pack(density.expand(site.batch_shape), site.symbols)
        return packed_log_density(dataclasses.replace(site, arguments=dict(arguments)))

    def _posterior(self, component: Component, factors: Mapping[str, Tensor], ours: set[str]) -> _Posterior:
        """log Z of a component, and the posterior of each of its factors.

        Of large tables there is one: log-densities are summed, and become responsibilities, where the first of `ours`
        lies. Each that is allocated anew is given back to the system and faulted in again at the next E-step.
        """
        graph = self.problem.graph
        symbols = "".join(sorted(component.symbols))
        dims = symbols + "".join(d for d in graph.plate_names if d in component.root)
        total: Tensor | None = None
        whose = False  # whether the total's memory is ours
        for name in component.factors:
            inner = set(dims_of(factors[name])) - set(dims)
            factor = sum_over(factors[name], inner, component.nests, graph.plate_sizes) if inner else factors[name]
            summand = align(factor, dims)
            if total is None:
                total, whose = summand, name in ours
            elif _holds(total, summand, whose):
                total += summand
            elif _holds(summand, total, name in ours):
                total, whose = summand.add_(total), True
            else:
                total, whose = total + summand, True
        assert total is not None
        shape = total.shape
        log_joint = total.reshape(math.prod(shape[: len(symbols)]), -1)
        if whose and log_joint.numel() >= LARGE and log_joint.is_contiguous():
            r, lse = log_joint, softmax_(log_joint)
        else:
            r, lse = softmax(log_joint)
        if not bool(lse.isfinite().all()):
            infinite = lse.new_full((), math.inf).double()
            return _Posterior(-infinite, infinite, {})
        lse = lse.reshape(shape[len(symbols) :])
        terms = with_dims(lse, dims[len(symbols) :])
        likelihood = weighted_sum(terms, component.weight)
        magnitude = weighted_sum(with_dims(lse.abs(), dims_of(terms)), component.weight)
        joint = r[: len(log_joint)].reshape(shape)
        weights = {}
        for name in component.factors:
            own_dims = [d for d in dims if d in graph.factors[name].dims]
            gone = [i for i, d in enumerate(dims) if d not in own_dims and i < len(symbols)]
            own = with_dims(joint.sum(gone) if gone else joint, "".join(d for i, d in enumerate(dims) if i not in gone))
            weights[name] = at_rows(own, graph.factors[name].plates, component.nests, graph.plate_sizes)
        return _Posterior(likelihood, magnitude, weights)


def _holds(table: Tensor, other: Tensor, whose: bool) -> bool:
    """Whether `other` may be added to this large table in place."""
    if not whose or table.numel() < LARGE or not table.is_contiguous():
        return False
    return broadcast_shapes(table.shape, other.shape) == table.shape


def _is_exp(predictor: Predictor) -> bool:
    return predictor.link.name == "exp" and predictor.fixed is None


def compile_predicted(problem: Problem, functions: Functions | None = None) -> Predicted:
    """:raises NotCompiled: if an argument is not recognised, or the latents do not live in the plate of their data."""
    return Predicted(problem, functions)
