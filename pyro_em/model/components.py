"""Components of a factor graph: factors connected through latents, and the plates that they all share.

Refused here: several scales in one component, tensor-valued scales, weights on a plate that a component's factors do
not all share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.errors import Refusal
from pyro_em.model import compat
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.nested import Nesting
from pyro_em.model.nests import Nests, closure
from pyro_em.model.packing import multiply
from pyro_em.model.trace import Run


@dataclass(frozen=True)
class Component:
    """Factors connected through latents; `root` are the plate symbols that all of them share.

    `loops` are the loops over time whose steps are chained in it (as far as they are in this component); `nests` are
    plates of it that are nested in others by an index (nests.py).
    """

    factors: tuple[str, ...]
    symbols: frozenset[str]
    root: frozenset[str]
    weight: Tensor | None
    loops: tuple[ChainedLoop, ...] = ()
    nests: Nests = field(default_factory=dict)

    def ordinal(self, plates: frozenset[str]) -> frozenset[str]:
        """Plates of a factor, with those that they are nested in."""
        return closure(plates, self.nests)


def components_of(
    run: Run,
    names: list[str],
    enumerated: Mapping[str, set[str]],
    weights: Mapping[str, Tensor],
    loops: tuple[ChainedLoop, ...],
    nesting: Nesting,
) -> tuple[Component, ...]:
    """Groups of the sites `names` that their latents connect, each with the plates over which log Z is a tensor.

    :param enumerated: symbols of the latents that each site reads.
    :raises Refusal: see the module docstring.
    """
    groups: list[tuple[set[str], list[str]]] = []
    for name in names:
        if not enumerated[name]:
            continue
        symbols, members = set(enumerated[name]), [name]
        rest = []
        for group in groups:
            if group[0] & symbols:
                symbols |= group[0]
                members = group[1] + members
            else:
                rest.append(group)
        groups = [*rest, (symbols, members)]
    order = {name: i for i, name in enumerate(run.sites)}
    return tuple(
        _component(run, tuple(sorted(members, key=order.__getitem__)), frozenset(symbols), weights, loops, nesting)
        for symbols, members in sorted(groups, key=lambda group: min(order[m] for m in group[1]))
    )


def _component(
    run: Run,
    members: tuple[str, ...],
    symbols: frozenset[str],
    weights: Mapping[str, Tensor],
    loops: tuple[ChainedLoop, ...],
    nesting: Nesting,
) -> Component:
    nests = nesting.of(members, symbols)
    ordinals = {name: closure(run.sites[name].plate_dims, nests) for name in members}
    root = frozenset.intersection(*ordinals.values())
    weight: Tensor | None = None
    for symbol, own in weights.items():
        touched = [name for name in members if symbol in ordinals[name]]
        if touched and symbol not in root:
            outside = next(name for name in members if symbol not in ordinals[name])
            raise Refusal(
                touched[0],
                f"weights were given for a plate which '{outside}', coupled to it by latents, stands outside of.",
                "weight a plate that all of them stand in (a group as a row of a table, with a mask), or repeat rows.",
            )
        if symbol in root:
            weight = multiply(weight, own)
    scales = {}
    for name in members:
        scale = run.sites[name].scale
        if isinstance(scale, Tensor) and scale.numel() > 1:
            raise Refusal(
                name,
                "poutine.scale with a tensor does not commute with summing or integrating out its latents.",
                'use fit(..., weights={"plate": w}), which multiplies the log-evidence of each element.',
            )
        scales[name] = float(scale)
    if len(set(scales.values())) > 1:
        first = next(iter(scales))
        other = next(name for name in scales if scales[name] != scales[first])
        raise Refusal(
            other,
            f"its scale {scales[other]:g} differs from the scale {scales[first]:g} of '{first}', but both are "
            "factors of one sum or integral over latents, which a power of one of them does not multiply.",
            "scale the whole component alike (one poutine.scale or one subsampled plate around all of it).",
        )
    scale = scales[members[0]]
    if scale != 1.0:
        weight = multiply(weight, compat.with_dims(torch.tensor(scale), ""))
    parts = (loop.part(members, symbols) for loop in loops)
    return Component(members, symbols, root, weight, tuple(part for part in parts if part is not None), nests)
