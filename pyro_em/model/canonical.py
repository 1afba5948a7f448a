"""Arguments whose canonical coordinate is a parameter: logits log w or logit p, the Cholesky factor of a covariance S.

    link(argument[cell]) = θ[row],      link = softmax, sigmoid, L ↦ L Lᵀ

The coordinate ties the entries of a row (softmax(log w) depends on all of w, through a sum that is 1), so that index
codes do not see the rows: they are found by their values. At the second point the free entries of a parameter are
random, which tells its rows apart; what is found there has to hold at the first point too. Two rows that are equal at
both have no free entries, and it does not matter which of them is taken. Zeros (logits of -inf) are values as any.

Not handled: multiples and other functions of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.families.base import IDENTITY, NORMALISED, Link

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}  # of a link and its inverse


def rows_taken(
    link: Link, event_dim: int, arguments: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]
) -> Tensor | None:
    """Entries of a parameter that the argument's coordinate consists of, -1 where it is fixed; None if of none.

    :param arguments: at two points, the second one random; :param values: of the parameter there.

    >>> from pyro_em.families import SOFTMAX
    >>> w = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.125, 0.875], [0.625, 0.375]])
    >>> rows_taken(SOFTMAX, 1, (w[0].flip(0).log(), w[1].flip(0).log()), w)
    tensor([[2, 3],
            [0, 1]])
    """
    if link in (IDENTITY, NORMALISED):
        return None
    found, found2 = (link.to_canonical(x.detach().double()) for x in arguments)
    split = found.dim() - event_dim
    lead, event = found.shape[:split], found.shape[split:]
    theta, theta2 = values
    if theta.shape[theta.dim() - event_dim :] != event or theta.dtype not in ROUNDING:
        return None
    size, rounding = event.numel(), ROUNDING[theta.dtype]
    cells, cells2, rows, rows2 = (x.detach().double().reshape(-1, size) for x in (found, found2, theta, theta2))
    row = _nearest(cells2, rows2)
    taken = _close(cells, rows[row], rounding) & _close(cells2, rows2[row], rounding)
    fixed = (cells == cells2).all(-1)
    if not bool((taken | fixed).all()) or not bool(taken.any()):
        return None
    index = row.unsqueeze(-1) * size + torch.arange(size, device=row.device)
    return torch.where(taken.unsqueeze(-1), index, -1).reshape((*lead, *event))


def _nearest(cells: Tensor, rows: Tensor) -> Tensor:
    """For each cell the row with the nearest projection: one sort, whatever the number of cells."""
    weights = torch.linspace(1, 2, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    keys, order = (rows @ weights).sort()
    wanted = cells @ weights
    above = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    below = (above - 1).clamp(min=0)
    return order[torch.where((keys[above] - wanted).abs() < (keys[below] - wanted).abs(), above, below)]


def _close(a: Tensor, b: Tensor, rounding: float) -> Tensor:
    return torch.isclose(a, b, rtol=rounding, atol=rounding).all(-1)
