"""Normal sites as whitened residuals: log p = c - ½ Σ_p w_p², with w linear in value and location.

For Normal(loc, scale) w = (value - loc) / scale per element (of log value for LogNormal); for MultivariateNormal
w = L⁻¹ (value - loc) with Σ = L Lᵀ, of the observed cells where some are missing. The residual is all that a Gaussian
E-step has to see: where w is affine in the latents, with a constant scale, the log-density is quadratic in them, and
its Hessian is -TᵀT for the tangents T of w.

Letters: P cells of one element of the batch (all event dims, flattened).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_em.distributions.incomplete import whitened_residuals
from pyro_em.families.incomplete_normal import IncompleteNormalFamily
from pyro_em.families.multivariate_normal import MultivariateNormalFamily
from pyro_em.families.normal import LocationScaleFamily, LogNormalFamily
from pyro_em.families.numerics import covariance_matrix
from pyro_em.model.density import clean_value
from pyro_em.model.flat import is_flat
from pyro_em.model.trace import SiteRecord

LOG_2PI = math.log(2 * math.pi)


def is_normal(site: SiteRecord) -> bool:
    """The site has residuals: a Normal, LogNormal or MultivariateNormal whose arguments are known."""
    if site.latent and is_flat(site.fn):
        return True
    return site.arguments is not None and isinstance(site.family, LocationScaleFamily | MultivariateNormalFamily)


def whitened(site: SiteRecord) -> tuple[Tensor, Tensor]:
    """Residuals w, shape batch + (P,), and the log-normaliser c, shape batch; float64, masked cells are 0.

    A flat prior of a latent has a density of one everywhere: w = 0 and c = 0.
    """
    if site.latent and is_flat(site.fn):
        flat = torch.zeros(*site.batch_shape, torch.Size(site.fn.event_shape).numel(), dtype=torch.float64)
        return flat, flat[..., 0]
    arguments = {n: v.double() for n, v in (site.arguments or {}).items()}
    value, loc = clean_value(site).double(), arguments["loc"]
    if isinstance(site.family, LocationScaleFamily):
        scale = arguments["scale"]
        w, log_norm = (site.family.coordinate(value) - loc) / scale, -scale.log() - 0.5 * LOG_2PI
        if isinstance(site.family, LogNormalFamily):
            log_norm = log_norm - value.log()
        elements, event = site.element_dims, 0
    elif isinstance(site.family, IncompleteNormalFamily):
        w, log_norm = whitened_residuals(value, loc, covariance_matrix(arguments))
        elements, event = site.element_dims, 1
    else:
        w, log_norm = _vector(arguments, value - loc)
        elements, event = site.element_dims, 1
    batch, shape = torch.Size(site.batch_shape), torch.Size(site.fn.event_shape)
    batch = torch.broadcast_shapes(batch, w.shape[: max(0, w.dim() - elements - event)])
    w = w.expand(batch + shape)
    inner = shape[: len(shape) - event]
    log_norm = log_norm.expand(torch.broadcast_shapes(log_norm.shape, inner))
    log_norm = log_norm.expand(batch + inner)
    if site.element_mask is not None:
        keep = site.element_mask.reshape(site.element_mask.shape + (1,) * event)
        w, log_norm = torch.where(keep, w, 0.0), torch.where(site.element_mask, log_norm, 0.0)
    if elements:
        log_norm = log_norm.sum(tuple(range(-elements, 0)))
    w = w.reshape(*batch, -1)
    if site.mask is not None and not site.latent:
        w, log_norm = torch.where(site.mask.unsqueeze(-1), w, 0.0), torch.where(site.mask, log_norm, 0.0)
    return w, log_norm


def _vector(arguments: dict[str, Tensor], difference: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹ d (or Pᵀd with precision P Pᵀ) and the log-normaliser of a MultivariateNormal."""
    size = difference.shape[-1]
    if "precision_matrix" in arguments:
        lower = torch.linalg.cholesky(arguments["precision_matrix"])
        w = (lower.mT @ difference.unsqueeze(-1)).squeeze(-1)
        half_log_det = -lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        lower = arguments.get("scale_tril")
        lower = torch.linalg.cholesky(arguments["covariance_matrix"]) if lower is None else lower
        column = difference.unsqueeze(-1)
        lead = torch.broadcast_shapes(lower.shape[:-2], column.shape[:-2])
        w = torch.linalg.solve_triangular(
            lower.expand(*lead, size, size), column.expand(*lead, size, 1), upper=False
        ).squeeze(-1)
        half_log_det = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return w, -half_log_det - 0.5 * size * LOG_2PI
