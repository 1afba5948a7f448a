"""Which sites are seen by mean and precision (families/by_mean.py): those whose concentrations no rule recognises.

`Beta(mu * phi, (1 - mu) * phi)` says of neither concentration what its parameters do in it. Such a site is marked, and
the model bound again; if the arguments are then known that is how the site is seen from there on.

The precision loses the dims along which it is the same at random parameters and latents: it is computed from
concentrations that vary along these, and is constant there up to rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.errors import PyroEMError
from pyro_em.families.by_mean import BY_MEAN, MARK
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.model.use import Use
from pyro_em.types import Model

SLOTS = ("concentration1", "concentration0")
Dims = frozenset[int]
Uses = Mapping[str, Sequence[Use]]


class _WithUses(Protocol):
    @property
    def uses(self) -> Uses: ...


Bound = TypeVar("Bound", bound=_WithUses)


class _Marks(Messenger):
    def __init__(self, sites: Mapping[str, Dims]) -> None:
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites:
            msg["infer"] = {**msg["infer"], MARK: self.sites[msg["name"]]}


def may_be_marked(uses: Uses, run: Run) -> list[str]:
    """Observed sites of such a family whose concentrations are not all known."""
    names = {u.site for own in uses.values() for u in own if u.slot in SLOTS and not u.known}
    return [n for n in run.sites if n in names and run.sites[n].observed and type(run.sites[n].family) in BY_MEAN]


def to_be_marked(uses: Uses, random: Run, others: Run | None, atoms: int) -> dict[str, Dims]:
    """Sites to be seen so, and the dims that their precision loses.

    :param random: a run at random parameters.
    :param others: a run there with other values of the continuous latents, if there are any.
    :param atoms: the dim of these latents' atoms.
    """
    found = {}
    for name in may_be_marked(uses, random):
        precision, elements = _precision(random.sites[name]), random.sites[name].element_dims
        rank = precision.dim() - elements
        dims = {i - rank for i in range(rank) if _same(precision, precision.narrow(i, 0, 1))}
        if others is not None and _same(precision, _precision(others.sites[name])):
            dims.add(atoms)
        found[name] = frozenset(dims)
    return found


def bound_so(bind: Callable[[Model], Bound], model: Model, sites: Mapping[str, Dims]) -> Bound | None:
    """The model bound with these sites marked; None if that does not make their arguments known."""
    try:
        found = bind(_Marks(sites)(model))
    except PyroEMError:
        return None
    own = (use for every in found.uses.values() for use in every if use.site in sites)
    return found if all(use.index is not None or use.predictor is not None for use in own) else None


def _precision(site: SiteRecord) -> Tensor:
    a, b = ((site.arguments or {})[slot].detach() for slot in SLOTS)
    total: Tensor = a + b
    return total


def _same(a: Tensor, b: Tensor) -> bool:
    """Up to the rounding of a sum of products."""
    eps = max(torch.finfo(x.dtype).eps for x in (a, b))
    return torch.allclose(a.double(), b.double().expand_as(a), rtol=64 * eps, atol=0.0)
