"""What every engine gives: the evidence at θ, and the sufficient statistics behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from torch import Tensor

from pyro_em.statistics import Posteriors
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

IMPOSSIBLE = -1e30  # stands for a log-probability of -inf in products


def is_possible(log_likelihood: float) -> bool:
    """Whether data have a finite log-likelihood, in which no `IMPOSSIBLE` is."""
    return 0.1 * IMPOSSIBLE < log_likelihood < math.inf


@dataclass(frozen=True)
class Expectation:
    """One E-step. `magnitude` is Σ|log p(x_n)|, the scale of rounding in `log_likelihood`; `error` is that of
    numerical integration in it, or of products in float32.

    `weights` are the posterior weights of every factor, which numeric M-steps need. Compiled engines do not
    form them; they are then computed by the reference path when somebody asks. `climbed` is what an update cannot
    lower, where that is another quantity than the log-likelihood (assigned.py).
    """

    log_likelihood: float
    log_prior: float
    magnitude: float
    sufficient: Sufficient
    posterior: Callable[[], Posteriors]
    climbed: float | None = None
    error: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "posterior", cache(self.posterior))

    @property
    def weights(self) -> Posteriors:
        """Posterior weights of every factor, packed like the factor (or the posterior of what is inside of a site)."""
        return self.posterior()


@dataclass(frozen=True)
class Unread:
    """An E-step no number of which has left the tensors, so that it can be recorded (tape/).

    `totals` (4,) are the numbers of an `Expectation`: log p(x|θ), log p(θ), Σ|ll_n| and the error of integration.
    """

    totals: Tensor
    sufficient: Sufficient
    posterior: Callable[[], Posteriors]

    def read(self) -> Expectation:
        """The same with its numbers."""
        likelihood, prior, magnitude, error = self.totals.tolist()
        return Expectation(likelihood, prior, magnitude, self.sufficient, self.posterior, error=error)


class Engine(Protocol):
    """Runs E-steps. `name` and `reason` appear in the plan."""

    name: str
    reason: str

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`; raises `NonFiniteError` as `Problem.evidence` does."""
        ...


class Recordable(Engine, Protocol):
    """An engine whose E-step is `unread(params).read()`, checks apart that only say what is wrong."""

    def unread(self, params: Params) -> Unread:
        """The E-step in tensor operations alone, as far as its result goes."""
        ...


@dataclass(frozen=True)
class Stage:
    """What the first stage of an E-step made of the parameters; only stages of one `kind` go together."""

    tensors: tuple[Tensor, ...]
    kind: Any
    rough: bool = False  # in float32, where the engine can


class Staged(Engine, Protocol):
    """An engine whose E-step is `after(params, core([before(params)])[0])`.

    The first and the last stage are tensor operations on parameters and statistics alone, so that they can be
    recorded (tape/); the one in the middle runs over the data, for several starts at once. `generation` changes
    when the data are laid out anew: what was recorded before is void then.
    """

    generation: int

    @property
    def compact(self) -> bool:
        """The stage in the middle is few operations, which can be recorded with the others."""
        ...

    def before(self, params: Params, magnitude: Tensor) -> Stage:
        """`magnitude` () is Σ|ll_n| of the E-step before, zero for the first one."""
        ...

    def core(self, stages: Sequence[Stage]) -> list[tuple[Tensor, ...]]:
        """One tuple of sums for each start."""
        ...

    def after(self, params: Params, sums: Sequence[Tensor]) -> tuple[Tensor, Sufficient]:
        """(log p(x|θ), log p(θ), Σ|ll_n|) as one tensor (3,), and the statistics."""
        ...

    def expectation(self, params: Params, sums: Sequence[Tensor]) -> Expectation:
        """`after` as an E-step."""
        ...


class NotCompiled(Exception):
    """This engine cannot run the model; the text is the reason."""


class OtherLayout(Exception):
    """The data have to be laid out in another way for these parameters; `Engine.e_step` does so."""
