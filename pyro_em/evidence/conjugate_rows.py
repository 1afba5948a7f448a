"""Rows of probabilities as conjugate latents: Dirichlet posteriors, read off from gradients.

    ∂ log joint / ∂z_k = a_k/z_k − c  on the simplex, with one c for all k         posterior Dirichlet(a + 1)

(log-densities that divide by Σz have c ≠ 0, those that take z as it is c = 0; on the simplex both are Σ a_k log z_k).
Multinomial and Categorical observations of the row are of this form.

Two equally weighted atoms u, v of the simplex carry E log z_k for every k, which is all that such densities consist of:
with g_k = exp E log z_k, G_A the largest and G_B the sum of the others,

    u_k v_k = g_k²,     u = g G⁻¹ (x, 1 − x by group),     x² − (1 + G_A² − G_B²) x + G_A² = 0.

Shapes as in conjugate_kinds.py; entries of an event are coupled in rows of `size` K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.evidence.conjugate_kinds import ROUNDING, BetaKind, GammaKind, InverseGammaKind, Kind


@dataclass(frozen=True)
class DirichletKind(Kind):
    """Coefficients (a, c); `size` K."""

    size: int
    name: ClassVar = "Dirichlet"
    num_probes: ClassVar = 2

    @property
    def event_dim(self) -> int:
        return 1

    def _rows(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size))

    def _normalised(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        return (rows / rows.sum(-1, keepdim=True)).flatten(-2)

    def start(self, layout: tuple[int, ...], k: int) -> Tensor:
        return torch.full((*layout, k), 1.0 / self.size, dtype=torch.float64)

    def common(self, center: Tensor, lead: tuple[int, ...]) -> Tensor:
        return self._normalised(super().common(center, lead))

    def near(self, center: Tensor, noise: Tensor) -> Tensor:
        return self._normalised(center * noise.exp())

    def probes(self, center: Tensor) -> list[Tensor]:
        rows = self._rows(center)
        corner = torch.nn.functional.one_hot(rows.argmin(-1), self.size).to(rows.dtype)
        return [center, (0.5 * rows + 0.5 * corner).flatten(-2)]

    def design(self, z: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(z), -z], -1)

    def scaled(self, z: Tensor, gradient: Tensor) -> Tensor:
        return z * gradient

    def solve(self, points: Sequence[Tensor], scaled: Sequence[Tensor]) -> Tensor:
        z, other = (self._rows(point) for point in points)
        s, t = (self._rows(x) for x in scaled)
        change = other - z
        c = ((s - t) * change).sum(-1, keepdim=True) / (change * change).sum(-1, keepdim=True)
        return torch.stack([(s + c * z).flatten(-2), c.expand(s.shape).flatten(-2)], -1)

    def proper(self, coefficients: Tensor, z: Tensor, rounding: float) -> bool:
        return bool((coefficients[..., 0] > -1).all())

    def distribution(self, coefficients: Tensor) -> dist.Dirichlet:
        return dist.Dirichlet(self._rows(coefficients[..., 0]) + 1, validate_args=False)

    def marginal(self, coefficients: Tensor) -> dist.Dirichlet:
        return dist.Dirichlet(coefficients[..., 0] + 1, validate_args=False)

    def log_density(self, coefficients: Tensor, z: Tensor) -> Tensor:
        found: Tensor = self.distribution(coefficients).log_prob(self._rows(z))
        return found.sum(-1)

    def center(self, coefficients: Tensor) -> Tensor:
        return self._normalised(coefficients[..., 0] + 1)

    def atoms(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._rows(coefficients[..., 0]) + 1
        logs = torch.digamma(alpha) - torch.digamma(alpha.sum(-1, keepdim=True))
        g = logs.exp().clamp(min=torch.finfo(torch.float64).tiny)
        first = torch.nn.functional.one_hot(g.argmax(-1), self.size).bool()
        one, rest = g.amax(-1, keepdim=True), torch.where(first, 0.0, g).sum(-1, keepdim=True)
        # The discriminant of the quadratic, as a product (Heron): 1 − one − rest is small where the rows are sure.
        gap = -torch.expm1(logs.logsumexp(-1, keepdim=True))
        root = (gap.clamp(min=0) * (1 - one + rest) * (1 + one - rest) * (1 + one + rest)).sqrt()
        high, high_rest = (1 + one**2 - rest**2 + root) / 2, (1 + rest**2 - one**2 + root) / 2
        low, low_rest = one**2 / high, rest**2 / high_rest
        u = torch.where(first, high, g * (low_rest / rest))
        v = torch.where(first, low, g * (high_rest / rest))
        return u.flatten(-2), v.flatten(-2)

    def magnitude(self, coefficients: Tensor) -> Tensor:
        alpha = self._rows(coefficients[..., 0]) + 1
        return torch.lgamma(alpha).abs().sum(-1) + torch.lgamma(alpha.sum(-1)).abs()

    def mode(self, coefficients: Tensor) -> Tensor:
        rows = self._rows(coefficients[..., 0])
        inside, rows = (rows >= -ROUNDING).all(-1, keepdim=True), rows.clamp(min=0)
        flat = rows.sum(-1, keepdim=True) <= ROUNDING  # every value is a mode of a uniform posterior
        rows = torch.where(flat, 1.0, rows)
        return torch.where(inside, rows / rows.sum(-1, keepdim=True), torch.nan).flatten(-2)


def kinds(support: str, size: int) -> tuple[Kind, ...]:
    """Kinds to try, in order, by support; `size` is the length of a row."""
    if support == "simplex":
        return (DirichletKind(size),)
    return (GammaKind(), InverseGammaKind()) if support == "positive" else (BetaKind(),)
