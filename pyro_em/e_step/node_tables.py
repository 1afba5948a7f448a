"""Densities of one predictor η, as the sums over rows and nodes that quadrature needs of them.

    log p(y | η) = a η - m A(η) + const,    A the cumulant function of the family

A *table* holds what is needed at every row and node of η = b + t; all sums are formed from it. What tables of the same
b have in common is their *base*. Kinds: node_trials.py, node_cumulants.py.

Shapes: as in node_panels.py; weights v (1, Q, G) belong to nodes, b (W, 1, G) to rows.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.e_step.node_panels import Panel
from pyro_em.shapes import broadcast_shapes

NEVER = -1e30  # η of an empty place: no event is expected there


class Memory:
    """Memory of tables, given again when nobody holds the table that was made in it.

    What is allocated anew for each table is given back to the system and faulted in again, page by page, which takes
    longer than what is done with it.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, weakref.ref[Tensor]]] = []

    def take(self, *shapes: torch.Size) -> Tensor:
        """A table of the shape that these broadcast to."""
        shape = broadcast_shapes(*shapes)
        for i, (flat, table) in enumerate(self._known):
            if flat.numel() == shape.numel() and table() is None:
                found = flat.view(shape)
                self._known[i] = flat, weakref.ref(found)
                return found
        flat = torch.empty(shape.numel(), dtype=torch.float64)
        found = flat.view(shape)
        self._known.append((flat, weakref.ref(found)))
        return found


class Table(ABC):
    """A density at every row and node of one panel; what was formed once is kept."""

    @property
    @abstractmethod
    def sums(self) -> Tensor:
        """Σ m A over the rows of each group, (Q, G of the panel)."""

    @abstractmethod
    def first(self, v: Tensor) -> Tensor:
        """Σ_q v m A' of every row, (W, 1, G)."""

    @abstractmethod
    def second(self, v: Tensor, first: Tensor) -> Tensor:
        """Σ_q v m A'' of every row, (W, 1, G), given the sums with A'."""

    @abstractmethod
    def in_groups(self) -> tuple[Tensor, Tensor]:
        """Σ m A' and Σ m A'' over the rows of each group at one node, (1, G of the panel)."""


class Cumulant(ABC):
    """`linear` a and `count` m are (R,); `empty` is η at empty places.

    `memory`, if given, is what tables are made in. (A recording has its own, tape/.)
    """

    empty: float = NEVER
    concave = False  # log p(y | η), so that every element has one mode wherever the search starts
    memory: Memory | None = None

    def __init__(self, linear: Tensor, count: Tensor) -> None:
        self.linear, self.count = linear, count

    @abstractmethod
    def base(self, panel: Panel, b: Tensor, arguments: Mapping[str, Tensor] | None = None) -> Any:
        """What tables of one panel with the same b have in common."""

    @abstractmethod
    def table(self, panel: Panel, base: Any, t: Tensor) -> Table:
        """Of η = b + t; t (1, Q, G), or of every cell."""
