"""What the M-step reads: every site's current arguments, and its moments on demand.

An engine (e_step/) makes one `Sufficient` per E-step and says how moments are formed; the M-step moves
parameters by `put`, which rewrites the arguments that take their entries. The data are not touched again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from pyro_em.model.recognise import VALUE, Use
from pyro_em.model.trace import SiteRecord
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors, SiteMoments, argument_cells, site_center, site_moments, site_weight
from pyro_em.types import Params

Arguments = dict[str, dict[str, Tensor]]
T = TypeVar("T")
MomentsOf = Callable[[str, dict[str, Tensor]], SiteMoments]


def raw_arguments(sites: Mapping[str, SiteRecord]) -> Arguments:
    """Float64 raw arguments of every site of a run; the same tensors where they are that already."""
    return {n: {a: _plain(v) for a, v in (s.arguments or {}).items()} for n, s in sites.items()}


def _plain(x: Tensor) -> Tensor:
    return (x.detach() if x.requires_grad else x).double()


class Sufficient:
    """Arguments and moments of the sites at the parameters of one E-step.

    :param sites: of a run of the model (their arguments at any parameters).
    :param arguments: current raw arguments, float64; owned and changed by this object.
    :param moments_of: moments of a data or latent site, given its arguments.
    :param grouped: uses of every parameter that count in Q, where `sites` are fewer than the model's, each
        standing for a group of them under the name of its first.
    """

    def __init__(
        self,
        problem: Problem,
        sites: Mapping[str, SiteRecord],
        arguments: Arguments,
        moments_of: MomentsOf,
        grouped: Mapping[str, tuple[Use, ...]] | None = None,
    ) -> None:
        self.problem, self.sites, self.arguments = problem, dict(sites), arguments
        self._moments_of, self._grouped = moments_of, grouped
        self._moments: dict[str, SiteMoments] = {}
        self._changes = dict.fromkeys(sites, 0)
        # Sites whose location the M-step keeps itself: a function that gives their residual moments.
        self.locations: dict[str, Any] = {}
        # How an engine that reads no rows makes them: (site, where each parameter begins in a block, its size).
        self.opens: Callable[[str, Mapping[str, int], int], Any] | None = None
        # The same of predictors behind links, for the sites of which such an engine makes them itself.
        self.predictors: Callable[[Any, Mapping[str, int], Tensor], Any] | None = None
        # Mean and covariance of cells of a latent, around the mean or another center: (site, cells, center).
        self.spread_of: Callable[[str, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None
        self.posterior: Callable[[], Posteriors] | None = None  # posterior weights of every factor
        # Where sites stand for groups: expected multiplicity of a group's data, and the same posterior at other
        # parameters.
        self.weight_of: Callable[[str], Tensor] | None = None
        self.at: Callable[[Params], Sufficient] | None = None
        self.weights: dict[str, Tensor] = {}  # made of these by the M-step, by site
        # What the units of the M-step made of these, by the unit's parameters, with the version it was made for.
        self._made: dict[tuple[str, ...], tuple[tuple[int, ...], Any]] = {}

    def uses(self, name: str, own: tuple[Use, ...]) -> tuple[Use, ...]:
        """The uses of a parameter that count, `own` in the model: one for each group of sites."""
        return own if self._grouped is None else self._grouped[name]

    def once(self, unit: tuple[str, ...], uses: tuple[Use, ...], make: Callable[[], T]) -> T:
        """What `make` gives for a unit of the M-step, made anew when an argument or value that `uses` read has changed.

        So what was made for the score serves the update.
        """
        version = tuple(self._changes[use.site] for use in uses)
        known = self._made.get(unit)
        if known is None or known[0] != version:
            known = self._made[unit] = version, make()
        made: T = known[1]
        return made

    def moments(self, name: str) -> SiteMoments:
        """Moments of a site at the cells of its arguments."""
        if name in self.locations:
            residual: SiteMoments = self.locations[name].moments()
            return residual
        if name not in self._moments:
            prior = name in self.problem.graph.priors
            found = self._prior_moments(name) if prior else self._moments_of(name, self.arguments[name])
            self._moments[name] = found
        return self._moments[name]

    def take(self, other: Sufficient) -> None:
        """Continue from another one's arguments and moments (after a numeric step moved the arguments)."""
        self.sites, self.arguments = other.sites, other.arguments
        self._moments_of, self._moments, self._grouped = other._moments_of, other._moments, other._grouped
        self.locations, self.weights = other.locations, other.weights
        self._changes = dict.fromkeys(other.sites, 1 + max(self._changes.values(), default=0))

    def forget(self, name: str) -> None:
        """The moments of this site depend on an argument that was moved: they are to be taken anew."""
        self._moments.pop(name, None)
        self.touch(name)

    def touch(self, name: str) -> None:
        """An argument of this site was changed."""
        self._changes[name] += 1

    def _prior_moments(self, name: str) -> SiteMoments:
        """A parameter's own prior has one observation: the parameter's current value."""
        site, arguments = self.sites[name], self.arguments[name]
        weight = site_weight(site, self.problem.graph.factors[name], None)
        return site_moments(site, arguments, weight, site_center(site, argument_cells(site, arguments)))

    def put(self, theta: Tensor, uses: tuple[Use, ...]) -> None:
        """Write a parameter's new value into the arguments that take its entries, and into its own prior."""
        if not uses:
            return
        theta = theta.detach().double()
        for use in uses:
            if use.index is None:
                continue
            self._changes[use.site] += 1
            if use.slot == VALUE:
                self.sites[use.site] = dataclasses.replace(self.sites[use.site], value=theta)
                self._moments.pop(use.site, None)
                continue
            old = self.arguments[use.site][use.slot]
            self.arguments[use.site][use.slot] = use.argument(theta, old)
