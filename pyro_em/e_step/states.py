"""Joint states of the latents of one row: which enumeration dims there are, and how many states each has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyro_em.e_step.base import NotCompiled
from pyro_em.model.graph import Component
from pyro_em.model.trace import Run


@dataclass(frozen=True)
class JointStates:
    """Enumeration dims of a component (Pyro dims, leftmost first) and their numbers of states."""

    dims: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num(self) -> int:
        return math.prod(self.sizes)


def joint_states(component: Component, run: Run, limit: int) -> JointStates:
    """Joint states of a component whose latents all live in its root plates.

    :raises NotCompiled: if some latent does not, dims are recycled, or there are more than `limit` states.
    """
    dim_of: dict[str, int] = {}
    for name in component.factors:
        site = run.sites[name]
        if site.enumerated and site.plate_dims != component.root:
            raise NotCompiled(f"latent '{name}' is not in the outermost plate of its data")
        for dim, symbol in site.symbols.items():
            if symbol in component.symbols and dim_of.setdefault(symbol, dim) != dim:
                raise NotCompiled("enumeration dims are recycled (pyro.markov)")
    if len(set(dim_of.values())) < len(dim_of):
        raise NotCompiled("enumeration dims are recycled (pyro.markov)")
    size_of = {
        run.sites[name].symbol: run.sites[name].fn.enumerate_support(expand=False).shape[0]
        for name in component.factors
        if run.sites[name].enumerated
    }
    order = sorted(component.symbols, key=dim_of.__getitem__)
    states = JointStates(tuple(dim_of[s] for s in order), tuple(size_of[s] for s in order))
    if states.num > limit:
        raise NotCompiled(f"{states.num} joint states of one row")
    return states
