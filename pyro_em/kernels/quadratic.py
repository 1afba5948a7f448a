"""h·(μ−o) − ½ (μ−o)ᵀ Λ (μ−o): locations, elementwise or as vectors.

The origin o keeps the digits: with data around 1e6 and spread 1, sums of x lose what sums of x − o
keep. Origins are not additive, so kernels are moved onto one origin (`rebase`) before their
coefficients are added. A kernel at origin θ_old has h = its score there, and its argmax is a Newton
step from θ_old, which leaves a direction without information (Λ singular) where it was.
Where h = P g and Λ = w P (the location of one normal site per entry: a weighted mean) the step is g/w, whatever P.
Assumes Λ symmetric and positive semidefinite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.kernels.base import FlatKernel, IncompatibleKernels, Kernel, Scatter
from pyro_em.shapes import broadcast_shapes

# A direction counts as undetermined if its information, in units in which every entry alone has 1, is below this
# times D: rounding in the sums leaves about eps there.
RANK = 1e-14


@dataclass(frozen=True, eq=False)
class Mean:
    """h = P g and Λ = w P; `metric` is P elementwise, F with P = FᵀF of vectors. `weight` w ≥ 0 has shape U."""

    weight: Tensor
    moment: Tensor  # U, or U + (D,)
    metric: Tensor  # U, or U + (D, D)
    vector: bool

    def moved(self, shift: Tensor) -> Mean:
        """g around an origin that is moved by `shift`."""
        weight = self.weight.unsqueeze(-1) if self.vector else self.weight
        return dataclasses.replace(self, moment=self.moment - weight * shift)

    def slope(self) -> Tensor:
        """P g."""
        if not self.vector:
            return self.metric * self.moment
        return (self.metric.mT @ (self.metric @ self.moment.unsqueeze(-1))).squeeze(-1)

    def step(self) -> Tensor:
        """g/w."""
        return self.moment / (self.weight.unsqueeze(-1) if self.vector else self.weight)

    @cached_property
    def is_positive(self) -> bool:
        """Every entry has a weight."""
        return bool((self.weight > 0).all())

    def collect(self, scatter: Scatter) -> Mean | None:
        """Σ P g over the cells of an entry is P Σ g, if P is the same in them; else None."""
        event = 2 * int(self.vector)
        own = self.metric.shape[: self.metric.dim() - event]
        cells = [self.weight.shape, self.moment.shape[: self.moment.dim() - int(self.vector)]]
        if own.numel() == 1:
            metric = self.metric.reshape(self.metric.shape[len(own) :])
        elif scatter.separates(own):
            cells.append(own)
            metric = None
        else:
            return None
        whole = broadcast_shapes(*cells)

        def at_entries(x: Tensor, event: int) -> Tensor:
            return scatter(x.expand(whole + x.shape[x.dim() - event :]), event)

        metric = at_entries(self.metric, event) if metric is None else metric
        return Mean(at_entries(self.weight, 0), at_entries(self.moment, int(self.vector)), metric, self.vector)


@dataclass(frozen=True, eq=False)
class QuadraticKernel(Kernel):
    """h·(μ−o) − ½ (μ−o)ᵀ Λ (μ−o).

    Elementwise: `linear` h and `precision` Λ of shape U. With `vector=True`: h of shape U + (D,) and
    Λ of shape U + (D, D). `origin` o broadcasts against μ. Where it is empty the argmax is o. `mean` says the same as
    h and Λ, where it is known.

    >>> QuadraticKernel(torch.tensor(6.0), torch.tensor(2.0), torch.tensor(100.0)).argmax()
    tensor(103.)
    """

    linear: Tensor
    precision: Tensor
    origin: Tensor = field(default_factory=lambda: torch.zeros(()))
    vector: bool = False
    mean: Mean | None = None

    names: ClassVar[tuple[str, ...]] = ("linear", "precision")

    @classmethod
    def of_mean(cls, mean: Mean, origin: Tensor) -> Self:
        """The kernel of a weighted mean."""
        weight, metric = mean.weight, mean.metric
        precision = weight[..., None, None] * (metric.mT @ metric) if mean.vector else weight * metric
        return cls(mean.slope(), precision, origin, mean.vector, mean)

    @property
    def event_dim(self) -> int:
        return int(self.vector)

    @property
    def event_dims(self) -> tuple[int, ...]:
        return (1, 2) if self.vector else (0, 0)

    @property
    def form(self) -> str:
        return "h.(m - o) - (m - o)'L(m - o)/2"

    def value(self, theta: Tensor) -> Tensor:
        shift = theta - self.origin
        value = (self.linear - self._apply(shift) / 2) * shift
        return value.sum(-1) if self.vector else value

    def gradient(self, theta: Tensor) -> Tensor:
        if theta is self.origin:
            return self.linear if self.mean is None else self.mean.slope()
        if self.mean is not None:
            return self.mean.moved(theta - self.origin).slope()
        return self.linear - self._apply(theta - self.origin)

    def argmax(self) -> Tensor:
        if self.mean is not None and self.mean.is_positive:
            return self.origin + self.mean.step()
        if self.vector:
            return self.origin + _solve(self.precision, self.linear, self._factor)
        step = self.linear / self.precision
        return self.origin + torch.where(self.is_empty(), torch.zeros_like(step), step)

    @cached_property
    def _factor(self) -> Tensor | None:
        """Of Λ, if no matrix of it has a direction without information."""
        return _factor(self.precision)

    @property
    def is_conditioned(self) -> bool:
        """Of vectors: Λ has no direction without information."""
        return self._factor is not None

    def is_empty(self) -> Tensor:
        empty = self.linear == 0
        if self.vector:
            return empty.all(-1) & (self.precision == 0).flatten(-2).all(-1)
        return empty & (self.precision == 0)

    @cached_property
    def is_informed(self) -> bool:
        if self.mean is not None and self.mean.is_positive:
            return True
        return super().is_informed

    def from_coefficients(self, coefficients: Sequence[Tensor]) -> Self:
        return dataclasses.replace(super().from_coefficients(coefficients), mean=None)

    def rescale(self, factor: Tensor) -> Self:
        # An entry multiplied by 0 no longer moves: its origin is folded into h before it is lost.
        zero = factor == 0
        moved = self.rebase(torch.where(zero, torch.zeros_like(self.origin), self.origin))
        if self.vector:
            precision = moved.precision * factor.unsqueeze(-1) * factor.unsqueeze(-2)
        else:
            precision = moved.precision * factor**2
        origin = moved.origin / torch.where(zero, torch.ones_like(factor), factor)
        return type(self)(moved.linear * factor, precision, origin, self.vector)

    def rebase(self, origin: Tensor) -> Self:
        """The same function, up to a constant, written around another origin."""
        shift = origin - self.origin
        mean = None if self.mean is None else self.mean.moved(shift)
        return dataclasses.replace(self, linear=self.linear - self._apply(shift), origin=origin, mean=mean)

    def as_vector(self, size: int) -> Self:
        """An elementwise kernel as one on vectors of `size` entries, with diagonal Λ."""
        if self.vector:
            return self
        cells = broadcast_shapes(self.linear.shape, self.precision.shape, (size,))
        precision = torch.diag_embed(self.precision.expand(cells))
        return type(self)(self.linear.expand(cells), precision, self.origin, vector=True)

    def collect(self, scatter: Scatter, at: Tensor, onto: Tensor) -> Self:
        moved = self.rebase(at)
        mean = None if moved.mean is None else moved.mean.collect(scatter)
        return dataclasses.replace(moved.map(scatter), origin=onto, mean=mean)

    def __add__(self, other: Kernel) -> Kernel:
        if isinstance(other, FlatKernel):
            return self
        if not isinstance(other, QuadraticKernel):
            both = other.absorbed(self)
            if both is None:
                raise IncompatibleKernels.sum_of(self, other)
            return both
        if self.vector != other.vector:
            size = (self if self.vector else other).linear.shape[-1]
            return self.as_vector(size) + other.as_vector(size)
        moved = other.rebase(self.origin)
        linear, precision = self.linear + moved.linear, self.precision + moved.precision
        return type(self)(linear, precision, self.origin, self.vector)

    def _apply(self, shift: Tensor) -> Tensor:
        if not self.vector:
            return self.precision * shift
        if shift.shape[-1:] != self.precision.shape[-1:]:
            shift = shift.expand(broadcast_shapes(shift.shape, self.precision.shape[-1:]))
        return (self.precision @ shift.unsqueeze(-1)).squeeze(-1)


def _solve(precision: Tensor, linear: Tensor, factor: Tensor | None) -> Tensor:
    """Λ⁻¹h, shape U + (D,); the step of least length where Λ is singular and has no factor."""
    if factor is not None:
        return torch.cholesky_solve(linear.unsqueeze(-1), factor).squeeze(-1)
    values, vectors, scale = _spectrum(precision)
    kept = values > RANK * values.shape[-1]
    inverse = torch.where(kept, values, torch.ones_like(values)).reciprocal() * kept
    step = (vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ (linear / scale).unsqueeze(-1)))).squeeze(-1) / scale
    # Of all solutions the one orthogonal to the null space, whose basis in the entries' own units is D⁻¹V.
    null = torch.where(kept.unsqueeze(-2), 0.0, vectors / scale.unsqueeze(-1))
    # Its vectors are made of one length: entries with next to no information are as long as the others are short.
    null = null / torch.where(kept, 1.0, torch.linalg.vector_norm(null, dim=-2)).unsqueeze(-2)
    along = torch.linalg.pinv(null.mT @ null, hermitian=True, rtol=RANK) @ (null.mT @ step.unsqueeze(-1))
    return step - (null @ along).squeeze(-1)


def _factor(precision: Tensor) -> Tensor | None:
    """The Cholesky factors, if the pivots of Λ, relative to its diagonal, are far from rounding."""
    factor, failed = torch.linalg.cholesky_ex(precision)
    if failed.any():
        return None
    pivots = factor.diagonal(dim1=-2, dim2=-1).square() / precision.diagonal(dim1=-2, dim2=-1)
    return factor if bool((pivots > RANK * pivots.shape[-1]).all()) else None


def well_conditioned(precision: Tensor) -> bool:
    """No matrix of a batch has a direction without information."""
    return _factor(precision) is not None


def null_directions(precision: Tensor) -> Tensor:
    """Directions (D, r) about which Λ (D, D) says nothing."""
    if well_conditioned(precision):
        return precision.new_zeros(precision.shape[-1], 0)
    values, vectors, scale = _spectrum(precision)
    return vectors[:, values <= RANK * values.shape[-1]] / scale.unsqueeze(-1)


def _spectrum(precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and vectors of Λ in units in which its diagonal is 1, and these units."""
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt()
    values, vectors = torch.linalg.eigh(precision / (scale.unsqueeze(-1) * scale.unsqueeze(-2)))
    return values, vectors, scale
