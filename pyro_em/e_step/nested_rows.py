"""Sites whose rows belong to the rows of Φ by an index: statistics of each group are summed once.

In long format row n belongs to group g(n), and no argument varies along the rows of a group, so that

    Σ_{n in g} log p(y_n | z_g = j) = <η_j, Σ_n T(y_n)> - N_g A_j + Σ_n h(y_n):

Φ has the sums of the statistics, and the number of rows in the place of flags (features.py). However many rows there
are, an E-step costs that of the groups. Where rounding would show (direct.py) a normal site is evaluated around the
mean m_g of the group's rows,

    -½ N_g |F(m_g - μ_j)|² - ½ tr F W_g Fᵀ - N_g log (2π)^{D/2}|Σ_j|^½,         W_g = Σ_n (y_n - m_g)(y_n - m_g)ᵀ,

in which nothing cancels. Shapes: positions P, width D of a vector (1 without an event), G groups.
Not handled: rows nested in two ways, or in a plate that they share in part; von Mises sites.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.features import Block, Part
from pyro_em.families.circular import VonMisesFamily
from pyro_em.model.components import Component
from pyro_em.model.graph import FactorGraph
from pyro_em.model.trace import SiteRecord


@dataclass(frozen=True)
class Groups:
    """The plate of a site's rows, its number of elements, and the group (row of Φ) of each of them."""

    symbol: str
    dim: int
    element: Tensor
    num_groups: int

    def sum(self, x: Tensor) -> Tensor:
        """Sums over the rows of each group: (.., N) to (.., G)."""
        return x.new_zeros(*x.shape[:-1], self.num_groups).index_add(-1, self.element, x)


def groups_of(site: SiteRecord, component: Component, graph: FactorGraph, root: list[str]) -> Groups | None:
    """How the rows of a site belong to the root plates of its component; None if it stands in these itself.

    :raises NotCompiled: if they do in another way than by one index.
    """
    if component.root <= site.plate_dims:
        return None
    around = [p for p in site.plates if component.root <= component.nests.get(site.symbols[p.dim], {}).keys()]
    if len(around) != 1 or component.root & site.plate_dims or isinstance(site.family, VonMisesFamily):
        raise NotCompiled(f"the rows of site '{site.name}' are nested in several plates, or in part")
    (plate,) = around
    symbol, total, count = site.symbols[plate.dim], torch.zeros(plate.size, dtype=torch.long), 1
    for d in root:
        total, count = total * graph.plate_sizes[d] + component.nests[symbol][d], count * graph.plate_sizes[d]
    return Groups(symbol, plate.dim, total, count)


def summed(block: Block, mask: Tensor | None, groups: Groups, centered: bool) -> Block:
    """The block of the groups from that of the rows, whose masked cells are 0."""
    parts, previous = [], torch.zeros(0)
    for part in block.parts:
        if part.raw is not None:
            previous = own = part.raw.double()
        elif part.kind == "square":
            own = previous * previous
        else:
            x = previous.reshape(block.positions, part.width, -1)
            i, j = torch.triu_indices(part.width, part.width)
            own = (x[:, i] * x[:, j]).reshape(-1, x.shape[-1])
        parts.append(Part(part.kind, part.width, groups.sum(own)))
    ones = torch.ones(block.positions, len(groups.element), dtype=torch.float64) if mask is None else mask.double()
    count = groups.sum(ones)
    within = _within(block, ones, count, groups) if centered else None
    return Block(block.positions, tuple(parts), count, None, within=within)


def _within(block: Block, ones: Tensor, count: Tensor, groups: Groups) -> Tensor:
    """W_g, (P, D, D, G)."""
    part = block.parts[0]
    assert part.raw is not None
    x = part.raw.double().reshape(block.positions, part.width, -1)
    mean = groups.sum(x) / count.clamp(min=1).unsqueeze(1)
    away = (x - mean[..., groups.element]) * ones.unsqueeze(1)
    return groups.sum(away.unsqueeze(2) * away.unsqueeze(1))


def group_log_density(block: Block, loc: Tensor, factor: Tensor, normalizer: Tensor, begin: int, end: int) -> Tensor:
    """The log-density of the rows of groups begin..end around their means, (J, P, end - begin).

    :param loc: (J, P, D, 1), less the center, `factor` (J, P, D, D) and `normalizer` (J, P, 1).
    """
    raw, width = block.parts[0].raw, block.parts[0].width
    assert raw is not None and block.flags is not None and block.within is not None
    count = block.flags[:, begin:end]
    mean = raw[:, begin:end].reshape(block.positions, width, -1) / count.clamp(min=1).unsqueeze(1)
    z = factor @ (mean - loc)
    precision = factor.mT @ factor
    inside = torch.einsum("jpab,pabg->jpg", precision, block.within[..., begin:end])
    return -0.5 * (count * (z * z).sum(-2) + inside) - count * normalizer
