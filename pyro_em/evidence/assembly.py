"""From rows of normal sites to a Gaussian system: h = -Σ Tᵀw, J = Σ TᵀT, summed over the rows of each element.

A row's residual is w + Σ_k T_k z_k[i_k] with i_k the element of column k that the row reads (columns.py). Rows of
the latents' own plate are summed in place, rows of a sibling plate are added to the element that they read.

Letters: m plate-like dims (atoms' dim first); K columns that a site reads; P cells of a row; n_A elements and k
columns of A; n_B entries of B (blocks.py). Rows have the layout (states of discrete latents, m dims).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.evidence.blocks import System
from pyro_em.evidence.columns import Column, Index


@dataclass(frozen=True)
class Reading:
    """What one site reads: `columns` (those of A first, `num_a` of them, at `positions` in A).

    `index` is the element of A that each row reads (None: its own); `entries` (rows + (K_B,)) the entries of B.
    """

    site: str
    columns: tuple[Column, ...]
    num_a: int
    positions: Tensor
    index: Index
    entries: Tensor | None


@dataclass(frozen=True)
class Geometry:
    """Where the unknowns stand: `layout` (m sizes, 1 where A has no plate), columns of A, offsets of B's columns."""

    layout: tuple[int, ...]
    columns_a: tuple[Column, ...]
    offsets_b: Mapping[Column, int]
    num_b: int

    @property
    def elements(self) -> int:
        return int(torch.Size(self.layout).numel())


@dataclass(frozen=True)
class Rows:
    """One site at some parameters: residual w (rows, P) at z = 0, tangents T (rows, P, K), log-normaliser (rows).

    `sizes` are the full sizes of the m dims: T has size 1 along dims where it is constant.
    """

    reading: Reading
    w: Tensor
    tangents: Tensor
    log_norm: Tensor
    sizes: tuple[int, ...]

    def at(self, z_a: Tensor, z_b: Tensor | None, geometry: Geometry) -> Tensor:
        """Residuals at latent values z_A (layout + (k,)) and z_B (n_B,)."""
        r, total = self.reading, self.w
        if r.num_a:
            own = z_a[..., r.positions]
            if r.index is not None:
                flat = own.reshape(*own.shape[: own.dim() - 1 - len(self.sizes)], -1, own.shape[-1])
                own = flat.index_select(-2, r.index.clamp(min=0).expand(self.sizes).reshape(-1))
                own = own.reshape(*own.shape[:-2], *self.sizes, own.shape[-1])
            total = total + (self.tangents[..., : r.num_a] @ own.unsqueeze(-1)).squeeze(-1)
        if r.entries is not None and z_b is not None:
            total = total + (self.tangents[..., r.num_a :] @ z_b[r.entries].unsqueeze(-1)).squeeze(-1)
        return total


def to_elements(x: Tensor, trailing: int, rows: Rows, geometry: Geometry) -> Tensor:
    """Sum a quantity of the rows (any `trailing` dims) over the rows of each element of A: the layout's shape."""
    m = len(geometry.layout)
    if rows.reading.index is None:
        for d in range(-m, 0):
            i = x.dim() - trailing + d
            if geometry.layout[d] == 1 and rows.sizes[d] > 1:
                x = x * rows.sizes[d] if x.shape[i] == 1 else x.sum(i, keepdim=True)
        return x
    lead, tail = x.shape[: x.dim() - trailing - m], x.shape[x.dim() - trailing :]
    flat = x.expand(*lead, *rows.sizes, *tail).reshape(*lead, -1, *tail)
    index = rows.reading.index.clamp(min=0).expand(rows.sizes).reshape(-1)
    out = flat.new_zeros((*lead, geometry.elements, *tail)).index_add(len(lead), index, flat)
    return out.reshape(*lead, *geometry.layout, *tail)


def gradient(all_rows: Sequence[Rows], residuals: Sequence[Tensor], geometry: Geometry) -> tuple[Tensor, Tensor | None]:
    """h = -Σ Tᵀw at given residuals: layout + (k,), and (n_B,)."""
    k = len(geometry.columns_a)
    linear: Tensor | None = None
    linear_b = residuals[0].new_zeros(geometry.num_b) if geometry.num_b else None
    for rows, w in zip(all_rows, residuals, strict=True):
        h = -(rows.tangents.mT @ w.unsqueeze(-1)).squeeze(-1)
        n = rows.reading.num_a
        if n:
            own = _embed(to_elements(h[..., :n], 1, rows, geometry), rows.reading.positions, k, 1)
            linear = own if linear is None else linear + own
        if linear_b is not None and rows.reading.entries is not None:
            values = h[..., n:]
            entries = rows.reading.entries.expand(*rows.sizes, values.shape[-1])
            linear_b = linear_b.index_add(0, entries.reshape(-1), values.expand(entries.shape).reshape(-1))
    assert linear is not None
    return linear.expand(*linear.shape[: linear.dim() - 1 - len(geometry.layout)], *geometry.layout, k), linear_b


def assemble(all_rows: Sequence[Rows], geometry: Geometry) -> System:
    """The system of all sites, at z = 0."""
    k, n_b = len(geometry.columns_a), geometry.num_b
    precision: Tensor | None = None
    zero = all_rows[0].w
    cross = zero.new_zeros(geometry.elements * k * n_b) if n_b else None
    common = zero.new_zeros(n_b * n_b) if n_b else None
    for rows in all_rows:
        r = rows.reading
        hessian = rows.tangents.mT @ rows.tangents
        n = r.num_a
        if n:
            own = _embed(to_elements(hessian[..., :n, :n], 2, rows, geometry), r.positions, k, 2)
            precision = own if precision is None else precision + own
        if cross is None or common is None or r.entries is None:
            continue
        entries = r.entries.expand(*rows.sizes, r.entries.shape[-1]).reshape(-1, r.entries.shape[-1])
        full = hessian.expand(*rows.sizes, *hessian.shape[-2:]).reshape(-1, *hessian.shape[-2:])
        both = entries.unsqueeze(-1) * n_b + entries.unsqueeze(-2)
        common = common.index_add(0, both.reshape(-1), full[:, n:, n:].reshape(-1))
        if n:
            element = _elements_of(rows, geometry)
            at = (element[:, None, None] * k + r.positions[:, None]) * n_b + entries.unsqueeze(-2)
            cross = cross.index_add(0, at.reshape(-1), full[:, :n, n:].reshape(-1))
    assert precision is not None
    linear, linear_b = gradient(all_rows, [rows.w for rows in all_rows], geometry)
    if cross is None or common is None:
        return System(linear, precision)
    return System(linear, precision, linear_b, cross.reshape(*geometry.layout, k, n_b), common.reshape(n_b, n_b))


def _elements_of(rows: Rows, geometry: Geometry) -> Tensor:
    index = rows.reading.index
    if index is None:
        index = torch.arange(geometry.elements).reshape(geometry.layout)
    return index.clamp(min=0).expand(rows.sizes).reshape(-1)


def _embed(x: Tensor, positions: Tensor, size: int, dims: int) -> Tensor:
    """Put the columns that a site reads at their places among all `size` columns of A."""
    if len(positions) == size and torch.equal(positions, torch.arange(size)):
        return x
    for d in range(1, dims + 1):
        shape = list(x.shape)
        shape[-d] = size
        x = x.new_zeros(shape).index_copy(x.dim() - d, positions, x)
    return x
