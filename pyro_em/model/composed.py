"""Arguments that no rule recognises, as functions a(θ) of the parameters alone: recorded once, replayed with gradients.

    diag(τ) L,    σ² ρ^|i−j|,    √(ρ v),    φ·sigmoid(x·β)

The run of the model that makes such an argument is recorded (tape/), and of its operations those that lead from the
parameters to the argument are kept. torch differentiates them when they are run again, so that an M-step (composed.py
there) costs a few small operations instead of runs of the model. The functions are compared with the model at a second
point.

Not handled (the argument then has no function here): arguments that move with continuous latents too, control flow
that depends on parameters, memory written in place, parameters of torch modules, random draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import PyroEMError
from pyro_em.model.trace import Run
from pyro_em.tape.listing import Listing, Step, Variable
from pyro_em.tape.record import NotRecorded, each, record
from pyro_em.tape.simplify import CHECK, simplify
from pyro_em.types import Params

MOST, MOST_BYTES = 10_000, 2**28  # operations of a run of the model, and bytes of their values
NEAR = 1e-12

Place = tuple[str, str]  # (site, slot)


@dataclass(frozen=True, eq=False)
class Composed:
    """One argument: `steps` from the parameters `reads` to it, float64 with the shape of the raw argument."""

    reads: tuple[str, ...]
    inputs: tuple[Variable, ...]
    steps: tuple[Step, ...]
    output: Variable

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """The argument at `params`, differentiable in them."""
        fresh = [params[name].clone(memory_format=torch.contiguous_format) for name in self.reads]  # as when recorded
        values: dict[Variable, Tensor] = dict(zip(self.inputs, fresh, strict=True))

        def value(x: Any) -> Any:
            return values[x] if type(x) is Variable else x

        for step in self.steps:
            found = step.call(*each(value, step.args), **each(value, step.kwargs))
            for target, own in zip(step.targets, (found,) if step.single else found, strict=True):
                if target is not None:
                    values[target] = own
        return values[self.output].double()


def composed(
    run: Callable[[Params, int], Run], places: Sequence[Place], points: tuple[Params, Params]
) -> dict[Place, Composed]:
    """Functions of those of the arguments that have one.

    :param run: the model at parameters, with its continuous latents at the first (0) or others (1) of their values.
    :param points: two values of all parameters, float64.
    """
    names = tuple(points[0])
    inputs = [points[0][name].detach().clone() for name in names]

    def arguments(*own: Tensor) -> list[Tensor]:
        sites = run(dict(zip(names, own, strict=True)), 0).sites
        return [(sites[site].arguments or {})[slot] for site, slot in places]

    try:
        operations, outputs = record(arguments, inputs, MOST, MOST_BYTES)
        listing = simplify(operations, inputs, outputs)
        with torch.no_grad():
            there = run(points[1], 1).sites
    except (NotRecorded, PyroEMError, RuntimeError):
        return {}
    found: dict[Place, Composed] = {}
    for place, output in zip(places, listing.outputs, strict=True):
        function = _function(listing, names, output)
        if function is None:
            continue
        truth = (there[place[0]].arguments or {})[place[1]].double()
        with torch.no_grad():
            value = function(points[1])
        if value.shape == truth.shape and torch.allclose(value, truth, rtol=NEAR, atol=0.0):
            found[place] = function
    return found


def _function(listing: Listing, names: tuple[str, ...], output: Variable | Tensor) -> Composed | None:
    """The part of a recording that leads to one output."""
    if not isinstance(output, Variable) or any(
        step.guard is not None or None in step.targets for step in listing.steps if step.call is not CHECK
    ):
        return None
    needed, steps = {output}, []
    for step in reversed(listing.steps):
        if needed.isdisjoint(step.targets):
            continue
        steps.append(step)
        each(lambda x: needed.add(x) if type(x) is Variable else None, [step.args, step.kwargs])
    read = [(v, n) for v, n in zip(listing.inputs, names, strict=True) if v in needed]
    return Composed(tuple(n for _, n in read), tuple(v for v, _ in read), tuple(steps[::-1]), output)
