"""Newton's method with backtracking, in free coordinates u:  u ← u + H⁻¹ g,  H = −∂²Q/∂u²,  g = ∂Q/∂u.

A step is accepted when Q rises by a share of what its slope promises (up to the rounding of Q): none lowers it.
Numbers stay tensors, so that what is decided by them can be recorded (tape/).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.kernels import QuadraticKernel
from pyro_em.m_step.kinks import Kinks

MAX_STEPS = 60
CLOSE = 1e3  # roundings of Q below which the promised gain of a step cannot be seen in it
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Value:
    """Q, and the rounding in it: of the sizes of its terms, which may cancel."""

    total: Tensor
    rounding: Tensor


class Climb(ABC):
    """A function of free coordinates u (P,), and the way to its maximum."""

    @property
    @abstractmethod
    def kinks(self) -> Kinks | None:
        """Where it has kinks, if anywhere."""

    @abstractmethod
    def free(self) -> Tensor:
        """u at the start."""

    @abstractmethod
    def value(self, u: Tensor) -> Value:
        """The function, up to a constant."""

    @abstractmethod
    def slope(self, u: Tensor) -> Tensor:
        """Its gradient, (P,)."""

    @abstractmethod
    def curvature(self, u: Tensor) -> Tensor:
        """Minus its Hessian, (P, P)."""

    def subslope(self, u: Tensor, slope: Tensor) -> Tensor:
        """Of the subgradients at u the one nearest to 0, given `slope(u)`: the slope where Q has no kink."""
        return slope if self.kinks is None else self.kinks.nearest(u, slope)

    def maximised(self, tolerance: float) -> Tensor:
        """Newton's method with backtracking, in free coordinates."""
        u, known = self.free(), None
        slope = self.slope(u)
        for _ in range(MAX_STEPS):
            size = self.subslope(u, slope).abs().max()
            if not bool(slope.isfinite().all()) or bool(size <= tolerance):
                break
            before = self.value(u) if known is None else known
            target, gain = self._target(u, slope)
            # Close to the top Q says nothing more, but its slope does: Newton's steps lower it quadratically.
            close = bool(gain <= CLOSE * before.rounding)
            moved, known = (target, None) if close else self._back_tracked(u, target, gain, before)
            following = self.slope(moved)
            if torch.equal(moved, u) or (close and not bool(self.subslope(moved, following).abs().max() < size)):
                break
            u, slope = moved, following
        return u

    def _target(self, u: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Where Newton's step ends, and the rise of Q that its slope promises."""
        curvature = self.curvature(u)
        if self.kinks is not None:
            return self.kinks.target(u, slope, convex(curvature))
        step = ascent(slope, curvature)
        return u + step, slope @ step

    def _back_tracked(self, u: Tensor, target: Tensor, gain: Tensor, before: Value) -> tuple[Tensor, Value]:
        """The longest of step, step/2, ... on which Q rises by a share of what its slope promises; u itself if none."""
        length = 1.0
        while length > 1e-12:
            moved = target if length == 1 else u + length * (target - u)
            after = self.value(moved)
            if bool(after.total >= before.total + 1e-4 * length * gain - before.rounding):
                return moved, after
            length /= 2
        return u, before


def ascent(gradient: Tensor, hessian: Tensor) -> Tensor:
    """H⁻¹g; where H is not positive definite, of its absolute eigenvalues (of least length where it is singular)."""
    return QuadraticKernel(gradient, convex(hessian), torch.zeros_like(gradient), vector=True).argmax()


def convex(hessian: Tensor) -> Tensor:
    """H, or the matrix of its absolute eigenvalues if some are negative."""
    hessian = (hessian + hessian.mT) / 2
    _, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        values, vectors = torch.linalg.eigh(hessian)
        if bool(values[0] < -1e-12 * values.abs().max()):
            return vectors @ (values.abs().unsqueeze(-1) * vectors.mT)
    return hessian
