"""The forward pass of chains in log-space: filtered states and one-step evidences, step by step.

    α_t(j) = p(s_t = j | x_0..x_t) ∝ exp u_t(j) Σ_i α_{t-1}(i) exp a_t(i, j),     p(x_t | x_0..x_{t-1}) = its sum

for potentials that are log-densities of a directed model, each step normalised given the one before. Sequential
over T steps, batched over B chains of S states. A step at which nothing is possible has evidence -inf; the states
after it are all zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.evidence.ring import logsumexp


def filtered(start: Tensor, unary: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Filtered distributions (T, B, S) and log p(x_t | x_0..x_{t-1}), (T, B), of T = N + 1 steps.

    :param start: log-potential of the first state, (B, S).
    :param unary: of the states after it, (N, B, S).
    :param pair: of neighbours, (N or 1, B or 1, S, S), from rows to columns.
    """
    states: list[Tensor] = []
    evidences: list[Tensor] = []
    log_joint = start
    for t in range(len(unary) + 1):
        if t:
            step = pair[0 if len(pair) == 1 else t - 1]
            log_joint = logsumexp((states[-1].unsqueeze(-1) + step).mT) + unary[t - 1]
        evidence = logsumexp(log_joint)
        possible = evidence.isfinite().unsqueeze(-1)
        shift = torch.where(possible, evidence.unsqueeze(-1), 0.0)
        states.append(torch.where(possible, log_joint - shift, -torch.inf))
        evidences.append(evidence)
    return torch.stack(states).exp(), torch.stack(evidences)


def predicted(last: Tensor, pair: Tensor, num_steps: int) -> Tensor:
    """Distributions of the states 1..num_steps steps after `last` (B, S), under one table (B or 1, S, S) of log p."""
    table, found = pair.exp(), []
    for _ in range(num_steps):
        last = (last.unsqueeze(-2) @ table).squeeze(-2)
        found.append(last)
    return torch.stack(found)
