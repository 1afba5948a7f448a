"""A coupled site's share of Q (coupled_sets.py), from the factor of its rows at the posterior.

The rows G (any, q) of regressors, at the posterior's mean and at its spread, and their residuals r at the parameters of
the E-step have an orthogonal factor [R_G | R_r] of at most q + P rows, whatever the number of cells. Near these
parameters, C the coefficients of pooled_location.py,

    Σ r rᵀ = R(C)ᵀ R(C),     R(C) = R_r + R_G (C - C₀).

What is large in data and location has cancelled before the factor is taken, row by row.
"""

from __future__ import annotations

from torch import Tensor

from pyro_em.e_step.pooled_location import PooledLocation, PooledSite
from pyro_em.statistics import SiteMoments
from pyro_em.sufficient import Sufficient


class CoupledLocation(PooledLocation):
    """One site at one E-step; `rows` (any, q + P) are [R_G | R_r]."""

    def __init__(
        self, own: PooledSite, C: Tensor, rows: Tensor, sufficient: Sufficient, total: SiteMoments | None
    ) -> None:
        super().__init__(own, C, (rows[:, : len(C)], rows[:, len(C) :]), sufficient, total)

    def _residual(self, C: Tensor) -> Tensor:
        assert self._data is not None
        return self._data + self._regressors @ (C - self._start)
