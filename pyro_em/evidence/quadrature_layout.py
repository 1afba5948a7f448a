"""Elements of latents that are integrated by quadrature: their values at nodes, and the log-factors as one f of each.

    f_e(z) = Σ over the rows that read element e of their log-densities

Letters: C states of discrete latents, Q nodes, k columns (entries of all latents' events), m batch dims of which the
nodes' is the first. Which row reads which element is found by quadrature_recognition.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.evidence.elimination import LatentSet, RunAt, Values
from pyro_em.model.density import log_density

CHUNK_CELLS = 2**20  # cells of log-densities evaluated at once

Rows = Mapping[str, Tensor | None]
"""Element that each row of a factor reads, (1,) + plates of the factor (m dims); None where row n reads element n."""


@dataclass(frozen=True)
class Layout:
    """Elements of the latents: `sizes` are the m batch dims, the nodes' first, of size 1; k columns by site.

    `width` rows read one element, on average; `batched` says that one run can take several nodes.
    """

    latents: LatentSet
    sizes: tuple[int, ...]
    rows: Rows
    width: int
    batched: bool = False

    @property
    def num_columns(self) -> int:
        return sum(event.numel() for _, event in self.latents.shapes.values())

    def values(self, z: Tensor, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Values by site of z (C..., Q, plates...) + (k,); in the latents' own shapes where C and Q are trivial."""
        found, begin, m = {}, 0, len(self.sizes)
        for name in self.latents.names:
            batch, event = self.latents.shapes[name]
            own = z[..., begin : begin + event.numel()]
            begin += event.numel()
            lead = own.shape[: own.dim() - m]  # dims of states and of nodes
            shape = (*((1,) * (m - 1 - len(batch)) if math.prod(lead) > 1 else ()), *batch, *event)
            lead = lead if math.prod(lead) > 1 else torch.Size()
            found[name] = own.reshape([*lead, *shape]).to(dtypes[name])
        return found

    def total(self, run_at: RunAt, values: Values) -> Tensor:
        """f of every state, node and element: (C..., Q, plates...), with m dims from the nodes'."""
        run, m = run_at(values), len(self.sizes)
        total = torch.zeros((1,) * m, dtype=torch.float64)
        for name in self.latents.factors:
            density = log_density(run.sites[name]).double()
            density = density.reshape((1,) * (m - density.dim()) + tuple(density.shape))
            total = total + self._to_elements(density, self.rows[name])
        return total

    def at_nodes(self, run_at: RunAt, nodes: Tensor, dtypes: Mapping[str, torch.dtype]) -> Tensor:
        """f at nodes (C..., Q, plates..., k): (C..., Q, plates...), in bounded memory."""
        axis = nodes.dim() - 1 - len(self.sizes)
        cells = max(1, nodes.select(axis, 0)[..., 0].numel())
        count = max(1, CHUNK_CELLS // (cells * self.width)) if self.batched else 1
        parts = []
        for part in nodes.split(count, axis):
            f = self.total(run_at, self.values(part, dtypes))
            parts.append(f.expand(torch.broadcast_shapes(f.shape, part.shape[:-1])))
        return torch.cat(parts, axis)

    def _to_elements(self, density: Tensor, index: Tensor | None) -> Tensor:
        m = len(self.sizes)
        if index is None:
            gone = [i - m for i in range(1, m) if self.sizes[i] == 1 and density.shape[i - m] > 1]
            return density.sum(gone, keepdim=True) if gone else density
        plates = torch.broadcast_shapes(density.shape[1 - m :], index.shape[1:]) if m > 1 else torch.Size()
        lead = density.shape[: density.dim() - (m - 1)]
        flat = density.expand(*lead, *plates).reshape([*lead, -1])
        found = flat.new_zeros(*lead, math.prod(self.sizes))
        found = found.index_add(-1, index.expand(1, *plates).reshape(-1), flat)
        return found.reshape([*lead, *self.sizes[1:]])

    def to_rows(self, per_element: Tensor, index: Tensor) -> Tensor:
        """A quantity (C..., Q, plates...) of every element at the rows that read it."""
        lead = per_element.shape[: per_element.dim() - len(self.sizes) + 1]
        flat = per_element.expand(*lead, *self.sizes[1:]).reshape([*lead, -1])
        return flat[..., index.reshape(-1)].reshape([*lead, *index.shape[1:]])
