"""What every kernel can do: add, scatter, scale, evaluate, maximise.

Shapes: U are leading cell dims (any number, broadcast freely); after them come the dims of one block
of θ: none for an elementwise kernel, (D,) for a row or vector, (D, D) for a matrix. A coefficient
has the cell dims of θ and trailing dims of its own, declared in `event_dims`, so that a caller can
scatter cells onto parameter entries with one function for all kernels. Which cells belong to which
entry is the caller's knowledge; kernels hold no index.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from pyro_em.shapes import broadcast_shapes

CoefficientMap = Callable[[Tensor, int], Tensor]


class Scatter(Protocol):
    """Sums a coefficient over cells onto the entries of a parameter."""

    def __call__(self, coefficient: Tensor, event_dim: int, /) -> Tensor: ...

    def keeps(self, kernel: Kernel) -> bool:
        """Whether every cell of the kernel is an entry, in their order: there is nothing to sum."""
        ...

    def separates(self, cells: torch.Size) -> bool:
        """Whether cells that differ along dims of this shape (those above 1) go to entries of their own."""
        ...


class IncompatibleKernels(TypeError):
    """A sum or a change of argument which leaves the closed forms: maximise numerically instead."""

    @classmethod
    def sum_of(cls, first: Kernel, second: Kernel) -> IncompatibleKernels:
        return cls(
            f"A kernel of the form {first.form} cannot be added to one of the form {second.form}: the sum "
            "has no closed-form maximum. Maximise it numerically instead."
        )


def times(coefficient: Tensor, factor: Tensor) -> Tensor:
    """coefficient · factor, where a coefficient of zero contributes 0 even if the factor is infinite."""
    product = coefficient * factor
    return torch.where(coefficient == 0, torch.zeros_like(product), product)


@dataclass(frozen=True, eq=False)
class Kernel(ABC):
    """A function of one parameter θ with additive coefficients; see the subclasses for the formulas."""

    names: ClassVar[tuple[str, ...]]
    """Fields that hold the additive coefficients, in order."""

    @property
    def at_infinity(self) -> bool:
        """Whether θ may be infinite: not in its own coordinate."""
        return False

    @property
    def event_dim(self) -> int:
        """Number of trailing dims of θ that form one block. Here and below: of an elementwise kernel."""
        return 0

    @property
    def event_dims(self) -> tuple[int, ...]:
        """Number of trailing event dims of each coefficient."""
        return (0,) * len(self.names)

    @property
    @abstractmethod
    def form(self) -> str:
        """The formula, for messages; two kernels of one form can be added."""

    @abstractmethod
    def value(self, theta: Tensor) -> Tensor:
        """The kernel at θ, shape U (event dims summed out)."""

    @abstractmethod
    def gradient(self, theta: Tensor) -> Tensor:
        """Derivative in the constrained θ, shape of θ. A zero coefficient contributes exactly 0,
        also on the boundary; a non-zero one may be infinite there."""

    @abstractmethod
    def argmax(self) -> Tensor:
        """The maximising θ. It may lie on the boundary (exactly 0 or 1), be infinite or singular where
        the kernel is unbounded, and NaN where `is_empty`: judging these is the caller's task."""

    @abstractmethod
    def is_empty(self) -> Tensor:
        """Boolean, shape U: blocks about which the kernel says nothing, so that θ keeps its value."""

    def within(self, value: Tensor, lower: Any, upper: Any) -> Tensor:
        """The maximum between two bounds (None for none), given the `argmax` without them.

        Here: the nearest bound, as elementwise kernels have a single mode.
        """
        return value.clamp(min=lower, max=upper)

    @cached_property
    def is_informed(self) -> bool:
        """Whether no block is empty. Kernels ask first what is usual and settles it in one comparison."""
        return not bool(self.is_empty().any())

    def relative_gradient(self, theta: Tensor) -> Tensor:
        """θ ∘ the gradient at a positive θ: the slope in its logarithm."""
        return theta * self.gradient(theta)

    def factor_gradient(self, factor: Tensor) -> Tensor | None:
        """Of a kernel of matrices: the derivative in L of θ = LLᵀ, on and below the diagonal; None if it has none."""
        return None

    def rescale(self, factor: Tensor) -> Self:
        """The kernel as a function of θ when the argument is factor · θ.

        `factor` ≥ 0 broadcasts against θ: one number for a matrix block has shape (..., 1, 1).

        :raises IncompatibleKernels: if the form has none. Here: for all factors but 1.
        """
        if (factor == 1).all():
            return self
        raise IncompatibleKernels(
            f"A kernel of the form {self.form} has no closed-form maximum once its argument is multiplied by a "
            "factor other than 1. Maximise it numerically instead."
        )

    @property
    def coefficients(self) -> tuple[Tensor, ...]:
        """The additive coefficients, not yet broadcast against each other."""
        return tuple([getattr(self, name) for name in self.names])

    def from_coefficients(self, coefficients: Sequence[Tensor]) -> Self:
        """The same form with other coefficients."""
        return dataclasses.replace(self, **dict(zip(self.names, coefficients, strict=True)))

    def map(self, function: CoefficientMap) -> Self:
        """Apply `function(coefficient, event_ndim)` to every coefficient, broadcast to one cell shape."""
        pairs = list(zip(self.coefficients, self.event_dims, strict=True))
        shapes = [c.shape[: c.dim() - ndim] for c, ndim in pairs]
        # torch.broadcast_shapes takes longer than the arithmetic of a small kernel.
        if all(s == shapes[0] for s in shapes):
            mapped = [function(c, ndim) for c, ndim in pairs]
            same = all(new is c for new, (c, _) in zip(mapped, pairs, strict=True))
            return self if same else self.from_coefficients(mapped)
        cells = broadcast_shapes(*shapes)
        return self.from_coefficients(
            [function(c.expand(cells + c.shape[c.dim() - ndim :]), ndim) for c, ndim in pairs]
        )

    def collect(self, scatter: Scatter, at: Tensor, onto: Tensor) -> Self:
        """Sum cells onto parameter entries with `scatter`, as `map` does.

        `at` is the current θ at the cells, `onto` the current θ at the entries that the cells go to:
        a kernel with an origin is first moved there, so that offsets are equal before they are added.
        """
        return self if scatter.keeps(self) else self.map(scatter)

    def absorbed(self, other: Kernel) -> Kernel | None:
        """The sum with a kernel that does not know this form; None where this one does not know the other either."""
        return None

    def __add__(self, other: Kernel) -> Kernel:
        if isinstance(other, FlatKernel):
            return self
        both = other.absorbed(self)
        if both is not None:
            return both
        if self.form != other.form:
            raise IncompatibleKernels.sum_of(self, other)
        pairs = zip(self.coefficients, other.coefficients, strict=True)
        return self.from_coefficients([mine + theirs for mine, theirs in pairs])


@dataclass(frozen=True, eq=False)
class FlatKernel(Kernel):
    """The constant 0: neutral in addition, empty everywhere. The kernel of a flat prior.

    >>> (FlatKernel() + FlatKernel()).is_empty()
    tensor(True)
    """

    names: ClassVar[tuple[str, ...]] = ()

    @property
    def form(self) -> str:
        return "0"

    def value(self, theta: Tensor) -> Tensor:
        return torch.zeros_like(theta)

    def gradient(self, theta: Tensor) -> Tensor:
        return torch.zeros_like(theta)

    def argmax(self) -> Tensor:
        return torch.tensor(torch.nan)

    def is_empty(self) -> Tensor:
        return torch.tensor(True)

    def rescale(self, factor: Tensor) -> Self:
        return self

    def __add__(self, other: Kernel) -> Kernel:
        return other
