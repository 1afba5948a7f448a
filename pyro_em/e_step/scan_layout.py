"""How the sites of a `pyro_em.markov` loop lie in Pyro's dims, and the way between those and chains of steps.

In the run of all steps together the first step has sites of its own; here they are told to be of the same form as
those of the later steps, and joined with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.compat import dims_of
from pyro_em.model.density import clean_value
from pyro_em.model.packing import align
from pyro_em.model.trace import Plate, SiteRecord
from pyro_em.problem import Problem


def by_dim(site: SiteRecord) -> list[str]:
    """Symbols of the site's plates, outermost (leftmost dim) first."""
    return [site.symbols[plate.dim] for plate in site.plates]


def dim_of(site: SiteRecord, symbol: str | None) -> int:
    """Pyro's dim of a symbol at the site."""
    return next(dim for dim, s in site.symbols.items() if s == symbol)


def num_states(site: SiteRecord) -> int:
    """Number of states of a latent site."""
    return int(site.fn.enumerate_support(expand=False).shape[0])


def over(packed: Tensor | None, order: list[str], sizes: list[int]) -> Tensor | None:
    """A packed tensor as one row per element of the plates `order`."""
    if packed is None:
        return None
    if not set(dims_of(packed)) <= set(order):
        raise NotCompiled("weights that vary within a step")
    return align(packed, "".join(order)).double().expand(sizes).reshape(-1)


def placed(weight: Tensor, site: SiteRecord, symbols: tuple[str | None, ...]) -> Tensor:
    """A weight over states with its dims at their places in Pyro's layout."""
    dims = [dim_of(site, symbol) for symbol in symbols]
    order = sorted(range(len(dims)), key=dims.__getitem__)
    shape = [1] * -min(dims)
    for dim, size in zip(dims, weight.shape, strict=True):
        shape[dim] = size
    return weight.permute(order).reshape(shape)


def alike(head: SiteRecord, rest: SiteRecord, start: Sequence[str], now: Sequence[str], problem: Problem) -> bool:
    """The first step's site says of the first states (symbols `start`) what the others say of theirs (`now`)."""
    if type(head.family) is not type(rest.family) or head.arguments is None or rest.arguments is None:
        return False
    if head.family is None or head.element_dims != rest.element_dims or str(head.constants) != str(rest.constants):
        return False
    read = problem.graph.factors[rest.name].dims
    latents = set(problem.graph.symbol_sites)
    if any(symbol in read for symbol in latents - set(now)):
        return False

    def described(site: SiteRecord, symbols: Sequence[str]) -> dict[tuple[str, ...], Tensor]:
        event_dims = site.family.arguments  # type: ignore[union-attr]
        dims = [next((d for d, s in site.symbols.items() if s == symbol), None) for symbol in symbols]
        tensors: dict[tuple[str, ...], tuple[Tensor, int]] = {
            ("value", name): (x, event_dims[name]) for name, x in (site.arguments or {}).items()
        }
        for uses in problem.uses.values():
            for use in uses:
                if use.site == site.name and use.index is not None:
                    how = (use.parameter, use.slot, str(use.power), str(use.exponential), str(use.link))
                    tensors["index", *how] = (use.index, event_dims[use.slot])
                    if use.coefficient is not None:
                        tensors["coefficient", *how] = (use.coefficient, event_dims[use.slot])
        return {key: _by_state(x.detach(), dims, site.element_dims, event) for key, (x, event) in tensors.items()}

    a, b = described(head, start), described(rest, now)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _by_state(x: Tensor, dims: Sequence[int | None], element_dims: int, event_dim: int) -> Tensor:
    """`x` with the dims of the states first (1 where it has none) and no leading dims of size 1 after them."""
    lead = x.dim() - event_dim - element_dims
    axes = [None if d is None or lead + d < 0 else lead + d for d in dims]
    kept = [axis for axis in axes if axis is not None]
    others = [i for i in range(x.dim()) if i not in kept]
    front = [1 if axis is None else x.shape[axis] for axis in axes]
    tail = [x.shape[i] for i in others]
    x = x.permute([*kept, *others])
    while len(tail) > element_dims + event_dim and tail[0] == 1:
        tail.pop(0)
    return x.reshape(*front, *tail)


def whole_site(head: SiteRecord, rest: SiteRecord, loop: ChainedLoop, sizes: Mapping[str, int]) -> SiteRecord:
    """The observed sites of the first step and of all others as one site in a plate of all steps.

    :param sizes: of every plate symbol.
    """
    dim = -1 - loop.loop.depth
    shape = [1] * -dim
    for plate in rest.plates:
        shape[plate.dim] = plate.size

    def joined(first: Tensor, others: Tensor, trailing: int) -> Tensor:
        def full(x: Tensor, steps: int) -> Tensor:
            if x.dim() > trailing - dim:
                raise NotCompiled("a mask that depends on the states")
            x = x.reshape((1,) * (-dim + trailing - x.dim()) + tuple(x.shape))
            return x.expand(steps, *shape[1:], *x.shape[x.dim() - trailing :])

        return torch.cat([full(first, 1), full(others, loop.loop.steps - 1)])

    def mask(name: str, trailing: int) -> Tensor | None:
        first, others = getattr(head, name), getattr(rest, name)
        if first is None and others is None:
            return None
        one = torch.ones((1,) * trailing, dtype=torch.bool)
        return joined(one if first is None else first, one if others is None else others, trailing)

    event = rest.fn.event_dim
    return replace(
        rest,
        value=joined(clean_value(head), clean_value(rest), event),
        plates=tuple(Plate(p.name, p.dim, loop.loop.steps if p.dim == dim else p.size) for p in rest.plates),
        mask=mask("mask", 0),
        element_mask=mask("element_mask", rest.element_dims),
    )
