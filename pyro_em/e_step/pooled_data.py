"""Rows of normal sites, pooled: for every element of the latents' plate as few pseudo-rows as its design has columns.

Of the rows Φ (n_g, V₁), X (n_g, V₀ + P) of element g (features that meet latents; all others and the data) a sum of
squares of Φ C₁ + X C₂ needs only the orthogonal factors

    Φ = Q R_g:      |Φ C₁ + X C₂|² = |R_g C₁ + QᵀX C₂|² + |(X - Q QᵀX) C₂|²,

so that the element has V₁ pseudo-rows QᵀX and one design R_g, and the second term, of all elements, is that of a few
rows *left* over. Elements of equal designs form a *class*: they differ in the vector x_g of their pseudo-rows only, of
which the latents' posterior is an affine function. All that an E-step needs of a class are Σ_g (1, x_g)(1, x_g)ᵀ, kept
as a factor: c *pseudo-elements* whose products have that sum. All factors are found by QR, those of the data around
their mean; nothing is squared. In factor analysis all rows are one class, and N rows become D + 1 pseudo-elements.

Source: Pinheiro and Bates (2000), section 2.2, for the pseudo-rows of an element.
Letters: G elements, U classes, c pseudo-elements of a class; see bilinear.py for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled

MAX_CELLS = 2**24  # of the largest table that is kept
MAX_QR = 2**26  # cells times columns up to which a factor is found by QR, not from a matrix of squares


@dataclass(frozen=True)
class Rows:
    """The rows of one site: element of each (N,), Φ (N, V₁), X (N, V₀ + P); a latent has no data, its X is (N, V₀)."""

    element: Tensor
    shared: Tensor
    data: Tensor


@dataclass(frozen=True)
class Pooled:
    """One site in its classes: R (U, V₁, V₁); pseudo-rows (U, V₁, V₀ + P, c); rows left over (any, V₀ + P)."""

    design: Tensor
    data: Tensor
    left: Tensor
    count: Tensor  # weighted number of rows, ()

    @cached_property
    def features(self) -> Tensor:
        """R with a dim for the atoms and one for the latents, (U, V₁, 1, V₁, 1)."""
        return self.design.unsqueeze(2).unsqueeze(-1)

    @cached_property
    def plain(self) -> bool:
        """The only feature that meets latents is 1, in one class: R = 1."""
        return self.design.shape == (1, 1, 1) and bool(self.design == 1)


@dataclass(frozen=True)
class Classes:
    """`ones` (U, c) is the first entry of each pseudo-element; `weight` (U,) the weighted number of elements."""

    ones: Tensor
    weight: Tensor
    sites: tuple[Pooled, ...]

    @cached_property
    def leading(self) -> Tensor:
        """`ones` with dims for rows and cells, (U, 1, 1, c)."""
        return self.ones[:, None, None]


def pool(sites: Sequence[Rows], weight: Tensor) -> Classes:
    """Classes of all elements; weight (G,), elements of weight 0 are left out.

    :raises NotCompiled: if there are so many different designs that nothing is gained.
    """
    kept = (weight > 0).nonzero().squeeze(-1)
    if not len(kept):
        raise NotCompiled("no element has data")
    designs, tops, lefts, counts = [], [], [], []
    for rows in sites:
        design, top, left, count = reduced(rows, weight)
        designs.append(design[kept])
        tops.append(top[kept])
        lefts.append(left)
        counts.append(count)
    weight = weight[kept]
    classes = _classes(torch.cat([d.reshape(len(kept), -1) for d in designs], -1))
    x = torch.cat([t.reshape(len(kept), -1) for t in tops], -1)
    pseudo, first = _pseudo_elements(x, weight, classes)
    total = torch.zeros(pseudo.shape[0], dtype=torch.float64).index_add(0, classes, weight)
    found, begin = [], 1
    for design, top, left, count in zip(designs, tops, lefts, counts, strict=True):
        size = top[0].numel()
        data = pseudo[:, begin : begin + size].reshape(pseudo.shape[0], *top.shape[1:], pseudo.shape[2])
        found.append(Pooled(design[first], data, left, count))
        begin += size
    return Classes(pseudo[:, 0], total, tuple(found))


def reduced(rows: Rows, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R_g (G, V₁, V₁) and QᵀX (G, V₁, V₀ + P) of every element, rows left over, and the weighted number of rows."""
    size, num, width = len(weight), rows.shared.shape[1], rows.data.shape[1]
    heavy = weight[rows.element] > 0
    element, shared, data = rows.element[heavy], rows.shared[heavy], rows.data[heavy]
    counts = torch.bincount(element, minlength=size)
    left = torch.zeros(0, width, dtype=torch.float64)
    total = (weight * counts).sum()
    if size * num * max(num, width) > MAX_CELLS:
        raise NotCompiled("the pseudo-rows of all elements are too many")
    design = torch.zeros(size, num, num, dtype=torch.float64)
    top = torch.zeros(size, num, width, dtype=torch.float64)
    if not len(element):
        return design, top, left, total
    if num == 1 and int(counts.max()) == 1:  # nothing to be reduced
        design[element, 0], top[element, 0] = shared, data
        return design, top, left, total
    for own, q, r, x in _factored(Rows(element, shared, data), counts):
        projected = q.mT @ x
        rest = (x - q @ projected) * weight[own].sqrt()[:, None, None]
        if width:
            left = torch.linalg.qr(torch.cat([left, rest.flatten(0, 1)]), mode="r").R
        design[own], top[own] = r, projected
    return design + 0.0, top, left, total


def reduced_apart(rows: Rows, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reduced` of elements that are told apart: R_g, QᵀX, the rows left over of each (G, V₀ + P, V₀ + P), and the
    number of rows of each (G,)."""
    num, width = rows.shared.shape[1], rows.data.shape[1]
    if size * (num + width) * max(num, width) > MAX_CELLS:
        raise NotCompiled("the pseudo-rows of all elements are too many")
    design = torch.zeros(size, num, num, dtype=torch.float64)
    top = torch.zeros(size, num, width, dtype=torch.float64)
    left = torch.zeros(size, width, width, dtype=torch.float64)
    counts = torch.bincount(rows.element, minlength=size)
    for own, q, r, x in _factored(rows, counts):
        projected = q.mT @ x
        rest = torch.linalg.qr(x - q @ projected, mode="r").R
        design[own], top[own] = r, projected
        left[own, : rest.shape[1]] = rest
    return design, top, left, counts.double()


def _factored(rows: Rows, counts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Elements of like size, with Q and R_g of their Φ and their X, rows that are not theirs zero."""
    num = rows.shared.shape[1]
    order = torch.argsort(rows.element, stable=True)
    begin = counts.cumsum(0) - counts
    # Elements of like size together, so that a large one does not pad all others.
    width_of = torch.where(counts > 0, counts.clamp(min=num).double().log2().ceil(), -1.0)
    for power in width_of.unique().tolist():
        if power < 0:
            continue
        own = (width_of == power).nonzero().squeeze(-1)
        longest = max(num, int(counts[own].max()))
        at = begin[own].unsqueeze(-1) + torch.arange(longest)
        inside = torch.arange(longest) < counts[own].unsqueeze(-1)
        at = order[torch.where(inside, at, 0)]
        phi = torch.where(inside.unsqueeze(-1), rows.shared[at], 0.0)
        x = torch.where(inside.unsqueeze(-1), rows.data[at], 0.0)
        q, r = torch.linalg.qr(phi)
        sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        yield own, q * sign.unsqueeze(-2), r * sign.unsqueeze(-1), x


def _classes(designs: Tensor) -> Tensor:
    """Number of the class of every element: those of equal designs, to the last bit, in order of appearance."""
    if bool((designs == designs[0]).all()):
        return torch.zeros(len(designs), dtype=torch.long)
    _, inverse = torch.unique(designs, dim=0, return_inverse=True)
    return inverse


def _pseudo_elements(x: Tensor, weight: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo-elements (U, 1 + Q, c) of every class, and the number of an element of it."""
    num, size = int(classes.max()) + 1, x.shape[1]
    counts = torch.bincount(classes, minlength=num)
    order = torch.argsort(classes, stable=True)
    begin = counts.cumsum(0) - counts
    first = order[begin]
    most = 1 if int(counts.max()) == 1 else 1 + min(size, int(counts.max()))
    if num * (1 + size) * most > MAX_CELLS:
        raise NotCompiled(f"{num} different designs of {size} numbers")
    if int(counts.max()) == 1:
        root = weight[first].sqrt()
        return torch.cat([root.unsqueeze(-1), root.unsqueeze(-1) * x[first]], -1).unsqueeze(-1), first
    found = torch.zeros(num, 1 + size, most, dtype=torch.float64)
    for u, (start, count) in enumerate(zip(begin.tolist(), counts.tolist(), strict=True)):
        own = order[start : start + count] if num > 1 else slice(None)
        w = weight[own]
        total = w.sum()
        mean = (w @ x[own]) / total
        found[u, 0, 0], found[u, 1:, 0] = total.sqrt(), total.sqrt() * mean
        if count > 1 and size:  # elements without data have their number only
            factor = _factor((x[own] - mean) * w.sqrt().unsqueeze(-1))
            found[u, 1:, 1 : 1 + factor.shape[1]] = factor
    return found, first


def _factor(deviations: Tensor) -> Tensor:
    """F (Q, c) with F Fᵀ = Σ d dᵀ of deviations from their mean (n, Q), c ≤ n and c ≤ Q."""
    n, size = deviations.shape
    if n * size * size > MAX_QR:
        lower, failed = torch.linalg.cholesky_ex(deviations.mT @ deviations)
        if not bool(failed):
            return lower
    return torch.linalg.qr(deviations, mode="r").R.mT
