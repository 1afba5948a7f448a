"""One step of a Kalman filter on batches of chains, and the arguments of all steps laid out for it.

Updates are in Joseph's form, a sum of squares, so covariances stay symmetric and positive semidefinite. Observed
cells that are not seen get a row of zeros in C and a unit variance of their own in R: they then have no influence
and contribute only a constant, which is not counted. A singular Q, or P, is fine; a singular covariance of an
observed step has no density, and raises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.state_space.linear_gaussian import Chain, outer, symmetric

LOG_2PI = math.log(2 * math.pi)
SINGULAR = 1e-14  # smallest squared pivot of a correlation matrix that is inverted as it stands


class SingularInnovation(ArithmeticError):
    """The covariance of an observed step given the past is not positive definite; `step` says where."""

    def __init__(self, step: int) -> None:
        super().__init__(f"singular at step {step}")
        self.step = step


@dataclass(frozen=True)
class Steps:
    """Arguments of steps, with dims (S|1, M|1, L|1) in front; `step` cuts one step out of every chunk."""

    A: Tensor
    b: Tensor
    Q: Tensor
    C: Tensor
    d: Tensor
    R: Tensor
    y: Tensor
    cells: Tensor  # number of cells seen

    def step(self, l: int) -> Steps:
        return Steps(*(x[:, :, l if x.shape[2] > 1 else 0] for x in vars(self).values()))

    def cut(self, begin: int, num: int, length: int) -> Steps:
        """Steps begin .. begin + num * length of an uncut set (M = 1), in chunks."""

        def of(x: Tensor) -> Tensor:
            if x.shape[2] == 1:
                return x
            return x[:, 0, begin : begin + num * length].unflatten(1, (num, length))

        return Steps(*(of(x) for x in vars(self).values()))


def prepared(chain: Chain) -> Steps:
    """All T steps in one chunk. The first has no transition: A, b, Q there are placeholders."""
    C, d, R, y = chain.C, chain.d, chain.R, chain.y
    _, T, P = y.shape
    if chain.seen is None:
        cells = torch.full((1, 1), float(P), dtype=y.dtype)
    else:
        seen = chain.seen.expand(len(chain.seen), T, P).to(y.dtype)
        C, d = C * seen.unsqueeze(-1), d * seen
        R = R * outer(seen, seen) + torch.diag_embed(1 - seen)
        y = torch.where(chain.seen, y, torch.zeros_like(y))
        cells = seen.sum(-1)

    def shifted(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x], 1) if x.shape[1] == T - 1 > 1 else x[:, :1]

    parts = (shifted(chain.A), shifted(chain.b), shifted(chain.Q), C, d, R, y, cells)
    return Steps(*(x.unsqueeze(1) for x in parts))


def update(s: Steps, m: Tensor, P: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Condition on one step's data: (mean, covariance, log density, I - KC, whitened C P-root for sensitivities)."""
    CP = s.C @ P
    factor, failed = torch.linalg.cholesky_ex(symmetric(CP @ s.C.mT + s.R))
    if bool(failed.any()):
        raise SingularInnovation(first)
    e = s.y - s.d - (s.C @ m.unsqueeze(-1)).squeeze(-1)
    K = torch.cholesky_solve(CP, factor).mT
    z = torch.linalg.solve_triangular(factor, e.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    density = -0.5 * (z * z).sum(-1) - log_det - 0.5 * LOG_2PI * s.cells
    keep = torch.eye(P.shape[-1], dtype=P.dtype) - K @ s.C
    P = symmetric(keep @ P @ keep.mT + K @ s.R @ K.mT)
    return m + (K @ e.unsqueeze(-1)).squeeze(-1), P, density, keep, factor


def predict(s: Steps, m: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance after the step's transition."""
    return (s.A @ m.unsqueeze(-1)).squeeze(-1) + s.b, symmetric(s.A @ P @ s.A.mT + s.Q)


def gain(P: Tensor, A: Tensor, predicted: Tensor) -> Tensor:
    """P Aᵀ predicted⁻¹, where the predicted covariance A P Aᵀ + Q may be singular (states without noise)."""
    scale = predicted.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    correlation = predicted / outer(scale, scale)
    right = A @ P / scale.unsqueeze(-1)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    small = factor.diagonal(dim1=-2, dim2=-1).amin(-1) ** 2 < SINGULAR
    if bool((small | (failed > 0)).any()):
        inverse = torch.linalg.pinv(correlation, rtol=SINGULAR, hermitian=True)
        return ((inverse @ right) / scale.unsqueeze(-1)).mT
    return (torch.cholesky_solve(right, factor) / scale.unsqueeze(-1)).mT


def rts(
    m: Tensor, P: Tensor, A: Tensor, m_next: Tensor, P_next: Tensor, Q: Tensor, s: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed x and Cov(x', x): (m, P) filtered, x' = A x + N(·, Q) predicted (m_next, P_next), smoothed (s, V)."""
    G = gain(P, A, P_next)
    keep = torch.eye(P.shape[-1], dtype=P.dtype) - G @ A
    mean = m + (G @ (s - m_next).unsqueeze(-1)).squeeze(-1)
    covariance = symmetric(keep @ P @ keep.mT + G @ (Q + V) @ G.mT)
    return mean, covariance, V @ G.mT
