"""Loops over time that hold continuous latents which are no chain by themselves: their steps are run one by one.

Run together, the steps of a `pyro_em.markov` loop are a plate whose elements only the chain of discrete states couples
(evidence/timed.py), or one Kalman site (folding.py). A continuous latent of every step beside discrete ones, or with a
conjugate or numerical posterior of its own, is integrated out by evidence/routes.py, to which each step has to be a
site of its own: the model is then what it is under `pyro.markov(range(T))`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyro_em.model.capture import Capture
from pyro_em.model.roles import RoleOf
from pyro_em.model.timeline import running
from pyro_em.types import Model


class StepByStep:
    """The model with every loop run step by step."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with running("alone"):
            return self.model(*args, **kwargs)


def is_for_single_steps(seen: Capture, roles: Mapping[str, RoleOf], folded: Collection[str]) -> bool:
    """Whether a loop of the model holds continuous latents that are not folded, or discrete ones beside folded ones."""
    latent = {name for name, role in roles.items() if role.role == "latent"}
    for loop in seen.loops:
        own = latent & set(loop.names)
        continuous = {name for name in own if not seen.sites[name].enumerable}
        if continuous and own - set(folded):
            return True
    return False
