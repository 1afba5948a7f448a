"""SQUAREM: squared extrapolation of two EM maps (Varadhan & Roland 2008, scheme S3).

    r = M(u) − u,   v = M(M(u)) − M(u) − r,   a = ‖r‖/‖v‖,      u' = u + 2a r + a² v
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pyro_em.accelerate.base import Coordinates, evaluate
from pyro_em.loop import MONOTONE, EMMap, Iterate, rounding

STABILISE = True
COMPARE = 1
GROW = 4.0
class Squarem:
    def __init__(self, em: EMMap) -> None:
        self.em = em
        self._longest = 1.0

    def step(self, current: Iterate) -> Iterate:
        em, iteration = self.em, current.iteration+1
        first = em.step(current)
        second = em.update(first)
        c = Coordinates.around(em, second)
        u0, u1, u2 = (c.to_free(p) for p in (current.params, first.params, second))
        r, v = u1 - u0, u2 - u1 - (u1 - u0)
        nv = float(v.norm())
        a = float(r.norm()) / nv if nv > 0 else 1.0
        if a == a and a >= self._longest:
            a = self._longest; cap = True
        else: cap = False
        prop = None
        if a > 1.0001 or (cap and self._longest==1.0):
            if a > 1.0001:
                prop = evaluate(em, c, u0 + 2*a*r + a*a*v, iteration)
                ref = first if COMPARE else current
                ok = prop is not None and prop.objective >= ref.objective - 1 * rounding(current)
            else: ok=True
            if cap and ok: self._longest *= GROW
            if not ok:
                prop = None
                if cap: self._longest = max(1.0, self._longest / GROW)
        if prop is not None:
            if STABILISE:
                try: prop = replace(em.step(prop), iteration=iteration)
                except Exception: prop=None
            if prop is not None: return prop
        return replace(em.reached(second, first), iteration=iteration)
