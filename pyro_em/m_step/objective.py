"""Q of a block as a function of its parameters, to be climbed by Newton's method (climb.py).

Constrained parameters move in their charts' free coordinates u:

    ∂²Q/∂u² = Jᵀ (∂²Q/∂θ²) J + Σ_i (∂Q/∂θ_i) ∂²θ_i/∂u²,       J = ∂θ/∂u
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pyro_em.charts import Chart, ElementwiseChart
from pyro_em.kernels import QuadraticKernel
from pyro_em.m_step.climb import EPS, Climb, Value
from pyro_em.m_step.curves import cellwise_derivatives
from pyro_em.m_step.kinks import Kinks, kink_of
from pyro_em.m_step.linear import prior_precision
from pyro_em.model.use import Use
from pyro_em.sufficient import Sufficient


class SiteOfQ(Protocol):
    """Q of one site as a function of a move δ of the block."""

    name: str

    def value(self, delta: Tensor) -> Tensor:
        """Q up to a constant, as terms that add up to it."""
        ...

    def gradient(self, delta: Tensor) -> Tensor:
        """∂Q/∂θ (P,)."""
        ...

    def hessian(self, delta: Tensor) -> Tensor:
        """−∂²Q/∂θ² (P, P)."""
        ...

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Change of the predictor of each argument."""
        ...

    def write(self, sufficient: Sufficient, delta: Tensor) -> None:
        """Put what the arguments are after the move into the statistics."""
        ...


class Prior:
    """log p(θ) of one parameter, given the arguments of its prior; of its logarithm t, `by_log`:

    ∂/∂t = θ ∂/∂θ,        −∂²/∂t² = θ (−∂²/∂θ²) θ − diag(θ ∂/∂θ)
    """

    def __init__(self, part: slice, use: Use, sufficient: Sufficient, shape: torch.Size, by_log: bool = False) -> None:
        site = dataclasses.replace(sufficient.sites[use.site], arguments=sufficient.arguments[use.site])
        assert site.family is not None
        kernel = site.family.value_kernel({**site.constants, **sufficient.arguments[use.site]})
        assert kernel is not None
        self.part, self.site, self.kernel, self.shape, self.by_log = part, site, kernel, shape, by_log

    def value(self, theta: Tensor) -> Tensor:
        """Up to a constant, one term for each entry (row) of the parameter."""
        own = self._own(theta)
        return self.kernel.value(own).expand(self.shape[: len(self.shape) - self.kernel.event_dim])

    def _own(self, theta: Tensor) -> Tensor:
        own = theta[self.part].reshape(self.shape)
        return own.exp() if self.by_log else own

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and minus the curvature, (P,) and (P, P)."""
        slope, curvature = self._derivatives(self._own(theta))
        if not self.by_log:
            return slope, curvature
        value = self._own(theta).reshape(-1)
        return value * slope, value.unsqueeze(-1) * curvature * value - torch.diag(value * slope)

    def _derivatives(self, own: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.kernel, QuadraticKernel):
            return self.kernel.gradient(own).expand(self.shape).reshape(-1), prior_precision(self.kernel, own)
        slopes, curvatures = cellwise_derivatives(lambda etas: self.kernel.value(etas[0]), [own])
        return slopes[0].reshape(-1), torch.diag(curvatures[0][0].reshape(-1))


@dataclass(frozen=True)
class Objective(Climb):
    """Q around the current place `start` (P,) of a block; functions of δ = θ − start, or of free coordinates u."""

    start: Tensor
    sites: list[SiteOfQ]
    charts: list[tuple[Chart, Tensor]]
    priors: list[Prior]
    real: bool  # u = θ

    @cached_property
    def kinks(self) -> Kinks | None:
        """Of Laplace priors, over u: their parameters are real, so that u = θ there."""
        found = {p.part.start: kink_of(p.site) for p in self.priors}
        starts = itertools.accumulate((value.numel() for _, value in self.charts), initial=0)
        parts = [(own.size, found.get(begin)) for (own, _), begin in zip(self.charts, starts, strict=False)]
        return Kinks.of(parts) if any(kernel is not None for _, kernel in parts) else None

    def theta(self, u: Tensor) -> Tensor:
        if self.real:
            return u
        parts = torch.split(u, [own.size for own, _ in self.charts])
        return torch.cat([own.from_free(part).reshape(-1) for (own, _), part in zip(self.charts, parts, strict=True)])

    def free(self) -> Tensor:
        return self.start if self.real else torch.cat([own.to_free(value) for own, value in self.charts])

    def pulled(self, gradient: Tensor) -> Tensor:
        """∂Q/∂u at the start."""
        if self.real:
            return gradient
        return torch.cat([own.pull_back(value, part) for own, value, part in self._parts(self.start, gradient)])

    def value(self, u: Tensor) -> Value:
        """Q up to a constant."""
        theta = self.theta(u)
        terms = [site.value(theta - self.start) for site in self.sites] + [prior.value(theta) for prior in self.priors]
        zero = torch.zeros((), dtype=torch.float64)
        size = sum((term.abs().sum() for term in terms), zero)
        return Value(sum((term.sum() for term in terms), zero), 16 * EPS * size)

    def gradient(self, delta: Tensor) -> Tensor:
        total = torch.zeros_like(self.start)
        for site in self.sites:
            total += site.gradient(delta)
        for prior in self.priors:
            total[prior.part] += prior.derivatives(self.start + delta)[0]
        return total

    def hessian(self, delta: Tensor) -> Tensor:
        """−∂²Q/∂θ²."""
        hessian = torch.zeros(len(self.start), len(self.start), dtype=torch.float64)
        for site in self.sites:
            hessian += site.hessian(delta)
        for prior in self.priors:
            hessian[prior.part, prior.part] += prior.derivatives(self.start + delta)[1]
        return hessian

    def slope(self, u: Tensor) -> Tensor:
        """∂Q/∂u."""
        theta = self.theta(u)
        gradient = self.gradient(theta - self.start)
        if self.real:
            return gradient
        return torch.cat([own.pull_back(value, part) for own, value, part in self._parts(theta, gradient)])

    def _parts(self, theta: Tensor, gradient: Tensor) -> list[tuple[Chart, Tensor, Tensor]]:
        """Each parameter's chart, its value in θ, and its part of a gradient."""
        found, begin = [], 0
        for own, value in self.charts:
            part = slice(begin, begin + value.numel())
            found.append((own, theta[part].reshape(value.shape), gradient[part].reshape(value.shape)))
            begin = part.stop
        return found

    def curvature(self, u: Tensor) -> Tensor:
        """−∂²Q/∂u²."""
        theta = self.theta(u)
        delta = theta - self.start
        hessian = self.hessian(delta)
        if self.real:
            return hessian
        gradient = self.gradient(delta)
        if all(isinstance(own, ElementwiseChart) for own, _ in self.charts):
            return self._elementwise(theta, gradient, hessian)

        def model(v: Tensor) -> Tensor:
            change = self.theta(v) - theta
            return gradient @ change - change @ hessian @ change / 2

        with torch.enable_grad():
            second: Tensor = torch.autograd.functional.hessian(model, u.detach())
        return -second

    def _elementwise(self, theta: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
        """The same where J is diagonal."""
        first, second, index, begin = [], [], [], 0
        for own, value, part in self._parts(theta, gradient):
            assert isinstance(own, ElementwiseChart)
            one, two = chart_derivatives(own, value)
            first.append(one)
            second.append(part.flatten()[own.index] * two)
            index.append(begin + own.index)
            begin += value.numel()
        free, jacobian = torch.cat(index), torch.cat(first)
        return hessian[free][:, free] * jacobian * jacobian.unsqueeze(-1) - torch.diag(torch.cat(second))


def chart_derivatives(own: ElementwiseChart, value: Tensor) -> tuple[Tensor, Tensor]:
    """∂x/∂u and ∂²x/∂u² of the free entries of a chart, (P,) each."""
    x = value.flatten()[own.index]
    if own.lower is not None and own.upper is not None:
        width = own.upper - own.lower
        first = (x - own.lower) * ((own.upper - x) / width)
        return first, first * (own.lower + own.upper - 2 * x) / width
    bound = own.upper if own.lower is None else own.lower
    if bound is None:
        return torch.ones_like(x), torch.zeros_like(x)
    return x - bound, x - bound
