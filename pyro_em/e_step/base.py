"""What every engine gives: the evidence at θ, and the sufficient statistics behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from pyro_em.sufficient import Sufficient
from pyro_em.types import Params


@dataclass(frozen=True)
class Expectation:
    """One E-step. `magnitude` is Σ|log p(x_n)|, the scale of rounding in `log_likelihood`.

    `weights` are the posterior weights of every factor, which numeric M-steps need. Compiled engines do not
    form them; they are then computed by the reference path when somebody asks.
    """

    log_likelihood: float
    log_prior: float
    magnitude: float
    sufficient: Sufficient
    posterior: Callable[[], Mapping[str, Tensor]]

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Posterior weights of every factor, packed like the factor."""
        return self.posterior()


class Engine(Protocol):
    """Runs E-steps. `name` and `reason` appear in the plan."""

    name: str
    reason: str

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`; raises `NonFiniteError` as `Problem.evidence` does."""
        ...


class NotCompiled(Exception):
    """This engine cannot run the model; the text is the reason."""
