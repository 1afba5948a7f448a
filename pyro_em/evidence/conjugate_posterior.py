"""The posterior of a conjugate latent, read in the shapes that `SetPosterior` has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.errors import InputError
from pyro_em.evidence.assembly import Geometry
from pyro_em.evidence.conjugate_kinds import Kind
from pyro_em.evidence.elimination import LatentSet


@dataclass(frozen=True)
class ConjugatePosterior:
    """`coefficients` (states) layout + (k, J), see conjugate.py."""

    latents: LatentSet
    geometry: Geometry
    kind: Kind
    coefficients: Tensor

    def placed(self, x: Tensor) -> Tensor:
        """Atoms (states, S, plates) + (k,) as values of the site in the atoms' run layout."""
        (name,) = self.latents.names
        _, event = self.latents.shapes[name]
        m = len(self.geometry.layout)
        value = x.reshape([*x.shape[:-1], *event])
        while value.dim() > m + len(event) and value.shape[0] == 1:
            value = value.squeeze(0)
        return value

    def _natural(self, x: Tensor) -> Tensor:
        """A quantity (states) layout + (k,) in the shape C + batch + event."""
        (name,) = self.latents.names
        batch, event = self.latents.shapes[name]
        m = len(self.geometry.layout)
        lead = x.shape[: x.dim() - 1 - m]
        return x.expand([*lead, *self.geometry.layout, x.shape[-1]]).reshape([*lead, *batch, *event])

    @property
    def _q(self) -> Any:
        return self.kind.distribution(self.coefficients)

    def _entries(self, x: Tensor) -> Tensor:
        """Entries of an event in one dim, where the distribution has rows of them."""
        return x.flatten(-2) if self.kind.event_dim else x

    def mean(self, site: str) -> Tensor:
        return self._natural(self._entries(self._q.mean))

    def variance(self, site: str) -> Tensor:
        return self._natural(self._entries(self._q.variance))

    def marginal(self, site: str) -> dist.Distribution:
        _, event = self.latents.shapes[site]
        own = torch.stack([self._natural(c) for c in self.coefficients.unbind(-1)], -1)
        q: Any = self.kind.marginal(own)
        elements = len(event) - self.kind.event_dim
        return q.to_event(elements) if elements else q

    def mode(self) -> dict[str, Tensor]:
        (name,) = self.latents.names
        mode = self.kind.mode(self.coefficients)
        if bool(mode.isnan().any()):
            raise InputError(f"The posterior density of '{name}' is unbounded at the end of its range: no mode.")
        return {name: self._natural(mode)}

    def sample(self, num: int) -> dict[str, Tensor]:
        (name,) = self.latents.names
        draws = self._entries(self._q.sample((num,)))
        return {name: torch.stack([self._natural(draw) for draw in draws])}
