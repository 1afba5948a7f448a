"""Sets of Gaussian latents whose plates do not factorise (crossed and nested effects), read off from the model.

A row of y ~ a[i] + c[j] reads one element of several plates. Rows that read the same elements are pooled to a *cell*:
a design R and pseudo-rows of the data, as the rows of an element are in pooled_data.py. The pattern of the joint
precision follows from what the cells read (evidence/elimination_order.py), and is made once.

A family of latents whose means do not depend on others is *drawn*: written z = z₀ + B u with u ~ N(0, I), so that a
variance of 0 is a value like any other; B is the same for all of its elements.

Letters: N rows, G cells; K columns (entries of a latent's event) of the set, D unknowns (those of all elements);
V₁ features that meet latents.

Weights (of plates in which all sites stand, or one for all) multiply the evidence of the elements of these plates,
which are independent: every row and every unknown belongs to one of them, and counts as often. The posterior does not
depend on them. Not handled: rows that count otherwise than what they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em import settings
from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.pooled_data import MAX_CELLS, Pooled, Rows, reduced
from pyro_em.e_step.pooled_location import PooledSite
from pyro_em.e_step.pooled_sets import SiteRows, columns_of, pooled_site, read_site, row_sizes
from pyro_em.evidence.assembly import Geometry, Reading
from pyro_em.evidence.columns import Column
from pyro_em.evidence.elimination_order import Family, Numbers, Order
from pyro_em.evidence.gaussian import GaussianRoute
from pyro_em.model.compat import unpack
from pyro_em.model.graph import Component
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.problem import Problem


@dataclass(frozen=True)
class Cells:
    """Where one site meets the unknowns."""

    unknowns: Tensor  # (K, G), D for none
    targets: Tensor  # (K K G,) cells of the store that pairs of them add to
    pairs: Tensor  # (K K, G) cells where they are read
    squares: Tensor  # (V₁ V₁, G), RᵀR, as often as it counts
    weight: Tensor | None  # (G,), how often a cell counts; None for once


@dataclass(frozen=True)
class Drawn:
    """A family z = z₀ + B u: its `columns` in the set, its `unknowns` (n, k), the numbers of its own `sites`."""

    columns: Tensor
    unknowns: Tensor
    sites: tuple[int, ...]


@dataclass(frozen=True)
class CoupledSet:
    """Sites with their cells. `prior` (D + 1,) is 1 for unknowns that are drawn; `weight` (D + 1,) is how often they
    count, None for once."""

    sites: tuple[PooledSite, ...]
    cells: tuple[Cells, ...]
    order: Order
    drawn: tuple[Drawn, ...]
    prior: Tensor
    size: int  # K
    constant: float
    weight: Tensor | None = None

    @property
    def text(self) -> str:
        """For the plan."""
        steps = [f"{len(level.unknowns)} blocks of {level.unknowns.shape[1]}" for level in self.order.levels]
        if len(self.order.tail):
            steps.append(f"{len(self.order.tail)} entries together")
        cells = sum(own.unknowns.shape[1] for site, own in zip(self.sites, self.cells, strict=True) if site.has_data)
        return f"rows pooled to {cells} cells, effects eliminated in steps: {', then '.join(steps)}"


def coupled_set(problem: Problem, route: GaussianRoute, component: Component, plain: Run, run: Run) -> CoupledSet:
    """A set with effects of several plates.

    :raises NotCompiled: with the reason.
    """
    columns = columns_of(route)
    rows = [read_site(problem, route, reading.site, plain, run) for reading in route.readings]
    read = [_elements(own.site, r, route.geometry, columns) for own, r in zip(rows, route.readings, strict=True)]
    groups = _groups(columns, read, plain)
    families = _families(route, columns, groups)
    counts = [_counts(problem, own.site, len(route.geometry.layout)) for own in rows]
    every = [_blocks(elements, groups) for elements in read]
    weight = _unknown_weights(families, every, counts)
    uniform = all(bool((count[kept] == 1).all()) for kept, count in counts)
    sites, blocks, weights, constant = [], [], [], 0.0
    for own, found, (kept, count) in zip(rows, every, counts, strict=True):
        constant -= float((own.jacobian.expand(len(kept)) * count)[kept].sum())
        pooled, cells_read, cell_weights = _pooled(own, found, kept, count)
        sites.append(pooled_site(problem, own, pooled))
        blocks.append(cells_read)
        weights.append(None if uniform else cell_weights)
    begins = np.cumsum([0, *(family.elements for family in families)])[:-1]
    order = Order(families, [np.where(own >= 0, own + begins, -1) for own in blocks])
    most = max(len(own) for own in blocks) * len(columns) ** 2
    if 8 * order.size > settings.max_table_bytes or most > MAX_CELLS:
        raise NotCompiled(f"crossing or nested plates whose joint precision has {order.size} entries")
    made = zip(blocks, sites, weights, strict=True)
    cells = [_cells(own, site, families, groups, order, count) for own, site, count in made]
    drawn = _drawn(columns, groups, families, sites, cells, order.num)
    prior = torch.zeros(order.num + 1, dtype=torch.float64)
    for family in drawn:
        prior[family.unknowns.reshape(-1)] = 1.0
    return CoupledSet(
        tuple(sites), tuple(cells), order, drawn, prior, len(columns), constant, None if uniform else weight
    )


def _elements(site: SiteRecord, reading: Reading, geometry: Geometry, columns: Sequence[Column]) -> Numbers:
    """The element of every column that each row reads (N, K), -1 for none."""
    sizes = row_sizes(site, len(geometry.layout))
    found = np.full((torch.Size(sizes).numel(), len(columns)), -1, dtype=np.int64)
    for i, column in enumerate(reading.columns):
        if i >= reading.num_a:
            assert reading.entries is not None
            index = reading.entries[..., i - reading.num_a] - geometry.offsets_b[column]
        elif reading.index is not None:
            index = reading.index
        else:
            index = torch.arange(geometry.elements).reshape(geometry.layout)
        found[:, columns.index(column)] = index.expand(sizes).reshape(-1).cpu().numpy()
    return found


def _groups(columns: Sequence[Column], read: Sequence[Numbers], run: Run) -> list[list[int]]:
    """Numbers of the columns of each family: those of the same plates of which every row reads the same element."""
    by_plates: dict[tuple[str, ...], list[int]] = {}
    for j, column in enumerate(columns):
        plates = tuple(plate.name for plate in run.sites[column.site].plates if plate.size > 1)
        by_plates.setdefault(plates if column.element is None else ("", column.site), []).append(j)
    groups = []
    for own in by_plates.values():
        groups += [own] if all(_single(found[:, own]) for found in read) else [[j] for j in own]
    return groups


def _single(elements: Numbers) -> bool:
    """Every row reads one element at most."""
    highest = elements.max(1, keepdims=True)
    return bool(((elements == highest) | (elements < 0)).all())


def _families(route: GaussianRoute, columns: Sequence[Column], groups: Sequence[Sequence[int]]) -> list[Family]:
    families, first = [], 0
    for own in groups:
        column = columns[own[0]]
        elements = route.latents.shapes[column.site][0].numel() if column.element is None else 1
        families.append(Family(elements, len(own), first))
        first += elements * len(own)
    return families


def _blocks(elements: Numbers, groups: Sequence[Sequence[int]]) -> Numbers:
    """The element of every family that each row reads (N, families), -1 for none."""
    return np.stack([elements[:, own].max(1) for own in groups], 1)


def _counts(problem: Problem, site: SiteRecord, m: int) -> tuple[Tensor, Tensor]:
    """Which rows have data (N,), and how often each row counts (N,)."""
    sizes = row_sizes(site, m)
    kept = torch.ones(torch.Size(sizes).numel(), dtype=torch.bool)
    if site.mask is not None and not site.latent:
        kept = site.mask.expand(torch.Size(site.batch_shape)).reshape(-1)
    own = problem.graph.factors[site.name].weight
    if own is None:
        return kept, kept.double()
    return kept, unpack(own, site.symbols).double().expand(sizes).reshape(-1)


def _unknown_weights(
    families: Sequence[Family], blocks: Sequence[Numbers], counts: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """How often every unknown counts (D + 1,): as often as the rows that read it.

    :raises NotCompiled: if rows of one element count differently.
    """
    begins = np.cumsum([0, *(family.elements for family in families)])
    weight = np.zeros(begins[-1])
    for found, (kept, count) in zip(blocks, counts, strict=True):
        for f, own in enumerate(found.T):
            here = (own >= 0) & kept.cpu().numpy()
            np.maximum.at(weight, begins[f] + own[here], count.cpu().numpy()[here])
    for found, (kept, count) in zip(blocks, counts, strict=True):
        for f, own in enumerate(found.T):
            here = (own >= 0) & kept.cpu().numpy()
            if not np.array_equal(weight[begins[f] + own[here]], count.cpu().numpy()[here]):
                raise NotCompiled("rows of crossing or nested plates that count otherwise than their elements")
    sizes = np.repeat([family.size for family in families], [family.elements for family in families])
    return torch.tensor(np.concatenate([np.repeat(weight, sizes), np.zeros(1)]))


def _pooled(own: SiteRows, blocks: Numbers, kept: Tensor, count: Tensor) -> tuple[Pooled, Numbers, Tensor]:
    """The pseudo-rows of a site, the elements that each cell reads (G, families), and how often it counts (G,)."""
    blocks, shared, data, count = blocks[kept.cpu().numpy()], own.form.shared[kept], own.data[kept], count[kept]
    cells, first, inverse = np.unique(blocks, axis=0, return_index=True, return_inverse=True)
    # Pseudo-rows would be more, or leave out what the posterior of an element that does not count consists of.
    if len(blocks) <= len(cells) * shared.shape[1] or bool((count == 0).any()):
        left = torch.zeros(0, data.shape[1], dtype=torch.float64)
        return Pooled(shared.unsqueeze(1), data[:, None, :, None], left, count.sum()), blocks, count
    weight = count[torch.tensor(first)]
    design, top, left, total = reduced(Rows(torch.tensor(inverse.reshape(-1)), shared, data), weight)
    return Pooled(design, top.unsqueeze(-1), left, total), cells, weight


def _cells(
    blocks: Numbers, site: PooledSite, families: Sequence[Family], groups: Sequence[Sequence[int]], order: Order,
    weight: Tensor | None,
) -> Cells:  # fmt: skip
    unknowns = np.full((sum(len(own) for own in groups), len(blocks)), order.num, dtype=np.int64)
    for f, (family, own) in enumerate(zip(families, groups, strict=True)):
        for place, j in enumerate(own):
            at = family.first + blocks[:, f] * family.size + place
            unknowns[j] = np.where(blocks[:, f] >= 0, at, order.num)
    one, other = np.broadcast_arrays(unknowns[:, None], unknowns[None])
    design = site.pooled.design
    squares = torch.einsum("gmv,gmw->vwg", design, design).flatten(0, 1)
    squares = squares if weight is None else squares * weight
    targets, pairs = order.cells(one, other, once=True).reshape(-1), order.cells(one, other).reshape(-1, len(blocks))
    return Cells(torch.tensor(unknowns), torch.tensor(targets), torch.tensor(pairs), squares, weight)


def _drawn(
    columns: Sequence[Column],
    groups: Sequence[Sequence[int]],
    families: Sequence[Family],
    sites: Sequence[PooledSite],
    cells: Sequence[Cells],
    none: int,
) -> tuple[Drawn, ...]:
    found = []
    for own, family in zip(groups, families, strict=True):
        names = {columns[j].site for j in own}
        numbers = tuple(i for i, site in enumerate(sites) if site.site.name in names)
        index = torch.tensor(own)
        unknowns = torch.tensor(family.unknowns)
        whole = sum(sites[i].cells for i in numbers) == family.size
        if whole and all(_stands_alone(sites[i], cells[i], index, unknowns, none) for i in numbers):
            found.append(Drawn(index, unknowns, numbers))
    return tuple(found)


def _stands_alone(site: PooledSite, cells: Cells, columns: Tensor, unknowns: Tensor, none: int) -> bool:
    """A latent's own site reads nothing but its family, in the same way for every element."""
    others = torch.ones(len(cells.unknowns), dtype=torch.bool)
    others[columns] = False
    own = cells.unknowns[columns].mT
    if own.shape != unknowns.shape or not bool((own == unknowns).all()):
        return False
    if bool((cells.unknowns[others] != none).any()):
        return False
    design = site.pooled.design
    return design.shape[1:] == (1, 1) and bool((design == 1).all())
