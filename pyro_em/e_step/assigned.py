"""E-steps that replace the exact posterior by its mode, a draw of it, or a tempered version (evidence/assigned.py).

They run the model and contract its factors, as the reference engine does; the exact log-likelihood is computed beside
them at every E-step. `climbed` is what an M-step from such weights cannot lower: Σ max log p(x,z|θ) for the mode,
T log Σ p(x,z|θ)^(1/T) at temperature T, nothing for a draw.

Refused: latents that are not summed over finitely many states.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyro_em.e_step.base import Expectation
from pyro_em.e_step.interpreted import unread
from pyro_em.errors import Refusal
from pyro_em.evidence.assigned import assign
from pyro_em.evidence.ring import Elimination
from pyro_em.problem import Problem
from pyro_em.types import Params

REASONS: dict[Elimination, str] = {
    "max": "the most probable states take the place of the posterior",
    "sample": "one draw of the states takes the place of the posterior",
    "sum": "the posterior is tempered",
}


class Assigned:
    """The engine. `temperature` may be changed between E-steps."""

    name = "interpreted"

    def __init__(self, problem: Problem, elimination: Elimination, temperature: float = 1.0) -> None:
        for name, role in problem.roles.items():
            if role.role == "latent" and not problem.capture.sites[name].enumerable:
                raise Refusal(
                    name,
                    "its states cannot be counted, so there is no assignment to them and no tempered sum over them.",
                    "use algorithm='em' without a temperature.",
                )
        self.problem, self.elimination, self.temperature = problem, elimination, temperature
        self.reason = REASONS[elimination]
        self._centers: dict[str, Tensor | None] = {}

    def e_step(self, params: Params) -> Expectation:
        """The E-step at `params`, with `climbed` unless it is a draw."""
        evidence, run = self.problem.evidence(params)
        with torch.no_grad():
            factors = self.problem.factors(run)
        value, weights = assign(self.problem.graph, factors, self.elimination, self.temperature)
        own = dataclasses.replace(evidence, weights={**evidence.weights, **weights})
        found = unread(self.problem, run, own, self._centers).read()
        return found if self.elimination == "sample" else dataclasses.replace(found, climbed=value)
