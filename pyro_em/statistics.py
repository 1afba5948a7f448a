"""Expected sufficient statistics: posterior-weighted sums of a site's statistics, per argument cell.

The *cells* of a site are the batch shape of its arguments: `Normal(mu[z], sigma)` in a data plate of N
has K cells, however large N is; a regression whose location differs in every row has K·N. Everything the
M-step needs from the data is one tuple of moments (S0 = Σw, then Σ w·T_j(x)) per cell. They are additive
over chunks of data.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyro_em.evidence.integrated import Integrated, integrate, integrates
from pyro_em.families.base import AnyStatistic, IndexedStatistic, OneHotStatistic, SumStatistic
from pyro_em.model import compat
from pyro_em.model.density import clean_value
from pyro_em.model.graph import FactorGraph, FactorInfo
from pyro_em.model.packing import multiply
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.shapes import broadcast_shapes


@dataclass(frozen=True)
class SiteMoments:
    """`moments` = (S0, Σ w T_1, ...) with leading dims `cells` (broadcastable); `center` was subtracted.

    Residual moments, of a location that varies from row to row, hold in `override` the arguments as seen from the
    current location (the number 0 where nothing is to be taken off), and in `total` the moments of all data around one
    center.
    """

    moments: tuple[Tensor, ...]
    cells: torch.Size
    center: Tensor | None
    override: Mapping[str, Any] = field(default_factory=dict)
    total: SiteMoments | None = None


Posteriors = Mapping[str, Tensor | Integrated]
"""By site: posterior weights of its factor, or the moments of what is inside."""


def with_integrated(run: Run, graph: FactorGraph, weights: Mapping[str, Tensor]) -> dict[str, Tensor | Integrated]:
    """Posterior weights with the posteriors of sites that have latents inside put in."""
    found: dict[str, Tensor | Integrated] = dict(weights)
    for name, site in run.sites.items():
        if integrates(site):
            found[name] = integrate(site, site_weight(site, graph.factors[name], weights.get(name)))
    return found


def expected_moments(
    site: SiteRecord,
    info: FactorInfo,
    posterior: Tensor | Integrated | None,
    arguments: dict[str, Tensor],
    center: Tensor | None = None,
) -> SiteMoments:
    """Moments of a site given its posterior weights, at the cells of its arguments."""
    cells = argument_cells(site, arguments)
    if integrates(site):
        if not isinstance(posterior, Integrated):
            posterior = integrate(site, site_weight(site, info, posterior))
        return SiteMoments(posterior.moments, cells, None)
    assert not isinstance(posterior, Integrated)
    weight = site_weight(site, info, posterior)
    return site_moments(site, arguments, weight, site_center(site, cells) if center is None else center)


def site_weight(site: SiteRecord, info: FactorInfo, posterior: Tensor | None) -> Tensor:
    """Expected multiplicity of the site in Pyro's dim layout, element dims of `.to_event` included.

    :param posterior: packed posterior weights of the site's factor, or None if no latent reaches it.
    """
    if posterior is None:
        posterior = compat.pack(torch.ones(site.batch_shape), site.symbols)
    weight = multiply(posterior, info.weight)
    assert weight is not None
    unpacked = compat.unpack(weight, site.symbols).double()
    unpacked = unpacked.reshape(unpacked.shape + (1,) * site.element_dims)
    if site.element_mask is not None:
        unpacked = unpacked * site.element_mask.to(unpacked.dtype)
    return unpacked


def argument_cells(site: SiteRecord, arguments: dict[str, Tensor]) -> torch.Size:
    """Broadcast batch shape of the raw arguments (element dims of `.to_event` count as batch)."""
    assert site.family is not None
    dims = site.family.arguments
    return broadcast_shapes(*(a.shape[: a.dim() - dims[n]] for n, a in arguments.items()), torch.Size())


def site_center(site: SiteRecord, cells: torch.Size) -> Tensor | None:
    """Mean of the data, constant within every cell: Σx² - (Σx)²/n would cancel at large offsets."""
    if site.family is None or not site.family.centered:
        return None
    x = site.family.location(clean_value(site))
    batch = x.dim() - site.family.location_dim
    keep = [
        i for i in range(batch) if i - batch >= -site.element_dims and i - batch >= -len(cells) and cells[i - batch] > 1
    ]
    gone = [i for i in range(batch) if i not in keep]
    mean = x.mean(gone, keepdim=True) if gone else x
    lead = next((i for i in range(batch) if i in keep), batch)
    return mean.reshape(mean.shape[lead:]) if batch else mean


def site_statistics(site: SiteRecord, arguments: dict[str, Tensor], center: Tensor | None) -> tuple[AnyStatistic, ...]:
    """Statistics of a site's value; of `arguments` only what does not move enters (sizes, total counts), unless the
    response is latent."""
    assert site.family is not None
    return site.family.statistics(clean_value(site), {**site.constants, **arguments}, center)


def complete_count(site: SiteRecord, arguments: dict[str, Tensor]) -> Tensor | float:
    """Expected number of complete observations behind each one, which truncation makes more than one."""
    assert site.family is not None
    return site.family.complete_count({**site.constants, **arguments}) if site.family.latent_response else 1.0


def site_moments(
    site: SiteRecord,
    arguments: dict[str, Tensor],
    weight: Tensor,
    center: Tensor | None,
    statistics: tuple[AnyStatistic, ...] | None = None,
) -> SiteMoments:
    """Weighted moments of one site at the cells of its arguments.

    :param statistics: `site_statistics` with the same center, where the caller has them already.
    """
    assert site.family is not None
    cells = argument_cells(site, arguments)
    value = clean_value(site)
    if statistics is None:
        statistics = site_statistics(site, arguments, center)
        count = complete_count(site, arguments)
        weight = weight if isinstance(count, float) else weight * count
    batch = value.shape[: value.dim() - site.family.event_dim]
    moments = [reduce_to(weight, [], 0, cells, batch)]
    moments += [_reduce(weight, statistic, cells, batch) for statistic in statistics]
    return SiteMoments(tuple(moments), cells, center)


def _reduce(weight: Tensor, statistic: AnyStatistic, cells: torch.Size, batch: torch.Size) -> Tensor:
    if isinstance(statistic, SumStatistic):
        first, *rest = (_reduce(weight, term, cells, batch) for term in statistic.terms)
        return sum(rest, first)
    if isinstance(statistic, IndexedStatistic):
        return _reduce_indexed(weight, statistic, cells, batch)
    if isinstance(statistic, OneHotStatistic):
        dim = -statistic.index.dim()
        if statistic.is_enumerated and (len(cells) < -dim or cells[dim] == 1):
            return _by_value(weight, dim, statistic.size, cells, batch)
        return reduce_to(weight, [statistic.dense()], 1, cells, batch)
    return reduce_to(weight, list(statistic.factors), statistic.factor_dim, cells, batch)


def _by_value(weight: Tensor, dim: int, size: int, cells: torch.Size, batch: torch.Size) -> Tensor:
    """Counts of values that are 0, 1, ... along `dim`: the weights there, without a product."""
    lead = max(len(cells), -dim) + dim
    kept = (*(1,) * (-dim - len(cells)), *cells)
    shape = [*weight.shape] if weight.dim() >= -dim else [*(1,) * (-dim - weight.dim()), *weight.shape]
    shape[dim] = size
    counts = reduce_to(weight.expand(shape), [], 0, torch.Size((*kept[:lead], size, *kept[lead + 1 :])), batch)
    return counts.unsqueeze(-1).transpose(dim - 1, -1)


def _reduce_indexed(weight: Tensor, statistic: IndexedStatistic, cells: torch.Size, batch: torch.Size) -> Tensor:
    """Weights are first summed over the rows of one number, which share their entry of the table."""
    index, table = statistic.index, statistic.table
    groups = table.shape[table.dim() - statistic.event_dim - 1]
    rank = max(index.dim(), weight.dim(), len(cells), len(batch))
    rows = [i for i in range(rank) if i - rank >= -index.dim() and index.shape[i - rank] > 1]
    kept = (1,) * (rank - len(cells)) + tuple(cells)
    if any(kept[i] > 1 for i in rows):
        return reduce_to(weight, [statistic.dense()], statistic.event_dim, cells, batch)
    weight = weight.reshape((1,) * (rank - weight.dim()) + tuple(weight.shape))
    full = [index.shape[i - rank] if i in rows else n for i, n in enumerate(weight.shape)]
    others = [i for i in range(rank) if i not in rows]
    flat = weight.expand(full).permute((*others, *rows)).reshape(*(full[i] for i in others), -1)
    summed = flat.new_zeros(*flat.shape[:-1], groups).index_add_(-1, index.reshape(-1), flat)
    lead = [1 if i in rows else full[i] for i in range(rank)]
    outer = [1 if i in rows or i - rank < -len(batch) else batch[i - rank] for i in range(rank)]
    summed = summed.reshape(*lead, groups)
    found = reduce_to(summed, [table], statistic.event_dim, torch.Size((*kept, 1)), torch.Size((*outer, groups)))
    return found.squeeze(rank)


def reduce_to(
    weight: Tensor, factors: Sequence[Tensor], factor_dim: int, cells: torch.Size, batch: torch.Size
) -> Tensor:
    """Σ over batch dims absent from `cells` of weight ⊗ factors, by one einsum.

    Nothing of the size of the full broadcast is formed: Σ w x xᵀ is an einsum of w, x and x.

    :param weight: batch dims, right aligned.
    :param factors: batch dims + `factor_dim` event dims each; their outer product is the statistic.
    :param cells: batch shape of the result (dims of size 1 are summed over).
    :param batch: batch shape of the data; a summed dim that no operand has counts with its size.
    """
    plan = _plan(weight.shape, tuple(f.shape for f in factors), factor_dim, cells, batch)
    operands = [x.reshape(shape) for x, shape in zip((weight, *factors), plan.operands, strict=True)]
    result = torch.einsum(plan.equation, *(x.to(weight.dtype) for x in operands))
    return (result * plan.repeats if plan.repeats != 1 else result).reshape(plan.result)


@dataclass(frozen=True)
class _Contraction:
    """What `reduce_to` does, known from the shapes: they are the same at every E-step."""

    operands: tuple[tuple[int, ...], ...]
    equation: str
    repeats: int
    result: tuple[int, ...]


@lru_cache(maxsize=1024)
def _plan(
    weight: torch.Size, factors: tuple[torch.Size, ...], factor_dim: int, cells: torch.Size, batch: torch.Size
) -> _Contraction:
    full = broadcast_shapes(weight, *(f[: len(f) - factor_dim] for f in factors), batch)
    rank = max(len(full), len(cells))
    full = torch.Size((1,) * (rank - len(full)) + tuple(full))
    target = (1,) * (rank - len(cells)) + tuple(cells)
    letters = iter(string.ascii_letters)
    name = [next(letters) for _ in range(rank)]
    operands, terms, events, event_shape = [], [], [], []
    for shape, event_dim in [(weight, 0), *((f, factor_dim) for f in factors)]:
        lead = len(shape) - event_dim
        kept = [i for i in range(lead) if shape[i] > 1]
        own_event = [next(letters) for _ in range(event_dim)]
        events += own_event
        event_shape += list(shape[lead:])
        operands.append((*(shape[i] for i in kept), *shape[lead:]))
        terms.append("".join(name[rank - lead + i] for i in kept) + "".join(own_event))
    present = set("".join(terms))
    out = [i for i in range(rank) if target[i] > 1 and name[i] in present]
    equation = ",".join(terms) + "->" + "".join(name[i] for i in out) + "".join(events)
    repeats = math.prod(full[i] for i in range(rank) if target[i] == 1 and name[i] not in present)
    return _Contraction(
        tuple(operands), equation, repeats, (*(full[i] if i in out else 1 for i in range(rank)), *event_shape)
    )
