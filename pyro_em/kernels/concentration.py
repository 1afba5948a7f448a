"""Concentrations of Dirichlet rows: n (log Γ(Σα) − Σ_k log Γ(α_k)) + Σ_k L_k α_k, concave in α.

`count` n is the number of rows, `logs` L = Σ log θ_k their sums of logarithms (or the posterior's expectations). The
maximum is where ψ(α_k) − ψ(Σα) = L_k / n. Newton's method with a Hessian that is diagonal plus a constant takes O(K) a
step (Minka 2000, "Estimating a Dirichlet distribution", section 1); it starts from two of his fixed-point steps behind
the value for large Σα, from where at most 13 steps are quadratic for Σα between 1e-3 and 1e8.

There is no finite maximum unless Σ_k exp(L_k / n) < 1 (rows that are all alike): α is infinite then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_em.kernels.base import Kernel

STEPS = 20  # of Newton's method


@dataclass(frozen=True, eq=False)
class DirichletKernel(Kernel):
    """`count` has shape U, `logs` U + (K,).

    >>> logs = torch.digamma(torch.tensor([1.0, 3.0])) - torch.digamma(torch.tensor(4.0))
    >>> DirichletKernel(torch.tensor(5.0), 5 * logs).argmax().round(decimals=4)
    tensor([1., 3.])
    """

    count: Tensor
    logs: Tensor

    names: ClassVar[tuple[str, ...]] = ("count", "logs")

    @property
    def event_dim(self) -> int:
        return 1

    @property
    def event_dims(self) -> tuple[int, ...]:
        return (0, 1)

    @property
    def form(self) -> str:
        return "n log B(a)^-1 + sum_k L_k a_k"

    def value(self, theta: Tensor) -> Tensor:
        norm = torch.lgamma(theta.sum(-1)) - torch.lgamma(theta).sum(-1)
        return self.count * norm + (self.logs * theta).sum(-1)

    def gradient(self, theta: Tensor) -> Tensor:
        slope = torch.digamma(theta.sum(-1, keepdim=True)) - torch.digamma(theta)
        return self.count.unsqueeze(-1) * slope + self.logs

    def argmax(self) -> Tensor:
        count = torch.where(self.is_empty(), torch.ones_like(self.count), self.count)
        means = self.logs / count.unsqueeze(-1)
        total = means.logsumexp(-1, keepdim=True)
        bounded = total < 0
        # log Σ exp(L/n) ≈ −(K − 1) / 2Σα where Σα is large
        size = (means.shape[-1] - 1) / (-2 * torch.where(bounded, total, -1.0))
        alpha = (size * torch.softmax(means, -1)).clamp(min=torch.finfo(means.dtype).tiny)
        for _ in range(2):
            alpha = _inverse_digamma(torch.digamma(alpha.sum(-1, keepdim=True)) + means)
        for _ in range(STEPS):
            whole = alpha.sum(-1, keepdim=True)
            slope = torch.digamma(whole) - torch.digamma(alpha) + means
            own = torch.polygamma(1, alpha)
            shared = (slope / own).sum(-1, keepdim=True) / (
                1 / torch.polygamma(1, whole) - (1 / own).sum(-1, keepdim=True)
            )
            moved = alpha + (slope + shared) / own
            alpha = torch.where(moved > 0, moved, alpha / 4)
        return torch.where(self.is_empty().unsqueeze(-1), torch.nan, torch.where(bounded, alpha, torch.inf))

    def is_empty(self) -> Tensor:
        return self.count <= 0


def _inverse_digamma(y: Tensor) -> Tensor:
    """ψ⁻¹ to a few digits; Minka (2000), appendix C."""
    x = torch.where(y >= -2.22, y.clamp(max=700.0).exp() + 0.5, -1 / (y + 0.5772156649015329).clamp(max=-1e-300))
    for _ in range(3):
        x = x - (torch.digamma(x) - y) / torch.polygamma(1, x)
    return x
