"""What stays in cache: windows of time that a long chain is cut into, or groups of many shorter chains.

    window i: blocks i (J - 2o) ... i (J - 2o) + J,  of which the first o and the last o are its neighbours' own

but for the last window, which ends where the chain ends.

A window begins o blocks early from a uniform vector and ends o blocks late: a chain forgets where it came from. Where
it does not, the vectors at the borders of the windows are carried from one to the next (scan_windows.py).

Chains that are shorter than a window are grouped, so many as are one; nothing passes from one group to another.

Shapes: T steps, C chains; each chain n windows of J blocks of L steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_em.evidence.banded import blocks_of
from pyro_em.evidence.blocked import Blocks

CELLS, STEPS = 800_000, 40_000  # of a window, steps times K² and steps: up to 16 MB of messages, products and band
STATES, GROUPED = 8, 5  # up to which windows, and groups, take less time than blocked.py, which multiplies no matrices
MARGIN = 256  # steps that a chain is given to forget


@dataclass(frozen=True)
class Windows:
    """`blocks` are those of one window, `margin` (o) is counted in blocks, `count` (n) are the windows of a chain."""

    steps: int
    chains: int
    blocks: Blocks
    margin: int
    count: int
    name: ClassVar[str] = "windows"
    padded: ClassVar[bool] = False  # places behind a chain's end are of no account (scan_windows.py)

    @property
    def length(self) -> int:
        """Steps of a block."""
        return self.blocks.length

    @property
    def columns(self) -> int:
        """Blocks of all windows."""
        return self.chains * self.count * self.blocks.per_chain

    def first(self, place: int) -> int:
        """The block of the chain with which its window begins."""
        J = self.blocks.per_chain
        last = -(-self.steps // self.length) - J
        return place * (J - 2 * self.margin) if place < self.count - 1 else last

    def inner(self, place: int) -> tuple[int, int]:
        """The blocks of a chain's window that are its own: from and to, counted from its first."""
        J, o = self.blocks.per_chain, self.margin
        begin = place * (J - 2 * o) + o - self.first(place) if place else 0
        return begin, J - (o if place < self.count - 1 else 0)

    def order(self) -> Tensor:
        """(C·n·L, J): the row t·C + c that lies there, -1 for padding."""
        L, J = self.length, self.blocks.per_chain
        within = torch.arange(L).reshape(-1, 1) + L * torch.arange(J)
        firsts = torch.tensor([self.first(place) for place in range(self.count)])
        t = L * firsts.reshape(-1, 1, 1) + within
        rows = t * self.chains + torch.arange(self.chains).reshape(-1, 1, 1, 1)
        return torch.where(t < self.steps, rows, -1).reshape(-1, J)


@dataclass(frozen=True)
class Groups:
    """`blocks` are those of a group of `size` chains; the last group may have fewer."""

    steps: int
    chains: int
    size: int
    length: int
    name: ClassVar[str] = "groups"

    @property
    def per_chain(self) -> int:
        """Blocks of a chain."""
        return -(-self.steps // self.length)

    @property
    def count(self) -> int:
        """How many groups there are."""
        return -(-self.chains // self.size)

    @property
    def columns(self) -> int:
        """Blocks of all chains."""
        return self.chains * self.per_chain

    @property
    def padded(self) -> bool:
        """Whether there are places behind a chain's end."""
        return self.length * self.per_chain != self.steps

    def members(self, i: int) -> slice:
        """The chains of a group."""
        return slice(i * self.size, min((i + 1) * self.size, self.chains))

    def blocks(self, i: int) -> Blocks:
        """Those of a group."""
        own = self.members(i)
        return Blocks(self.steps, own.stop - own.start, self.length, self.per_chain)

    def order(self) -> Tensor:
        """(L·C·J,), group by group: the row t·C + c that lies there, -1 for padding."""
        found = []
        for i in range(self.count):
            blocks, own = self.blocks(i), self.blocks(i).order().reshape(-1)
            t, c = own.div(blocks.chains, rounding_mode="floor"), own % blocks.chains + self.members(i).start
            found.append(torch.where(own < 0, -1, t * self.chains + c))
        return torch.cat(found)


def cut(steps: int, chains: int, states: int) -> Windows | Groups | None:
    """Windows or groups, or None where chains are one group, or rather smoothed otherwise."""
    most = min(STEPS, CELLS // states**2)
    if steps > most:
        return _windows(steps, chains, states, most) if states <= STATES else None
    size = most // steps
    if states > GROUPED:
        return None
    return Groups(steps, chains, size, blocks_of(steps, size, states).length) if steps > 1 and size < chains else None


def _windows(steps: int, chains: int, states: int, most: int) -> Windows:
    """Of about the same length."""
    length = blocks_of(most, 1, states).length
    margin, total = -(-MARGIN // length), -(-steps // length)
    own = max(most // length - 2 * margin, 1)
    count = max(2, -(-(total - 2 * margin) // own))
    blocks = -(-(total + 2 * margin * (count - 1)) // count)
    if (count - 1) * blocks - 2 * margin * (count - 2) > total:  # of so many windows the last would have nothing to do
        blocks = most // length
    return Windows(steps, chains, Blocks(blocks * length, 1, length, blocks), margin, count)
