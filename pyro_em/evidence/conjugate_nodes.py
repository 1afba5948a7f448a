"""Nodes of a conjugate posterior for expectations of other functions than its statistics.

The atoms of an E-step carry E z and E log z (conjugate_kinds.py), not the variance of z: a function of z is averaged
over nodes of its own. Moments of an observation given z are, for the sites that such latents meet, polynomials of
degree one or two in a coordinate t of z whose moments are closed forms:

    Gamma, InverseGamma     t = z^p, p = 1, -1, ½, -½                     E z^p = b^-p Γ(a + p) / Γ(a), ∞ if a + p ≤ 0
    Beta                    t = z, 1/z, 1/(1 - z)
    Dirichlet               t = z

Degree one: the node z(E t). Degree two: two nodes of weights 1 - w and w, t = m - s √(w/(1-w)) and m + s √((1-w)/w),
with w so small that the lower one is positive for every element (on a simplex: second differences around the mean).
Anything else: the tanh-sinh rule in the quantiles of z (Takahasi and Mori 1974), which is exact to rounding unless z is
nearly 0 or 1, or the far tail decides. Halving its step squares its error: where that of the double step is not small,
there is no expectation. Weights are the same for all elements, so that nodes stand along the atoms' dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from pyro_em.evidence.conjugate_kinds import BetaKind, InverseGammaKind
from pyro_em.evidence.conjugate_posterior import ConjugatePosterior
from pyro_em.evidence.conjugate_rows import DirichletKind

Array = np.ndarray[Any, Any]
AGREEMENT = 1e-9  # of a polynomial with a value that did not determine it
STEP, REACH = 1 / 64, 6.0  # of the tanh-sinh rule: quantiles down to 1e-275
HALF = 1e-6  # relative error of the rule with the double step, at which it is 1e-12 with its own


@dataclass(frozen=True)
class Nodes:
    """`values` (states, S, plates) + event of the latent; `weights` (S,). `halved`: every other node is a rule too."""

    values: Tensor
    weights: Tensor
    halved: bool = False

    def average(self, found: Tensor, axis: int) -> Tensor:
        """E f, given f at the nodes along `axis` (negative), which is kept.

        :raises NoNodes: if every other node gives something else.
        """
        weighted = self.weights.to(found).reshape(-1, *(1,) * (-axis - 1)) * found
        mean = weighted.sum(axis, keepdim=True)
        if self.halved:
            other = weighted.movedim(axis, 0)[::2].sum(0).unsqueeze(axis) / float(self.weights[::2].sum())
            apart = (other - mean).abs() > HALF * mean.abs() + HALF**2
            if bool((apart & mean.isfinite()).any()):
                raise NoNodes("are not found by quadrature, with so much of its posterior near the ends of its range")
        return mean


class NoNodes(Exception):
    """An expectation that is not found to rounding; the text says why, after "the moments of its cells"."""


@dataclass(frozen=True)
class Coordinate:
    """t(z) with its inverse; `moment(k)` is E tᵏ of every element."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    moment: Callable[[int], Tensor]


def probes(posterior: ConjugatePosterior) -> Nodes:
    """Four values at which to look, the same for all elements (of a Dirichlet on a line through its simplex)."""
    kind, m = posterior.kind, len(posterior.geometry.layout)
    k = len(posterior.geometry.columns_a)
    if isinstance(kind, DirichletKind):
        end = torch.full((k,), 1.0 / kind.size, dtype=torch.float64)
        other = torch.arange(1, kind.size + 1, dtype=torch.float64).repeat(k // kind.size) / (
            kind.size * (kind.size + 1) / 2
        )
        values = torch.stack([end + t * (other - end) for t in LINE.to(end)])
    else:
        scale = 1.0 if isinstance(kind, BetaKind) else float(kind.center(posterior.coefficients).log().mean().exp())
        near = (0.2, 0.4, 0.6, 0.85) if isinstance(kind, BetaKind) else (0.5, 0.8, 1.3, 2.1)
        values = torch.tensor(near, dtype=torch.float64).unsqueeze(-1).expand(4, k) * scale
    placed = values.reshape(4, *(1,) * (m - 1), k).expand(4, *posterior.geometry.layout[1:], k)
    return Nodes(posterior.placed(placed), torch.ones(4, dtype=torch.float64))


LINE = torch.tensor([0.0, 0.3, 0.6, 1.0])


def nodes_for(posterior: ConjugatePosterior, values: Tensor, at: Nodes, axis: int) -> Nodes:
    """Nodes over which a function averages to its expectation, given its values at `at = probes(posterior)`.

    :param axis: the dim of `values` along which the probes stand.
    """
    rows = values.movedim(axis, 0) if values.shape[axis] == 4 else values.movedim(axis, 0).expand(4, *values.shape[1:])
    kind = posterior.kind
    if isinstance(kind, DirichletKind):
        return _row(posterior, kind, _degree(LINE.to(rows), rows))
    z = at.values.reshape(4, -1)[:, 0]
    found = ((_degree(c.forward(z), rows), c) for c in _coordinates(posterior))
    degree, coordinate = min(found, key=lambda pair: pair[0])
    if degree == 0:  # any node will do, where no moment may be infinite
        center = kind.center(posterior.coefficients)
        return _placed(posterior, [center], [1.0])
    if degree == 1:
        return _placed(posterior, [coordinate.inverse(coordinate.moment(1))], [1.0])
    return _pair(posterior, coordinate) if degree == 2 else by_quantiles(posterior)


def _degree(t: Tensor, rows: Tensor) -> int:
    """Of the polynomial in t with the values `rows` (4, ...): 0, 1, 2, or 3 for anything else."""
    scale = rows.abs().amax(0)
    for degree in (0, 1, 2):
        fitted = torch.zeros_like(rows)
        for i in range(degree + 1):  # Lagrange
            others = [j for j in range(degree + 1) if j != i]
            basis = math.prod(((t - t[j]) / (t[i] - t[j]) for j in others), start=torch.ones_like(t))
            fitted = fitted + basis.reshape(-1, *(1,) * (rows.dim() - 1)) * rows[i]
        if bool(((fitted - rows).abs().amax(0) <= AGREEMENT * scale).all()):
            return degree
    return 3


def _coordinates(posterior: ConjugatePosterior) -> list[Coordinate]:
    q = posterior.kind.distribution(posterior.coefficients)
    if isinstance(posterior.kind, BetaKind):
        a, b = q.concentration1, q.concentration0  # type: ignore[attr-defined]

        def rising(x: Tensor, y: Tensor, k: int) -> Tensor:
            return x / (x + y) if k == 1 else x * (x + 1) / ((x + y) * (x + y + 1))

        def falling(x: Tensor, y: Tensor, k: int) -> Tensor:
            found = (x + y - 1) / (x - 1) if k == 1 else (x + y - 1) * (x + y - 2) / ((x - 1) * (x - 2))
            return torch.where(x > k, found, torch.inf)

        return [
            Coordinate(lambda z: z, lambda t: t, lambda k: rising(a, b, k)),
            Coordinate(lambda z: 1 / z, lambda t: 1 / t, lambda k: falling(a, b, k)),
            Coordinate(lambda z: 1 / (1 - z), lambda t: 1 - 1 / t, lambda k: falling(b, a, k)),
        ]
    a, b = q.concentration, q.rate  # type: ignore[attr-defined]
    sign = -1.0 if isinstance(posterior.kind, InverseGammaKind) else 1.0

    def power(p: float) -> Coordinate:
        def moment(k: int) -> Tensor:
            order = sign * k * p
            inside = (a + order).clamp(min=1e-6)
            found = (torch.lgamma(inside) - torch.lgamma(a) - order * b.log()).exp()
            return torch.where(a + order > 0, found, torch.inf)

        return Coordinate(lambda z: z**p, lambda t: t ** (1 / p), moment)

    return [power(p) for p in (1.0, -1.0, 0.5, -0.5)]


def _pair(posterior: ConjugatePosterior, coordinate: Coordinate) -> Nodes:
    mean, square = coordinate.moment(1), coordinate.moment(2)
    finite = square.isfinite()
    spread = torch.where(finite, (square - mean * mean).clamp(min=0).sqrt(), 0.0)
    largest = float((spread / torch.where(finite, mean, 1.0)).max())
    w = 1 / (2 + 2 * largest**2)
    low, high = mean - spread * math.sqrt(w / (1 - w)), mean + spread * math.sqrt((1 - w) / w)
    low = torch.where(mean.isfinite(), low, coordinate.forward(posterior.kind.center(posterior.coefficients)))
    ends = [coordinate.inverse(t) for t in (low, torch.where(finite, high, torch.inf))]
    return _placed(posterior, ends, [1 - w, w])


def _row(posterior: ConjugatePosterior, kind: DirichletKind, degree: int) -> Nodes:
    """The mean, or f(m) + ½ tr(f″ C) by differences, exact for a quadratic f, with C = (diag(m) − m mᵀ) / (A + 1)."""
    alpha = kind.distribution(posterior.coefficients).concentration
    total = alpha.sum(-1, keepdim=True)
    mean = alpha / total
    if degree <= 1:
        return _placed(posterior, [mean.flatten(-2)], [1.0])
    if degree > 2:
        raise NoNodes("are no polynomials of degree two in its probabilities")
    covariance = (torch.diag_embed(mean) - mean.unsqueeze(-1) * mean.unsqueeze(-2)) / (total.unsqueeze(-1) + 1)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # its columns are steps on the simplex
    h = 0.5 * float((mean.unsqueeze(-1) / root.abs().clamp(min=1e-300)).min().clamp(max=1.0))
    steps = [sign * h * root[..., i] for i in range(kind.size) for sign in (1.0, -1.0)]
    ends = [mean, *(mean + step for step in steps)]
    return _placed(posterior, [end.flatten(-2) for end in ends], [1 - kind.size / h**2, *[0.5 / h**2] * len(steps)])


def by_quantiles(posterior: ConjugatePosterior) -> Nodes:
    """The tanh-sinh rule: ∫₀¹ f(z(u)) du with u = 1 / (1 + exp(−π sinh x))."""
    x = np.arange(-REACH, REACH + STEP / 2, STEP)
    lower, upper = special.expit(np.pi * np.sinh(x)), special.expit(-np.pi * np.sinh(x))
    weights = STEP * np.pi * np.cosh(x) * lower * upper
    q = posterior.kind.distribution(posterior.coefficients)
    if isinstance(posterior.kind, BetaKind):
        a, b = (c.cpu().numpy() for c in (q.concentration1, q.concentration0))  # type: ignore[attr-defined]
        ends = [_beta_quantile(a, b, u) if u <= 0.5 else 1 - _beta_quantile(b, a, v)
                for u, v in zip(lower, upper, strict=True)]  # fmt: skip
    else:
        a, b = (c.cpu().numpy() for c in (q.concentration, q.rate))  # type: ignore[attr-defined]
        ends = [special.gammaincinv(a, u) / b if u <= 0.5 else special.gammainccinv(a, v) / b
                for u, v in zip(lower, upper, strict=True)]  # fmt: skip
        if isinstance(posterior.kind, InverseGammaKind):
            with np.errstate(divide="ignore"):
                ends = [1 / end for end in ends]
    nodes = _placed(posterior, [torch.as_tensor(end) for end in ends], (weights / weights.sum()).tolist())
    return replace(nodes, halved=True)


def _beta_quantile(a: Array, b: Array, u: float) -> Array:
    """scipy's, and where u is too small for it the first term z = (u a B(a, b))^(1/a) of its series."""
    if u > 1e-25:
        found: Array = special.betaincinv(a, b, u)
        return found
    first: Array = np.exp((np.log(u) + np.log(a) + special.betaln(a, b)) / a)
    return np.minimum(first, 1.0)


def _placed(posterior: ConjugatePosterior, ends: list[Tensor], weights: list[float]) -> Nodes:
    """Values of the elements, (states) layout + (k,) each, along the atoms' dim."""
    m = len(posterior.geometry.layout)
    values = torch.cat([end.to(posterior.coefficients) for end in ends], ends[0].dim() - 1 - m)
    return Nodes(posterior.placed(values), torch.tensor(weights, dtype=torch.float64))
