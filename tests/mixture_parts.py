"""Parts of random mixtures (mixtures.py): parameters with their priors, sites, and parameters moved from their start.

Letters: N rows, P covariates, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

N, P, G = 48, 2, 3
TRIALS = 6
Values = dict[str, Tensor]
Argument = Callable[[Values, Tensor], Tensor]  # of the parameters and the class, over the rows
Prior = Callable[[Values], Any]
CONSTRAINTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "unit": constraints.unit_interval,
    "simplex": constraints.simplex,
    "covariance": constraints.positive_definite,
}


@dataclass(frozen=True)
class Parameter:
    kind: str
    value: Tensor
    prior: Prior | None

    @property
    def kink(self) -> tuple[Tensor, Tensor] | None:
        """Rate and centre of a Laplace prior."""
        law = None if self.prior is None or self.kind != "real" else self.prior({})
        law = law.base_dist if isinstance(law, dist.Independent) else law
        return (1 / law.scale, law.loc) if isinstance(law, dist.Laplace) else None


@dataclass(frozen=True)
class Site:
    name: str
    distribution: Callable[[Values, Tensor], Any]
    mask: Tensor | None


def moved(parameter: Parameter) -> Tensor:
    """A feasible neighbour of the start."""
    value, u = parameter.value, 0.3 * torch.randn(parameter.value.shape)
    if parameter.kind == "real":
        return value + u
    if parameter.kind == "positive":
        return value * u.exp()
    if parameter.kind == "unit":
        return torch.sigmoid(torch.logit(value) + u)
    if parameter.kind == "simplex":
        return torch.softmax(value.log() + u, -1)
    return value
