"""Latents on fixed grids: `Quadrature(adaptive=False)` makes a normal latent one that can be enumerated.

The latent's distribution is replaced by `GridNormal` before any other handler sees it; everything that serves
enumerated latents, compiled engines included, then serves it. All elements share the nodes, which reach 8 standard
deviations to either side of the prior's mean.

Refused: priors that depend on parameters or latents (the nodes would move with them), that differ from element to
element, or that are not normal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger

from pyro_em.distributions.grid import GridNormal
from pyro_em.errors import Refusal
from pyro_em.evidence.rule import Quadrature
from pyro_em.model import compat, wrappers
from pyro_em.types import Model

REACH = 8.0  # standard deviations of the prior
_refined: list[bool] = []


def on_grids(model: Model, rules: Mapping[str, Quadrature]) -> Model:
    """The model with the latents of rules that are not adaptive on their grids."""
    fixed = {name: rule for name, rule in rules.items() if not rule.adaptive}
    if not fixed:
        return model
    wrapped: Model = _Grids(fixed)(model)
    return wrapped


@contextlib.contextmanager
def refined() -> Iterator[None]:
    """Within this context grids have half the spacing."""
    _refined.append(True)
    try:
        yield
    finally:
        _refined.pop()


class _Grids(Messenger):
    def __init__(self, rules: Mapping[str, Quadrature]) -> None:
        super().__init__()
        self.rules = rules

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.rules or msg["is_observed"]:
            return
        base = compat.base_distribution(msg["fn"])
        if type(base) is GridNormal:
            return  # the model of a problem that is bound again
        remedy = "leave out adaptive=False."
        if type(base) is not dist.Normal:
            raise Refusal(
                name, f"it is {type(base).__name__}, and a fixed grid is for univariate normal latents.", remedy
            )
        if get_provenance([base.loc, base.scale]):
            raise Refusal(
                name, "its prior depends on parameters or latents, with which a fixed grid cannot move.", remedy
            )
        loc, scale = detach_provenance(base.loc).reshape(-1), detach_provenance(base.scale).reshape(-1)
        if bool((loc != loc[0]).any()) or bool((scale != scale[0]).any()):
            raise Refusal(name, "its prior differs from element to element, but they share a fixed grid.", remedy)
        count = self.rules[name].num_nodes
        count = 2 * count - 1 if _refined else count
        reach = REACH * float(scale[0])
        nodes = torch.linspace(float(loc[0]) - reach, float(loc[0]) + reach, count, dtype=torch.float64).tolist()
        msg["fn"] = wrappers.replace_base(msg["fn"], lambda **raw: GridNormal(**raw, nodes=nodes))
