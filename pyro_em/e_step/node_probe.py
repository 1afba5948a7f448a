"""Runs of the model from which the compiled engine of quadrature reads it off (node_reading.py).

With the latents at 0 and at 1 in one column after the other, and at random values. Where discrete latents are read
too, each of their joint states c has an element of its own in the place of every element g of the latents,

    f_cg(z),     element number c G + g,

with a mode and nodes of its own, as evidence/quadrature.py has them. Letters: C joint states (1 without discrete
latents), G elements of the latents, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.device import seeded_normal
from pyro_em.e_step.base import NotCompiled
from pyro_em.evidence.quadrature import QuadratureRoute
from pyro_em.model.density import log_density
from pyro_em.model.recognise import second_point
from pyro_em.model.trace import Run
from pyro_em.problem import Problem
from pyro_em.shapes import broadcast_shapes
from pyro_em.types import Params


@dataclass(frozen=True)
class Probe:
    """Runs with the latents at 0 and at each unit (with gradients), and at random values.

    `random` are triples of a run, values z (C G, K) and parameters: the start and others. `states` are the dims that
    discrete latents have left of those of the layout, empty where the set reads none.
    """

    units: tuple[Run, ...]
    random: tuple[tuple[Run, Tensor, Params], ...]
    states: torch.Size


def probe_of(problem: Problem, route: QuadratureRoute) -> Probe:
    """Runs of the model to be read off; latents of other sets stay where they are."""
    continuous = problem.continuous
    assert continuous is not None
    rest = continuous.runs.atom(continuous.values, 0)
    layout, dtypes = route.layout, route.dtypes
    num, sizes = layout.num_columns, torch.Size(layout.sizes)

    def values(z: Tensor) -> dict[str, Tensor]:
        return {**rest, **layout.values(z, dtypes)}

    units = []
    for k in range(num + 1):
        leaves = {n: v.detach().clone().requires_grad_(True) for n, v in problem.start.items()}
        z = torch.zeros(num, dtype=torch.float64)
        if k:
            z[k - 1] = 1.0
        with torch.enable_grad():
            units.append(continuous.runs.one(leaves, values(z.expand(*sizes, num))))
    states = _states(units[0], route)
    generator = torch.Generator().manual_seed(4)
    other = {n: second_point(record, generator) for n, record in problem.parameters.items()}
    random = []
    for params in (problem.start, other):
        z = seeded_normal((states.numel() * sizes.numel(), num), generator)
        with torch.no_grad():
            random.append((continuous.runs.one(params, values(z.reshape(*states, *sizes, num))), z, params))
    return Probe(tuple(units), tuple(random), states)


def _states(run: Run, route: QuadratureRoute) -> torch.Size:
    """Dims left of the layout's, of all factors of the set together."""
    m = len(route.layout.sizes)
    shapes = [log_density(run.sites[name]).shape for name in route.latents.factors]
    found = broadcast_shapes(*(shape[: max(0, len(shape) - m)] for shape in shapes))
    return found if found.numel() > 1 else torch.Size()


def check_prior(probe: Probe, name: str) -> None:
    """:raises NotCompiled: if the latent's own distribution depends on latents that are integrated."""
    first = probe.units[0].sites[name].arguments
    if first is None:
        raise NotCompiled(f"the latent '{name}' hides its arguments")
    for run in (*probe.units[1:], probe.random[0][0]):
        other = run.sites[name].arguments or {}
        pairs = (torch.broadcast_tensors(x.detach(), other[slot].detach()) for slot, x in first.items())
        if any(not torch.equal(*pair) for pair in pairs):
            raise NotCompiled(f"the distribution of the latent '{name}' depends on a latent")
