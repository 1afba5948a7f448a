"""Anderson"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.accelerate.base import Coordinates, evaluate
from pyro_em.loop import MONOTONE, EMMap, Iterate, rounding

ORDER = 10
KAPPA = 25
ALPHA = 1.2
S0 = 0
DAMP = True
RESTART = True
RESETFAIL = False
SLACK=1.0
class Anderson:
    def __init__(self, em: EMMap) -> None:
        self.em = em
        self._c = None
        self._pairs: list = []
        self._s = S0
        self._ell = None
        self.log=[]

    def step(self, current: Iterate) -> Iterate:
        em = self.em
        plain = em.update(current)
        if self._c is None or not self._c.cover(plain):
            self._c = Coordinates.around(em, plain); self._pairs = []; self._ell=current.objective
        c = self._c
        x, g = c.to_free(current.params), c.to_free(plain)
        if not bool(x.isfinite().all()):
            self._c=None
            return em.reached(plain, current)
        self._pairs.append((x, g))
        m = min(ORDER, len(x))
        k = len(self._pairs) - 1
        if k == 0:
            return em.reached(plain, current)
        X = torch.stack([a for a, _ in self._pairs]); G = torch.stack([b for _, b in self._pairs])
        F = G - X
        dF, dG = F.diff(dim=0).T, G.diff(dim=0).T
        f = F[-1]
        U, S, Vh = torch.linalg.svd(dF, full_matrices=False)
        d = U.T @ f
        lam = damping(S, d, 1/(1+ALPHA**(KAPPA-self._s))) if DAMP else 1e-12*float(S[0])**2
        gamma = Vh.T @ (S*d/(S*S+lam))
        prop = evaluate(em, c, g - dG @ gamma, current.iteration+1)
        ok = prop is not None and prop.objective >= current.objective - SLACK * rounding(current)
        if ok: self._s += 1
        if RESTART and k >= m or (not ok and RESETFAIL):
            now = prop.objective if ok else current.objective
            if DAMP and self._ell is not None and not ok: self._s = max(self._s - m, -2*KAPPA)
            self._c = None
        elif k >= m: self._pairs.pop(0)
        self.log.append((k,ok,lam))
        return prop if ok else em.reached(plain, current)

def damping(S, d, delta):
    full = float((torch.where(S > 1e-12*S[0], d / S, 0.)**2).sum())
    target = (delta * full) ** .5
    if target == 0: return 0.0
    lam = 0.
    for _ in range(50):
        q = S*S+lam
        n2 = float((torch.where(S > 1e-12*S[0], S*d/q,0.)**2).sum()); n = n2**.5
        if n <= target*1.01: break
        dn = float((torch.where(S > 1e-12*S[0],(S*d)**2/q**3,0.)).sum())
        lam += n2/dn*(n-target)/target
    return lam
