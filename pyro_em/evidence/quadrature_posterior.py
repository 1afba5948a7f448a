"""What the posterior of a latent integrated by quadrature says: expectations over its weighted nodes.

    E g(z) = Σ_q p_q g(z_q)

which is as exact as the rule for smooth g. Draws of one-dimensional latents come from the density itself, tabulated on
a fine grid around the mode; those of vectors are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.errors import Refusal

if TYPE_CHECKING:
    from pyro_em.evidence.elimination import RunAt
    from pyro_em.evidence.quadrature import Layout

GRID, WIDTH = 401, 9.0  # points, and standard deviations to either side of the mode


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

    def marginal(self, site: str) -> dist.Distribution:
        """The weighted nodes, as an Empirical distribution: its mean and variance are the posterior's."""
        axis = self.nodes.dim() - 1 - len(self.layout.sizes)
        batch, event = self.layout.latents.shapes[site]
        values = torch.stack([self._own(site, part) for part in self.nodes.split(1, axis)], -1)
        shape = self.weights.shape[:axis]
        logs = torch.stack(
            [w.expand(*shape, *self.layout.sizes).reshape([*shape, *batch]) for w in self.weights.split(1, axis)], -1
        ).log()
        values = values.movedim(-1, values.dim() - 1 - len(event))
        return dist.Empirical(values, logs)

    def mode(self) -> dict[str, Tensor]:
        return {name: self._own(name, self.peak) for name in self.layout.latents.names}

    def sample(self, num: int) -> dict[str, Tensor]:
        """Independent draws: the density is linear between the points of a grid of 401 over ±9 standard deviations."""
        if self.layout.num_columns > 1:
            raise Refusal(
                self.layout.latents.names[0],
                "draws from a posterior that quadrature integrates in several dimensions are not offered.",
                "use its mean, variance and marginal, or algorithm='svi' with a guide.",
            )
        m = len(self.layout.sizes)
        axis = self.peak.dim() - 1 - m
        points = torch.linspace(-WIDTH, WIDTH, GRID, dtype=torch.float64)
        logs = []
        with torch.no_grad():
            for point in points:
                z = self.peak + self.spread.squeeze(-1) * point
                f = self.layout.total(self.run_at, self.layout.values(z, self.dtypes))
                logs.append(f.expand(self.peak.shape[:-1]))
        log_density = torch.cat(logs, axis)
        density = (log_density - log_density.amax(axis, keepdim=True)).exp().movedim(axis, -1)
        areas = (density[..., 1:] + density[..., :-1]) / 2
        cumulative = areas.cumsum(-1)
        total = cumulative[..., -1:]
        u = torch.rand(*density.shape[:-1], num, dtype=torch.float64) * total
        cell = torch.searchsorted(cumulative.contiguous(), u).clamp(max=GRID - 2)
        left, right = density[..., :-1].gather(-1, cell), density[..., 1:].gather(-1, cell)
        before = cumulative.gather(-1, cell) - areas.gather(-1, cell)
        rest = (u - before).clamp(min=0)
        # Within a cell the density is left + (right - left) t: solve ∫ = rest for t.
        t = 2 * rest / (left + (left * left + 2 * (right - left) * rest).clamp(min=0).sqrt()).clamp(min=1e-300)
        place = -WIDTH + (cell + t.clamp(0, 1)) * (2 * WIDTH / (GRID - 1))
        drawn = place.movedim(-1, 0).unsqueeze(axis + 1)
        z = self.peak + self.spread.squeeze(-1) * drawn.reshape(num, *self.peak.shape[:-1], 1)
        return {name: torch.stack([self._own(name, one) for one in z]) for name in self.layout.latents.names}
