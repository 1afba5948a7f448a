"""The E-step of one component as two matrix products per chunk of rows, for one start or several at once.

With Φ (F, n) the features of a chunk (features.py) and W (J, F) the natural parameters of the joint states,

    L = W Φ,   R = softmax(L, over j),   Sᵀ += Φ (R·w)ᵀ,   log p = Σ w · logsumexp(L, over j)

W of several starts are stacked: the products are then wider, which is where a processor is at its best, and Φ is
formed once for all of them. Memory is bounded by the chunk. J joint states, F features, n rows of a chunk, R starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.device import chunk_scale
from pyro_em.e_step.direct import NUM_PREPARED, centered_log_density
from pyro_em.e_step.features import Features
from pyro_em.e_step.layout import SiteLayout
from pyro_em.products import product_
from pyro_em.softmax import padded, softmax, softmax_

FIRST_ROWS = 2**16  # at which the product is compared with the families' own log-densities
CHUNK_CELLS = 2**16  # of L, in one start's W or several: half of a second-level cache of 1 MiB


def rows_of_cells(states: int, device: torch.device) -> int:
    """Rows that go through the products together, at most."""
    return max(256, chunk_scale(device) * CHUNK_CELLS // states // 64 * 64)


Normal = tuple[Tensor, Tensor, Tensor]  # what direct.py prepares


@dataclass(frozen=True)
class Prepared:
    """What an E-step needs of the parameters: W, and of each site in `direct` what direct.py prepares."""

    coefficients: Tensor  # (J, F)
    direct: tuple[int, ...] = ()
    normal: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Sums:
    """`totals` (J, F), sums of weighted responsibilities times features; `evidence` = (Σ w ll_n, Σ |w ll_n|)."""

    totals: Tensor
    evidence: Tensor


@dataclass(frozen=True)
class Product:
    """The data of one component: features, and per row its weight and log base measure (or None)."""

    features: Features
    layouts: tuple[SiteLayout, ...]
    weight: Tensor | None  # (N,)
    base: Tensor | None  # (N,)

    @property
    def num_chunks(self) -> int:
        """Chunks of rows."""
        return math.ceil(self.features.num_rows / self.features.chunk)

    def sums(self, prepared: Sequence[Prepared]) -> list[Sums]:
        """One `Sums` per start; all must evaluate the same sites directly."""
        w, sites = self._stacked(prepared)
        w = w.to(self.features.dtype)
        starts, rows = len(prepared), w.shape[0]
        most, height = rows_of_cells(rows, w.device), padded(rows)
        memory = w.new_empty(height * min(most, self.features.chunk))  # which stays in cache
        part = w.new_empty(self.features.num_features, height)
        totals: Tensor | None = None
        evidence: Tensor | None = None
        for first, whole in self.features.chunks():
            for begin in range(0, whole.shape[1], most):
                phi, row = whole[:, begin : begin + most], first + begin
                end = row + phi.shape[1]
                weight = None if self.weight is None else self.weight[row:end]
                whole_data = phi.shape[1] == self.features.num_rows
                if whole_data:
                    r, lse = softmax(self._log_joint(w, sites, phi, row), starts, weight)
                    own = (r @ phi.mT).mT  # states first, as what reads it does
                else:
                    r = memory[: height * phi.shape[1]].view(height, -1)
                    self._log_joint(w, sites, phi, row, out=r[:rows])
                    r[rows:] = 0.0
                    lse = softmax_(r[:rows], starts, weight)
                    own = product_(phi, r.mT, part)
                found = self._evidence(lse.double(), row, weight)
                if totals is None or evidence is None:
                    totals, evidence = own.to(torch.float64, copy=not whole_data), found
                else:  # in float64: the sum over chunks keeps its digits
                    totals += own
                    evidence += found
        assert totals is not None and evidence is not None
        split = zip(totals.mT[:rows].chunk(starts), evidence.unbind(0), strict=True)
        return [Sums(own, found) for own, found in split]

    def log_joint(self, prepared: Sequence[Prepared]) -> Tensor:
        """log p(x_n, z = j) of the first rows without their base measure, (R·J, n)."""
        _, phi = next(self.features.chunks())
        return self._log_joint(*self._stacked(prepared), phi[:, :FIRST_ROWS], 0)

    def _stacked(self, prepared: Sequence[Prepared]) -> tuple[Tensor, list[tuple[SiteLayout, Normal]]]:
        first = prepared[0]
        w = first.coefficients if len(prepared) == 1 else torch.cat([p.coefficients for p in prepared])
        return w, [(self.layouts[i], _stacked(prepared, place)) for place, i in enumerate(first.direct)]

    @staticmethod
    def _log_joint(
        w: Tensor, sites: list[tuple[SiteLayout, Normal]], phi: Tensor, begin: int, out: Tensor | None = None
    ) -> Tensor:
        """L (R·J, n), in `out` if it is given."""
        if w.shape[1] == len(phi):
            log_joint = torch.mm(w, phi) if out is None else product_(w, phi, out)
        else:
            log_joint = w.expand(-1, phi.shape[1])
            log_joint = log_joint if out is None else out.copy_(log_joint)
        for layout, own in sites:
            density = centered_log_density(layout, own, begin, begin + phi.shape[1])
            log_joint = log_joint + density if out is None else log_joint.add_(density)
        return log_joint

    def _evidence(self, lse: Tensor, begin: int, weight: Tensor | None) -> Tensor:
        """The evidence of a chunk, (R, 2)."""
        if self.base is not None:
            lse = lse + self.base[begin : begin + lse.shape[-1]]
        if weight is not None:
            lse = torch.where(weight == 0, lse.new_zeros(()), lse * weight)
        return torch.stack([lse.sum(-1), lse.abs().sum(-1)], -1)


def _stacked(prepared: Sequence[Prepared], place: int) -> Normal:
    """What direct.py prepared for one site, over the joint states of all starts."""
    begin = place * NUM_PREPARED
    parts = zip(*(p.normal[begin : begin + NUM_PREPARED] for p in prepared), strict=True)
    loc, factor, normalizer = (part[0] if len(part) == 1 else torch.cat(part) for part in parts)
    return loc, factor, normalizer
