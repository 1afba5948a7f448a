"""Log-densities of normal sites by differences x - μ, where the product on statistics would lose digits.

η·x - ½xᵀPx - A cancels when a component lies many of its standard deviations from the centre of the data (or
its covariance is nearly singular): the terms grow like that distance squared while their sum does not. Over
many rows the rounding averages out; over few it would show as a falling log-likelihood.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_em.e_step.layout import SiteLayout
from pyro_em.e_step.states import JointStates

LOG_2PI = math.log(2 * math.pi)


def centered_log_density(
    layout: SiteLayout, arguments: dict[str, Tensor], states: JointStates, begin: int, end: int
) -> Tensor:
    """Σ over positions of log N(x_n; args_j) for rows begin..end, shape (J, end - begin)."""
    block, center = layout.block, layout.center
    raw = block.parts[0].raw
    assert raw is not None
    family = layout.site.family
    assert family is not None
    shift = arguments["loc"] if center is None else arguments["loc"] - center
    x = raw[:, begin:end].double()
    if family.event_dim == 0:
        loc = layout.spread(shift, states, 0).unsqueeze(-1)
        scale = layout.spread(arguments["scale"], states, 0).unsqueeze(-1)
        z = (x - loc) / scale
        density = -0.5 * z * z - scale.log() - 0.5 * LOG_2PI
    else:
        width = block.parts[0].width
        loc = layout.spread(shift, states, 1).unsqueeze(-1)
        factor, half_log_det = _inverse_factor(arguments)
        factor = layout.spread(factor, states, 2)
        z = factor @ (x.reshape(block.positions, width, -1) - loc)
        half = layout.spread(half_log_det, states, 0).unsqueeze(-1)
        density = -0.5 * (z * z).sum(-2) - half - 0.5 * width * LOG_2PI
    if block.flags is not None:
        density = torch.where(block.flags[:, begin:end].bool(), density, density.new_zeros(()))
    return density.sum(1)


def _inverse_factor(arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """F with FᵀF = Σ⁻¹, and ½ log|Σ|."""
    if "precision_matrix" in arguments:
        lower = torch.linalg.cholesky(arguments["precision_matrix"])
        return lower.mT, -lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    lower = arguments.get("scale_tril")
    if lower is None:
        lower = torch.linalg.cholesky(arguments["covariance_matrix"])
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse, lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
