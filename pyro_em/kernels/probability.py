"""Weighted logarithms of probabilities: A log p + B log(1 − p), and Σ_k A_k log p_k on a simplex.

Coefficients are counts, plus a − 1 for each Beta(a, ·) or Dirichlet(a) prior. A prior with a < 1 can
make a coefficient negative; the density then grows without bound towards that boundary. `argmax`
takes the usual convention and clamps each coefficient at 0, which puts the estimate exactly on the
boundary; `value` and `gradient` keep the true coefficient. A block without any positive coefficient
has no maximum inside and counts as empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.kernels.base import IncompatibleKernels, Kernel, times


@dataclass(frozen=True, eq=False)
class BetaKernel(Kernel):
    """Elementwise A log p + B log(1 − p), p in [0, 1]; `successes` A and `failures` B have shape U.

    >>> BetaKernel(torch.tensor(3.0), torch.tensor(1.0)).argmax()
    tensor(0.7500)
    """

    successes: Tensor
    failures: Tensor

    names: ClassVar[tuple[str, ...]] = ("successes", "failures")

    @property
    def form(self) -> str:
        return "A log p + B log(1 - p)"

    def value(self, theta: Tensor) -> Tensor:
        return torch.xlogy(self.successes, theta) + torch.special.xlog1py(self.failures, -theta)

    def gradient(self, theta: Tensor) -> Tensor:
        return times(self.successes, theta.reciprocal()) - times(self.failures, (1 - theta).reciprocal())

    def argmax(self) -> Tensor:
        successes, failures = self.successes.clamp(min=0), self.failures.clamp(min=0)
        return successes / (successes + failures)

    def is_empty(self) -> Tensor:
        return (self.successes <= 0) & (self.failures <= 0)


@dataclass(frozen=True, eq=False)
class SimplexKernel(Kernel):
    """Σ_k A_k log p_k over the last dim; `counts` A has shape U + (K,). A zero count gives an exact 0.

    >>> SimplexKernel(torch.tensor([3.0, 0.0, 1.0])).argmax()
    tensor([0.7500, 0.0000, 0.2500])
    """

    counts: Tensor

    names: ClassVar[tuple[str, ...]] = ("counts",)

    @property
    def event_dim(self) -> int:
        return 1

    @property
    def event_dims(self) -> tuple[int, ...]:
        return (1,)

    @property
    def form(self) -> str:
        return "sum_k A_k log p_k"

    def value(self, theta: Tensor) -> Tensor:
        return torch.xlogy(self.counts, theta).sum(-1)

    def gradient(self, theta: Tensor) -> Tensor:
        return times(self.counts, theta.reciprocal())

    def relative_gradient(self, theta: Tensor) -> Tensor:
        return self.counts

    def argmax(self) -> Tensor:
        counts, total = self._clamped
        return counts / total

    @cached_property
    def is_informed(self) -> bool:
        return bool((self._clamped[1] > 0).all())

    @cached_property
    def _clamped(self) -> tuple[Tensor, Tensor]:
        """A clamped at 0, and its sums over rows."""
        counts = self.counts.clamp(min=0)
        return counts, counts.sum(-1, keepdim=True)

    def is_empty(self) -> Tensor:
        return (self.counts <= 0).all(-1)

    def rescale(self, factor: Tensor) -> Self:
        if factor.dim() == 0 or factor.shape[-1] == 1:
            # One factor for a whole row cancels when the row is normalised.
            return self
        raise IncompatibleKernels(
            f"A kernel of the form {self.form} has no closed-form maximum once the entries of a row are "
            "multiplied by different factors. Maximise it numerically instead."
        )
