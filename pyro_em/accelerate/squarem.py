"""SQUAREM: squared extrapolation through two EM maps (Varadhan & Roland 2008, scheme S3).

    r = M(u) − u,    v = M(M(u)) − M(u) − r,    a = ‖r‖ / ‖v‖,        u' = u + 2a r + a² v

a = 1 gives M(M(u)), two plain steps. An update costs two E-steps (at M(u) and u') if u' is accepted, three
if it is refused. After `PATIENCE` refusals in a row the length is bounded: on a curved ridge only short
extrapolations climb. A bound from the start, as in the R package, took two to six times the E-steps on
the flat likelihoods of Poisson mixtures, where one long step in ten is worth the nine refused.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pyro_em.accelerate.base import Coordinates, evaluate
from pyro_em.loop import EMMap, Iterate, Steps

PATIENCE = 8  # 3, 5 and 8 were compared: 8 loses little on ridges and nothing on flat likelihoods
FACTOR = 4.0  # by which the bound moves, as in the R package


class Squarem:
    """Carries the bound on the length, and the number of refusals in a row that sets it."""

    def __init__(self, em: EMMap) -> None:
        self.em = em
        self._longest = math.inf
        self._refusals = 0

    def step(self, current: Iterate) -> Steps[Iterate]:
        """u' if its objective is not below that of M(u), else M(M(u))."""
        first = yield from self.em.step(current)
        second = self.em.update(first)
        coordinates = Coordinates.around(self.em, second)
        u, once, twice = (coordinates.to_free(p) for p in (current.params, first.params, second))
        r = once - u
        v = twice - once - r
        wanted = float(r.norm() / v.norm())
        length = min(wanted, self._longest)
        # Not so where u' would lie before M(M(u)), and for 0/0 at a fixed point.
        if length > 1:
            extrapolated = u + 2 * length * r + length**2 * v
            proposal = yield from evaluate(self.em, coordinates, extrapolated, current.iteration + 1)
            if proposal is not None and proposal.objective >= first.objective - first.rounding:
                self._refusals = 0
                self._longest = math.inf if wanted <= self._longest else FACTOR * self._longest
                return proposal
            self._refusals += 1
            if self._refusals >= PATIENCE:
                self._longest = max(length / FACTOR, FACTOR)
        reached = yield from self.em.reached(second, first)
        return replace(reached, iteration=current.iteration + 1)
