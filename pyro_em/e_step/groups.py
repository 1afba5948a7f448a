"""Sites that differ only in their numbers, evaluated as one: G isomorphic sites are one site in a plate of G.

The transitions of a chain of 1000 steps are one `Categorical(A[z])`, its emissions one `Normal(mu[z], sigma)`
with stacked data. Every tensor of a site (raw arguments, value, masks, index codes of the parameters) is laid
out alike,

    (copies G, plates: those of the component's root first, enumeration dims in program order, elements, event)

with size 1 where it has no such dim, and tensors that are equal in all copies are kept once, so that equal
factors are computed once. Which sites are isomorphic is read off these layouts: family, arguments, shapes,
constants, and how parameters enter: by entries, or by linear predictors (group_predictors.py). Sites of unknown
families keep their factors as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.group_predictors import PREDICTED, key_of, parts_of, predictors_of, stacked_predictor
from pyro_em.model.compat import dims_of
from pyro_em.model.density import clean_value
from pyro_em.model.graph import FactorInfo
from pyro_em.model.packing import align
from pyro_em.model.recognise import Use
from pyro_em.model.trace import SiteRecord
from pyro_em.shapes import broadcast_shapes


@dataclass(frozen=True, eq=False)
class Group:
    """G isomorphic sites as one.

    `record` is the first site with stacked arguments and (cleaned) value, its masks taken out, its batch the own
    shape; `uses` are the parameters' uses at the stacked arguments, under the first site's name; `shape` is the full
    shape of the factor, (G, plates, enumeration dims); `own_shape` the part of it along which anything varies;
    `weight` the multiplicity of the counts (`FactorInfo.weight`); `factor` is set where no argument can move.
    """

    sites: tuple[str, ...]
    dims: tuple[str, ...]  # of each site, its packed dims in the order of the layout
    record: SiteRecord
    uses: tuple[Use, ...]
    shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    num_enumerated: int
    mask: Tensor | None
    element_mask: Tensor | None
    weight: Tensor | None
    factor: Tensor | None

    @property
    def name(self) -> str:
        return self.sites[0]

    def log_factor(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """Log-density at these arguments, (G, plates, enumeration dims) with size 1 where constant."""
        if self.factor is not None:
            return self.factor
        site = self.record
        assert site.family is not None
        result = site.family.log_prob({**site.constants, **arguments}, site.value)
        if self.element_mask is not None:
            result = torch.where(self.element_mask, result, result.new_zeros(()))
        if site.element_dims:
            batch = result.dim() - site.element_dims
            sizes = broadcast_shapes(result.shape[batch:], site.fn.event_shape[: site.element_dims])
            result = result.expand(*result.shape[:batch], *sizes).flatten(batch).sum(-1)
        if self.mask is not None:
            result = torch.where(self.mask, result, result.new_zeros(()))
        return result

    def expected_weight(self, posterior: Tensor) -> Tensor:
        """Posterior weights times the multiplicity of counts, summed where nothing of the site varies.

        :param posterior: broadcastable to `shape`.
        """
        if self.weight is not None:
            posterior = posterior * self.weight
        constant = [i for i, (own, full) in enumerate(zip(self.own_shape, self.shape, strict=True)) if own < full]
        repeats = math.prod(self.shape[i] for i in constant if posterior.shape[i] == 1)
        gone = [i for i in constant if posterior.shape[i] > 1]
        if gone:
            posterior = posterior.sum(gone, keepdim=True)
        weight = posterior * repeats if repeats != 1 else posterior
        weight = weight.reshape(weight.shape + (1,) * self.record.element_dims).double()
        return weight if self.element_mask is None else weight * self.element_mask


@dataclass
class _Layout:
    """One site, laid out (without the copies' dim)."""

    site: SiteRecord
    dims: str
    sizes: tuple[int, ...]
    num_enumerated: int
    tensors: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)

    def key(self, place: Hashable) -> Hashable:
        site = self.site
        uses = tuple((u.parameter, u.slot, u.power, u.exponential, u.link, u.coefficient is None) for u in self.uses)
        shapes = tuple((name, tuple(x.shape), x.dtype) for name, x in self.tensors.items())
        constants = tuple((name, str(value)) for name, value in site.constants.items())
        elements = tuple(site.fn.event_shape[: site.element_dims])
        return (
            place, type(site.family), site.observed, site.enumerated, self.sizes, self.num_enumerated, shapes,
            uses, constants, elements, key_of(self.uses),
        )  # fmt: skip


def make_groups(
    sites: Mapping[str, SiteRecord],
    factors: Mapping[str, Tensor],
    infos: Mapping[str, FactorInfo],
    uses: Mapping[str, Sequence[Use]],
    orders: Mapping[str, tuple[str, int]],
    places: Mapping[str, Hashable],
) -> list[Group]:
    """Groups of isomorphic sites, in the order of their first sites.

    :param factors: packed log-density of every site, as the reference has it.
    :param uses: of every site, by parameters.
    :param orders: of every site, its packed dims in layout order and how many of them are enumeration dims.
    :param places: of every site, what its group must have in common besides.
    :raises NotCompiled: if a tensor of a site has a dim that is neither plate nor enumeration dim.
    """
    found: dict[Hashable, list[_Layout]] = {}
    for name, site in sites.items():
        layout = _lay_out(site, factors[name], infos[name], uses[name], *orders[name])
        found.setdefault(layout.key(places[name]), []).append(layout)
    return [_stack(layouts) for layouts in found.values()]


def _lay_out(
    site: SiteRecord, factor: Tensor, info: FactorInfo, uses: Sequence[Use], dims: str, num_enumerated: int
) -> _Layout:
    if not set(dims_of(factor)) <= set(dims):
        raise NotCompiled(f"the mask of site '{site.name}' depends on a latent that its arguments do not read")
    layout = _Layout(site, dims, tuple(align(factor, dims).shape), num_enumerated)
    tensors = layout.tensors
    if info.weight is not None:
        tensors["weight",] = align(info.weight, dims).double()
    tensors["factor",] = align(factor, dims).detach().double()
    sized = any(isinstance(x, Tensor) and x.dim() for x in site.constants.values())
    if site.family is None or site.arguments is None or (sized and not uses):
        return layout
    if sized:
        raise NotCompiled(f"'{site.name}' has constants of a shape of their own")
    event_dims = site.family.arguments

    def put(key: tuple[str, ...], x: Tensor, event_dim: int, element_dims: int) -> None:
        tensors[key] = _aligned(x.detach(), event_dim, element_dims, site, dims)

    for name, x in site.arguments.items():
        put(("argument", name), x.double(), event_dims[name], site.element_dims)
    value = clean_value(site)
    put(
        ("value",),
        value.double() if value.is_floating_point() else value,
        site.family.event_dim,
        site.element_dims,
    )
    if site.mask is not None and not site.enumerated:
        put(("mask",), site.mask, 0, 0)
    if site.element_mask is not None:
        put(("element_mask",), site.element_mask, 0, site.element_dims)
    layout.uses = [use for use in uses if use.known]
    for key, x in parts_of(layout.uses, site.arguments).items():
        put(key, x, event_dims[key[1]], site.element_dims)
    for use in layout.uses:
        if use.index is None:
            continue
        put(("index", use.parameter, use.slot), use.index, event_dims[use.slot], site.element_dims)
        if use.coefficient is not None:
            key = ("coefficient", use.parameter, use.slot)
            put(key, use.coefficient, event_dims[use.slot], site.element_dims)
    return layout


def _aligned(x: Tensor, event_dim: int, element_dims: int, site: SiteRecord, dims: str) -> Tensor:
    """`x` with its batch dims permuted to `dims` (1 where absent), then its element dims, then its event."""
    batch = x.dim() - event_dim
    lead = max(0, batch - element_dims)
    tail = (1,) * (element_dims - (batch - lead)) + tuple(x.shape[lead:])
    symbols = [site.symbols.get(i - lead) for i in range(lead)]
    kept = [i for i in range(lead) if x.shape[i] > 1]
    position = {symbols[i]: i for i in kept}
    if len(position) < len(kept) or not all(symbol is not None and symbol in dims for symbol in position):
        raise NotCompiled(f"'{site.name}' has a batch dim outside of any plate")
    order = [position[d] for d in dims if d in position]
    ones = [i for i in range(lead) if x.shape[i] == 1]
    x = x.permute([*order, *ones, *range(lead, x.dim())])
    sizes = iter(x.shape)
    return x.reshape([*(next(sizes) if d in position else 1 for d in dims), *tail])


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stacked along a new first dim, of size 1 if all are equal."""
    first = tensors[0]
    if all(x is first or torch.equal(x, first) for x in tensors[1:]):
        return first.unsqueeze(0)
    return torch.stack(list(tensors))


def _stack(layouts: Sequence[_Layout]) -> Group:
    first = layouts[0]
    tensors = {key: _stacked([layout.tensors[key] for layout in layouts]) for key in first.tensors}
    site, batch = first.site, 1 + len(first.dims)
    shape = (len(layouts), *first.sizes)
    arguments = {key[1]: x for key, x in tensors.items() if key[0] == "argument"}
    value, factor = tensors.get(("value",)), tensors["factor",]
    if value is not None and any(len(x) > len(value) for x in tensors.values()):
        value = value.expand(len(layouts), *value.shape[1:])  # statistics may need arguments at its level
    predictors = {slot: stacked_predictor(own, site.name, tensors) for slot, own in predictors_of(first.uses).items()}
    for slot in predictors:  # equal in all copies where what multiplies the covariates is 0 as yet
        shapes = (x.shape for key, x in tensors.items() if key[0] in PREDICTED and key[1] == slot)
        arguments[slot] = arguments[slot].expand(broadcast_shapes(arguments[slot].shape, *shapes))
    uses = tuple(
        dataclasses.replace(
            use,
            site=site.name,
            index=tensors.get(("index", use.parameter, use.slot)),
            coefficient=tensors.get(("coefficient", use.parameter, use.slot)),
            predictor=None if use.predictor is None else predictors[use.slot],
        )
        for use in first.uses
    )
    varying = [*arguments.values(), *(x for key, x in tensors.items() if key[0] in ("index", "element_mask"))]
    varying.append(factor if value is None else value)
    own_shape = tuple(broadcast_shapes(*(x.shape[:batch] for x in varying)))
    group = Group(
        sites=tuple(layout.site.name for layout in layouts),
        dims=tuple(layout.dims for layout in layouts),
        record=dataclasses.replace(
            site,
            arguments=arguments if arguments else None,
            value=site.value if value is None else value,
            mask=None,
            element_mask=None,
            batch_shape=own_shape,
        ),
        uses=uses,
        shape=shape,
        own_shape=own_shape,
        num_enumerated=first.num_enumerated,
        mask=tensors.get(("mask",)),
        element_mask=tensors.get(("element_mask",)),
        weight=tensors.get(("weight",)),
        factor=factor if value is None else None,
    )
    found = group.log_factor(arguments)
    if not torch.allclose(found.expand(shape), factor.expand(shape), rtol=1e-5, atol=1e-5, equal_nan=True):
        raise NotCompiled(f"'{site.name}' is not what its arguments say")
    return group if uses else dataclasses.replace(group, factor=found)
