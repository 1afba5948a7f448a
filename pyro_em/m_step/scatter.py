"""Kernels over the cells of an argument, summed onto the entries of the parameter that the cells take.

    K_i(θ_i) = Σ_c 1[index_c = i] K_c(θ_i)

Which cell takes which entry does not change during a fit: a plan is made at the first question and kept with the use
(model/use.py). Where every cell has an entry of its own, in their order, nothing moves.

Shapes: cells are the batch dims of the argument; an entry is one number, a row or a matrix of the parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.kernels import FlatKernel, IncompatibleKernels, Kernel
from pyro_em.model.use import Use


def collected(kernel: Kernel, index: Tensor, use: Use, coordinate: Tensor) -> Kernel:
    """A kernel over cells as one over the entries of the parameter (in its canonical coordinate).

    :param index: entry of the parameter at every cell, over the event dims too; -1 for none.
    :raises IncompatibleKernels: where an event (row, matrix) of a cell is not one of the parameter's.
    """
    if isinstance(kernel, FlatKernel):
        return kernel
    split = coordinate.dim() - kernel.event_dim
    lead, event = coordinate.shape[:split], coordinate.shape[split:]
    count = lead.numel()
    key = (kernel.event_dim, index.shape)
    if key not in use.plans:
        use.plans[key] = _scatter_plan(index, event, kernel.event_dim, use, count)
    plan = use.plans[key]
    if not plan.identity:
        at = coordinate.reshape(-1, *event)[plan.rows.clamp(min=0)]
    else:
        at = coordinate if plan.rows.shape == lead else coordinate.reshape(plan.rows.shape + event)
    return kernel.collect(_Scatter(plan, lead, count), at, coordinate)


@dataclass(frozen=True)
class _ScatterPlan:
    """Rows that the cells of one use go to; computed once, since it depends on the index alone."""

    rows: Tensor
    kept: Tensor
    kept_rows: Tensor
    identity: bool


@dataclass(frozen=True)
class _Scatter:
    """`lead` are the dims of the parameter's entries, `count` is their number (kernels/base.py)."""

    plan: _ScatterPlan
    lead: torch.Size
    count: int

    def __call__(self, coefficient: Tensor, event_dim: int, /) -> Tensor:
        plan = self.plan
        cells = coefficient.shape[: coefficient.dim() - event_dim]
        if plan.identity and cells == self.lead:
            return coefficient
        tail = coefficient.shape[len(cells) :]
        rank = max(len(cells), plan.rows.dim())
        if len(cells) < rank:
            coefficient = coefficient.reshape((1,) * (rank - len(cells)) + tuple(coefficient.shape))
        target = (1,) * (rank - plan.rows.dim()) + tuple(plan.rows.shape)
        gone = [i for i in range(rank) if target[i] == 1 and coefficient.shape[i] > 1]
        if gone:
            coefficient = coefficient.sum(gone, keepdim=True)
        coefficient = coefficient.expand(target + tuple(tail))
        if plan.identity:
            return coefficient.reshape((*self.lead, *tail))
        result = coefficient.new_zeros((self.count, *tail))
        result.index_add_(0, plan.kept_rows, coefficient.reshape(-1, *tail).index_select(0, plan.kept))
        return result.reshape((*self.lead, *tail))

    def keeps(self, kernel: Kernel) -> bool:
        if not self.plan.identity:
            return False
        pairs = zip(kernel.coefficients, kernel.event_dims, strict=True)
        return all(c.shape[: c.dim() - ndim] == self.lead for c, ndim in pairs)

    def separates(self, cells: torch.Size) -> bool:
        rows = self.plan.rows.shape
        same = (1,) * (len(cells) - len(rows)) + tuple(rows)[max(0, len(rows) - len(cells)) :]
        return self.plan.identity and all(size == 1 or size == own for size, own in zip(cells, same, strict=True))


def _scatter_plan(index: Tensor, event: torch.Size, event_dim: int, use: Use, count: int) -> _ScatterPlan:
    rows = _row_index(index, event, event_dim, use)
    flat = rows.reshape(-1)
    kept = (flat >= 0).nonzero().squeeze(-1)
    identity = flat.numel() == count and torch.equal(flat, torch.arange(count))
    return _ScatterPlan(rows, kept, flat[kept], identity)


def _row_index(index: Tensor, event: torch.Size, event_dim: int, use: Use) -> Tensor:
    """Number of the row (vector, matrix) of the parameter that each cell takes whole, -1 for none."""
    if event_dim == 0:
        return index
    where = f"{use.site}.{use.slot}"
    if index.shape[index.dim() - event_dim :] != event:
        raise IncompatibleKernels(f"{where}: it takes parts of the parameter's last dims")
    numel = event.numel()
    flat = index.reshape(*index.shape[: index.dim() - event_dim], numel)
    rows = torch.div(flat[..., 0], numel, rounding_mode="floor")
    rows = torch.where(flat[..., 0] < 0, torch.full_like(rows, -1), rows)
    whole = rows.unsqueeze(-1) * numel + torch.arange(numel)
    whole = torch.where(rows.unsqueeze(-1) < 0, torch.full_like(whole, -1), whole)
    if not torch.equal(whole, flat):
        raise IncompatibleKernels(f"{where}: it mixes entries of different rows of the parameter")
    return rows
