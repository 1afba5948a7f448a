"""Units of the M-step: parameters that are updated together by one rule, given all others.

    Separate   one parameter, the argmax of the sum of its kernels        (separate.py)
    Linear     affine locations of a coupled block, one linear solve      (linear.py)
    Median     the location of Laplace sites                              (median.py)
    States     the same for sites with latents inside                     (states.py)
    Newton     generalised linear sites and concentrations                (newton.py)

A unit reads and rewrites the arguments of the E-step's `Sufficient`, so that the units after it see its update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from pyro_em.evidence.integrated import Integrated
from pyro_em.problem import Problem
from pyro_em.statistics import site_weight
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params


class Unit(Protocol):
    """Parameters that are updated together."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its parameters."""
        ...

    def slope(self, params: Params, sufficient: Sufficient) -> Tensor:
        """∂Q/∂u over its parameters' free coordinates, 0 in other entries, or max|∂Q/∂u|; any shape."""
        ...

    def update(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """Its parameters at the argmax of Q, and the names of those that (in part) no data inform.

        :raises DegenerateLikelihoodError: if the maximum does not exist.
        """
        ...


def weight_of(problem: Problem, name: str, sufficient: Sufficient) -> Tensor:
    """Expected multiplicity of a site's data over its batch dims; a prior counts once."""
    if name not in sufficient.weights:
        if sufficient.weight_of is not None and name not in problem.graph.priors:
            return sufficient.weights.setdefault(name, sufficient.weight_of(name))
        info = problem.graph.factors[name]
        assert sufficient.posterior is not None
        alone = name in problem.graph.priors or name in problem.graph.constants
        posterior = None if alone else sufficient.posterior().get(name)
        assert not isinstance(posterior, Integrated)
        sufficient.weights[name] = site_weight(sufficient.sites[name], info, posterior)
    return sufficient.weights[name]


def begins_of(names: Sequence[str], params: Params) -> tuple[dict[str, int], int]:
    """Where each parameter begins in the block of all of them, flattened in a row, and the size of the block."""
    starts, size = {}, 0
    for name in names:
        starts[name] = size
        size += params[name].numel()
    return starts, size


def connected(names: Sequence[str], touched: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of names that share something they touch, directly or through others; order is kept."""
    groups: list[tuple[set[str], set[str]]] = []
    for name in names:
        joined, things, rest = {name}, set(touched[name]), []
        for group in groups:
            if group[1] & touched[name]:
                joined, things = joined | group[0], things | group[1]
            else:
                rest.append(group)
        groups = [*rest, (joined, things)]
    return [tuple(name for name in names if name in group) for group, _ in groups]
