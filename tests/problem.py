"""What the table of problems (problems.py) has in each row.

A `Problem` is a small model with its data, a start that is no symmetric saddle, and what is known about it: the plate
whose elements are independent (for the oracle), whether the whole M-step has a closed form, whether parameters have
priors. A law that does not hold of a model as it stands reads that off a field here, never off its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tests.oracles import Enumeration, enumerate_model, log_prior


@dataclass(frozen=True)
class Case:
    """A model with its data and a start: what the tables of all kinds have in common."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    init: Mapping[str, Tensor]

    def start(self) -> dict[str, Tensor]:
        """A fresh copy of the starting values."""
        return {name: value.clone() for name, value in self.init.items()}


@dataclass(frozen=True)
class Fitted(Case):
    """A case with the algorithm that fits it, and further arguments of `fit`."""

    algorithm: str = "em"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem(Case):
    plate: str | None  # its elements are independent given the parameters and the latents outside it
    closed: bool = True  # every parameter's update has a closed form (by Newton's method it has none)
    priors: bool = False  # some parameters are `pyro.sample` sites
    weights: Tensor | None = None  # of the elements of `plate`
    options: dict[str, Any] = field(default_factory=dict)  # more arguments of `fit`
    attained: bool = True  # the objective has a maximum inside of the parameter space
    completes: str = ""  # why the complete data of the M-step, and so its Q, are not those of the model as written
    rows: Mapping[str, Tensor] | None = None  # in long format the element of `plate` that each row of a plate reads
    rounds: str = ""  # why another device does other arithmetic than the CPU, equal to rounding only

    def fit_options(self, algorithm: str) -> dict[str, Any]:
        weights = {} if self.weights is None else {"weights": {self.plate: self.weights}}
        return {"algorithm": algorithm, **weights, **self.options}

    def oracle(self, params: Mapping[str, Tensor]) -> Enumeration:
        return enumerate_model(self.model, self.args, params, self.plate, self.weights, rows=self.rows)

    def objective(self, params: Mapping[str, Tensor], algorithm: str) -> Tensor:
        """The exact log-likelihood, for map-em plus the log prior."""
        value = self.oracle(params).log_evidence
        return value + log_prior(self.model, self.args, params) if algorithm == "map-em" else value
