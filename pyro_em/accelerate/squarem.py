"""SQUAREM: squared extrapolation through two EM maps (Varadhan & Roland 2008, scheme S3).

    r = M(u) − u,    v = M(M(u)) − M(u) − r,    a = ‖r‖ / ‖v‖,        u' = u + 2a r + a² v

a = 1 gives M(M(u)), two plain steps. An accepted update costs two E-steps (at M(u) and u'), a rejected one
three. There is no bound on a: the R package's (1, growing fourfold) took two to ten times the E-steps on
flat likelihoods, where a proposal refused now and then is cheap.
"""

from __future__ import annotations

from dataclasses import replace

from pyro_em.accelerate.base import Coordinates, evaluate
from pyro_em.loop import EMMap, Iterate, rounding
from pyro_em.types import Params


class Squarem:
    """Carries nothing from one update to the next."""

    def __init__(self, em: EMMap) -> None:
        self.em = em

    def step(self, current: Iterate) -> Iterate:
        """u' if its objective is not below that of M(u), else M(M(u))."""
        first = self.em.step(current)
        second = self.em.update(first)
        proposal = self._extrapolated(current, first, second)
        if proposal is not None and proposal.objective >= first.objective - rounding(first):
            return proposal
        return replace(self.em.reached(second, first), iteration=current.iteration + 1)

    def _extrapolated(self, current: Iterate, first: Iterate, second: Params) -> Iterate | None:
        coordinates = Coordinates.around(self.em, second)
        u, once, twice = (coordinates.to_free(p) for p in (current.params, first.params, second))
        r = once - u
        v = twice - once - r
        length = r.norm() / v.norm()
        # Below 1 the proposal lies before M(M(u)); at a fixed point it is 0/0. Neither improves on two steps.
        if not bool(length > 1):
            return None
        return evaluate(self.em, coordinates, u + 2 * length * r + length**2 * v, current.iteration + 1)
