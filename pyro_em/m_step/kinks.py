"""Newton's steps where priors have kinks: Laplace priors of coefficients, and so coefficients that are exactly 0.

With g and H the gradient and minus the Hessian of the smooth part of Q, x the distances of the entries from the centres
of their priors and r = 1/scale (0 for entries without such a prior), the step ends at the maximum y of

    g·(y − x) − ½ (y − x)ᵀ H (y − x) − Σ_i r_i |y_i|

found by alternating a sweep over single entries (soft thresholds, which say what is 0 and give signs) with the linear
system of all others at once (exact once zeros and signs are right). Where y_i = 0 is best, |slope| ≤ r_i: the
subgradient nearest to 0 is 0 there, which is what the certificate reads.

Source: proximal Newton methods, Lee, Sun and Saunders (2014), SIAM J. Optim. 24(3), section 2.
Not handled: kinks of many parameters without predictors (a network), which L-BFGS would climb; refused (choose.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.kernels import LassoKernel
from pyro_em.model.trace import SiteRecord
from pyro_em.model.use import VALUE, Use

SWEEPS, EXACT, ROUNDING = 2000, 1e-15, 1e-10


@dataclass(frozen=True)
class Kinks:
    """Of all entries of a block (P,): `rate` of the penalty r |θ − `center`|, 0 where there is none."""

    rate: Tensor
    center: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[int, LassoKernel | None]]) -> Kinks:
        """Of parameters one after the other: their numbers of entries, and their priors where these have kinks."""
        none = torch.zeros((), dtype=torch.float64)
        found = [(none, none) if kernel is None else (kernel.rate, kernel.center) for _, kernel in parts]
        sizes = [size for size, _ in parts]
        rate, center = (
            torch.cat([x.detach().double().reshape(-1).expand(n) for x, n in zip(own, sizes, strict=True)])
            for own in zip(*found, strict=True)
        )
        return cls(rate, center)

    def nearest(self, theta: Tensor, slope: Tensor) -> Tensor:
        """The subgradient nearest to 0, from the smooth part's slope at the kinks and the slope elsewhere."""
        return torch.where((theta == self.center) & (self.rate > 0), soft(slope, self.rate), slope)

    def target(self, theta: Tensor, slope: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """Where the step ends, and the rise of Q that the model promises.

        :param slope: as `nearest` takes it; :param hessian: positive semidefinite.
        """
        x = torch.where(self.rate > 0, theta - self.center, 0.0)
        smooth = slope + self.rate * x.sign()
        y = _maximum(smooth, hessian, x, self.rate)
        gain = smooth @ (y - x) - (self.rate * (y.abs() - x.abs())).sum()
        # Exactly the centre, which θ + (m − θ) need not be.
        return torch.where((self.rate > 0) & (y == 0), self.center, theta + (y - x)), gain


def kinked(uses: Mapping[str, tuple[Use, ...]], sites: Mapping[str, SiteRecord]) -> set[str]:
    """Parameters whose prior, if it counts, has a kink."""
    return {name for name, own in uses.items() if any(_is_kinked(use, sites[use.site]) for use in own)}


def _is_kinked(use: Use, site: SiteRecord) -> bool:
    return use.slot == VALUE and kink_of(site) is not None


def kink_of(site: SiteRecord) -> LassoKernel | None:
    """The density of a prior as a function of its value, if it has a kink; over all entries of the value."""
    if site.family is None or site.arguments is None:
        return None
    kernel = site.family.value_kernel({**site.constants, **site.arguments})
    if not isinstance(kernel, LassoKernel):
        return None
    rate, center = (x.expand(site.value.shape) for x in (kernel.rate, kernel.center))
    return LassoKernel(kernel.smooth, center, rate)


def soft(x: Tensor, threshold: Tensor) -> Tensor:
    """x moved towards 0 by the threshold, and 0 if it would pass it."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)


def _maximum(g: Tensor, H: Tensor, x: Tensor, rate: Tensor) -> Tensor:
    diagonal = H.diagonal()
    y, free = x.clone(), rate == 0
    for _ in range(SWEEPS):
        before = y.clone()
        for i in range(len(y)):
            if diagonal[i] > 0:
                y[i] = soft(diagonal[i] * y[i] + g[i] - H[i] @ (y - x), rate[i]) / diagonal[i]
        sign = y.sign()
        moving = free | (sign != 0)
        solved = _solved(g - rate * sign, H, x, moving)
        left = g - H @ (solved - x)
        # Not solved where H is singular: the penalty then pulls along a direction that the data leave open.
        left = torch.where(moving, left - rate * sign, soft(left, rate))
        if bool(((solved.sign() == sign) | free).all()) and bool(
            (left.abs() <= ROUNDING * (g.abs() + rate).max()).all()
        ):
            return solved
        if bool(((y - before).abs() <= EXACT * (1 + y.abs())).all()):
            break
    return y


def _solved(g: Tensor, H: Tensor, x: Tensor, moving: Tensor) -> Tensor:
    """The maximum over the moving entries of the smooth model with slope g, all others at 0."""
    y = torch.zeros_like(x)
    held = g - H[:, ~moving] @ (y - x)[~moving]
    own = torch.linalg.pinv(H[moving][:, moving], rtol=1e-14, hermitian=True) @ held[moving]
    y[moving] = x[moving] + own
    return y
