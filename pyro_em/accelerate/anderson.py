"""Anderson acceleration, restarted and damped (DAAREM: Henderson & Varadhan 2019), kept monotone.

With residuals f_i = M(u_i) − u_i and differences ΔF, ΔM (P, k) of the last k + 1 iterates,

    γ = argmin ‖f − ΔF γ‖² + λ‖γ‖²,        u' = M(u) − ΔM γ

λ is such that ‖γ‖² is a share δ = 1/(1 + 1.2^(−s)) of its value at λ = 0; s counts accepted proposals and
falls by the order at a refused one. The memory, at most min(10, P) differences, is emptied when full, and at a
refusal: differences that led astray would do so again. An update costs one E-step if u' is accepted, two if not.

Where this differs from DAAREM: the objective may never fall, and so damping begins at δ = 1/2, not 0.01,
which took up to half the E-steps. Whether u' points away from M(u) says nothing (where a variance goes to 0 and
EM creeps, good proposals often do); only its objective counts.
Like every quasi-Newton method on a residual it is drawn to saddles too, and leaves them at EM's pace.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_em.accelerate.base import Coordinates, evaluate
from pyro_em.loop import EMMap, Iterate, Steps

ORDER = 10
GROWTH = 1.2  # of the odds δ/(1 − δ) with each accepted proposal
RANK = 1e-12  # directions of ΔF below this share of its largest singular value are rounding


class Anderson:
    """Carries the points since the last restart, in the coordinates of that restart, and s."""

    def __init__(self, em: EMMap) -> None:
        self.em = em
        self._coordinates: Coordinates | None = None
        self._maps, self._residuals = np.empty((2, 0, 0))  # M(u) and M(u) − u of each point, one a row
        self._count = 0  # of points
        self._accepted = 0  # s

    def step(self, current: Iterate) -> Steps[Iterate]:
        """u' if its objective is not below that of u, else M(u)."""
        mapped = self.em.update(current)
        if self._coordinates is None or not self._coordinates.cover(mapped):
            self._coordinates, self._count = Coordinates.around(self.em, mapped), 0
        coordinates = self._coordinates
        # Small vectors: NumPy's calls take a third of the time of torch's.
        u, plain = coordinates.to_free(current.params).numpy(), coordinates.to_free(mapped).numpy()
        order = min(ORDER, len(u))
        self._append(plain, plain - u, order)
        if self._count == 1:
            return (yield from self.em.reached(mapped, current))
        extrapolated = self._mixed()
        if self._count > order:
            self._coordinates = None  # the next update starts afresh
        free = torch.from_numpy(extrapolated)
        proposal = yield from evaluate(self.em, coordinates, free, current.iteration + 1)
        if proposal is not None and proposal.objective >= current.objective - current.rounding:
            self._accepted += 1
            return proposal
        self._coordinates, self._accepted = None, max(self._accepted - order, -order)
        return (yield from self.em.reached(mapped, current))

    def _append(self, plain: NDArray[np.float64], residual: NDArray[np.float64], order: int) -> None:
        if self._count == 0:
            self._maps, self._residuals = np.empty((2, max(order, 1) + 1, len(plain)))
        self._maps[self._count], self._residuals[self._count] = plain, residual
        self._count += 1

    def _mixed(self) -> NDArray[np.float64]:
        """u' (P,); not finite if some point is not."""
        maps, residuals = self._maps[: self._count], self._residuals[: self._count]
        if not np.isfinite(residuals).all():
            return np.full(maps.shape[1], np.nan)
        left, singular, right = np.linalg.svd(residuals[1:] - residuals[:-1], full_matrices=False)  # ΔFᵀ
        kept = singular > RANK * singular[:1]
        singular, target = singular[kept], (right @ residuals[-1])[kept]
        penalty = ridge(singular, target, share=1 / (1 + GROWTH**-self._accepted))
        gamma = left[:, kept] @ (singular * target / (singular**2 + penalty))
        return maps[-1] - gamma @ (maps[1:] - maps[:-1])


def ridge(singular: NDArray[np.float64], target: NDArray[np.float64], share: float) -> float:
    """λ for which ‖γ(λ)‖² = share · ‖γ(0)‖², where γ_j(λ) = d_j t_j / (d_j² + λ), d and t (k,).

    Newton's method on 1/‖γ‖, as in trust regions (Moré 1978): from λ = 0 it rises to the root monotonically.
    """
    if not target.any():
        return 0.0
    wanted = math.sqrt(share) * _norm(target / singular)
    penalty = 0.0
    for _ in range(20):
        shifted = singular**2 + penalty
        gamma = singular * target / shifted
        size = _norm(gamma)
        if size <= 1.001 * wanted:
            break
        penalty += size**2 / float((gamma**2 / shifted).sum()) * (size - wanted) / wanted
    return penalty


def _norm(x: NDArray[np.float64]) -> float:
    return math.sqrt(float(x @ x))
