"""Log-factors of a run: each site's exact log-density, packed over plate and enumeration symbols.

torch clamps probabilities (p = 0 scores -36 instead of -inf), which breaks structural zeros; where
the family of a site is known its own exact `log_prob` on the raw arguments is used, otherwise the
distribution's. Masks apply to observed factors only, as in Pyro: a latent site is a normalised
distribution whose mask would destroy the sum to one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_em.errors import NonFiniteError, Refusal
from pyro_em.families.spaces import some
from pyro_em.model import compat
from pyro_em.model.capture import Capture
from pyro_em.model.timeline import read_outside
from pyro_em.model.trace import SiteRecord
from pyro_em.shapes import broadcast_shapes
from pyro_em.state_space.start import Undetermined
from pyro_em.state_space.steps import SingularInnovation


def clean_value(site: SiteRecord) -> Tensor:
    """The site's value with masked-out entries replaced by an allowed one.

    Data behind a mask may be NaN; NaN times zero is NaN in densities, statistics and gradients.
    """
    value = site.value
    if not site.observed or (site.mask is None and site.element_mask is None):
        return value
    keep = torch.ones((), dtype=torch.bool, device=value.device) if site.mask is None else site.mask
    keep = keep.reshape(keep.shape + (1,) * site.fn.event_dim)
    if site.element_mask is not None:
        base_event = site.fn.event_dim - site.element_dims
        keep = keep & site.element_mask.reshape(site.element_mask.shape + (1,) * base_event)
    keep = keep.expand(broadcast_shapes(keep.shape, value.shape))
    if bool(keep.all()):
        return value
    kept = keep.reshape((*keep.shape[: keep.dim() - site.fn.event_dim], -1)).all(-1)
    rows = value.expand(keep.shape)
    filler = rows[kept][0] if bool(kept.any()) else rows.new_ones(())
    return torch.where(keep, rows, filler)


@contextlib.contextmanager
def naming_singular_steps(site: str) -> Iterator[None]:
    """A step without a density, or a start that is not determined, as an error that names the site."""
    try:
        yield
    except Undetermined as error:
        raise Refusal(
            site,
            "the observations do not determine the flat (improper) start of its states: there is no likelihood.",
            "Give the states that no observation depends on a normal start, or observe more steps.",
        ) from error
    except SingularInnovation as error:
        raise NonFiniteError(
            site,
            f"Site '{site}': the covariance of its step {error.step} given the steps before is not positive definite, "
            "so that it has no density: a noise scale has collapsed, or the start has zeros where noise is needed.",
        ) from error


def log_density(site: SiteRecord, *, masked: bool = True) -> Tensor:
    """Unscaled log-density of a site in Pyro's dim layout (batch shape of the site).

    `masked=False` leaves out the mask, as latent sites do anyway.
    """
    value = clean_value(site)
    if site.family is None or site.arguments is None:
        result = site.fn.log_prob(value)
    else:
        with naming_singular_steps(site.name):
            result = site.family.log_prob({**site.constants, **site.arguments}, value)
        outside = site.family.outside(site.arguments)
        if outside is not None and some(outside):
            result = torch.where(outside, torch.nan, result)
        if site.element_mask is not None:
            result = torch.where(site.element_mask, result, result.new_zeros(()))
        if site.element_dims:
            shape = broadcast_shapes(result.shape, site.fn.event_shape[: site.element_dims])
            result = result.expand(shape).sum(tuple(range(-site.element_dims, 0)))
        result = result.expand(broadcast_shapes(result.shape, site.batch_shape))
    if masked and site.mask is not None and not site.latent:
        result = torch.where(site.mask, result, result.new_zeros(()))
    return result


def packed_log_density(site: SiteRecord) -> Tensor:
    """Log-density of a site, packed over its plates and enumeration symbols.

    :raises Refusal: if it has dims that belong to neither.
    """
    return _pack(log_density(site), site)


def factor_shape(site: SiteRecord) -> Tensor:
    """A packed tensor of the shape of the site's log-density, without the work and memory of it."""
    own = site.value.shape[: site.value.dim() - site.fn.event_dim]
    try:
        batch = broadcast_shapes(own, site.batch_shape)
    except ValueError as error:  # of data outside of a plate, with a latent's states
        raise _undeclared(site, own) from error
    if site.mask is not None and not site.enumerated:
        batch = broadcast_shapes(batch, site.mask.shape)  # a mask may depend on a latent that the arguments do not read
    if site.element_mask is not None:
        own = site.element_mask.shape
        batch = broadcast_shapes(batch, own[: max(0, len(own) - site.element_dims)])
    return _pack(torch.zeros(()).expand(batch), site)


def shape_in(site: SiteRecord, seen: Capture) -> Tensor:
    """`factor_shape`, whose refusal then names the latents that the site reads."""
    try:
        return factor_shape(site)
    except Refusal as refusal:
        latents = [n for n in seen.sites[site.name].upstream if n in seen.sites and seen.sites[n].enumerable]
        for loop in seen.loops:
            inside = sorted(set(latents) & set(loop.names))
            if inside and site.name not in loop.names:
                raise read_outside(site.name, inside[0]) from refusal
        read = f" It reads {', '.join(repr(n) for n in sorted(latents))}." if latents else ""
        raise Refusal(site.name, refusal.reason + read, refusal.remedy) from refusal


def _pack(density: Tensor, site: SiteRecord) -> Tensor:
    try:
        return compat.pack(density, site.symbols)
    except ValueError as error:
        raise _undeclared(site, density.shape) from error


def _undeclared(site: SiteRecord, shape: torch.Size) -> Refusal:
    plates = ", ".join(f"'{p.name}' (dim {p.dim}, size {p.size})" for p in site.plates) or "none"
    return Refusal(
        site.name,
        f"its log-density has shape {tuple(shape)}, with dims that belong to none of its plates or latents: a latent "
        f"or the data were summed, indexed or broadcast across a plate. Its plates: {plates}.",
        "declare every independent dim by pyro.plate(..., dim=...), make dims within one observation its event "
        "(.to_event(1)), and use a latent only elementwise or by indexing (loc[z]) inside of its own plates. Latents "
        "that the data couple in pairs (a stochastic block model) have no posterior that is summed exactly: use "
        "algorithm='svi' with a guide for them.",
    )
