"""Compiled E-step for Gaussian latents beside a discrete one in the same rows: mixtures of factor analysers.

In state k of the row's discrete latent its sites are those of factor analysis with parameters of their own, so that

    ℓ_kn = log p(x_n | k)      by Woodbury's side of all rows at once (pooled_posterior.py), a table (K, N)
    r_kn = p(k | x, θ)         from the table and all other factors by contraction, as in the reference (discrete.py)

and within a state the rows weighted by r_k enter through their number, mean and scatter: c pseudo-elements with these
moments are made at every E-step, at which the latents' posterior and the least squares of the M-step are those of
pooled.py. The model is not run again, no covariance of observed cells is formed, and the cost is that of the matrix
products (N x Q by Q x Q) of each state. Source: Ghahramani and Hinton (1996).

Letters: K states, N rows, Q cells of a row in all sites together, features that meet no latent included.
Not handled: rows that share a latent, or whose loadings vary from row to row; several discrete latents that the sites
read; log-normal sites.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_em.e_step.arguments import ArgumentsAt, Functions, check_served, opaque
from pyro_em.e_step.base import Expectation, NotCompiled, Unread
from pyro_em.e_step.interpreted import at_atoms, read
from pyro_em.e_step.pooled_data import Classes
from pyro_em.e_step.pooled_data import Pooled as PooledRows
from pyro_em.e_step.pooled_location import PooledLocation, PooledSite
from pyro_em.e_step.pooled_mixture import MixtureLocation
from pyro_em.e_step.pooled_posterior import Whitener, log_evidence, posterior, whitener
from pyro_em.e_step.pooled_sets import PooledSet
from pyro_em.e_step.pooled_state_rows import StateRows, at_state
from pyro_em.evidence.discrete import evaluate
from pyro_em.latents import integral
from pyro_em.m_step.location import Location, total_moments
from pyro_em.model.compat import detached, with_dims
from pyro_em.model.density import packed_log_density
from pyro_em.model.packing import align
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments, expected_moments
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class State:
    """The sites of the set in one state, and all rows: (N, V₀ + P) of each site, (N, Q) of all together."""

    sites: tuple[PooledSite, ...]
    data: tuple[Tensor, ...]
    joint: Tensor


class PooledStates:
    """The engine; made by `compile_states`."""

    name = "pooled"

    def __init__(self, problem: Problem, functions: Functions, found: StateRows) -> None:
        self.problem, self.run, self.found = problem, found.run, found
        self.states = self._states(found)
        self.place = {site.site.name: i for i, site in enumerate(self.states[0].sites)}
        check_served(opaque(problem, self.place), functions)
        for own in problem.uses.values():
            for use in own:
                if use.site not in self.place and use.predictor is not None:
                    raise NotCompiled(f"the arguments of '{use.site}' are not plain")
        self._arguments = ArgumentsAt(problem, self.run, functions, lambda use: use.predictor is not None)
        self._totals = {n: total_moments(self.run.sites[n], self._vector(n)) for n in self.place if self._seen(n)}
        assert problem.continuous is not None
        self.integral, self.size = integral(problem.continuous.sets[0]), found.num_latents
        self._centers: dict[str, Tensor | None] = {}
        count, rows = len(self.states), len(found.weight)
        self.reason = (
            f"Gaussian latents: evidence of {rows} rows in {count} states by Woodbury's identity, moments of the rows "
            "weighted by their posterior in every state"
        )

    def _states(self, found: StateRows) -> tuple[State, ...]:
        return tuple(_state(rows) for rows in found.states)

    def _vector(self, name: str) -> bool:
        return self.states[0].sites[self.place[name]].vector

    def _seen(self, name: str) -> bool:
        return not self.run.sites[name].latent

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`; raises `NonFiniteError` as `Problem.evidence` does."""
        return read(self.problem, params, self.unread(params))

    def unread(self, params: Params) -> Unread:
        """The same before any of its numbers is read."""
        sufficient = self._arguments(params)
        noises = [self._noise(k, params, sufficient) for k in range(len(self.states))]
        found = [self._table(state, noise) for state, noise in zip(self.states, noises, strict=True)]
        tables, cancelled = (torch.stack(own) for own in zip(*found, strict=True))
        dims, sizes = self.found.dims, self.found.sizes
        factors = {self.integral: with_dims(tables.reshape(len(tables), *sizes), dims)}
        for name, site in sufficient.sites.items():  # priors at the parameters' values
            if name not in self.place:
                here = dataclasses.replace(site, arguments=sufficient.arguments[name])
                factors[name] = detached(packed_log_density(here))
        evidence = evaluate(self.problem.reduced_graph, factors)
        weights = dict(evidence.weights)
        own = align(weights.pop(self.integral), dims).expand(len(tables), *sizes).reshape(len(tables), -1)
        magnitude = evidence.magnitude + (own * cancelled).sum(0) @ self.found.weight
        made: dict[str, MixtureLocation] = {}
        parts: list[tuple[PooledSet, Tensor]] = []
        known = weakref.proxy(sufficient)  # which holds these functions: no cycle, as in `opened`

        def location(name: str) -> MixtureLocation:
            if not parts:
                pairs = zip(self.states, noises, own, strict=True)
                parts.extend(self._pooled(state, noise, r * self.found.weight) for state, noise, r in pairs)
            if name not in made:
                made[name] = self._location(name, params, known, parts)
            return made[name]

        def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
            if name in self.place:
                mixed = location(name)
                return mixed.value_moments() if self.run.sites[name].latent and not mixed.moves else mixed.moments()
            info = self.problem.graph.factors[name]
            return expected_moments(self.run.sites[name], info, weights.get(name), arguments)

        def opens(name: str, starts: Mapping[str, int], size: int) -> Location | None:
            return location(name).opened(starts, size) if name in self.place else None

        sufficient._moments_of, sufficient.opens = moments_of, opens
        zero = torch.zeros((), dtype=torch.float64)
        totals = torch.stack([evidence.log_likelihood, evidence.log_prior, magnitude, zero])
        return Unread(totals.detach(), sufficient, at_atoms(self.problem, params, sufficient))

    def _noise(self, k: int, params: Params, sufficient: Sufficient) -> list[tuple[Tensor, Whitener]]:
        """Coefficients and noise of every site in state k."""
        found = []
        for site in self.states[k].sites:
            own = self._at(k, site.site.name, sufficient.arguments[site.site.name])
            found.append((site.form.coefficients(params), whitener(site, own)))
        return found

    def _at(self, k: int, name: str, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return at_state(self.run.sites[name], arguments, self.found.rank, k)

    def _table(self, state: State, noise: list[tuple[Tensor, Whitener]]) -> tuple[Tensor, Tensor]:
        """ℓ_k (N,), and the size of the terms that cancel in it."""
        one = torch.ones((), dtype=torch.float64)
        ones = torch.ones(1, state.joint.shape[0], dtype=torch.float64)
        rows = [data.mT.unsqueeze(0).unsqueeze(0) for data in state.data]
        return log_evidence(self._set(state, rows, ones, one), noise)

    def _pooled(self, state: State, noise: list[tuple[Tensor, Whitener]], weight: Tensor) -> tuple[PooledSet, Tensor]:
        """The pseudo-elements of a state, and the atoms of the latents' posterior at them."""
        total = weight.sum()
        safe = total.clamp(min=TINY)
        mean = (weight @ state.joint) / safe
        around = state.joint - mean
        scatter = (around * weight.unsqueeze(-1)).mT @ around
        root = total / safe.sqrt()  # 0 in a state without rows
        pseudo = torch.cat([(root * mean).unsqueeze(-1), _root(scatter)], -1)
        ones = torch.nn.functional.pad(root.reshape(1, 1), (0, pseudo.shape[1] - 1))
        widths = [data.shape[1] for data in state.data]
        rows = [part.unsqueeze(0).unsqueeze(0) for part in pseudo.split(widths)]
        own = self._set(state, rows, ones, total)
        return own, posterior(own, noise)[0]

    def _set(self, state: State, rows: list[Tensor], ones: Tensor, count: Tensor) -> PooledSet:
        pooled = []
        for site, data in zip(state.sites, rows, strict=True):
            left = torch.zeros(0, data.shape[2], dtype=torch.float64)
            pooled.append(PooledRows(site.pooled.design, data, left, count))
        sites = tuple(site.at(own) for site, own in zip(state.sites, pooled, strict=True))
        return PooledSet(sites, Classes(ones, count.reshape(1), tuple(pooled)), self.size, 0.0)

    def _location(
        self, name: str, params: Params, sufficient: Sufficient, parts: list[tuple[PooledSet, Tensor]]
    ) -> MixtureLocation:
        found = []
        for k, (own, zeta) in enumerate(parts):
            site = own.sites[self.place[name]]
            C = site.form.coefficients(params)
            state = partial(self._at, k, name)
            found.append(PooledLocation(site, C, site.rows(zeta), sufficient, None, state))
        return MixtureLocation(self.run.sites[name], found, sufficient, self._totals.get(name))


def _state(rows: tuple[tuple[PooledSite, Tensor], ...]) -> State:
    sites, data = (tuple(own) for own in zip(*rows, strict=True))
    return State(sites, data, torch.cat(list(data), -1))


def _root(scatter: Tensor) -> Tensor:
    """F with F Fᵀ = Σ."""
    lower, failed = torch.linalg.cholesky_ex(scatter)
    if not bool(failed):
        return lower
    values, vectors = torch.linalg.eigh(scatter)  # cells that are constant in a state
    return vectors * values.clamp(min=0).sqrt()
