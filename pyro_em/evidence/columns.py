"""Which elements of the latents each row of a factor reads, found by pushing tangents through the model.

A *column* is one entry of a latent's event, in all elements of its plates at once: z ~ Normal(0, 1).expand([5])
.to_event(1) in a plate has 5 columns. The tangent of a site's residual w (residuals.py) along a column moved by 1
in every element is the row's coefficient; along arange(1..n), divided by that, the number of the element that the
row reads (`b[subject]`), whatever the indexing. A row that reads two elements of one column shows as a number that
is no integer, or that fails a random tangent; the column is then split into its elements.

Refused: sites that read latents and are not normal, residuals that are not affine in the latents, scales that
depend on them, and sites inside of a latent's plate that read more than their own element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.derivatives import pulled_back
from pyro_em.device import seeded_normal
from pyro_em.errors import Refusal
from pyro_em.evidence.elimination import Candidate, Values
from pyro_em.evidence.residuals import is_normal, whitened
from pyro_em.model.trace import Run, SiteRecord

MAX_SPLIT = 512  # elements of a latent that are treated one by one where a row reads several
DOUBLE, SINGLE = 1e-7, 1e-4  # relative deviation of tangents from those of an index that rounding explains
AFFINE = 1e-7  # relative deviation from an affine residual that rounding explains

OutputsOf = Callable[[Run, tuple[str, ...]], Sequence[Tensor]]
Index = Tensor | None
"""Element read by every row, shape of the site's plates (-1 for none); None where row n reads element n."""


@dataclass(frozen=True)
class Column:
    """Entry `event` (of the flattened event) of `site`; `element` of its plates, or None for all of them."""

    site: str
    event: int
    element: int | None = None


class Coupled(Exception):
    """A row reads several elements of one column."""

    def __init__(self, site: str, latent: str) -> None:
        super().__init__(site)
        self.site, self.latent = site, latent


def direction(column: Column, shape: tuple[torch.Size, torch.Size], along: Tensor) -> Tensor:
    """The tangent that moves `column` by `along` (one number per element of its plates), in the value's shape."""
    batch, event = shape
    tangent = torch.zeros((batch.numel(), event.numel()), dtype=torch.float64)
    if column.element is None:
        tangent[:, column.event] = along
    else:
        tangent[column.element, column.event] = along[column.element]
    return tangent.reshape([*batch, *event])


def pushing(outputs: Sequence[Tensor], leaf: Tensor, graph: bool) -> Callable[[Tensor], list[Tensor]]:
    """Directional derivatives of every output along a direction; with `graph` differentiable (double vjp).

    What does not depend on the direction is done once.
    """
    zeros = [torch.zeros_like(o) for o in outputs]
    reached = [i for i, o in enumerate(outputs) if o.requires_grad]
    cotangents = [torch.zeros_like(outputs[i], requires_grad=True) for i in reached]
    pulled = None
    if reached:
        (pulled,) = pulled_back([outputs[i] for i in reached], [leaf], cotangents, graph=True)

    def along(direction: Tensor) -> list[Tensor]:
        row = list(zeros)
        if pulled is None or not pulled.requires_grad:
            return row
        pushed = pulled_back([pulled], cotangents, [direction.to(pulled)], graph=graph)
        for i, p in zip(reached, pushed, strict=True):
            if p is not None:
                row[i] = p if graph else p.detach()
        return row

    return along


def push(outputs: Sequence[Tensor], leaf: Tensor, directions: Sequence[Tensor], graph: bool) -> list[list[Tensor]]:
    """Directional derivatives of every output along each direction."""
    along = pushing(outputs, leaf, graph)
    return [along(direction) for direction in directions]


def columns_of(candidate: Candidate, split: frozenset[str]) -> list[Column]:
    """All columns, those of the latents in `split` element by element."""
    found = []
    for name in candidate.latents.names:
        batch, event = candidate.latents.shapes[name]
        elements = range(batch.numel()) if name in split else (None,)
        found += [Column(name, e, j) for j in elements for e in range(event.numel())]
    return found


def readings(
    candidate: Candidate, split: frozenset[str] = frozenset()
) -> tuple[list[Column], dict[str, dict[Column, Index]]]:
    """Columns, and for each factor those that it reads with the element that each of its rows reads.

    :param split: latents whose elements are columns of their own.
    :raises Refusal: see the module docstring.
    """
    for run, leaves in zip((candidate.first, candidate.second), candidate.leaves, strict=True):
        for name in candidate.latents.factors:
            _check_normal(run.sites[name], candidate)
        parts = [whitened(run.sites[name]) for name in candidate.latents.factors]
        _check_scales(candidate.latents.factors, [p[1] for p in parts], leaves)
        check_affine_in(candidate.latents.factors, [p[0] for p in parts], leaves)
    return readings_of(candidate, lambda run, names: [whitened(run.sites[name])[0] for name in names], split)


def readings_of(
    candidate: Candidate, outputs_of: OutputsOf, split: frozenset[str] = frozenset()
) -> tuple[list[Column], dict[str, dict[Column, Index]]]:
    """`readings` of any quantities of the factors' rows, shape batch + (P,), that depend on the latents read."""
    while True:
        columns = columns_of(candidate, split)
        try:
            first = _readings(candidate, candidate.first, candidate.leaves[0], columns, outputs_of)
            second = _readings(candidate, candidate.second, candidate.leaves[1], columns, outputs_of)
        except Coupled as found:
            own = {plate.name for plate in candidate.first.sites[found.latent].plates}
            at = candidate.first.sites[found.site]
            size = candidate.latents.shapes[found.latent][0].numel()
            if own & {plate.name for plate in at.plates} or size > MAX_SPLIT or found.latent in split:
                raise Refusal(
                    found.site,
                    f"it reads several elements of the latent '{found.latent}' in one row, so the elements of plate "
                    f"{sorted(own)} are not independent given the parameters.",
                    "use a latent of a plate only for the same element of the plate (or by indexing from a sibling "
                    "plate), or write coupled values as one MultivariateNormal event.",
                ) from found
            split = split | {found.latent}
            continue
        return columns, {name: _merge(name, first[name], second[name]) for name in candidate.latents.factors}


def _check_normal(site: SiteRecord, candidate: Candidate) -> None:
    if is_normal(site):
        return
    family = type(site.fn).__name__ if site.family is None else type(site.family).distribution.__name__
    latents = ", ".join(repr(name) for name in candidate.latents.names)
    if site.name in candidate.latents.names:
        others = ", ".join(repr(name) for name in candidate.latents.names if name != site.name)
        met = f" (it meets {others} in one density)" if others else ""
        raise Refusal(
            site.name,
            f"the latent is {family}, whose density is not Gaussian, so that its posterior is not{met}.",
            "give it a normal prior, use e_step=pyro_em.Quadrature if it is of low dimension and its density smooth, "
            "make it a parameter by roles=, or use algorithm='svi' with a guide for it.",
        )
    raise Refusal(
        site.name,
        f"its {family} density is not quadratic in the Gaussian latents {latents} that it reads.",
        "use e_step=pyro_em.Quadrature for latents of low dimension, or algorithm='svi' with a guide for them.",
    )


def _readings(
    candidate: Candidate, run: Run, leaves: Values, columns: Sequence[Column], outputs_of: OutputsOf
) -> dict[str, dict[Column, Index]]:
    names = candidate.latents.factors
    outputs = outputs_of(run, names)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[Column, Index]] = {name: {} for name in names}
    pushes = {latent: pushing(outputs, leaves[latent], graph=False) for latent in candidate.latents.names}
    for column in columns:
        shape = candidate.latents.shapes[column.site]
        n = shape[0].numel()
        ones = torch.ones(n, dtype=torch.float64)
        code = torch.arange(1, n + 1, dtype=torch.float64)
        draw = seeded_normal((n,), generator)
        ways = [direction(column, shape, along) for along in (ones, code, draw)]
        by_one, by_code, by_draw = (pushes[column.site](way) for way in ways)
        for i, name in enumerate(names):
            if bool((by_one[i] != 0).any()) or bool((by_draw[i] != 0).any()):
                rank = -candidate.dim
                rounding = SINGLE if leaves[column.site].dtype == torch.float32 else DOUBLE
                index = _index(by_one[i], by_code[i], by_draw[i], draw, rank, rounding)
                if index is None:
                    raise Coupled(name, column.site)
                found[name][column] = None if column.element is not None else _aligned(index, shape[0], rank)
    return found


def check_affine_in(names: Sequence[str], outputs: Sequence[Tensor], leaves: Values) -> None:
    """Refuse residuals whose tangent in a random direction itself has a tangent."""
    generator = torch.Generator().manual_seed(1)
    ways = {n: seeded_normal(v.shape, generator) for n, v in leaves.items()}
    for i, name in enumerate(names):
        if not outputs[i].requires_grad:
            continue
        for latent, leaf in leaves.items():
            ((first,),) = push([outputs[i]], leaf, [ways[latent]], graph=True)
            if not first.requires_grad:
                continue
            scale = float(first.detach().abs().max())
            for other, inner in leaves.items():
                ((second,),) = push([first], inner, [ways[other]], graph=False)
                if float(second.abs().max()) > AFFINE * max(scale, 1e-300):
                    raise not_affine(name, latent)


def not_affine(site: str, latent: str) -> Refusal:
    """The refusal of a site that is not linear in a latent."""
    return Refusal(
        site,
        f"its location is not an affine function of the Gaussian latent '{latent}' (a nonlinearity such as tanh, exp, "
        "abs or where, or a product of latents), so the posterior is not Gaussian.",
        "make it linear, use e_step=pyro_em.Quadrature for latents of low dimension, or algorithm='svi' with a guide.",
    )


def _check_scales(names: Sequence[str], log_norms: Sequence[Tensor], leaves: Values) -> None:
    for name, log_norm in zip(names, log_norms, strict=True):
        if not log_norm.requires_grad:
            continue
        found = torch.autograd.grad(log_norm.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        for latent, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                raise Refusal(
                    name,
                    f"its scale depends on the Gaussian latent '{latent}', so the posterior is not Gaussian.",
                    "let latents enter the location only, or use algorithm='svi' with a guide.",
                )


def _index(ones: Tensor, code: Tensor, draw: Tensor, drawn: Tensor, rank: int, rounding: float) -> Tensor | None:
    """Element that each row reads, shape of its plates (`rank` dims), -1 for none; None if some row reads several.

    In NumPy, whose calls take a third of the time of torch's where tangents are small."""
    one, number, other, numbers = (x.cpu().numpy() for x in (ones, code, draw, drawn))
    valid = one != 0
    if ((other != 0) & ~valid).any():
        return None
    with np.errstate(all="ignore"):
        ratio = np.where(valid, number / np.where(valid, one, 1.0), 0.0)
        nearest = np.rint(ratio)
        bound = 10 * rounding + (0.01 * rounding * np.abs(ratio) if rounding > DOUBLE else 0.0)
        index = nearest.astype(np.int64) - 1
        if (np.abs(ratio - nearest) > bound).any() or (index >= len(numbers)).any():
            return None
        expected = np.where(valid, one * numbers[index.clip(min=0)], 0.0)
        near = np.abs(other - expected) <= 0.01 * rounding * np.abs(one).max() + rounding * np.abs(expected)
    if not near.all():
        return None
    rows = index.max(-1)
    if (index != rows[..., None])[valid].any():
        return None
    if rows.ndim > rank:
        common = rows.max(tuple(range(rows.ndim - rank)))
        if ((rows != common) & (rows >= 0)).any():
            return None
        rows = common
    return torch.from_numpy(np.asarray(rows)).to(ones.device).reshape((1,) * (rank - rows.ndim) + tuple(rows.shape))


def _aligned(index: Tensor, batch: torch.Size, rank: int) -> Index:
    own = torch.arange(batch.numel()).reshape((1,) * (rank - len(batch)) + tuple(batch))
    if any(n not in (1, size) for n, size in zip(own.shape, index.shape, strict=True)):
        return index
    return None if bool(((index == own) | (index < 0)).all()) else index


def _merge(site: str, first: Mapping[Column, Index], second: Mapping[Column, Index]) -> dict[Column, Index]:
    """A column that is not read at one point (a loading of 0) is read as at the other."""
    merged = {**first, **second}
    for column in first.keys() & second.keys():
        a, b = first[column], second[column]
        if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
            if a is not None and b is not None and a.shape == b.shape and bool(((a == b) | (a < 0) | (b < 0)).all()):
                merged[column] = torch.maximum(a, b)
                continue
            raise Refusal(
                site,
                f"which element of the latent '{column.site}' it reads depends on the parameters.",
                "index latents by data only.",
            )
    return merged
