"""What a family of distributions tells the M-step.

A family gives an exact `log_prob`, sufficient statistics of a value, and two kinds of kernel
(`pyro_em.kernels`): its log density as a function of one *argument*, given weighted moments

    S₀ = Σ w,   S_j = Σ w T_j(x)

and its log density as a function of its *value*, for priors. Anything a family does not offer is
None, and the caller then maximises `log_prob` numerically. A family knows no site and no parameter,
does no reduction, and does not check supports: a value outside is the caller's error to report.

Shapes: arguments and values carry leading batch or cell dims U (any number, broadcast freely), then
their own event dims.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_em.families.spaces import beyond, intervals
from pyro_em.kernels import Kernel, PowerKernel

Arguments = Mapping[str, Any]
Moments = Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Statistic:
    """The outer product of one or two `factors`, each with `factor_dim` trailing event dims.

    Two factors stand for x² (factor_dim 0) or x xᵀ (factor_dim 1), so that Σ w x xᵀ is one
    contraction and no (N, D, D) table is made.
    """

    factors: tuple[Tensor, ...]
    factor_dim: int = 0

    @property
    def event_dim(self) -> int:
        return len(self.factors) * self.factor_dim

    def dense(self) -> Tensor:
        """The statistic itself, with its event dims last."""
        first, *rest = self.factors
        for second in rest:
            first = first * second if self.factor_dim == 0 else first[..., :, None] * second[..., None, :]
        return first


@dataclass(frozen=True, eq=False)
class OneHotStatistic:
    """One-hot rows, shape U + (size,), kept as an integer `index` of shape U."""

    index: Tensor
    size: int

    @property
    def event_dim(self) -> int:
        return 1

    def dense(self) -> Tensor:
        return self._dense

    @cached_property
    def _dense(self) -> Tensor:
        return one_hot(self.index, self.size).double()

    @cached_property
    def is_enumerated(self) -> bool:
        """The index is 0, 1, ... along its first dim and does not vary along others, as of an enumerated latent."""
        shape = self.index.shape
        if not shape or shape[0] != self.size or self.index.numel() != self.size:
            return False
        return bool((self.index.reshape(-1) == torch.arange(self.size, device=self.index.device)).all())


@dataclass(frozen=True, eq=False)
class IndexedStatistic:
    """Rows of a `table`, shape V + (G,) + event, picked by an integer `index` of shape U.

    V has size 1 (or nothing) along the dims along which the index varies: all rows of one number share the entry.
    """

    index: Tensor
    table: Tensor
    event_dim: int

    def dense(self) -> Tensor:
        rows = len(self.table.shape) - self.event_dim - 1
        cells = torch.broadcast_shapes(self.index.shape, self.table.shape[:rows])
        event = self.table.shape[rows + 1 :]
        index = self.index.expand(cells).reshape(*cells, 1, *(1,) * self.event_dim).expand(*cells, 1, *event)
        table = self.table.expand(*cells, *self.table.shape[rows:])
        return table.gather(len(cells), index).squeeze(len(cells))


@dataclass(frozen=True, eq=False)
class SumStatistic:
    """The sum of several statistics of one event shape, reduced one by one."""

    terms: tuple[Statistic | IndexedStatistic, ...]

    @property
    def event_dim(self) -> int:
        return self.terms[0].event_dim

    def dense(self) -> Tensor:
        first, *rest = (term.dense() for term in self.terms)
        return sum(rest, first)


AnyStatistic = Statistic | OneHotStatistic | IndexedStatistic | SumStatistic


@dataclass(frozen=True)
class Link:
    """The canonical coordinate of an argument: where its kernel lives.

    Both functions are differentiable and inverse to each other up to what the distribution ignores
    (a constant added to logits, the length of unnormalised probs).
    """

    name: str
    to_canonical: Callable[[Tensor], Tensor]
    from_canonical: Callable[[Tensor], Tensor]


def _identity(value: Tensor) -> Tensor:
    return value


IDENTITY = Link("identity", _identity, _identity)
LOGIT = Link("logit", torch.sigmoid, torch.logit)
SOFTMAX = Link("softmax", lambda logits: torch.softmax(logits, -1), torch.log)
NORMALISED = Link("normalised", lambda probs: probs / probs.sum(-1, keepdim=True), _identity)
CHOLESKY = Link("cholesky", lambda factor: factor @ factor.mT, torch.linalg.cholesky)


class Family(ABC):
    """One family; stateless. Subclasses fill the table at the top and what has a closed form."""

    distribution: ClassVar[type]
    """The Pyro distribution class."""
    event_dim: ClassVar[int] = 0
    """Event dims of a value."""
    arguments: ClassVar[Mapping[str, int]]
    """Tensor arguments of the constructor, with the event dims of each."""
    links: ClassVar[Mapping[str, Link]] = {}
    """Canonical coordinate of each argument which is not its own."""
    closed: ClassVar[frozenset[str]] = frozenset()
    """Arguments which have a `kernel`."""
    diagonal: ClassVar[frozenset[str]] = frozenset()
    """Matrix arguments which have a `diagonal_kernel`."""
    by_entries: ClassVar[frozenset[str]] = frozenset()
    """Matrix arguments whose kernel is quadratic in all their entries in a row, event shape (rows x columns,)."""
    by_row: ClassVar[frozenset[str]] = frozenset()
    """Vector arguments that Newton's method moves on the log-density of the rows, where there is no closed form."""
    integrates: ClassVar[bool] = False
    """Whether the distribution has latents inside, whose posterior `posterior_moments` gives."""
    centered: ClassVar[bool] = False
    """Whether `statistics` and the kernels use a `center`; the first statistic is then the location."""
    latent_response: ClassVar[bool] = False
    """The value is seen only in part, so that `statistics` depend on the arguments that move (response.py)."""

    @property
    def name(self) -> str:
        """As plans and messages call it."""
        return self.distribution.__name__

    @property
    def location_dim(self) -> int:
        """Event dims of `location`."""
        return self.event_dim

    def location(self, value: Tensor) -> Tensor:
        """Of a `centered` family: where the data lie, in the coordinate of the first statistic."""
        (first, *_) = self.statistics(value)
        return first.dense()

    def complete_count(self, args: Arguments) -> Tensor | float:
        """Of a latent response: expected number of complete observations behind each one that was seen."""
        return 1.0

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        """log density or mass at `value`, shape broadcast(U of args, U of value).

        `args` are raw constructor arguments (Python numbers allowed, names not in `arguments`
        ignored). Exactly −inf at an impossible value, with gradients that are never NaN. Here:
        the distribution's own `log_prob`, right wherever that has no boundary trouble.
        """
        kept = {name: args[name] for name in self.arguments if name in args}
        result: Tensor = self.distribution(**kept, validate_args=False).log_prob(value)
        return result

    def bounded(self, argument: str) -> bool:
        """Whether an argument's entries are bounded each by itself: `outside` looks at it."""
        return argument in intervals(self.distribution)

    def at_edge(self, argument: str, value: Tensor, share: float) -> bool:
        """Whether entries of an argument lie within a share of its largest entry from the edge of its space."""
        margin = share * value.abs().amax()
        return any(bool(((value - edge).abs() <= margin).any()) for edge in intervals(self.distribution)[argument])

    def outside(self, args: Arguments) -> Tensor | None:
        """Cells, shape U, where an argument is no number of its space: no density there, whatever `log_prob` says.

        None where no argument has bounds. Matrices are not looked at.
        """
        found: Tensor | None = None
        for name, bounds in intervals(self.distribution).items():
            if name in args and name in self.arguments:
                bad = beyond(torch.as_tensor(args[name]), bounds)
                dims = self.arguments[name]
                bad = bad.flatten(-dims).any(-1) if dims else bad
                found = bad if found is None else found | bad
        return found

    def log_prob_of_all(self, args: Arguments, value: Tensor) -> Tensor:
        """`log_prob` at all values of a finite support, which are in order along the first dim of `value`.

        Without gradients, and by less than a look-up where the arguments are the probabilities themselves.
        """
        return self.log_prob(args, value)

    def accepts(self, raw: Mapping[str, Any]) -> bool:
        """Whether a distribution with these constructor arguments is of this family."""
        return True

    def posterior_moments(self, args: Arguments, value: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Log density (batch shape), and moments for the kernels of a family that `integrates`, given the value.

        :param weight: of every batch element, float64; it multiplies the moments only.
        """
        raise NotImplementedError

    def posterior(self, args: Arguments, value: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """The same in two stages, for weights that depend on the log density: a function gives the moments for them."""
        raise NotImplementedError

    def is_noise(self, argument: str) -> bool:
        """Of a family that `integrates`: whether a covariance argument is that of a noise, not of a first state (which
        may vanish: it is one value for every sequence)."""
        return False

    def expected_log_density(self, args: Arguments, moments: Moments) -> Tensor:
        """E log p(value, latents inside | args) under the posterior behind `moments`, a number."""
        raise NotImplementedError

    def statistics(
        self, value: Tensor, args: Arguments | None = None, center: Tensor | None = None
    ) -> tuple[AnyStatistic, ...]:
        """Sufficient statistics T_j(value) for the kernels, in the order of the moments.

        `args` supplies what a statistic itself depends on (the number of categories, a total count) at the level of the
        values. `center` broadcasts against the first statistic of a `centered` family and is subtracted from it:
        Σx² − (Σx)²/n keeps its digits only for a center within a few standard deviations of the data.
        """
        return ()

    def kernel(self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None) -> Kernel | None:
        """Σ w log p(x | args) as a function of one argument, up to a constant, or None.

        `moments` is (S₀, S₁, ...): S₀ of shape U, then one weighted sum per statistic, U + event. `args` are the other
        arguments, `center` what `statistics` was given (against U). The kernel is in the canonical coordinate (`link`).
        """
        return None

    def couples(self, one: str, other: str) -> bool:
        """Whether two arguments are parts of one location, so that `cross_precision` gives a block."""
        return False

    def cross_precision(self, one: str, other: str, moments: Moments, args: Arguments) -> Tensor:
        """-∂²Q between the entries (matrices: in a row) of two arguments that couple, shape U + (entries, entries)."""
        raise NotImplementedError

    def block_kernel(self, argument: str, block: Tensor, moments: Moments, args: Arguments) -> Kernel | None:
        """Kernel of the rows and columns `block` of a matrix argument with zeros between them and the others."""
        return None

    def diagonal_kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> PowerKernel | None:
        """Like `kernel`, for a matrix argument known to be diagonal: one kernel, U + (D,), for its diagonal entries."""
        return None

    def value_kernel(self, args: Arguments) -> Kernel | None:
        """log p(value | args) as a function of the value, up to a constant, or None."""
        return None

    def link(self, argument: str) -> Link:
        """The canonical coordinate of `argument`."""
        return self.links.get(argument, IDENTITY)
