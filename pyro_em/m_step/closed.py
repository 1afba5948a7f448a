"""Closed-form updates: add up the kernels of all uses of a parameter, take the argmax.

As a function of one parameter, with the others held fixed, Q is a sum over the parameter's uses. Where a
use is elementwise (recognise.py) and its family has a kernel for that argument (kernels/), the sum is a
kernel again: ties add, conjugate priors add (a prior is the use of the parameter as a *value*), fixed
factors rescale. So one mechanism serves plain, tied, scaled and MAP updates of every family, and whatever
does not fit says why and goes to numeric.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.derivatives import pulled_back
from pyro_em.families.base import CHOLESKY, IDENTITY, LOGIT, NORMALISED, SOFTMAX, Link
from pyro_em.kernels import (
    BetaKernel,
    DirectionKernel,
    DirichletKernel,
    FlatKernel,
    HalfCauchyKernel,
    IncompatibleKernels,
    Kernel,
    LassoKernel,
    LogNormalKernel,
    PositiveSum,
    PowerKernel,
    QuadraticKernel,
    ResultantKernel,
    SimplexKernel,
    StudentKernel,
    WishartKernel,
)
from pyro_em.m_step.scatter import collected
from pyro_em.model.recognise import VALUE, Use
from pyro_em.model.trace import SiteRecord
from pyro_em.statistics import SiteMoments

Arguments = Mapping[str, Mapping[str, Tensor]]


WORDS: dict[type[Kernel], str] = {
    BetaKernel: "ratio of counts",
    DirectionKernel: "direction of the weighted sum",
    DirichletKernel: "Newton in the mean logarithms",
    HalfCauchyKernel: "mode of the prior",
    LassoKernel: "soft threshold",
    LogNormalKernel: "mode of the prior",
    PositiveSum: "root of a concave slope",
    PowerKernel: "ratio of moments",
    QuadraticKernel: "precision-weighted mean",
    ResultantKernel: "Newton in the mean resultant length",
    SimplexKernel: "normalised counts",
    StudentKernel: "root of a cubic",
    WishartKernel: "weighted scatter matrix",
}


class NotClosed(Exception):
    """No closed form for this parameter; the text is the reason that `plan()` prints."""


@dataclass(frozen=True)
class Combined:
    """Total kernel of a parameter in its canonical coordinate, and the way there and back."""

    kernel: Kernel
    link: Link
    exponential: bool
    rule: str

    @property
    def at_infinity(self) -> bool:
        """Whether θ may be infinite: the logit or logarithm of a probability of 0."""
        return self.exponential or self.link in (LOGIT, SOFTMAX)

    def canonical(self, theta: Tensor) -> Tensor:
        return theta.exp() if self.exponential else self.link.to_canonical(theta)

    def argmax(self, theta: Tensor) -> Tensor:
        """The maximiser, in the parameter's own coordinate; entries without information keep `theta`."""
        best = self.kernel.argmax()
        if not self.kernel.is_informed:
            empty = self.kernel.is_empty()
            empty = empty.reshape(empty.shape + (1,) * self.kernel.event_dim)
            best = torch.where(empty, self.canonical(theta), best)
        best = best.log() if self.exponential else self.link.from_canonical(best)
        if self.at_infinity:
            # A probability of exactly 0 has logit -inf; the nearest finite one has the same density.
            limit = -math.log(torch.finfo(theta.dtype).tiny)
            best = best.clamp(-limit, limit)
        return best

    def gradient(self, theta: Tensor) -> Tensor:
        """∂Q/∂θ at `theta`, other parameters fixed."""
        if self.link is IDENTITY and not self.exponential:
            return self.kernel.gradient(theta)
        known = self.kernel.factor_gradient(theta) if self.link is CHOLESKY else None
        if known is not None:
            return known
        leaf = theta.detach().requires_grad_(True)
        with torch.enable_grad():
            canonical = self.canonical(leaf)
            outer = self.kernel.gradient(canonical.detach())
            (gradient,) = pulled_back([canonical], [leaf], [outer])
        assert gradient is not None
        return gradient

    def relative_gradient(self, theta: Tensor) -> Tensor:
        """θ ∘ ∂Q/∂θ."""
        if self.link is IDENTITY and not self.exponential:
            return self.kernel.relative_gradient(theta)
        return theta * self.gradient(theta)

    def factor_gradient(self, factor: Tensor) -> Tensor | None:
        """∂Q/∂L at the Cholesky factor L of a matrix θ, if it is known without that in θ."""
        return self.kernel.factor_gradient(factor) if self.link is IDENTITY and not self.exponential else None


def combine(
    uses: tuple[Use, ...],
    theta: Tensor,
    sites: Mapping[str, SiteRecord],
    moments: Mapping[str, SiteMoments],
    arguments: Arguments,
) -> Combined:
    """Total kernel of a parameter.

    :param theta: current value, float64.
    :param moments: of every site that uses the parameter as an argument.
    :param arguments: current raw arguments of every site, float64.
    :raises NotClosed: with the reason.
    """
    if not uses:
        raise NotClosed("nothing in the model uses it")
    total: Kernel = FlatKernel()
    link: Link | None = None
    exponential: bool | None = None
    rules: list[str] = []
    for use in uses:
        if use.index is None:
            raise NotClosed(f"{use.site}: {use.reason}")
        piece = _piece(use, sites[use.site], moments, arguments[use.site])
        if not isinstance(piece.kernel, FlatKernel):
            if link is not None and piece.link is not link:
                raise NotClosed("its uses have kernels in different coordinates")
            if exponential is not None and exponential != use.exponential:
                raise NotClosed("one use takes its exponential, another does not")
            link, exponential = piece.link, use.exponential
        coordinate = theta.exp() if use.exponential else piece.link.to_canonical(theta)
        try:
            total = total + collected(piece.kernel, piece.index, use, coordinate)
        except IncompatibleKernels as error:
            raise NotClosed(str(error)) from error
        label = _label(use, sites[use.site])
        if label not in rules:
            rules.append(label)
    if isinstance(total, FlatKernel):
        raise NotClosed("no use informs it")
    return Combined(total, link or IDENTITY, bool(exponential), f"{WORDS[type(total)]} ({', '.join(rules)})")


def _label(use: Use, site: SiteRecord) -> str:
    name = site.family.name if site.family is not None else "?"
    return f"prior {name}" if use.slot == VALUE else f"{name}.{use.slot}"


@dataclass(frozen=True)
class _Piece:
    """One use's kernel over cells, and the entries of the parameter that the cells take."""

    kernel: Kernel
    link: Link
    index: Tensor


def _piece(use: Use, site: SiteRecord, moments: Mapping[str, SiteMoments], arguments: Mapping[str, Tensor]) -> _Piece:
    family, index = site.family, use.index
    assert family is not None and index is not None
    everything = {**site.constants, **arguments}
    where = f"{type(family).__name__}.{use.slot} at '{use.site}'"
    if use.slot == VALUE:
        kernel = family.value_kernel(everything)
        if kernel is None:
            raise NotClosed(f"the density of {type(family).__name__} at '{use.site}' has no kernel in its value")
        return _Piece(kernel, IDENTITY, index)
    own = moments[use.site]
    everything |= own.override
    if family.arguments[use.slot] == 2 and _is_diagonal(index, arguments[use.slot]):
        kernel = family.diagonal_kernel(use.slot, own.moments, everything, own.center)
        if kernel is None:
            raise NotClosed(f"{where}: no kernel for a diagonal matrix")
        return _Piece(_transform(kernel, use, _diagonal(use.coefficient)), IDENTITY, _diagonal(index))
    argument, coefficient = arguments[use.slot], use.coefficient
    block = _block(index, argument) if family.arguments[use.slot] == 2 else None
    if block is not None:
        kernel = family.block_kernel(use.slot, block, own.moments, everything)
        index, argument = (x[..., block[:, None], block] for x in (index, argument))
        coefficient = None if coefficient is None else coefficient[..., block[:, None], block]
    else:
        kernel = family.kernel(use.slot, own.moments, everything, own.center) if use.slot in family.closed else None
    if kernel is None:
        raise NotClosed(f"{where} has no closed form")
    if use.link is not None:
        return _Piece(kernel, IDENTITY, index)
    if isinstance(kernel, WishartKernel) and _is_multiple(index, argument) and coefficient is not None:
        known, turns = torch.where(index < 0, 0.0, coefficient.double()), 1
        if family.link(use.slot) is CHOLESKY:  # the kernel is one of L Lᵀ
            known, turns = known @ known.mT, 2
        return _Piece(kernel.along(known).power(turns * use.power), IDENTITY, index.amax((-2, -1)))
    link = family.link(use.slot)
    if not use.gather and link is not IDENTITY:
        raise NotClosed(f"{where}: a transformed entry in the {link.name} coordinate")
    return _Piece(_transform(kernel, use, coefficient), IDENTITY if link is NORMALISED else link, index)


def _is_diagonal(index: Tensor, argument: Tensor) -> bool:
    """The matrix has free entries on its diagonal only, with zeros in their rows and columns (1 x 1 counts as full).

    Nothing is asked of its other rows, which may have blocks of other parameters.
    """
    size = index.shape[-1]
    off = ~torch.eye(size, dtype=torch.bool)
    if size == 1 or bool((index[..., off] >= 0).any()):
        return False
    free = (_diagonal(index) >= 0).reshape(-1, size).any(0)
    beside = off & (free | free.unsqueeze(-1))
    return bool((argument[..., beside] == 0).all())


def _block(index: Tensor, argument: Tensor) -> Tensor | None:
    """Rows (and columns) of the free entries, if that is not all of the matrix and zeros separate it from the rest."""
    free = (index >= 0).reshape(-1, *index.shape[-2:]).any(0)
    mine = free.any(0) | free.any(1)
    block, rest = mine.nonzero().squeeze(-1), (~mine).nonzero().squeeze(-1)
    if not len(block) or not len(rest):
        return None
    between = argument[..., block[:, None], rest], argument[..., rest[:, None], block]
    return None if any(bool((x != 0).any()) for x in between) else block


def _is_multiple(index: Tensor, argument: Tensor) -> bool:
    """All entries of a matrix are multiples of one and the same entry of the parameter (0 where they are of none)."""
    one = index == index.amax((-2, -1), keepdim=True)
    return index.shape[-1] > 1 and bool((one | ((index < 0) & (argument == 0))).all()) and bool((index >= 0).any())


def _diagonal(x: Any) -> Any:
    return None if x is None else x.diagonal(dim1=-2, dim2=-1)


def _transform(kernel: Kernel, use: Use, coefficient: Tensor | None) -> Kernel:
    """The kernel in the parameter (or its exponential) when the argument is c·θ^r."""
    if coefficient is None:
        return kernel
    coefficient = coefficient.double()
    if isinstance(kernel, PowerKernel):
        return kernel.power(use.power, coefficient)
    if use.power != 1 or use.exponential:
        raise NotClosed(f"{use.site}.{use.slot}: a power of an entry")
    if kernel.event_dim == 2:
        first = coefficient[..., :1, :1]
        if not torch.allclose(coefficient, first.expand_as(coefficient), rtol=1e-12, atol=0.0):
            raise NotClosed(f"{use.site}.{use.slot}: entries of one matrix are scaled differently")
        coefficient = first
    elif kernel.event_dim == 1:
        raise NotClosed(f"{use.site}.{use.slot}: scaled entries of a vector")
    return kernel.rescale(coefficient)
