"""The forward pass of chains in log-space: filtered states and one-step evidences.

    α_t(j) = p(s_t = j | x_0..x_t) ∝ exp u_t(j) Σ_i α_{t-1}(i) exp a_t(i, j),     p(x_t | x_0..x_{t-1}) = its sum

for potentials that are log-densities of a directed model, each step normalised given the one before. B chains of
S states and T steps, in blocks of time (two_level.py). A step at which nothing is possible has evidence -inf; the
states after it are all zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.evidence.ring import logsumexp
from pyro_em.evidence.two_level import LOG, Messages

CELLS = 2**22  # of the tables of pairs that are held at once


def filtered(start: Tensor, unary: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Filtered distributions (T, B, S) and log p(x_t | x_0..x_{t-1}), (T, B), of T = N + 1 steps.

    :param start: log-potential of the first state, (B, S).
    :param unary: of the states after it, (N, B, S).
    :param pair: of neighbours, (N or 1, B or 1, S, S), from rows to columns.
    """
    if not len(unary):
        return torch.softmax(start, -1).nan_to_num(0.0).unsqueeze(0), logsumexp(start).unsqueeze(0)
    messages, _ = Messages(LOG, start, unary, pair).forward_and_backward(backward=False)
    total = logsumexp(messages).unsqueeze(-1)
    states = torch.where(total.isfinite(), messages - torch.where(total.isfinite(), total, 0.0), -torch.inf)
    evidences = [logsumexp(start).unsqueeze(0)]
    chunk = max(1, CELLS // (start.numel() * start.shape[-1]))
    for begin in range(0, len(unary), chunk):
        end = min(begin + chunk, len(unary))
        step = pair if len(pair) == 1 else pair[begin:end]
        evidences.append(logsumexp(logsumexp((states[begin:end].unsqueeze(-1) + step).mT) + unary[begin:end]))
    return states.exp(), torch.cat(evidences)


def predicted(last: Tensor, pair: Tensor, num_steps: int) -> Tensor:
    """Distributions of the states 1..num_steps steps after `last` (B, S), under one table (B or 1, S, S) of log p."""
    table, found = pair.exp(), []
    for _ in range(num_steps):
        last = (last.unsqueeze(-2) @ table).squeeze(-2)
        found.append(last)
    return torch.stack(found)
