"""Normal vectors with missing cells: the complete vector is a latent response.

    log p(x_o | μ, Σ) = log N(x_o; μ_o, Σ_oo)
    E x = (x_o, μ_m + Σ_mo Σ_oo⁻¹ (x_o − μ_o)),      E xxᵀ = (E x)(E x)ᵀ + (0, Σ_mm − Σ_mo Σ_oo⁻¹ Σ_om)

These expected statistics (Orchard & Woodbury 1972; Dempster, Laird & Rubin 1977, section 4.1.3) enter the kernels of
the complete normal, so that every update of a location, covariance, Cholesky factor or precision, tied, structured
or with a prior, is that of complete data. They depend on the arguments and are taken afresh at every E-step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.distributions.incomplete import IncompleteNormal, completed, marginal_log_density
from pyro_em.families.base import AnyStatistic, Arguments, IndexedStatistic, Statistic, SumStatistic
from pyro_em.families.multivariate_normal import MultivariateNormalFamily
from pyro_em.families.numerics import covariance_matrix, floats


class IncompleteNormalFamily(MultivariateNormalFamily):
    """Values have NaN where a cell is missing."""

    distribution = IncompleteNormal
    latent_response = True

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        loc, covariance, x = floats(args["loc"], covariance_matrix(args), value)
        return marginal_log_density(x, loc, covariance)

    def location(self, value: Tensor) -> Tensor:
        """The value with missing cells at the mean of their column."""
        rows = value.reshape(-1, value.shape[-1])
        mean = torch.nan_to_num(rows.nanmean(0))
        return torch.where(value.isnan(), mean, value)

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[AnyStatistic, ...]:
        """Expected statistics given the observed cells, at the arguments."""
        assert args is not None
        loc, covariance, x = floats(args["loc"], covariance_matrix(args), value)
        found = completed(x, loc, covariance)
        first, second = super().statistics(found.mean, args, center)
        assert isinstance(second, Statistic)
        spread = IndexedStatistic(found.pattern, found.covariance, event_dim=2)
        return first, SumStatistic((second, spread))
