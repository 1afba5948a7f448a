"""Log-densities of normal and von Mises sites by differences, where the product on statistics would lose digits.

η·x - ½xᵀPx - A cancels when a component lies many of its standard deviations from the centre of the data (or
its covariance is nearly singular): the terms grow like that distance squared while their sum does not. Over
many rows the rounding averages out; over few it would show as a falling log-likelihood.

An angle is a point on the circle: κ cos(x - μ) - κ = -½ κ |e(x) - e(μ)|² with e(x) = (cos x, sin x), a normal of two
dimensions but for its normaliser.

What depends on the parameters alone is prepared once an E-step: μ, F with FᵀF = Σ⁻¹, and log (2π)^{D/2}|Σ|^½, each
over joint states J and positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_em.e_step.base import IMPOSSIBLE
from pyro_em.e_step.layout import SiteLayout
from pyro_em.e_step.nested_rows import group_log_density
from pyro_em.e_step.states import JointStates
from pyro_em.families.circular import VonMisesFamily
from pyro_em.families.numerics import half_log_det, precision_factor

LOG_2PI = math.log(2 * math.pi)
NUM_PREPARED = 3


def serves(layout: SiteLayout) -> bool:
    """Whether differences say the log-density of the site."""
    family = layout.site.family
    return family is not None and (family.centered or isinstance(family, VonMisesFamily))


def is_rough(w: Tensor, rms: Tensor, num_rows: int, magnitude: Tensor) -> bool:
    """Whether rounding of the product W Φ would show.

    It is about eps·sqrt(N)·max_j Σ_f |W_jf|·rms(Φ_f), against the eps·Σ|ll_n| that a monotone objective may lose.

    :param w: W (J, F), -inf as `IMPOSSIBLE`; :param rms: of every feature, (F,); :param magnitude: Σ|ll_n|.
    """
    bound = math.sqrt(num_rows)
    if not bool((w.abs() * rms).sum(-1).max() * bound > magnitude):
        return False
    w = torch.where(w <= 0.1 * IMPOSSIBLE, torch.zeros_like(w), w)
    return bool((w.abs() * rms).sum(-1).max() * bound > magnitude)


def prepare(layout: SiteLayout, arguments: dict[str, Tensor], states: JointStates) -> tuple[Tensor, Tensor, Tensor]:
    """Location (J, positions, width, 1), inverse factor (J, positions, width, width) and log normaliser.

    A univariate site has no width, and 1/σ for a factor; the normaliser is (J, positions, 1). A von Mises site has
    e(μ) and √κ, (J, positions, 1, 1).
    """
    family = layout.site.family
    assert family is not None
    if isinstance(family, VonMisesFamily):
        at, kappa = arguments["loc"], arguments["concentration"]
        loc = layout.spread(torch.stack([at.cos(), at.sin()], -1), states, 1).unsqueeze(-1)
        half = layout.spread((2 * math.pi * torch.special.i0e(kappa)).log(), states, 0).unsqueeze(-1)
        return loc, layout.spread(kappa.sqrt(), states, 0)[..., None, None], half
    shift = arguments["loc"] if layout.center is None else arguments["loc"] - layout.center
    if family.event_dim == 0:
        loc = layout.spread(shift, states, 0).unsqueeze(-1)
        scale = layout.spread(arguments["scale"], states, 0).unsqueeze(-1)
        return loc, scale.reciprocal(), scale.log() + 0.5 * LOG_2PI
    width = layout.block.parts[0].width
    factor = precision_factor(arguments)
    loc = layout.spread(shift, states, 1).unsqueeze(-1)
    half = layout.spread(half_log_det(arguments), states, 0).unsqueeze(-1)
    return loc, layout.spread(factor, states, 2), half + 0.5 * width * LOG_2PI


def centered_log_density(layout: SiteLayout, prepared: tuple[Tensor, Tensor, Tensor], begin: int, end: int) -> Tensor:
    """Σ over positions of log N(x_n; args_j) for rows begin..end, shape (J, end - begin)."""
    block, (loc, factor, normalizer) = layout.block, prepared
    if block.within is not None:
        event = layout.site.family is not None and layout.site.family.event_dim > 0
        mean, root = (loc, factor) if event else (loc.unsqueeze(-1), factor.unsqueeze(-1))
        return group_log_density(block, mean, root, normalizer, begin, end).sum(1)
    raw = block.parts[0].raw
    assert raw is not None and layout.site.family is not None
    x = raw[:, begin:end].double()
    if isinstance(layout.site.family, VonMisesFamily):
        sine = block.parts[1].raw
        assert sine is not None
        z = factor * (torch.stack([x, sine[:, begin:end].double()], -2) - loc)
        square = (z * z).sum(-2)
    elif layout.site.family.event_dim == 0:
        z = (x - loc) * factor
        square = z * z
    else:
        z = factor @ (x.reshape(block.positions, block.parts[0].width, -1) - loc)
        square = (z * z).sum(-2)
    density = -0.5 * square - normalizer
    if block.flags is not None:
        density = torch.where(block.flags[:, begin:end].bool(), density, density.new_zeros(()))
    return density.sum(1) if block.positions > 1 else density.squeeze(1)
