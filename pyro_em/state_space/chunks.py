"""What chunks of steps of a linear-Gaussian chain do to an unknown state at their beginning; differentiable, exact.

Time is cut into M chunks of L steps that run side by side in one batch (Särkkä and García-Fernández 2021, eq. 10-14):

    x_end | x, y ~ N(Φ x + f, F),        log p(y_chunk | x) = c + ηᵀx - ½ xᵀJx

(a filter from a known start, with the sensitivity Φ carried along). A short recursion over the M chunks then
gives the exact state at every boundary and the log-evidence. There is no burn-in and nothing to certify.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.state_space.linear_gaussian import Chain, symmetric
from pyro_em.state_space.steps import Steps, predict, update

BATCH = 32  # sequences side by side from which on more chunks would not make steps cheaper


@dataclass(frozen=True)
class Action:
    """What a chunk does to a state x at its beginning; see the module docstring."""

    Phi: Tensor
    f: Tensor
    F: Tensor
    J: Tensor
    eta: Tensor
    c: Tensor

    def on(self, m: Tensor, P: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Chunk k after x ~ N(m, P): (x | chunk) mean and covariance, x_end mean and covariance, log-evidence."""
        J, eta, Phi = self.J[:, k], self.eta[:, k], self.Phi[:, k]
        system = torch.eye(P.shape[-1], dtype=P.dtype) + P @ J
        inner = symmetric(torch.linalg.solve(system, P))
        g = eta - (J @ m.unsqueeze(-1)).squeeze(-1)
        inner_g = (inner @ g.unsqueeze(-1)).squeeze(-1)
        evidence = self.c[:, k] + 0.5 * ((eta + g) * m).sum(-1) + 0.5 * (g * inner_g).sum(-1)
        evidence = evidence - 0.5 * torch.linalg.slogdet(system)[1]
        start = m + inner_g
        end = (Phi @ start.unsqueeze(-1)).squeeze(-1) + self.f[:, k]
        return start, inner, end, symmetric(Phi @ inner @ Phi.mT + self.F[:, k]), evidence


def act(steps: Steps, S: int, M: int, L: int, D: int, begin: int) -> Action:
    """Actions of M chunks of L steps; `begin` is the first of these steps (for errors)."""
    y = steps.y
    eye = torch.eye(D, dtype=y.dtype).expand(S, M, D, D)
    Phi, f, F = eye, y.new_zeros(S, M, D), y.new_zeros(S, M, D, D)
    J, eta, c = y.new_zeros(S, M, D, D), y.new_zeros(S, M, D), y.new_zeros(S, M)
    for l in range(L):
        s = steps.step(l)
        f, F = predict(s, f, F)
        Phi = s.A @ Phi
        e = s.y - s.d - (s.C @ f.unsqueeze(-1)).squeeze(-1)
        f, F, density, keep, factor = update(s, f, F, begin + l)
        seen = torch.linalg.solve_triangular(factor, s.C @ Phi, upper=False)
        z = torch.linalg.solve_triangular(factor, e.unsqueeze(-1), upper=False)
        J = J + seen.mT @ seen
        eta = eta + (seen.mT @ z).squeeze(-1)
        c = c + density
        Phi = keep @ Phi
    return Action(Phi, f, F, J, eta, c)


def cut(S: int, n: int) -> tuple[int, int]:
    """Number and length of chunks for n steps of S sequences: about 3L + 2M small operations in a row."""
    if n < 48 or S >= BATCH:
        return 0, 1
    best = min(range(4, n + 1), key=lambda L: 3 * L + 2 * (n // L) + 3 * (n % L))
    return n // best, best


def begin(chain: Chain, steps: Steps, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_0 given y_0: mean (S, 1, D), covariance, log density (S, 1)."""
    D = chain.mean.shape[-1]
    m = chain.mean.expand(S, D).unsqueeze(1)
    P = chain.covariance.expand(S, D, D).unsqueeze(1)
    m, P, density, _, _ = update(steps.step(0), m, P, 0)
    return m, P, density.expand(S, 1)
