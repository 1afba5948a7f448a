"""Charts: unconstrained coordinates u of a constrained value x, free dimensions only.

    chart(constraint, x).from_free(u)       x, with x = from_free(to_free(x))
    chart(constraint, x).pull_back(x, g)    Jᵀ g, J = ∂x/∂u: the score in u for a gradient g in x

    real x;   bounds log(x − a), log(b − x), log((x − a)/(b − x));   simplex log p_k − log p_ref;
    Cholesky factors by the entries below the diagonal and its logarithm, covariances by their factor

torch's `transform_to` has other coordinates with redundant ones (D² for a covariance) and loses exact
zeros. A chart is built at a value and freezes what lies on the boundary there (a probability of 0 or 1,
a rate of 0, an infinite logit, a zero of a simplex): no coordinate, no NaN. Constraints without a chart
here go through `transform_to`. Shape: P is the number of coordinates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform, transform_to
from torch.distributions.constraints import Constraint

from pyro_em.derivatives import pulled_back
from pyro_em.errors import InputError
from pyro_em.shapes import places


class Chart(ABC):
    """Coordinates around one value. Frozen; the value's shape and boundary entries are built in."""

    @property
    @abstractmethod
    def size(self) -> int:
        """P, the number of free coordinates."""

    @abstractmethod
    def to_free(self, value: Tensor) -> Tensor:
        """Coordinates (P,) of a value with the same entries on the boundary."""

    @abstractmethod
    def from_free(self, free: Tensor) -> Tensor:
        """The value at coordinates (P,); differentiable."""

    @abstractmethod
    def pull_back(self, value: Tensor, gradient: Tensor) -> Tensor:
        """Jᵀ gradient, shape (P,); a frozen entry's gradient does not matter, even if infinite or NaN."""


@dataclass(frozen=True, eq=False)
class ElementwiseChart(Chart):
    """Each entry on its own, between bounds or without; `index` holds the free ones."""

    template: Tensor  # the value at which the chart was built
    index: Tensor  # (P,) positions in the flattened value
    lower: Tensor | None  # (P,), or None without a bound
    upper: Tensor | None  # (P,), or None

    @property
    def size(self) -> int:
        return self.index.numel()

    @cached_property
    def whole(self) -> bool:
        """Every entry is free."""
        return self.index.numel() == self.template.numel()

    def _entries(self, value: Tensor) -> Tensor:
        return value.flatten() if self.whole else value.flatten()[self.index]

    def to_free(self, value: Tensor) -> Tensor:
        x = self._entries(value)
        if self.lower is None:
            return x if self.upper is None else (self.upper - x).log()
        return (x - self.lower).log() if self.upper is None else ((x - self.lower) / (self.upper - x)).log()

    def from_free(self, free: Tensor) -> Tensor:
        if self.lower is None:
            x = free if self.upper is None else self.upper - free.exp()
        elif self.upper is None:
            x = self.lower + free.exp()
        else:
            x = self.lower + (self.upper - self.lower) * free.sigmoid()
        flat = x if self.whole else self.template.flatten().index_put((self.index,), x)
        return flat.reshape(self.template.shape)

    def pull_back(self, value: Tensor, gradient: Tensor) -> Tensor:
        x, slope = self._entries(value), self._entries(gradient)
        if self.lower is None:
            return slope if self.upper is None else slope * (x - self.upper)
        inside = slope * (x - self.lower)
        return inside if self.upper is None else inside * ((self.upper - x) / (self.upper - self.lower))


@dataclass(frozen=True, eq=False)
class SimplexChart(Chart):
    """Rows of probabilities: log-ratios of the positive entries to the largest one at build time."""

    logits: Tensor  # (..., K): −inf at the zeros, 0 elsewhere
    index: Tensor  # (P,) positions of the free entries in the flattened value
    reference: Tensor  # (..., 1) position of the largest entry of each row

    @property
    def size(self) -> int:
        return self.index.numel()

    def to_free(self, value: Tensor) -> Tensor:
        ratio = value.log() - value.gather(-1, self.reference).log()
        return ratio.flatten()[self.index]

    def from_free(self, free: Tensor) -> Tensor:
        logits = self.logits.flatten().index_put((self.index,), free)
        return logits.reshape(self.logits.shape).softmax(-1)

    def pull_back(self, value: Tensor, gradient: Tensor) -> Tensor:
        # ∂p_j/∂u_k = p_j (1[j = k] − p_k); an entry of 0, or whose logarithm's gradient overflows, does not move.
        weighted = torch.where(value > 1e-300, value * gradient, torch.zeros_like(value))
        return (weighted - value * weighted.sum(-1, keepdim=True)).flatten()[self.index]


@dataclass(frozen=True, eq=False)
class CholeskyChart(Chart):
    """Lower triangular factors with a positive diagonal, or with a diagonal of ones (`unit`)."""

    shape: torch.Size  # (..., D, D)
    device: torch.device
    unit: bool = False

    @property
    def size(self) -> int:
        return self.shape[:-2].numel() * self._places[0].numel()

    def to_free(self, value: Tensor) -> Tensor:
        entries = self._entries(value)
        diagonal = self._places[1]
        return torch.where(diagonal, torch.where(diagonal, entries, 1.0).log(), entries).flatten()

    def from_free(self, free: Tensor) -> Tensor:
        entries = free.reshape(*self.shape[:-2], -1)
        diagonal = self._places[1]
        entries = torch.where(diagonal, torch.where(diagonal, entries, 0.0).exp(), entries)
        blank = free.new_zeros(self.shape).flatten(-2)
        factor = blank.index_copy(-1, self._places[0], entries).reshape(self.shape)
        return factor + torch.eye(self.shape[-1]).to(factor) if self.unit else factor

    def pull_back(self, value: Tensor, gradient: Tensor) -> Tensor:
        slope = torch.where(self._places[1], self._entries(value), 1.0)
        return (slope * self._entries(gradient)).flatten()

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Positions of the entries in the flattened matrix, and which of them are on the diagonal."""
        size = self.shape[-1]
        rows, columns = torch.tril_indices(size, size, offset=-1 if self.unit else 0, device=self.device)
        return rows * size + columns, rows == columns

    def _entries(self, matrix: Tensor) -> Tensor:
        return matrix.flatten(-2).index_select(-1, self._places[0])


@dataclass(frozen=True, eq=False)
class CovarianceChart(Chart):
    """Positive definite matrices Σ = LLᵀ, through the coordinates of L."""

    factor: CholeskyChart

    @property
    def size(self) -> int:
        return self.factor.size

    def to_free(self, value: Tensor) -> Tensor:
        return self.factor.to_free(torch.linalg.cholesky(value))

    def from_free(self, free: Tensor) -> Tensor:
        factor = self.factor.from_free(free)
        return factor @ factor.mT

    def pull_back(self, value: Tensor, gradient: Tensor) -> Tensor:
        # ⟨G, dL Lᵀ + L dLᵀ⟩ = ⟨(G + Gᵀ) L, dL⟩
        factor = torch.linalg.cholesky(value)
        return self.factor.pull_back(factor, (gradient + gradient.mT) @ factor)


@dataclass(frozen=True, eq=False)
class TransformChart(Chart):
    """Any other constraint, by torch's transform and its number of coordinates."""

    transform: Transform
    shape: torch.Size  # of the transform's domain

    @property
    def size(self) -> int:
        return self.shape.numel()

    def to_free(self, value: Tensor) -> Tensor:
        return self.transform.inv(value).reshape(-1)

    def from_free(self, free: Tensor) -> Tensor:
        return self.transform(free.reshape(self.shape))

    def pull_back(self, value: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            free = self.to_free(value.detach()).requires_grad_()
            return pulled_back([self.from_free(free)], [free], [gradient])[0]  # type: ignore[return-value]


def chart(constraint: Constraint, value: Tensor, fixed: Tensor | None = None) -> Chart:
    """The chart of a constraint at `value`, of any shape.

    `fixed` (bool, broadcasts to the value) freezes single entries; only constraints that act on each
    entry alone accept it. Raises InputError for a value outside the constraint's bounds, and for a
    constraint without unconstrained coordinates.

    >>> c = chart(constraints.simplex, torch.tensor([0.5, 0.0, 0.5]))
    >>> c.size, c.from_free(torch.zeros(1))
    (1, tensor([0.5000, 0.0000, 0.5000]))
    """
    constraint, value = base_constraint(constraint), value.detach()
    if constraint is constraints.real or isinstance(constraint, BOUNDED):
        return _elementwise(constraint, value, fixed)
    if fixed is not None:
        raise InputError(
            f"Single entries cannot be fixed under the constraint {constraint}, which ties entries to each "
            "other. Fix the whole parameter, or give it a constraint that acts on each entry alone."
        )
    if constraint is constraints.simplex:
        return _simplex(value)
    unit = constraint is constraints.unit_lower_cholesky
    if unit or isinstance(constraint, type(constraints.lower_cholesky)):
        return CholeskyChart(value.shape, value.device, unit)
    if constraint in (constraints.positive_definite, constraints.positive_semidefinite):
        return CovarianceChart(CholeskyChart(value.shape, value.device))
    try:
        transform = transform_to(constraint)
    except NotImplementedError:
        raise InputError(
            f"The constraint {constraint} has no unconstrained coordinates, so a parameter under it cannot "
            "be optimised. Write the parameter through one that has: real, positive, simplex, ..."
        ) from None
    return TransformChart(transform, torch.Size(transform.inverse_shape(value.shape)))


def free_dimension(constraint: Constraint, value: Tensor) -> int:
    """K − 1 for a simplex row, D(D+1)/2 for a covariance. Entries on the boundary count: it is the model's number."""
    constraint = base_constraint(constraint)
    if constraint is constraints.real or isinstance(constraint, BOUNDED):
        return value.numel()
    if constraint is constraints.simplex:
        return value.shape[:-1].numel() * (value.shape[-1] - 1)
    return chart(constraint, value).size


_NAMES = "greater_than greater_than_eq less_than interval half_open_interval"
BOUNDED = tuple(getattr(constraints, name) for name in _NAMES.split())


def base_constraint(constraint: Any) -> Any:
    """The constraint below `independent`, which only says how many dims make one event."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def bounds_of(constraint: Any, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of every entry; None without one."""
    bounds = [getattr(constraint, name, None) for name in ("lower_bound", "upper_bound")]
    lower, upper = (None if b is None else torch.as_tensor(b).to(value).expand(value.shape) for b in bounds)
    return lower, upper


def _elementwise(constraint: Any, value: Tensor, fixed: Tensor | None) -> ElementwiseChart:
    lower, upper = bounds_of(constraint, value)
    free, outside = value.isfinite(), value.isnan()
    if lower is not None:
        free, outside = free & (value > lower), outside | (value < lower)
    if upper is not None:
        free, outside = free & (value < upper), outside | (value > upper)
    if outside.any():
        raise InputError(
            f"A value of {value[outside][0].item()!r} does not satisfy the constraint {constraint}. "
            "Give a value inside, or on the boundary to keep it there."
        )
    if fixed is not None:
        free = free & ~fixed
    index = places(free)
    lower, upper = (None if b is None else b.flatten()[index] for b in (lower, upper))
    return ElementwiseChart(value.clone(), index, lower, upper)


def _simplex(value: Tensor) -> SimplexChart:
    if not bool((value >= 0).all()) or not bool((value.sum(-1) > 0).all()):
        raise InputError("A row of probabilities has negative, NaN or only zero entries; let rows sum to 1.")
    reference = value.argmax(-1, keepdim=True)
    free = (value > 0).scatter(-1, reference, False)
    logits = torch.where(value > 0, 0.0, -torch.inf).to(value)
    return SimplexChart(logits, places(free), reference)
