"""The inverse Wishart, which Pyro does not have.

    log p(Σ | ν, Ψ) = ½ν log|Ψ| − ½νD log 2 − log Γ_D(ν/2) − ½(ν+D+1) log|Σ| − ½ tr(Ψ Σ⁻¹)

D is the size of the matrices. Pyro's `Wishart` covers the same prior on a precision Σ⁻¹.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Chi2
from torch.distributions.utils import lazy_property

from pyro_em.shapes import broadcast_shapes


class InverseWishart(TorchDistribution):
    """Distribution of a (D, D) covariance matrix, conjugate to a MultivariateNormal's.

    `df` ν > D − 1, a number or shape `batch_shape`; `scale_matrix` Ψ, positive definite, shape
    `batch_shape + (D, D)`. If Σ has this distribution, Σ⁻¹ is Wishart(ν, Ψ⁻¹). Raises ValueError for
    other arguments (Gelman et al., Bayesian Data Analysis, 3rd ed., appendix A).

    >>> InverseWishart(5.0, 6 * torch.eye(2)).mean
    tensor([[3., 0.],
            [0., 3.]])
    """

    has_rsample = True
    support = constraints.positive_definite

    def __init__(self, df: Tensor | float, scale_matrix: Tensor, validate_args: bool | None = None) -> None:
        if scale_matrix.dim() < 2 or scale_matrix.shape[-1] != scale_matrix.shape[-2]:
            raise ValueError(
                f"InverseWishart got scale_matrix of shape {tuple(scale_matrix.shape)}; give square ones, "
                "shape (..., D, D)."
            )
        df = torch.as_tensor(df, dtype=scale_matrix.dtype, device=scale_matrix.device)
        batch_shape = broadcast_shapes(df.shape, scale_matrix.shape[:-2])
        event_shape = scale_matrix.shape[-2:]
        self.df = df.expand(batch_shape)
        self.scale_matrix = scale_matrix.expand(batch_shape + event_shape)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """ν > D − 1 depends on the size of the matrix, so this is a property."""
        return {
            "df": constraints.greater_than(self.event_shape[-1] - 1),
            "scale_matrix": constraints.positive_definite,
        }

    @lazy_property
    def _factor(self) -> Tensor:
        return torch.linalg.cholesky(self.scale_matrix)

    def expand(self, batch_shape: Any, _instance: Any = None) -> InverseWishart:
        new = self._get_checked_instance(InverseWishart, _instance)
        batch_shape = torch.Size(batch_shape)
        new.df = self.df.expand(batch_shape)
        new.scale_matrix = self.scale_matrix.expand(batch_shape + self.event_shape)
        super(InverseWishart, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        size = self.event_shape[-1]
        factor = torch.linalg.cholesky(value)
        # tr(Ψ Σ⁻¹) = ‖L⁻¹ chol(Ψ)‖² for Σ = LLᵀ, which cannot come out negative.
        whitened = torch.linalg.solve_triangular(factor, self._factor, upper=False)
        return (
            self.df * _half_log_det(self._factor)
            - self.df * size / 2 * math.log(2)
            - torch.mvlgamma(self.df / 2, size)
            - (self.df + size + 1) * _half_log_det(factor)
            - whitened.square().sum((-2, -1)) / 2
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws by Bartlett's decomposition of the Wishart precision, shape sample + batch + (D, D)."""
        size = self.event_shape[-1]
        shape = self._extended_shape(torch.Size(sample_shape))
        degrees = self.df.unsqueeze(-1) - torch.arange(size, dtype=self.df.dtype, device=self.df.device)
        diagonal = Chi2(degrees).rsample(torch.Size(sample_shape)).sqrt()
        noise = torch.randn(shape, dtype=self.df.dtype, device=self.df.device)
        bartlett = noise.tril(-1) + torch.diag_embed(diagonal)
        # Wishart(ν, I) = AAᵀ, so Σ = L (AAᵀ)⁻¹ Lᵀ = RᵀR with R = A⁻¹Lᵀ.
        root = torch.linalg.solve_triangular(bartlett, self._factor.mT.expand(shape), upper=False)
        return root.mT @ root

    @property
    def mean(self) -> Tensor:
        """Ψ / (ν − D − 1); NaN where ν ≤ D + 1, as no mean exists."""
        excess = self.df - self.event_shape[-1] - 1
        return self.scale_matrix / torch.where(excess > 0, excess, torch.nan)[..., None, None]

    @property
    def mode(self) -> Tensor:
        """Ψ / (ν + D + 1)."""
        return self.scale_matrix / (self.df + self.event_shape[-1] + 1)[..., None, None]


def _half_log_det(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
