"""In which order the unknowns of a sparse Gaussian system are eliminated, and where each number of it is kept.

The unknowns come in *families*: the k effects of each of the n elements of a plate. Elements that no row couples are
independent given all others, so that a family is eliminated in one batched step (a `Level`), the one with most
elements first; that couples the neighbours of each element (fill). What is left when no family is independent, or so
little that it does not pay, is the dense *tail*. Two crossed factors with 500 and 50 levels: one level of 500 blocks
and a tail of 50. Classes in schools: two levels, each with at most one neighbour.

All entries of the precision that may differ from 0 have a cell in one vector, the *store*,

    [0 | tail (m, m) | last level: own (n, k, k), with its neighbours (n, k, t) | ... | first level]

whose first entry stands for "none". The pattern depends on the design alone, and is made once. Source: George and Liu
(1981), chapters 2 and 5, with plates as supernodes; Bates et al. (2015), section 3, for mixed models.

Letters: D unknowns; n elements of a family, k unknowns of each, t neighbours at most; m unknowns of the tail.
Not handled: dissection of a tail that is sparse itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

SMALL = 64  # unknowns that are as well eliminated together
FULL = 4  # rows of which so large a part (1/4) is filled are kept as whole rows of the tail
MAX_FILL = 2**25  # pairs of neighbours, each of which is changed on its own

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Family:
    """`elements` blocks of `size` unknowns; those of element e are numbered first + e·size onwards."""

    elements: int
    size: int
    first: int

    @property
    def unknowns(self) -> Numbers:
        """Shape (n, k)."""
        found: Numbers = self.first + np.arange(self.elements * self.size).reshape(self.elements, self.size)
        return found


@dataclass(frozen=True)
class Level:
    """A family that is eliminated at once; `targets` and `pairs` are None where the neighbours are the whole tail."""

    unknowns: Tensor  # (n, k)
    neighbours: Tensor  # (n, t), D where there are fewer; (t,) if they are the whole tail
    own: slice  # its parts of the store
    cross: slice
    targets: Tensor | None  # (n t t,) cells of the store that pairs of neighbours change, 0 for mirror images
    pairs: Tensor | None  # (n, t, t) cells where pairs of neighbours are read


@dataclass(frozen=True)
class _Chosen:
    family: Family
    neighbours: Numbers | None  # (n, t), D where there are fewer; None for all of the tail


class Order:
    """The levels, first to last, the unknowns of the `tail` (m,), and the `size` of the store.

    `diagonal` (D,) are the cells of the unknowns with themselves.
    """

    def __init__(self, families: Sequence[Family], coupled: Sequence[Numbers]) -> None:
        """:param coupled: for every site the blocks that each of its rows couples, (rows, any), -1 for none. Blocks
        are the elements of all families, numbered one after the other.
        """
        self.num = sum(f.elements * f.size for f in families)
        self._chosen, rest = _choose(families, coupled, self.num)
        tail = np.concatenate([np.zeros(0, dtype=np.int64), *(f.unknowns.reshape(-1) for f in rest)])
        self._level, self._element, self._place = (np.full(self.num + 1, -1, dtype=np.int64) for _ in range(3))
        self._level[tail], self._place[tail] = len(self._chosen), np.arange(len(tail))
        self._begin: list[tuple[int, int]] = []
        size = 1 + len(tail) ** 2
        for i, chosen in reversed(list(enumerate(self._chosen))):
            own = chosen.family.unknowns
            self._level[own] = i
            self._element[own], self._place[own] = np.indices(own.shape)
            begin = size, size + own.size * own.shape[1]
            self._begin.insert(0, begin)
            size = begin[1] + own.size * (len(tail) if chosen.neighbours is None else chosen.neighbours.shape[1])
        self.size, self.tail = size, torch.tensor(tail)
        self.levels = tuple(self._made(i) for i in range(len(self._chosen)))
        every = np.arange(self.num)
        self.diagonal = torch.tensor(self.cells(every, every))

    def zeros(self) -> Tensor:
        """An empty store."""
        return torch.zeros(self.size, dtype=torch.float64)

    def _made(self, i: int) -> Level:
        chosen, (own, cross) = self._chosen[i], self._begin[i]
        n, k = chosen.family.elements, chosen.family.size
        unknowns, spans = torch.tensor(chosen.family.unknowns), (slice(own, own + n * k * k), cross)
        if chosen.neighbours is None:
            return Level(unknowns, self.tail, spans[0], slice(cross, cross + n * k * len(self.tail)), None, None)
        near = chosen.neighbours
        cross_span = slice(cross, cross + n * k * near.shape[1])
        if i + 1 == len(self._chosen):  # all neighbours are in the tail, where no pair has a mirror image
            known, place, m = near < self.num, self._place[near], len(self.tail)
            both = known[:, :, None] & known[:, None, :]
            pairs = torch.tensor(np.where(both, 1 + m * place[:, :, None] + place[:, None, :], 0))
            targets = pairs.reshape(-1)
        else:
            one, other = np.broadcast_arrays(near[:, :, None], near[:, None, :])
            targets = torch.tensor(self.cells(one, other, once=True).reshape(-1))
            pairs = torch.tensor(self.cells(one, other))
        return Level(unknowns, torch.tensor(near), spans[0], cross_span, targets, pairs)

    def cells(self, one: Numbers, other: Numbers, once: bool = False) -> Numbers:
        """Cells of the store for pairs of unknowns, of any shape; 0 where one of them is D, which stands for none.

        :param once: leave out mirror images of pairs that have a single cell, for adding to the store.
        """
        level, element, place = self._level, self._element, self._place
        mirrored = level[one] > level[other]
        first, second = np.where(mirrored, other, one), np.where(mirrored, one, other)
        known = (one < self.num) & (other < self.num)
        m = len(self.tail)
        found = np.where(known & (level[first] == len(self._chosen)), 1 + place[first] * m + place[second], 0)
        for i, (chosen, (own, cross)) in enumerate(zip(self._chosen, self._begin, strict=True)):
            here, k = known & (level[first] == i), chosen.family.size
            same = here & (level[second] == i)
            row = element[first] * k + place[first]
            found[same] = own + row[same] * k + place[second[same]]
            apart = here & ~same
            if chosen.neighbours is None:
                found[apart] = cross + row[apart] * m + place[second[apart]]
            else:
                at = _among(chosen.neighbours, element[first[apart]], second[apart], self.num)
                found[apart] = cross + row[apart] * chosen.neighbours.shape[1] + at
        if once:
            found[mirrored] = 0
        return found


def _choose(families: Sequence[Family], coupled: Sequence[Numbers], num: int) -> tuple[list[_Chosen], list[Family]]:
    """Families to be eliminated, in order, and those of the tail."""
    begins = np.cumsum([0, *(f.elements for f in families)])
    sizes = np.repeat([f.size for f in families], [f.elements for f in families])
    firsts = np.concatenate([f.unknowns[:, 0] for f in families])
    graph = _graph(coupled, int(begins[-1]))
    left = sorted(range(len(families)), key=lambda i: -families[i].elements)
    chosen: list[_Chosen] = []
    while sum(families[i].elements * families[i].size for i in left) > SMALL:
        blocks = {i: np.arange(begins[i], begins[i + 1]) for i in left}
        here = next((i for i in left if families[i].elements > 1 and _independent(graph, blocks[i])), None)
        if here is None:
            break
        left.remove(here)
        others = np.concatenate([np.zeros(0, dtype=np.int64), *(blocks[i] for i in left)])
        near = graph[blocks[here]][:, others]
        count = near @ sizes[others]
        full = FULL * count.max(initial=0) >= sizes[others].sum() or (count**2).sum() > MAX_FILL
        if full and left:
            chosen.append(_Chosen(families[here], None))
            break
        chosen.append(_Chosen(families[here], _padded(near, firsts[others], sizes[others], num)))
        fill = (near.T @ near).tocoo()
        graph = graph + sparse.csr_matrix((fill.data, (others[fill.row], others[fill.col])), graph.shape)
    return chosen, [families[i] for i in sorted(left)]


def _graph(coupled: Sequence[Numbers], size: int) -> sparse.csr_matrix:
    """Which blocks (size, size) some row couples; of a block with itself too."""
    found = sparse.csr_matrix((size, size))
    for rows in coupled:
        for one in rows.T:
            for other in rows.T:
                both = (one >= 0) & (other >= 0)
                ones = np.ones(int(both.sum()))
                found = found + sparse.csr_matrix((ones, (one[both], other[both])), (size, size))
    return found


def _independent(graph: sparse.csr_matrix, blocks: Numbers) -> bool:
    own = graph[blocks][:, blocks].tocoo()
    return bool((own.row == own.col).all())


def _padded(near: sparse.csr_matrix, firsts: Numbers, sizes: Numbers, num: int) -> Numbers:
    """Unknowns (n, t) of the blocks that each row of `near` has, in rising order, then `num`."""
    pairs = near.tocoo()
    repeats = sizes[pairs.col]
    within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    row, unknown = np.repeat(pairs.row, repeats), np.repeat(firsts[pairs.col], repeats) + within
    order = np.lexsort((unknown, row))
    row, unknown = row[order], unknown[order]
    counts = np.bincount(row, minlength=near.shape[0])
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.full((near.shape[0], int(counts.max(initial=0))), num, dtype=np.int64)
    found[row, place] = unknown
    return found


def _among(neighbours: Numbers, element: Numbers, unknown: Numbers, num: int) -> Numbers:
    """Where an unknown stands among the neighbours of an element."""
    t = neighbours.shape[1]
    keys = (np.arange(len(neighbours))[:, None] * (num + 1) + neighbours).reshape(-1)
    at = np.searchsorted(keys, element * (num + 1) + unknown)
    found: Numbers = at - element * t
    return found
