"""Linear-Gaussian state-space models for the laws, and their oracle: the joint normal of all states and data.

Nothing here filters or smooths. The states z_0..z_T and observations y_1..y_T of a sequence are one big normal
vector; its covariance is written down, conditioned by a dense solve, and expectations of quadratic forms are
taken under it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints

Params = Mapping[str, Tensor]
definite = constraints.positive_definite


@dataclass(frozen=True)
class Dense:
    """One sequence: z_0 ~ N(m, P), z_t = F_tᵀ z_{t-1} + b_t + N(0, Q_t), y_t = H_tᵀ z_t + d_t + N(0, R_t)."""

    m: Tensor
    P: Tensor
    F: Tensor  # (T, D, D), rows are old states, as in Pyro
    b: Tensor  # (T, D)
    Q: Tensor
    H: Tensor  # (T, D, O)
    d: Tensor
    R: Tensor

    @classmethod
    def of(cls, T: int, m: Any, P: Any, F: Any, b: Any, Q: Any, H: Any, d: Any, R: Any) -> Dense:
        """Arguments without a time dim are repeated."""

        def timed(x: Tensor, events: int) -> Tensor:
            return x if x.dim() > events else x.expand(T, *x.shape)

        return cls(m, P, timed(F, 2), timed(b, 1), timed(Q, 2), timed(H, 2), timed(d, 1), timed(R, 2))

    def joint(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and covariance of the states (z_0..z_T in a row), and the map and offset to the observations."""
        T, D = self.b.shape
        mean, cov = [self.m], torch.zeros((T + 1) * D, (T + 1) * D)
        rows = [[self.P]]
        for t in range(T):
            mean.append(mean[-1] @ self.F[t] + self.b[t])
            row = [self.F[t].mT @ block for block in rows[-1]]
            row.append(self.F[t].mT @ rows[-1][-1] @ self.F[t] + self.Q[t])
            # Cov(z_{t+1}, z_s) = Fᵀ Cov(z_t, z_s) for s <= t
            rows.append(row)
        blocks = [[rows[i][j] if j <= i else rows[j][i].mT for j in range(T + 1)] for i in range(T + 1)]
        cov = torch.cat([torch.cat(row, 1) for row in blocks])
        H = torch.cat([torch.zeros(T * self.d.shape[-1], D), torch.block_diag(*(h.mT for h in self.H))], 1)
        return torch.cat(mean), cov, H, self.d.reshape(-1)

    def observed(self) -> MultivariateNormal:
        mean, cov, H, d = self.joint()
        return MultivariateNormal(H @ mean + d, H @ cov @ H.mT + torch.block_diag(*self.R), validate_args=False)

    def posterior(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of all states given the sequence."""
        mean, cov, H, d = self.joint()
        S = H @ cov @ H.mT + torch.block_diag(*self.R)
        gain = torch.linalg.solve(S, H @ cov).mT
        return mean + gain @ (y.reshape(-1) - H @ mean - d), cov - gain @ H @ cov

    def expected_log_joint(self, y: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
        """E log p(z, y) at these arguments for z ~ N(mean, cov); coordinates without noise are left out."""
        T, D = self.b.shape
        n = (T + 1) * D
        eye = torch.eye(n).reshape(T + 1, D, n)

        def term(L: Tensor, c: Tensor, noise: Tensor) -> Tensor:
            keep = noise.diagonal() > 0
            L, c, noise = L[keep], c[keep], noise[keep][:, keep]
            r = L @ mean + c
            second = torch.outer(r, r) + L @ cov @ L.mT
            log_det = torch.logdet(2 * torch.pi * noise)
            return -0.5 * (log_det + (torch.linalg.inv(noise) * second).sum())

        total = term(eye[0], -self.m, self.P)
        for t in range(T):
            total = total + term(eye[t + 1] - self.F[t].mT @ eye[t], -self.b[t], self.Q[t])
            total = total + term(-self.H[t].mT @ eye[t + 1], y[t] - self.d[t], self.R[t])
        return total


@dataclass(frozen=True)
class Case:
    """A model with its data (S, T, O), a start, and what its parameters mean: `dense(params)` is the oracle."""

    name: str
    model: Callable[..., Any]
    data: Tensor
    init: Params
    dense: Callable[[Params], Dense]
    support: Mapping[str, Any] = field(default_factory=dict)
    log_prior: Callable[[Params], Tensor] | None = None
    copies: bool = False  # a state is a copy of another: the states have no joint density
    attained: bool = False  # the maximum is identified and at variances above 0, on so few steps

    def log_evidence(self, params: Params) -> Tensor:
        own = self.dense(params).observed()
        return torch.stack([own.log_prob(y.reshape(-1)) for y in self.data]).sum()

    def objective(self, params: Params) -> Tensor:
        value = self.log_evidence(params)
        return value if self.log_prior is None else value + self.log_prior(params)

    def q(self, old: Params) -> Callable[[Params], Tensor]:
        """θ -> E[log p(z, y | θ) | y, old] (+ log p(θ))."""
        before = self.dense(old)
        posteriors = [tuple(x.detach() for x in before.posterior(y)) for y in self.data]

        def at(params: Params) -> Tensor:
            own = self.dense(params)
            parts = [own.expected_log_joint(y, *p) for y, p in zip(self.data, posteriors, strict=True)]
            value = torch.stack(parts).sum()
            return value if self.log_prior is None else value + self.log_prior(params)

        return at
