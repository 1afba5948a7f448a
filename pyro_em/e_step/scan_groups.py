"""One E-step of many chains that are short, group by group: what scan_short.py does with one stays in cache.

Sums over the groups are sums over all chains. The groups work in the same memory, one after the other; each knows the
rate of its own messages. It is one operation of torch, as that of one group is.

Shapes: K states, F features; C chains of J blocks of L steps (evidence/windows.py), data (L·C·J,) group by group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pyro_em.e_step.scan_short import ChainSums, Given, Short, Weights
from pyro_em.evidence.banded import Banded
from pyro_em.evidence.windows import Groups


class Grouped(ChainSums):
    """Φ (F, L·C·J), zero where there is padding; `base` (C,) are sums of log base measures."""

    def __init__(
        self, groups: Groups, phi: Tensor, base: Tensor, states: int, weights: Weights, padding: Tensor | None
    ) -> None:
        super().__init__(phi, base, states, weights, padding)
        memory = {blocks: Banded(blocks, states) for blocks in {groups.blocks(i) for i in range(groups.count)}}
        self._parts: list[tuple[Short, slice]] = []  # with the places of its data
        end = 0
        for i in range(groups.count):
            blocks, members = groups.blocks(i), groups.members(i)
            at = slice(end, end := end + blocks.length * blocks.columns)
            own = Weights(
                _part(weights.chains, members),
                tuple(_part(w, members) for w in weights.first),
                tuple(_part(w, at) for w in weights.pairs),
            )
            self._parts.append((Short(memory[blocks], phi[:, at], base[members], states, own, None), at))
        self._own = [x.numpy() for x in self.outputs()]

    def into(self, outputs: Sequence[np.ndarray], given: Given) -> None:
        *sums, held = outputs
        for x in sums:
            x.fill(0.0)
        held[...] = False
        for part, at in self._parts:
            extra = None if given.differences is None else given.differences[:, at]
            part.into(self._own, given._replace(differences=extra))
            if not self._own[-1]:
                return
            for x, own in zip(sums, self._own, strict=False):
                np.add(x, own, x)
        held[...] = True


def _part(weight: Tensor | None, at: slice) -> Tensor | None:
    return None if weight is None else weight.reshape(-1)[at]
