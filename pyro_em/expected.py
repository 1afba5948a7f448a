"""Mean and variance of a site's value over the posterior of the latents, exactly.

    E x = Σ_c p(c) E[ E(x | c, z) | c ],      E x² = Σ_c p(c) E[ E(x² | c, z) | c ]

over the states c of the discrete latents and a continuous latent z. The atoms of a Gaussian posterior have its mean and
covariance, so that they average what is affine in z and its square; the location of a log-normal site is averaged
before its exponential. Conjugate latents have nodes of their own (evidence/conjugate_nodes.py).

Shapes: as the site's value, its plates included; leading dims are those of states and atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.distributions import IncompleteLowRankNormal, IncompleteNormal
from pyro_em.distributions.incomplete import completed
from pyro_em.errors import Refusal
from pyro_em.evidence.conjugate_nodes import NoNodes, nodes_for, probes
from pyro_em.evidence.conjugate_posterior import ConjugatePosterior
from pyro_em.evidence.discrete import Evidence
from pyro_em.evidence.elimination import atoms_of
from pyro_em.evidence.integrated import integrates
from pyro_em.families.normal import LogNormalFamily
from pyro_em.model.compat import base_distribution, unpack
from pyro_em.model.stacking import Tabulated, distribution_of
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.problem import Problem
from pyro_em.state_posterior import StatePosterior
from pyro_em.types import Params

Quantity = Callable[[SiteRecord], Tensor]


@dataclass(frozen=True)
class Expected:
    """E x and E x² of every cell; `probabilities` of its values, one more dim, where these are finitely many."""

    first: Tensor
    second: Tensor
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class Expectations:
    """Of the sites of a problem at `params`; `evidence` and `run` are those of its E-step there."""

    problem: Problem
    params: Params
    evidence: Evidence
    run: Run

    def of(self, name: str, rank: int) -> Expected:
        """:param rank: dims of the site's value with its plates and event."""
        site = self.run.sites[name]
        event = site.fn.event_dim - site.element_dims
        base = base_distribution(self.problem.capture.sites[name].fn)
        if isinstance(site.fn, Tabulated):
            raise Refusal(
                name,
                f"its {type(base).__name__} density is known as a table over the latents only, so that the moments of "
                "its missing cells are not.",
                "index the last dim of the latent, whatever stands left of it (b[..., group]).",
            )
        lead = rank - site.fn.event_dim
        if not integrates(site) and base.has_enumerate_support and event == 0:
            support = base.enumerate_support(expand=False).reshape(-1)
            probabilities = self._average(name, _masses, 1, lead)
            states = support.to(probabilities)
            return Expected((probabilities * states).sum(-1), (probabilities * states**2).sum(-1), probabilities)
        if isinstance(site.family, LogNormalFamily):
            return self._log_normal(name, lead)
        return Expected(self._average(name, _first, event, lead), self._average(name, _second, event, lead))

    def _log_normal(self, name: str, lead: int) -> Expected:
        """Given the states the logarithm is normal: its mean and variance are averaged, then exp(m + v/2)."""

        def moments(loc: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
            variance = square - loc * loc
            return (loc + variance / 2).exp(), (2 * loc + 2 * variance).exp()

        if self._conjugate(name) is not None:  # a latent precision: by nodes, as any other function of it
            return Expected(self._average(name, _first, 0, lead), self._average(name, _second, 0, lead))
        first, second = moments(self._over_atoms(name, _log_loc), self._over_atoms(name, _log_square))
        return Expected(self._over_states(name, first, 0, lead), self._over_states(name, second, 0, lead))

    def _average(self, name: str, quantity: Quantity, event: int, lead: int) -> Tensor:
        found = self._over_nodes(name, quantity, event)
        return self._over_states(name, self._over_atoms(name, quantity, event) if found is None else found, event, lead)

    def _set(self, name: str) -> int | None:
        continuous = self.problem.continuous
        sets = () if continuous is None else continuous.sets
        return next((i for i, latents in enumerate(sets) if name in latents.factors), None)

    def _conjugate(self, name: str) -> ConjugatePosterior | None:
        number = self._set(name)
        posterior = None if number is None else self.evidence.parts[number].posterior
        return posterior if isinstance(posterior, ConjugatePosterior) else None

    def _over_nodes(self, name: str, quantity: Quantity, event: int) -> Tensor | None:
        """Averages over a conjugate latent, given the states; None where the site reads none."""
        posterior = self._conjugate(name)
        if posterior is None:
            return None
        continuous = self.problem.continuous
        assert continuous is not None
        (latent,) = posterior.latents.names
        at = probes(posterior)
        axis = continuous.runs.dim - event - self.run.sites[name].element_dims
        try:
            nodes = nodes_for(posterior, self._at(name, {latent: at.values}, quantity), at, axis)
            found = self._at(name, {latent: nodes.values}, quantity)
            if found.dim() < -axis or found.shape[axis] != len(nodes.weights):
                return found  # it does not depend on the latent
            return nodes.average(found, axis)
        except NoNodes as error:
            raise Refusal(
                name,
                f"the moments of its missing cells, given '{latent}', {error}.",
                f"mask those cells, and draw them given draws of '{latent}' (result.posterior().sample).",
            ) from error

    def _at(self, name: str, own: Mapping[str, Tensor], quantity: Quantity) -> Tensor:
        """The quantity at values of some latents, those of all others at their atoms."""
        continuous = self.problem.continuous
        assert continuous is not None
        values = atoms_of(self.evidence.parts) | dict(own)
        return quantity(continuous.runs.several(self.params, values).sites[name])

    def _over_atoms(self, name: str, quantity: Quantity, event: int = 0) -> Tensor:
        """Averages over the atoms of the site's continuous latents given the states, the atoms' dim kept."""
        continuous, number, site = self.problem.continuous, self._set(name), self.run.sites[name]
        weights = self._weights(name)
        if continuous is None or number is None or weights is None:
            return quantity(site)
        x = quantity(site)
        dim, trailing = continuous.runs.dim, event + site.element_dims
        if weights.dim() < -dim or weights.shape[dim] == 1 or x.dim() < -dim + trailing or x.shape[dim - trailing] == 1:
            return x
        given = weights / weights.sum(dim, keepdim=True)
        given = torch.where(given.isnan(), 1 / weights.shape[dim], given)  # a state without posterior weight
        return (given.reshape(given.shape + (1,) * trailing).to(x) * x).sum(dim - trailing, keepdim=True)

    def _weights(self, name: str) -> Tensor | None:
        packed = self.evidence.weights.get(name)
        return None if packed is None else unpack(packed, self.run.sites[name].symbols)

    def _over_states(self, name: str, x: Tensor, event: int, lead: int) -> Tensor:
        """Σ over the states: dims left of the site's own are theirs, and that of the atoms, which `x` no longer has."""
        weights, trailing = self._weights(name), event + self.run.sites[name].element_dims
        if weights is not None:
            continuous = self.problem.continuous
            if continuous is not None and self._set(name) is not None and weights.dim() >= -continuous.runs.dim:
                weights = weights.sum(continuous.runs.dim, keepdim=True)
            x = torch.where(weights.reshape(weights.shape + (1,) * trailing) > 0,
                            weights.reshape(weights.shape + (1,) * trailing).to(x) * x, 0.0)  # fmt: skip
        extra = x.dim() - trailing - lead
        return x.sum(tuple(range(extra))) if extra > 0 else x


def _masses(site: SiteRecord) -> Tensor:
    """Probabilities of the values, one more dim; exact where an argument is at the end of its range."""
    base = distribution_of(site)
    support = base.enumerate_support(expand=False)
    support = support.reshape(-1, *(1,) * len(base.batch_shape))
    if site.family is None or site.arguments is None:
        masses: Tensor = base.log_prob(support)
    else:
        masses = site.family.log_prob({**site.constants, **site.arguments}, support)
    return masses.exp().movedim(0, -1)


def _moments(site: SiteRecord) -> tuple[Tensor, Tensor]:
    base = distribution_of(site)
    if integrates(site):
        return StatePosterior(site).observations()
    if isinstance(base, IncompleteNormal | IncompleteLowRankNormal):
        whole = completed(site.value, base.loc, base._unbroadcasted_covariance)
        return whole.mean, _variances(whole.covariance, whole.pattern)
    return base.mean, base.variance


def _variances(covariance: Tensor, pattern: Tensor) -> Tensor:
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)  # batch' + (G, D)
    cells = torch.broadcast_shapes(diagonal.shape[:-2], pattern.shape)
    index = pattern.expand(cells)[..., None, None].expand(*cells, 1, diagonal.shape[-1])
    return diagonal.expand(*cells, *diagonal.shape[-2:]).gather(len(cells), index).squeeze(len(cells))


def _first(site: SiteRecord) -> Tensor:
    return _moments(site)[0]


def _second(site: SiteRecord) -> Tensor:
    mean, variance = _moments(site)
    return variance + mean * mean


def _log_loc(site: SiteRecord) -> Tensor:
    loc: Tensor = distribution_of(site).loc
    return loc


def _log_square(site: SiteRecord) -> Tensor:
    base = distribution_of(site)
    square: Tensor = base.loc**2 + base.scale**2
    return square.expand(base.batch_shape)
