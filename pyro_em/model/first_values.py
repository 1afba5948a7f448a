"""The first values of continuous latents: random ones inside of their supports, with the model's runs there.

What holds at two such points, of latents and of parameters, is taken to hold; gradients to the latents tell what is
made of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_em.charts import base_constraint
from pyro_em.device import seeded_normal
from pyro_em.model.atoms import AtomRuns
from pyro_em.model.capture import Capture
from pyro_em.model.trace import Run
from pyro_em.types import Params

FURTHER = 2.0
Values = dict[str, Tensor]


def draw(capture: Capture, names: tuple[str, ...], seed: int, dtype: torch.dtype | None = None) -> Values:
    """Random values of the latents inside of their supports, in their own shapes, whatever their distribution.

    Those of seed 2 spread further where they may be any numbers: to where an edge (clamp, relu) may be.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        site = capture.sites[name]
        bijection = biject_to(site.fn.support)
        shape = bijection.inverse_shape(site.value.shape)
        noise = seeded_normal(shape, generator)
        further = seed > 1 and base_constraint(site.fn.support) in (constraints.real, constraints.real_vector)
        found[name] = bijection(FURTHER * noise if further else noise).to(dtype or site.value.dtype)
    return found


def leaves_of(drawn: Values) -> Values:
    """The same values, with gradients, if they are in float64 (see `first_runs`)."""
    double = all(value.dtype == torch.float64 for value in drawn.values())
    return {n: value.clone().requires_grad_(True) for n, value in drawn.items()} if double else drawn


def first_runs(
    runs: AtomRuns, capture: Capture, names: tuple[str, ...], params: tuple[Params, Params], begun: tuple[Values, Run]
) -> tuple[tuple[Values, Values], tuple[Run, Run]]:
    """Leaves at two points and the model's runs there, in float64 even for a model in float32 if it lets them in.

    Type promotion then computes everything that the latents reach in float64. (A matrix product does not promote.)
    """
    started = begun if all(value.requires_grad for value in begun[0].values()) else None
    for dtype in (torch.float64, None):
        points = [draw(capture, names, i, dtype) for i in ((2,) if started else (1, 2))]
        leaves = [{n: v.requires_grad_(True) for n, v in own.items()} for own in points]
        try:
            with torch.enable_grad():
                found = [runs.one(p, own) for p, own in zip(params[-len(leaves) :], leaves, strict=True)]
        except RuntimeError:
            if dtype is None:
                raise
        else:
            break
    if started is not None:
        leaves, found = [started[0], *leaves], [started[1], *found]
    return (leaves[0], leaves[1]), (found[0], found[1])
