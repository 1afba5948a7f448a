"""Which elements of the latents each row of a factor reads, found by pushing tangents through the model.

A *column* is one entry of a latent's event, in all elements of its plates at once: z ~ Normal(0, 1).expand([5])
.to_event(1) in a plate has 5 columns. The tangent of a site's residual w (residuals.py) along a column moved by 1
in every element is the row's coefficient; along arange(1..n), divided by that, the number of the element that the
row reads (`b[subject]`), whatever the indexing. A row that reads two elements of one column shows as a number that
is no integer, or that fails a random tangent; the column is then split into its elements. All columns of a latent
mostly read the same element: one tangent along the sum of their codes, and one random tangent, then tell it of all.

Refused: sites inside of a latent's plate that read more than their own element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.derivatives import pulled_back
from pyro_em.device import seeded_normal
from pyro_em.errors import Refusal
from pyro_em.evidence.elimination import Candidate, Values
from pyro_em.model.trace import Run

MAX_SPLIT = 512  # elements of a latent that are treated one by one where a row reads several
DOUBLE, SINGLE = 1e-7, 1e-4  # relative deviation of tangents from those of an index that rounding explains

Array = NDArray[Any]
OutputsOf = Callable[[Run, tuple[str, ...]], Sequence[Tensor]]
Index = Tensor | None
"""Element read by every row, shape of the site's plates (-1 for none); None where row n reads element n."""


@dataclass(frozen=True)
class Column:
    """Entry `event` (of the flattened event) of `site`; `element` of its plates, or None for all of them."""

    site: str
    event: int
    element: int | None = None


Tangents = Mapping[Column, list[Tensor]]
"""Of the outputs of all factors, along every column moved by 1 in each of its elements."""


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
    """Directional derivatives of every output along a direction; with `graph` differentiable (double vjp)."""
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


def readings_of(
    candidate: Candidate, outputs_of: OutputsOf, split: frozenset[str] = frozenset()
) -> tuple[list[Column], dict[str, dict[Column, Index]], tuple[Tangents, Tangents]]:
    """Columns, for each factor those that it reads with the element that each of its rows reads, and at both points the
    tangents of the factors' outputs along every column.

    :param outputs_of: quantities of the factors' rows, shape batch + (P,), that depend on the latents read.
    :param split: latents whose elements are columns of their own.
    :raises Refusal: see the module docstring.
    """
    while True:
        columns = columns_of(candidate, split)
        try:
            first, along = _readings(candidate, candidate.first, candidate.leaves[0], columns, outputs_of)
            second, along2 = _readings(candidate, candidate.second, candidate.leaves[1], columns, outputs_of)
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
        merged = {name: _merge(name, first[name], second[name]) for name in candidate.latents.factors}
        return columns, merged, (along, along2)


def _readings(
    candidate: Candidate, run: Run, leaves: Values, columns: Sequence[Column], outputs_of: OutputsOf
) -> tuple[dict[str, dict[Column, Index]], Tangents]:
    names, shapes, rank = candidate.latents.factors, candidate.latents.shapes, -candidate.dim
    outputs = outputs_of(run, names)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[Column, Index]] = {name: {} for name in names}
    tangents: dict[Column, list[Tensor]] = {}
    for latent in candidate.latents.names:
        own, shape = [c for c in columns if c.site == latent], shapes[latent]
        along, n = pushing(outputs, leaves[latent], graph=False), shape[0].numel()
        tangents |= {c: along(direction(c, shape, torch.ones(n, dtype=torch.float64))) for c in own}
        draws, shares = seeded_normal((len(own), n), generator), seeded_normal((len(own),), generator)
        code = torch.arange(1, n + 1, dtype=torch.float64)
        rounding = SINGLE if leaves[latent].dtype == torch.float32 else DOUBLE
        joint = None
        if len(own) > 1 and own[0].element is None:
            events = [c.event for c in own]
            joint = [along(_all_columns(events, shape, x)) for x in (code.unsqueeze(-1) * shares, draws.mT)]
        single: dict[Column, list[list[Tensor]]] = {}
        for i, name in enumerate(names):
            by_one = [tangents[c][i] for c in own]
            told = None if joint is None else _shared_index(by_one, joint[0][i], joint[1][i], draws, shares, rounding)
            known: dict[int, Index] = {}  # by id of what columns share, which `told` holds
            for k, column in enumerate(own):
                if told is not None:
                    read, index = told[k] is not None, told[k]
                else:
                    if column not in single:
                        single[column] = [along(direction(column, shape, x)) for x in (code, draws[k])]
                    by_code, by_draw = (x[i] for x in single[column])
                    read = bool((by_one[k] != 0).any()) or bool((by_draw != 0).any())
                    index = _index(by_one[k], by_code, by_draw, draws[k], rounding) if read else None
                if not read:
                    continue
                if told is None or id(index) not in known:
                    rows = None if index is None else _without_states(index, rank)
                    if rows is None:
                        raise Coupled(name, latent)
                    known[id(index)] = None if column.element is not None else _aligned(rows, shape[0], rank)
                found[name][column] = known[id(index)]
    return found, tangents


def _all_columns(events: Sequence[int], shape: tuple[torch.Size, torch.Size], along: Tensor) -> Tensor:
    """The tangent that moves every column, of these entries of the event, by numbers of its own (n, columns)."""
    batch, event = shape
    tangent = torch.zeros((batch.numel(), event.numel()), dtype=torch.float64)
    tangent[:, events] = along
    return tangent.reshape([*batch, *event])


def _shared_index(
    ones: Sequence[Tensor], code: Tensor, draw: Tensor, draws: Tensor, shares: Tensor, rounding: float
) -> list[Array | None] | None:
    """Element that each row reads, by column (None: no row reads the column), if it is the same in all columns.

    Of a row that reads element i, with the tangent t_c of column c, the sum of the codes is i Σ_c share_c t_c, and the
    random tangent Σ_c t_c draw_c[i]: numbers that no other reading gives. None if that is not so; then each column
    is to be looked at by itself, as it is where the shares happen to cancel.

    :param ones, draws, shares: by column; `code` and `draw` are the tangents of all columns together.
    """
    each = [x.cpu().numpy() for x in ones]
    number, other, numbers, weights = (x.cpu().numpy() for x in (code, draw, draws, shares))
    valid = [x != 0 for x in each]
    read = np.logical_or.reduce(valid)
    if ((other != 0) & ~read).any():
        return None
    total, size = np.zeros_like(number), np.zeros_like(number)
    for x, weight in zip(each, weights, strict=True):
        total += weight * x
        size += abs(weight) * np.abs(x)
    if (np.abs(total) < 1e-3 * size).any():
        return None
    index = _entries(number, np.where(read, total, 0.0), numbers.shape[1], rounding)
    if index is None:
        return None
    expected, size, at = np.zeros_like(number), np.zeros_like(number), index.clip(min=0)
    for x, own in zip(each, numbers, strict=True):
        part = x * own[at]
        expected += part
        size += np.abs(part)
    largest = max(float(np.abs(x).max()) for x in each)
    if not (np.abs(other - expected) <= 0.01 * rounding * largest + rounding * size).all():
        return None
    rows = _same_in_cells(index, read)
    if rows is None:
        return None
    have = [own.any(-1) for own in valid]
    return [rows if own.all() else np.where(own, rows, -1) if own.any() else None for own in have]


def _index(ones: Tensor, code: Tensor, draw: Tensor, drawn: Tensor, rounding: float) -> Array | None:
    """Element that each row reads, -1 for none; None if some row reads several. In NumPy: tangents may be small."""
    one, number, other, numbers = (x.cpu().numpy() for x in (ones, code, draw, drawn))
    valid = one != 0
    if ((other != 0) & ~valid).any():
        return None
    index = _entries(number, one, len(numbers), rounding)
    if index is None:
        return None
    expected = np.where(valid, one * numbers[index.clip(min=0)], 0.0)
    if not (np.abs(other - expected) <= 0.01 * rounding * np.abs(one).max() + rounding * np.abs(expected)).all():
        return None
    return _same_in_cells(index, valid)


def _entries(code: Array, one: Array, count: int, rounding: float) -> Array | None:
    """Quotients that are whole numbers from 1 to `count`, less 1; -1 where `one` is 0."""
    valid = one != 0
    with np.errstate(all="ignore"):
        ratio = np.where(valid, code / np.where(valid, one, 1.0), 0.0)
        nearest = np.rint(ratio)
        bound = 10 * rounding + (0.01 * rounding * np.abs(ratio) if rounding > DOUBLE else 0.0)
        index = nearest.astype(np.int64) - 1
        wrong = (np.abs(ratio - nearest) > bound).any() or (index >= count).any()
    return None if wrong else index


def _same_in_cells(index: Array, valid: Array) -> Array | None:
    """The element of each row, if it is the same in all cells that read one."""
    rows = index.max(-1)
    return None if (index != rows[..., None])[valid].any() else rows


def _without_states(rows: Array, rank: int) -> Tensor | None:
    """Over the plates (`rank` dims), if it is the same for all states of discrete latents."""
    if rows.ndim > rank:
        common = rows.max(tuple(range(rows.ndim - rank)))
        if ((rows != common) & (rows >= 0)).any():
            return None
        rows = common
    return torch.tensor(rows).reshape((1,) * (rank - rows.ndim) + tuple(rows.shape))


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
