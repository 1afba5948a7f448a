"""Tables over rows and nodes, in panels: rows of groups of like size stand side by side, and no index is followed.

A row of group g is evaluated at the Q nodes of g. In a panel the rows are laid out as (W, G) with the nodes between
them, (W, Q, G): what belongs to a row is (W, 1, G), what belongs to the nodes of a group (1, Q, G); sums over the rows
of a group or over its nodes are sums along one dim. Where groups are few and large it is (G, Q, W), so that the last
dim is always the longer one. Groups with fewer than W rows are filled up with rows that are *empty*.

Letters: R places of all panels together, one after the other; G groups, W rows of each; Q nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FULL = 0.75  # a panel takes groups of at least this share of the rows of its largest
MAX_CELLS = 2**19  # rows times nodes of a panel


@dataclass(frozen=True, eq=False)
class Panel:
    """`groups` (G,) are those of this panel, a slice where they follow on each other; `last`: the rows of a group stand
    in the last dim. `begin` is the first of its places.
    """

    groups: Tensor | slice
    shape: tuple[int, int]  # (W, G), or (G, W) with `last`
    last: bool
    begin: int

    @property
    def end(self) -> int:
        """Behind the last of its places."""
        return self.begin + self.shape[0] * self.shape[1]

    def of_rows(self, x: Tensor) -> Tensor:
        """What belongs to the places (R,): (W, 1, G) or (G, 1, W)."""
        return x[self.begin : self.end].reshape(self.shape[0], 1, self.shape[1])

    def of_nodes(self, x: Tensor) -> Tensor:
        """What belongs to the nodes of all groups (Q, any G): (1, Q, G) or (G, Q, 1)."""
        x = x if x.shape[1] == 1 else x[:, self.groups]
        return x.mT.unsqueeze(-1) if self.last else x.unsqueeze(0)

    def over_rows(self, table: Tensor) -> Tensor:
        """A table summed over the rows of each group, (Q, G of this panel)."""
        return table.sum(-1).mT if self.last else table.sum(0)

    def into(self, total: Tensor | None, own: Tensor, size: int) -> Tensor:
        """`total` (Q, size) with the part (Q, G) of this panel added; None for nothing so far."""
        if isinstance(self.groups, Tensor):
            total = own.new_zeros(own.shape[0], size) if total is None else total
            return total.index_add_(1, self.groups, own)
        if total is None and own.shape[1] == size:
            return own
        total = own.new_zeros(own.shape[0], size) if total is None else total
        total[:, self.groups] += own
        return total


@dataclass(frozen=True, eq=False)
class Panels:
    """All panels of one site. `rows` (R,) is the row at each place, -1 where it is empty; `size` groups in all."""

    panels: tuple[Panel, ...]
    rows: Tensor
    size: int

    def placed(self, x: Tensor, empty: float = 0.0) -> Tensor:
        """What belongs to the rows (N, any) at the places (R, any)."""
        found = x[self.rows.clamp(min=0)]
        gone = (self.rows < 0).reshape(-1, *(1,) * (x.dim() - 1))
        return torch.where(gone, torch.as_tensor(empty, dtype=x.dtype), found)

    def summed(self, x: Tensor, num_rows: int) -> Tensor:
        """What belongs to the places (R,), added up at the rows (num_rows,)."""
        return x.new_zeros(num_rows + 1).index_add(0, self._targets(num_rows), x)[:-1]

    def _targets(self, num_rows: int) -> Tensor:
        return torch.where(self.rows < 0, num_rows, self.rows)


def panels_of(group: Tensor, size: int, num_nodes: int) -> Panels:
    """Panels of rows that read the groups `group` (N,), -1 for rows that are left out."""
    kept = (group >= 0).nonzero().squeeze(-1)
    own = group[kept]
    order = kept[torch.argsort(own, stable=True)]
    counts = torch.bincount(own, minlength=size)
    begins = counts.cumsum(0) - counts
    panels: list[Panel] = []
    rows: list[Tensor] = []
    place = 0
    for members, width in _bins(counts, num_nodes):
        first, end = int(members[0]), int(members[-1]) + 1
        groups = slice(first, end) if end - first == len(members) else members
        within = torch.arange(width)
        at = begins[members] + within.unsqueeze(-1)
        inside = within.unsqueeze(-1) < counts[members]
        found = torch.where(inside, order[at.clamp(max=max(0, len(order) - 1))], -1)  # (W, G)
        for part in _parts(found, num_nodes):
            last = part.shape[0] > part.shape[1]
            part = part.mT if last else part
            panels.append(Panel(groups, (part.shape[0], part.shape[1]), last, place))
            rows.append(part.reshape(-1))
            place += part.numel()
    empty = torch.zeros(0, dtype=torch.long)
    return Panels(tuple(panels), torch.cat(rows) if rows else empty, size)


def _bins(counts: Tensor, num_nodes: int) -> list[tuple[Tensor, int]]:
    """Groups of each panel, and their rows W."""
    found = []
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[counts[order] > 0]
    while len(order):
        width = int(counts[order[0]])
        like = int((counts[order] >= FULL * width).sum())
        most = max(1, MAX_CELLS // (width * num_nodes))
        members, _ = order[: min(like, most)].sort()
        found.append((members, width))
        order = order[len(members) :]
    return found


def _parts(rows: Tensor, num_nodes: int) -> Sequence[Tensor]:
    """Rows (W, G) of a panel, cut along W where even one group is large."""
    most = max(1, MAX_CELLS // (rows.shape[1] * num_nodes))
    parts: Sequence[Tensor] = rows.split(most)
    return parts
