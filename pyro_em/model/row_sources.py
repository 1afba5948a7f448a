"""Where what varies from row to row comes from: covariates, and what the model makes of them.

`Sources` finds what varies along the rows without depending on a parameter among the arguments of the operations of a
run on few rows; `Copies` takes the same arguments of the same operations from a run on all rows, so that a column that
was recognised on the few is known on all. The model may hold covariates in whatever way, and transform them.

Not handled: columns that are no tensor of the run, or a + b times one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_em.model.few_rows import Rows

TOLERANCE = 1e-9
MOST_COLUMNS = 4096  # of sources

Place = tuple[int, int]  # of an operation in a run, of a tensor among its arguments


class _Arguments(TorchFunctionMode):
    """Numbers the calls of torch in a run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for i, x in enumerate(args):
            if isinstance(x, Tensor):
                self.meet((self.count, i), x)
        self.count += 1
        return call(*args, **(kwargs or {}))

    def meet(self, place: Place, x: Tensor) -> None:
        """A tensor among the arguments of a call."""
        raise NotImplementedError


class Sources(_Arguments):
    """Tensors that vary along the rows and on no parameter, of a run with gradients on few rows."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.found: dict[Place, tuple[Tensor, int]] = {}  # with the dim of the rows
        self._seen: set[int] = set()
        self._columns = 0

    def meet(self, place: Place, x: Tensor) -> None:
        if x.requires_grad or id(x) in self._seen or x.shape.count(len(self.rows.index)) != 1:
            return
        columns = x.numel() // len(self.rows.index)
        if self._columns + columns > MOST_COLUMNS or x.dtype == torch.bool:
            return
        self._seen.add(id(x))
        self._columns += columns
        self.found[place] = (x.detach(), x.shape.index(len(self.rows.index)))

    def columns(self) -> tuple[Tensor, list[tuple[Place, int]]]:
        """All of them as rows (C, n) in float64, with the place of each and its number there."""
        parts, names = [torch.zeros(0, len(self.rows.index), dtype=torch.float64)], []
        for place, (x, dim) in self.found.items():
            flat = x.movedim(dim, -1).reshape(-1, x.shape[dim]).double()
            parts.append(flat.to(parts[0].device))
            names += [(place, i) for i in range(len(flat))]
        return torch.cat(parts), names


class Copies(_Arguments):
    """The tensors at some places of a run on all rows."""

    def __init__(self, wanted: Mapping[Place, tuple[Tensor, int]]) -> None:
        super().__init__()
        self.wanted, self.found = wanted, dict[Place, Tensor]()

    def meet(self, place: Place, x: Tensor) -> None:
        if place in self.wanted:
            self.found[place] = x.detach()

    def column(self, place: Place, number: int, rows: Rows) -> Tensor | None:
        """A column (N,) in its own dtype; None if the run on all rows has no such tensor there.

        It need not be equal on the few rows: the model may have taken means over all rows (standardised covariates).
        """
        few, dim = self.wanted[place]
        whole = self.found.get(place)
        shape = list(few.shape)
        shape[dim] = rows.size
        if whole is None or list(whole.shape) != shape:
            return None
        own = whole.movedim(dim, -1)
        return own[_unravelled(number, own.shape[:-1])]


def _unravelled(number: int, shape: Sequence[int]) -> tuple[int, ...]:
    found = []
    for i, size in enumerate(shape):
        stride = math.prod(shape[i + 1 :])
        found.append(number // stride % size)
    return tuple(found)


class NotBound(Exception):
    """These uses cannot be written out for all rows."""


class Columns:
    """Where what varies from row to row comes from."""

    def __init__(self, sources: Sources) -> None:
        self._few, self._names = sources.columns()
        self.wanted: dict[Place, tuple[Tensor, int]] = {}
        self._found = sources.found

    def match(self, x: Tensor) -> list[tuple[Place, int, float, float]]:
        """For every row of x (R, n) a column and a, b with x = a + b·column."""
        found = []
        low = self._few.argmin(1) if len(self._few) else None
        for row in x.double().to(self._few.device):
            if low is None:
                raise NotBound
            high = self._few.argmax(1)
            ends = self._few.gather(1, torch.stack([low, high], 1))
            values = row[torch.stack([low, high], 1)]
            span = ends[:, 1] - ends[:, 0]
            slope = torch.where(span > 0, (values[:, 1] - values[:, 0]) / span, 0.0)
            # A factor alone is told apart from an intercept with it, and ±1 from what rounding made of it.
            start = values[:, 0] - slope * ends[:, 0]
            size = row.abs().max()
            start = torch.where(start.abs() <= TOLERANCE * size, 0.0, start)
            slope = torch.where((slope.abs() - 1).abs() <= TOLERANCE, slope.sign(), slope)
            away = (start.unsqueeze(1) + slope.unsqueeze(1) * self._few - row).abs().amax(1)
            simple = (start != 0).double() + (slope != 1).double()
            simple[~((span > 0) & (away <= TOLERANCE * size))] = torch.inf
            best = int(simple.argmin())
            if not bool(simple[best].isfinite()):
                raise NotBound
            place, number = self._names[best]
            self.wanted[place] = self._found[place]
            found.append((place, number, float(start[best]), float(slope[best])))
        return found


@dataclasses.dataclass(frozen=True)
class Varying:
    """What varies along the rows: a tensor on the few, the dim of the rows in it, and its columns."""

    few: Tensor
    dim: int
    columns: list[tuple[Place, int, float, float]]

    def whole(self, copies: Copies, rows: Rows) -> Tensor:
        parts = []
        for place, number, start, slope in self.columns:
            column = copies.column(place, number, rows)
            if column is None:
                raise NotBound
            column = column.to(torch.float64)
            column = column if slope == 1 else slope * column
            parts.append(column if start == 0 else start + column)
        found = torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)
        if not self.few.is_floating_point():
            found = found.round()
        shape = self.few.movedim(self.dim, -1).shape[:-1]
        return found.reshape(*shape, rows.size).movedim(-1, self.dim).to(self.few.dtype).contiguous()
