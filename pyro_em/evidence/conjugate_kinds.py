"""Families of posteriors that the gradient of a log joint in one latent tells apart.

    support       ∂ log joint / ∂z        posterior
    (0, ∞)        a/z − b + c/z²          Gamma(a + 1, b) if c = 0;  InverseGamma(−a − 1, c) if b = 0
    (0, 1)        a/z − b/(1 − z)         Beta(a + 1, b + 1)
    simplex       a_k/z_k − c             Dirichlet(a + 1), see conjugate_rows.py

Every conjugate pair with such a latent is one of these, whatever its sites are called: Poisson, exponential and
Gamma observations of a rate, the precision or the variance of a normal, counts out of n. With b and c both there the
posterior is generalised inverse Gaussian, which is not offered.

Two equally weighted atoms carry the expectations that such log-densities consist of:

    Gamma           m (1 ± d), m = E z, d² = 1 − exp(2 (E log z − log m))           E z and E log z
    InverseGamma    reciprocals of the atoms of 1/z                                  E 1/z and E log z
    Beta            roots of z² − s z + P, P = exp 2E log z,
                    s = 1 + P − exp 2E log(1 − z)                                    E log z and E log(1 − z)

Shapes: any, elementwise; coefficients have one more dim at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

ROUNDING = 1e-9  # of an exponent that is 0: the density is flat at that end, not unbounded


class Kind(ABC):
    """One row of the table."""

    name: ClassVar[str]
    num_probes: ClassVar[int]

    @property
    def event_dim(self) -> int:
        """Event dims of `distribution`."""
        return 0

    def marginal(self, coefficients: Tensor) -> dist.Distribution:
        """The posterior, coefficients in the latent's own event shape + (J,)."""
        return self.distribution(coefficients)

    def start(self, layout: tuple[int, ...], k: int) -> Tensor:
        """A point to begin with, layout + (k,)."""
        return torch.full((*layout, k), 0.5, dtype=torch.float64)

    def common(self, center: Tensor, lead: tuple[int, ...]) -> Tensor:
        """One point in place of several along the dims `lead`."""
        return center.log().mean(lead).exp() if lead else center

    @abstractmethod
    def near(self, center: Tensor, noise: Tensor) -> Tensor:
        """A random point around the center, given standard normal numbers."""

    def solve(self, points: Sequence[Tensor], scaled: Sequence[Tensor]) -> Tensor:
        """Coefficients from `scaled` gradients at the probes."""
        design, target = torch.stack([self.design(z) for z in points], -2), torch.stack(list(scaled), -1)
        design = design.expand(*target.shape[:-1], *design.shape[-2:])
        return torch.linalg.solve(design, target.unsqueeze(-1)).squeeze(-1)

    def log_density(self, coefficients: Tensor, z: Tensor) -> Tensor:
        """log q of all entries of an event together."""
        q: Any = self.distribution(coefficients)
        return q.log_prob(z).sum(-1)

    @abstractmethod
    def probes(self, center: Tensor) -> list[Tensor]:
        """Points around `center` that determine the coefficients; the first is the center."""

    @abstractmethod
    def design(self, z: Tensor) -> Tensor:
        """Row of the linear system at z, shape (..., J), for `scaled` gradients."""

    @abstractmethod
    def scaled(self, z: Tensor, gradient: Tensor) -> Tensor:
        """The gradient times what makes the terms of `design` of one order."""

    @abstractmethod
    def proper(self, coefficients: Tensor, z: Tensor, rounding: float) -> bool:
        """The coefficients (of a log joint expanded at z) are those of this kind, and it can be normalised.

        :param rounding: share of the largest term that rounding explains.
        """

    @abstractmethod
    def distribution(self, coefficients: Tensor) -> dist.Distribution:
        """The posterior."""

    @abstractmethod
    def center(self, coefficients: Tensor) -> Tensor:
        """A point in the middle of the posterior."""

    @abstractmethod
    def atoms(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Two equally weighted values with the posterior's expectations."""

    @abstractmethod
    def mode(self, coefficients: Tensor) -> Tensor:
        """Where the density is highest, NaN where it is unbounded."""

    @abstractmethod
    def magnitude(self, coefficients: Tensor) -> Tensor:
        """Size of the terms of the normaliser, which cancel against those of the prior."""


class _Positive(Kind):
    """Coefficients (a, b, c)."""

    num_probes = 3

    def probes(self, center: Tensor) -> list[Tensor]:
        return [center, 0.5 * center, 2.0 * center]

    def near(self, center: Tensor, noise: Tensor) -> Tensor:
        return center * noise.exp()

    def design(self, z: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(z), -z, 1 / z], -1)

    def scaled(self, z: Tensor, gradient: Tensor) -> Tensor:
        return z * gradient

    @staticmethod
    def _gone(coefficients: Tensor, z: Tensor, index: int, rounding: float) -> bool:
        terms = (coefficients * torch.stack([torch.ones_like(z), z, 1 / z], -1)).abs()
        return bool((terms[..., index] <= rounding * (1 + terms.amax(-1))).all())


class GammaKind(_Positive):
    """c = 0."""

    name = "Gamma"

    def proper(self, coefficients: Tensor, z: Tensor, rounding: float) -> bool:
        a, b, _ = coefficients.unbind(-1)
        return self._gone(coefficients, z, 2, rounding) and bool((a > -1).all()) and bool((b > 0).all())

    def distribution(self, coefficients: Tensor) -> dist.Gamma:
        a, b, _ = coefficients.unbind(-1)
        return dist.Gamma(a + 1, b, validate_args=False)

    def center(self, coefficients: Tensor) -> Tensor:
        a, b, _ = coefficients.unbind(-1)
        return (a + 1) / b

    def atoms(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        a, b, _ = coefficients.unbind(-1)
        mean = (a + 1) / b
        # E log z - log m = ψ(a + 1) - log(a + 1)
        gap = torch.digamma(a + 1) - (a + 1).log()
        spread = (-torch.expm1(2 * gap)).clamp(min=0).sqrt()
        return mean * torch.exp(2 * gap) / (1 + spread), mean * (1 + spread)

    def magnitude(self, coefficients: Tensor) -> Tensor:
        a, b, _ = coefficients.unbind(-1)
        return ((a + 1) * b.log()).abs() + torch.lgamma(a + 1).abs()

    def mode(self, coefficients: Tensor) -> Tensor:
        a, b, _ = coefficients.unbind(-1)
        return torch.where(a >= -ROUNDING, a.clamp(min=0) / b, torch.nan)


class InverseGammaKind(_Positive):
    """b = 0."""

    name = "InverseGamma"

    def proper(self, coefficients: Tensor, z: Tensor, rounding: float) -> bool:
        a, _, c = coefficients.unbind(-1)
        return self._gone(coefficients, z, 1, rounding) and bool((a < -1).all()) and bool((c > 0).all())

    def distribution(self, coefficients: Tensor) -> dist.InverseGamma:
        a, _, c = coefficients.unbind(-1)
        return dist.InverseGamma(-a - 1, c, validate_args=False)

    def center(self, coefficients: Tensor) -> Tensor:
        a, _, c = coefficients.unbind(-1)
        return c / (-a - 1)

    def atoms(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        a, _, c = coefficients.unbind(-1)
        reciprocal = torch.stack([-a - 2, c, torch.zeros_like(c)], -1)
        low, high = GammaKind().atoms(reciprocal)
        return 1 / low, 1 / high

    def magnitude(self, coefficients: Tensor) -> Tensor:
        a, _, c = coefficients.unbind(-1)
        return ((a + 1) * c.log()).abs() + torch.lgamma(-a - 1).abs()

    def mode(self, coefficients: Tensor) -> Tensor:
        a, _, c = coefficients.unbind(-1)
        return c / -a


class BetaKind(Kind):
    """Coefficients (a, b)."""

    name = "Beta"
    num_probes = 2

    def probes(self, center: Tensor) -> list[Tensor]:
        return [center, torch.where(center > 0.5, 0.5 * center, 0.5 * (1 + center))]

    def near(self, center: Tensor, noise: Tensor) -> Tensor:
        return torch.sigmoid(torch.logit(center) + noise)

    def design(self, z: Tensor) -> Tensor:
        return torch.stack([1 - z, -z], -1)

    def scaled(self, z: Tensor, gradient: Tensor) -> Tensor:
        return z * (1 - z) * gradient

    def proper(self, coefficients: Tensor, z: Tensor, rounding: float) -> bool:
        return bool((coefficients > -1).all())

    def distribution(self, coefficients: Tensor) -> dist.Beta:
        a, b = coefficients.unbind(-1)
        return dist.Beta(a + 1, b + 1, validate_args=False)

    def center(self, coefficients: Tensor) -> Tensor:
        a, b = coefficients.unbind(-1)
        return (a + 1) / (a + b + 2)

    def atoms(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        a, b = coefficients.unbind(-1)
        total = torch.digamma(a + b + 2)
        square, other = torch.exp(2 * (torch.digamma(a + 1) - total)), torch.exp(2 * (torch.digamma(b + 1) - total))
        s = 1 + square - other
        root = (s * s - 4 * square).clamp(min=0).sqrt()
        high = (s + root) / 2
        return square / high, high

    def magnitude(self, coefficients: Tensor) -> Tensor:
        a, b = coefficients.unbind(-1)
        return torch.lgamma(a + 1).abs() + torch.lgamma(b + 1).abs() + torch.lgamma(a + b + 2).abs()

    def mode(self, coefficients: Tensor) -> Tensor:
        a, b = coefficients.unbind(-1)
        inside, a, b = (a >= -ROUNDING) & (b >= -ROUNDING), a.clamp(min=0), b.clamp(min=0)
        flat = a + b <= ROUNDING  # every value is a mode of a uniform posterior
        return torch.where(inside, torch.where(flat, 0.5, a / torch.where(flat, 1.0, a + b)), torch.nan)
