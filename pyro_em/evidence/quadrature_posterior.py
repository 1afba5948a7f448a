"""What the posterior of a latent integrated by quadrature says: expectations over its weighted nodes.

    E g(z) = Σ_q p_q g(z_q)

which is as exact as the rule for smooth g. A draw is continuous: a node is drawn with its weight, then every entry anew
given the others (one Gibbs sweep in the coordinates t of z = mode + L t), from its density, tabulated on a grid of 401
points over ±9 standard deviations and linear between them. In one dimension that is a draw from the posterior itself;
in more the sweep leaves the posterior as it is, so that the draws are as exact as the rule's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.evidence.elimination import RunAt
from pyro_em.evidence.quadrature_layout import Layout

GRID, WIDTH = 401, 9.0  # points, and standard deviations to either side of the mode
BLOCK = 2**22  # numbers of nodes laid out at once


@dataclass(frozen=True)
class QuadraturePosterior:
    """Nodes (C..., Q, plates, k) and weights (C..., Q, plates). Shapes of the answers as in `SetPosterior`."""

    layout: Layout
    nodes: Tensor
    weights: Tensor
    peak: Tensor
    spread: Tensor
    run_at: RunAt
    dtypes: Mapping[str, torch.dtype]

    def _own(self, site: str, z: Tensor) -> Tensor:
        """The columns of one latent: (..., plates, k) with the nodes' dim summed to 1 -> C + batch + event."""
        begin = 0
        for name in self.layout.latents.names:
            batch, event = self.layout.latents.shapes[name]
            if name == site:
                own = z[..., begin : begin + event.numel()]
                lead = own.shape[: own.dim() - 1 - len(self.layout.sizes)]
                own = own.expand(*lead, *self.layout.sizes, event.numel())
                return own.reshape([*lead, *batch, *event])
            begin += event.numel()
        raise KeyError(site)

    def _expected(self, z: Tensor) -> Tensor:
        axis = self.nodes.dim() - 1 - len(self.layout.sizes)
        return (self.weights.unsqueeze(-1) * z).sum(axis, keepdim=True)

    def mean(self, site: str) -> Tensor:
        return self._own(site, self._expected(self.nodes))

    def variance(self, site: str) -> Tensor:
        centred = self.nodes - self._expected(self.nodes)
        return self._own(site, self._expected(centred * centred))

    def marginal(self, site: str, shares: Tensor | None = None) -> dist.Distribution:
        """The weighted nodes, as an Empirical distribution: its mean and variance are the posterior's.

        :param shares: weights (C,) + batch of the states, over which the nodes are then put together.
        """
        axis = self.nodes.dim() - 1 - len(self.layout.sizes)
        batch, event = self.layout.latents.shapes[site]
        values = torch.stack([self._own(site, part) for part in self.nodes.split(1, axis)], -1)
        shape = self.weights.shape[:axis]
        logs = torch.stack(
            [w.expand(*shape, *self.layout.sizes).reshape([*shape, *batch]) for w in self.weights.split(1, axis)], -1
        ).log()
        values = values.movedim(-1, values.dim() - 1 - len(event))
        if shares is not None:
            k, size = len(batch), values.shape[values.dim() - 1 - len(event)]
            values = values.reshape(-1, *batch, size, *event).movedim(0, k).flatten(k, k + 1)
            logs = logs.reshape(-1, *batch, size) + shares.log().unsqueeze(-1)
            logs = logs.movedim(0, k).flatten(k, k + 1)
        return dist.Empirical(values, logs)

    def mode(self) -> dict[str, Tensor]:
        return {name: self._own(name, self.peak) for name in self.layout.latents.names}

    def sample(self, num: int) -> dict[str, Tensor]:
        """Independent draws, see the module docstring.

        A vector costs 401 evaluations of its density for each entry of each draw.
        """
        m, k = len(self.layout.sizes), self.layout.num_columns
        axis = self.peak.dim() - 1 - m
        with torch.no_grad():
            t = self._drawn_nodes(num)  # (C..., num, plates, k), in the coordinates of the rule
            block = max(1, BLOCK // (GRID * max(1, t.select(axis, 0).numel())))
            for d in range(k):
                rest = t.clone()
                rest[..., d] = 0.0
                if k == 1:  # one density for all draws
                    t = self._along(0, rest.narrow(axis, 0, 1), num).unsqueeze(-1)
                else:
                    t[..., d] = torch.cat([self._along(d, own, 1) for own in rest.split(block, axis)], axis)
        z = (self.peak + (self.spread @ t.unsqueeze(-1)).squeeze(-1)).movedim(axis, 0).unsqueeze(axis + 1)
        return {name: torch.stack([self._own(name, one) for one in z]) for name in self.layout.latents.names}

    def _drawn_nodes(self, num: int) -> Tensor:
        """Nodes drawn with their weights, in the coordinates t of z = mode + L t."""
        m = len(self.layout.sizes)
        axis = self.peak.dim() - 1 - m
        t = torch.linalg.solve(self.spread, (self.nodes - self.peak).unsqueeze(-1)).squeeze(-1)
        shape = [*self.peak.shape[:axis], *self.layout.sizes]
        shape[axis] = t.shape[axis]
        weights = self.weights.expand(shape).movedim(axis, -1)
        picked = torch.multinomial(weights.reshape(-1, weights.shape[-1]), num, replacement=True)
        index = picked.reshape(*weights.shape[:-1], num).movedim(-1, axis)
        full = t.expand(*shape, t.shape[-1])
        return full.gather(axis, index.unsqueeze(-1).expand(*index.shape, t.shape[-1]))

    def _along(self, d: int, rest: Tensor, num: int) -> Tensor:
        """`num` draws of entry d of t given the others, `rest` (C..., R, plates, k): (C..., R · num, plates)."""
        axis = self.peak.dim() - 1 - len(self.layout.sizes)
        count = rest.shape[axis]
        t = rest.repeat_interleave(GRID, axis)
        grid = torch.linspace(-WIDTH, WIDTH, GRID, dtype=torch.float64)
        t[..., d] = grid.repeat(count).reshape([-1, *(1,) * (t.dim() - 2 - axis)]).expand(t.shape[:-1])
        nodes = self.peak + (self.spread @ t.unsqueeze(-1)).squeeze(-1)
        f = self.layout.at_nodes(self.run_at, nodes, self.dtypes).expand(t.shape[:-1])
        f = f.unflatten(axis, (count, GRID)).movedim(axis + 1, -1)
        place = _draw_from((f - f.amax(-1, keepdim=True)).exp(), num)  # (C..., R, plates, num)
        return place.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _draw_from(density: Tensor, num: int) -> Tensor:
    """Draws (..., num) from densities (..., 401) that are linear between the points of the grid."""
    areas = (density[..., 1:] + density[..., :-1]) / 2
    cumulative = areas.cumsum(-1)
    u = torch.rand(*density.shape[:-1], num, dtype=torch.float64) * cumulative[..., -1:]
    cell = torch.searchsorted(cumulative.contiguous(), u).clamp(max=GRID - 2)
    left, right = density[..., :-1].gather(-1, cell), density[..., 1:].gather(-1, cell)
    rest = (u - cumulative.gather(-1, cell) + areas.gather(-1, cell)).clamp(min=0)
    # Within a cell the density is left + (right - left) t: solve ∫ = rest for t.
    t = 2 * rest / (left + (left * left + 2 * (right - left) * rest).clamp(min=0).sqrt()).clamp(min=1e-300)
    return -WIDTH + (cell + t.clamp(0, 1)) * (2 * WIDTH / (GRID - 1))
