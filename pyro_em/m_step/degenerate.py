"""Is an updated parameter usable? Collapsed variances, unbounded rates, and bounds of its constraint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.charts import base_constraint
from pyro_em.errors import DegenerateLikelihoodError, InputError
from pyro_em.evidence.finite import is_unbounded, spread_to_zero
from pyro_em.families import LOCATIONS
from pyro_em.kernels import PowerKernel, WishartKernel
from pyro_em.m_step.closed import Combined
from pyro_em.model.recognise import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.sufficient import Sufficient

# A variance below this share of the variance of all data of the site is rounding, not information.
COLLAPSED = 1e-13
ROUNDED = (64 * torch.finfo(torch.float64).eps) ** 2  # a variance below this share of the mean² is that of a constant
CORRELATED = 1e-7  # least eigenvalue of the correlations of a noise in a sequence: 1e-8 and sums lose their digits
REMEDY = (
    "start elsewhere (init=, restarts=), use fewer components, share the variance between components, or put a "
    "prior on it (InverseGamma, InverseWishart) and use algorithm='map-em'."
)


def check_update(
    problem: Problem,
    name: str,
    uses: tuple[Use, ...],
    combined: Combined,
    value: Tensor,
    spread: Callable[[], Spread | None],
    integrated: bool = False,
    noise: bool = False,
    effects: bool = False,
) -> Tensor:
    """The update, moved into the bounds of its constraint (`Kernel.within`).

    :param spread: gives the scale of the data (`spread_of`), where it is needed.
    :param integrated: the parameter's sites have latents inside; `noise`: it is a noise there (`Family.is_noise`).
    :param effects: its sites are continuous latents. Their spread may be 0, and has no data to be small against: what
        the first E-step gave them is the start's.
    :raises DegenerateLikelihoodError: if the maximum does not exist.
    """
    site = next((use.site for use in uses if use.slot != VALUE), name)
    if isinstance(combined.kernel, WishartKernel):
        own = _covariance(combined.kernel).diagonal(dim1=-2, dim2=-1) if effects else None
        around = spread() if own is None else Spread(own)
        _check_noise(site, combined) if noise else _check_matrices(site, combined, around)
    elif isinstance(combined.kernel, PowerKernel) and not (problem.with_prior or integrated or effects):
        _check_scales(site, combined.kernel, spread())
    finite = not bool((value - value).any())  # in few operations
    prior = _free_prior(problem, name, uses)
    if prior is not None and not (finite and (prior == name or bool((value != 0).all()))):
        raise DegenerateLikelihoodError(prior, None, *spread_to_zero(prior))
    if not finite:
        raise DegenerateLikelihoodError(
            site,
            _component(~value.isfinite()),
            f"the update of '{name}' is unbounded (its statistic is zero).",
            REMEDY,
        )
    record = problem.parameters[name]
    constraint = base_constraint(record.constraint)
    lower, upper = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    if upper is not None and record.kind == "sample":  # a Uniform prior is zero at its upper end, not below
        upper = torch.nextafter(torch.as_tensor(upper).to(value), value.new_tensor(-torch.inf))
    if lower is not None or upper is not None:
        value = combined.kernel.within(value, lower, upper)
    return value


def _free_prior(problem: Problem, name: str, uses: tuple[Use, ...]) -> str | None:
    """The site of a prior that is narrower the smaller (or larger) this parameter is, or that of the parameter itself
    if others do so."""
    if not problem.with_prior:
        return None
    spreads = [use.site for use in uses if use.site in problem.graph.priors and use.slot not in (VALUE, *LOCATIONS)]
    everywhere = (use for own in problem.uses.values() for use in own if use.slot not in (VALUE, *LOCATIONS))
    if not spreads and name in problem.graph.priors and any(use.site == name for use in everywhere):
        spreads = [name]
    return next((site for site in spreads if is_unbounded(problem.capture.sites[site].fn)), None)


def _component(bad: Tensor) -> int | None:
    """First index of the first bad entry: the component, where components come first."""
    return int(bad.nonzero()[0][0]) if bad.dim() else None


@dataclass(frozen=True)
class Spread:
    """Variance of data, one number or one for each dimension, and what follows from it for all updates."""

    variance: Tensor

    @cached_property
    def is_positive(self) -> bool:
        """Everywhere."""
        return bool((self.variance > 0).all())

    @cached_property
    def least(self) -> Tensor:
        """Below which a variance is rounding."""
        return COLLAPSED * self.variance.min()


def spread_of(uses: tuple[Use, ...], sufficient: Sufficient) -> Tensor | None:
    """Variance of all data that the parameter's sites explain, per dimension of vectors, else one number.

    That number is the smallest of those of the elements, which may be in units of their own; elements without spread
    (one datum each, a constant) are left out while there are others.
    """
    count, center, squares = [], [], []  # of every cell, whose squares are about a center of its own
    elements: list[Tensor] = []
    for use in uses:
        family = sufficient.sites[use.site].family
        if use.slot == VALUE or family is None or not family.centered:
            continue
        own = sufficient.moments(use.site)
        own = own.total or own
        if own.center is None:
            continue
        weight, second = own.moments[0], own.moments[2]
        width = 1
        if second.dim() > weight.dim():  # x xᵀ of vectors
            second, weight = second.diagonal(dim1=-2, dim2=-1), weight.unsqueeze(-1)
            width = second.shape[-1]
        count.append(weight.expand(second.shape).reshape(-1, width))
        center.append(own.center.expand(second.shape).reshape(-1, width))
        squares.append(second.reshape(-1, width))
        own_dims = second.dim() - sufficient.sites[use.site].element_dims
        number = width if width > 1 else math.prod(second.shape[own_dims:])
        variance, mean = _pooled(*(x[-1].reshape(-1, number) for x in (count, center, squares)))
        elements.append(torch.where(variance > ROUNDED * mean**2, variance, torch.inf).amin())
    if not count:
        return None
    if len({x.shape[-1] for x in count}) > 1:  # a factor of vectors and of numbers
        smallest = torch.stack(elements).amin()
        return torch.where(smallest.isfinite(), smallest, 0.0)
    pooled, mean = _pooled(*(torch.cat(x) for x in (count, center, squares)))
    pooled = torch.where(pooled > ROUNDED * mean**2, pooled, 0.0)  # equal data, whose mean is rounded
    if pooled.numel() > 1:
        return pooled
    return torch.stack([*elements, pooled.squeeze(0)]).amin()


def _pooled(count: Tensor, center: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean over the first dim, of cells whose squares are about centers of their own."""
    total = count.sum(0)
    mean = (count * center).sum(0) / total
    return (squares + count * (center - mean) ** 2).sum(0) / total, mean


def _covariance(kernel: WishartKernel) -> Tensor:
    return kernel.argmax() if not kernel.inverse else kernel.inverted().argmax()


def _check_noise(site: str, combined: Combined) -> None:
    """Variances have no scale to be small on: a random walk strays from its noise as far as it likes. What is lost
    where a combination of entries has no noise is seen by their correlations."""
    kernel = combined.kernel
    assert isinstance(kernel, WishartKernel)
    covariance = _covariance(kernel)
    if not kernel.is_informed:  # series of one step have no transitions
        unit = torch.eye(covariance.shape[-1]).to(covariance)
        covariance = torch.where(kernel.is_empty()[..., None, None], unit, covariance)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1).diag_embed()
    _, failed = torch.linalg.cholesky_ex(covariance - CORRELATED * diagonal)
    if not bool(failed.any()):
        return
    root = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    smallest = torch.linalg.eigvalsh(torch.nan_to_num(covariance / (root.unsqueeze(-1) * root.unsqueeze(-2))))
    raise DegenerateLikelihoodError(
        site,
        None,
        f"the covariance matrix of a noise has become singular (smallest eigenvalue {float(smallest.min()):.1e} of its "
        "correlations): a combination of states or observations follows from the others without error.",
        "use fewer states or a diagonal covariance, start elsewhere (init=, restarts=), give it more data, or "
        "put a prior on it (InverseWishart) and use algorithm='map-em'.",
    )


def _check_matrices(site: str, combined: Combined, around: Spread | None) -> None:
    kernel = combined.kernel
    assert isinstance(kernel, WishartKernel)
    covariance = _covariance(kernel)
    if around is None:
        return
    spread = torch.nan_to_num(around.variance).clamp(min=torch.finfo(torch.float64).tiny)
    if not kernel.is_informed:
        unit = torch.diag_embed(spread.expand(covariance.shape[:-1])).to(covariance)
        covariance = torch.where(kernel.is_empty()[..., None, None], unit, covariance)
    # In units of the spread the smallest eigenvalue is above c where Σ - c·spread can be factorised; it takes a third
    # of the time.
    _, failed = torch.linalg.cholesky_ex(covariance - COLLAPSED * spread.expand(covariance.shape[:-1]).diag_embed())
    if bool(failed.any()):
        root = spread.sqrt()
        smallest = torch.linalg.eigvalsh(torch.nan_to_num(covariance / (root.unsqueeze(-1) * root)))
        raise DegenerateLikelihoodError(
            site,
            _component(failed != 0),
            f"the covariance matrix has become singular (smallest eigenvalue {float(smallest.min()):.1e} relative "
            "to the spread of the data): the component sits on too few distinct points.",
            REMEDY,
        )


def _check_scales(site: str, kernel: PowerKernel, spread: Spread | None) -> None:
    if spread is None:
        return
    if not spread.is_positive:
        if bool(kernel.is_empty().all()):  # all of its values are missing
            return
        raise InputError(f"Site '{site}': all data are equal, so that its scale has no maximum-likelihood estimate.")
    theta = kernel.argmax()
    # falling power: θ^q is a variance for q = 2 (scale), 1 (variance); rising: a precision.
    variance_like = kernel.is_scale or bool((kernel.log_coefficient < 0).any())
    size = theta**kernel.exponent if variance_like else 1 / theta**kernel.exponent
    large = size > spread.least
    if bool(large.all()):
        return
    bad = ~large & ~kernel.is_empty()
    if bool(bad.any()):
        raise DegenerateLikelihoodError(
            site,
            _component(bad),
            "its variance has collapsed to zero: the component sits on a single point.",
            REMEDY,
        )
