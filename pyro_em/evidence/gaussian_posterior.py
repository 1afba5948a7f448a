"""The Gaussian posterior of a set of latents, read site by site.

Unknowns are kept as z_A (layout + (k,)) and z_B (n_B,), see blocks.py; here they are put at the places where the
latents' values have them. Leading dims: draws or atoms, then states of discrete latents, then plates and event.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.evidence.assembly import Geometry
from pyro_em.evidence.blocks import Factored
from pyro_em.evidence.columns import Column
from pyro_em.evidence.elimination import LatentSet, Values


@dataclass(frozen=True)
class GaussianPosterior:
    """N(m, J⁻¹) with its factors. Shapes as in `SetPosterior`."""

    latents: LatentSet
    geometry: Geometry
    factored: Factored
    mean_a: Tensor
    mean_b: Tensor | None

    @staticmethod
    def place(latents: LatentSet, geometry: Geometry, z_a: Tensor, z_b: Tensor | None) -> dict[str, Tensor]:
        """Values by site from unknowns with atoms in the first of the layout's m dims, in the atoms' run layout.

        :param z_a: (states..., S, plates...) + (k,).
        :param z_b: (S, n_B) or (n_B,).
        """
        m = len(geometry.layout)
        lead = z_a.shape[: z_a.dim() - 1 - m]
        found = {}
        for name in latents.names:
            batch, event = latents.shapes[name]
            n = batch.numel()
            inner = (1,) * (m - 1 - len(batch)) + tuple(batch)
            own_a = [(i, c) for i, c in enumerate(geometry.columns_a) if c.site == name]
            if own_a and own_a[0][1].element is None:
                atoms = z_a.shape[z_a.dim() - 1 - m]
                value = z_a[..., [i for i, _ in own_a]].expand(*lead, atoms, *inner, len(own_a))
            elif own_a:
                order = [i for i, c in sorted(own_a, key=lambda ic: (ic[1].element, ic[1].event))]
                value = z_a[..., order].reshape([*z_a.shape[:-m], *inner, event.numel()])
            else:
                assert z_b is not None
                rows = z_b if z_b.dim() == 2 else z_b.unsqueeze(0)
                columns = [c for c in geometry.offsets_b if c.site == name]
                value = rows[:, entries_of(geometry, columns, n)].reshape(rows.shape[0], *inner, len(columns))
                if columns[0].element is not None:
                    value = value.reshape(rows.shape[0], *inner, event.numel())
            found[name] = value.reshape([*value.shape[:-1], *event])
        return found

    @staticmethod
    def unknowns(latents: LatentSet, geometry: Geometry, values: Values) -> tuple[Tensor, Tensor | None]:
        """z_A (layout + (k,)) and z_B (n_B,) of values by site in the latents' own shapes: the inverse of `place`."""
        m = len(geometry.layout)
        flat = {n: values[n].detach().double().reshape(latents.shapes[n][0].numel(), -1) for n in latents.names}

        def of(column: Column) -> Tensor:
            own = flat[column.site][:, column.event]
            return own if column.element is None else own[column.element : column.element + 1]

        parts = []
        for column in geometry.columns_a:
            batch = latents.shapes[column.site][0] if column.element is None else torch.Size()
            parts.append(of(column).reshape((1,) * (m - len(batch)) + tuple(batch)))
        z_a = torch.stack(torch.broadcast_tensors(*parts), -1)
        if not geometry.num_b:
            return z_a, None
        z_b = torch.zeros(geometry.num_b, dtype=torch.float64)
        for column, offset in geometry.offsets_b.items():
            own = of(column)
            z_b[offset : offset + len(own)] = own
        return z_a, z_b

    def deviate(self, standard: Tensor) -> tuple[Tensor, Tensor | None]:
        """z at standard numbers (S, k + n_B) that all elements of A share, S at the atoms' place."""
        k, m = len(self.geometry.columns_a), len(self.geometry.layout)
        own = standard[:, :k].reshape(-1, *(1,) * (m - 1), k)
        if self.mean_b is None:
            deviation, _ = self.factored.spread(own, None)
            return self.mean_a + deviation, None
        # The atoms' dim is the first of the layout, so that common values broadcast along it.
        deviation, common = self.factored.spread(own, standard[:, k:])
        assert common is not None
        return self.mean_a + deviation, self.mean_b + common

    def values(self, z_a: Tensor, z_b: Tensor | None) -> dict[str, Tensor]:
        """Atoms by site, leading dims of size 1 dropped."""
        found = self.place(self.latents, self.geometry, z_a, z_b)
        m = len(self.geometry.layout)
        stripped = {}
        for name, value in found.items():
            rank = m + len(self.latents.shapes[name][1])
            while value.dim() > rank and value.shape[0] == 1:
                value = value.squeeze(0)
            stripped[name] = value
        return stripped

    def _plain(self, name: str, value: Tensor) -> Tensor:
        """Drop the atoms' dim and dims that the latent's own batch does not have."""
        batch, event = self.latents.shapes[name]
        m = len(self.geometry.layout)
        lead = value.shape[: value.dim() - m - len(event)]
        return value.reshape([*lead, *batch, *event])

    def mean(self, site: str) -> Tensor:
        return self._plain(site, self.place(self.latents, self.geometry, self.mean_a, self.mean_b)[site])

    def covariance(self, site: str) -> Tensor:
        """Covariance of the flattened event, shape C + plates + (E, E)."""
        batch, event = self.latents.shapes[site]
        own, common = self.factored.covariance()
        size, n = event.numel(), batch.numel()
        at_a = [(i, c) for i, c in enumerate(self.geometry.columns_a) if c.site == site]
        if at_a and at_a[0][1].element is None:
            index = [i for i, _ in at_a]
            picked = own[..., index, :][..., index]
            m = len(self.geometry.layout)
            lead = picked.shape[: picked.dim() - 2 - m]
            return picked.expand(*lead, *self.geometry.layout, size, size).reshape([*lead, *batch, size, size])
        if at_a:
            order = [i for i, c in sorted(at_a, key=lambda ic: (ic[1].element, ic[1].event))]
            wide = own[..., order, :][..., order]
            lead = wide.shape[: wide.dim() - 2 - len(self.geometry.layout)]
            wide = wide.reshape([*lead, n, size, n, size]).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            return wide.reshape([*lead, *batch, size, size])
        assert common is not None
        columns = [c for c in self.geometry.offsets_b if c.site == site]
        rows = entries_of(self.geometry, columns, n).reshape(n, size)
        return common[rows.unsqueeze(-1), rows.unsqueeze(-2)].reshape([*batch, size, size])

    def variance(self, site: str) -> Tensor:
        event = self.latents.shapes[site][1]
        diagonal = self.covariance(site).diagonal(dim1=-2, dim2=-1)
        return diagonal.reshape([*diagonal.shape[:-1], *event])

    def marginal(self, site: str) -> dist.Distribution:
        event = self.latents.shapes[site][1]
        mean = self.mean(site)
        if len(event) == 0:
            return dist.Normal(mean, self.variance(site).sqrt(), validate_args=False)
        if len(event) > 1:
            return dist.Normal(mean, self.variance(site).sqrt(), validate_args=False).to_event(len(event))
        covariance = self.covariance(site)
        covariance = covariance.expand(*mean.shape[:-1], *covariance.shape[-2:])
        return dist.MultivariateNormal(mean, covariance, validate_args=False)

    def mode(self) -> dict[str, Tensor]:
        return {name: self.mean(name) for name in self.latents.names}

    def log_peak(self) -> Tensor:
        """log q(m) = ½ log|J| - (D/2) log 2π of each element, in the layout (with common entries one number)."""
        own, common = self.factored.log_det()
        k = len(self.geometry.columns_a)
        two_pi = torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        if self.mean_b is not None:
            return 0.5 * (own.expand(self.geometry.layout).sum() + common) - 0.5 * two_pi * (
                k * self.geometry.elements + self.geometry.num_b
            )
        peak = 0.5 * own - 0.5 * k * two_pi
        m = len(self.geometry.layout)
        return peak.expand(*peak.shape[: peak.dim() - m], *self.geometry.layout)

    def sample(self, num: int) -> dict[str, Tensor]:
        k, m = len(self.geometry.columns_a), len(self.geometry.layout)
        lead = self.mean_a.shape[: self.mean_a.dim() - 1 - m]
        own = torch.randn(*lead, num, *self.geometry.layout[1:], k, dtype=torch.float64)
        b = None if self.mean_b is None else torch.randn(num, self.geometry.num_b, dtype=torch.float64)
        deviation, common = self.factored.spread(own, b)
        z_b = None if self.mean_b is None or common is None else self.mean_b + common
        found = {}
        for name, value in self.place(self.latents, self.geometry, self.mean_a + deviation, z_b).items():
            batch, event = self.latents.shapes[name]
            front = value.movedim(value.dim() - m - len(event), 0)
            found[name] = front.reshape(num, *front.shape[1 : front.dim() - (m - 1) - len(event)], *batch, *event)
        return found


def entries_of(geometry: Geometry, columns: list[Column], elements: int) -> Tensor:
    """Entries of B that hold a latent's columns, in the order element by element, column by column."""
    if columns[0].element is not None:
        ordered = sorted(columns, key=lambda c: (c.element, c.event))
        return torch.tensor([geometry.offsets_b[c] for c in ordered])
    offsets = torch.tensor([geometry.offsets_b[c] for c in columns])
    return (offsets.unsqueeze(0) + torch.arange(elements).unsqueeze(-1)).reshape(-1)
