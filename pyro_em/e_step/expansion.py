"""Parameter expansion (PX-EM) of Gaussian latents: their mean and covariance are free within an update.

Of a latent z ~ N(μ₀, S₀), both known, whose slopes are parameters, an E-step also gives the maximum over z ~ N(μ, Σ),

    μ = Σ_g E[z_g|x] / G,     Σ = Σ_g E[(z_g − μ)(z_g − μ)ᵀ|x] / G,

and with z = μ + A (z̃ − μ₀), A S₀ Aᵀ = Σ, so that z̃ ~ N(μ₀, S₀), that is the model itself at slopes C A and intercepts
c + C (μ − A μ₀): an update that never descends (Q is at its maximum over more than EM's), with the same fixed points.
What EM finds in a thousand small steps, the scale of factors whose loadings begin too small, is one step of this.
Source: Liu, Rubin and Wu (1998), section 4.

A latent takes part as far as parameters can take the change up. Latents that are in the same cells of every site, each
with an entry of its own of real parameters, are mixed by a lower triangular A; others are scaled at most (tau * e[g]).
μ moves if every cell that they are in has an intercept of its own. Not where anything else hangs on these parameters:
a prior that counts, another site, a value that is held.

Shapes: K latents of a block, m cells that they are in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import constraints

from pyro_em.charts import base_constraint
from pyro_em.e_step.base import Engine
from pyro_em.e_step.pooled import Pooled
from pyro_em.e_step.pooled_location import PooledSite, per_cell
from pyro_em.e_step.pooled_sets import PooledSet, columns_of, pooled_routes
from pyro_em.evidence.columns import Column
from pyro_em.m_step.auto import MStep
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

Array = NDArray[Any]


@dataclass(frozen=True)
class Block:
    """Latents that are mixed: `cells` of their site's value, the known mean and scale (K,) there; where the slopes
    stand among all parameters taken in a row, and what they count (K, m); the same for the intercepts (m,), if all
    cells have one. What changes nothing is None: scales of 1, and counts if all are the same."""

    site: str
    cells: Tensor
    mean: Tensor
    scale: Tensor | None
    slopes: Tensor
    factor: Tensor | None
    intercepts: Tensor | None
    intercept_factor: Tensor | None

    @cached_property
    def centered(self) -> bool:
        """The known mean is 0."""
        return not self.mean.any()

    def moved(self, flat: Tensor, mean: Tensor, root: Tensor) -> Tensor:
        """The parameters at the latents' mean and a root of their covariance."""
        A = root if self.scale is None else root / self.scale
        slopes = flat.index_select(0, self.slopes.reshape(-1)).reshape(self.slopes.shape)
        slopes = slopes if self.factor is None else slopes * self.factor
        if self.intercepts is not None:
            shift = (mean if self.centered else mean - A @ self.mean) @ slopes
            shift = shift if self.intercept_factor is None else shift / self.intercept_factor
            flat = flat.index_add(0, self.intercepts, shift)
        slopes = A.mT @ slopes
        return flat.index_put((self.slopes,), slopes if self.factor is None else slopes / self.factor)


@dataclass(frozen=True)
class Expansion:
    """Called with parameters M(θ) and the statistics of the E-step at θ."""

    names: tuple[str, ...]
    blocks: tuple[Block, ...]

    def __call__(self, params: Params, sufficient: Sufficient) -> Params:
        assert sufficient.spread_of is not None
        flat = torch.cat([params[name].detach().double().reshape(-1) for name in self.names])
        for own in self.blocks:
            center = None if own.intercepts is not None else own.mean
            mean, covariance = sufficient.spread_of(own.site, own.cells, center)
            root, failed = torch.linalg.cholesky_ex(covariance)
            if bool(failed):  # no further than EM
                return params
            flat = own.moved(flat, mean, root)
        sizes = [params[name].numel() for name in self.names]
        moved = zip(self.names, flat.split(sizes), strict=True)
        return {**params, **{n: x.reshape(params[n].shape).to(params[n].dtype) for n, x in moved}}


def expansion_of(engine: Engine, m_step: MStep) -> Expansion | None:
    """What can be expanded in the updates of an engine, or None."""
    if not isinstance(engine, Pooled):
        return None
    problem = engine.problem
    starts: dict[str, int] = {}
    blocks: list[Block] = []
    size = 0
    for route, own in zip(pooled_routes(problem), engine.sets, strict=True):
        if not isinstance(own, PooledSet):
            continue
        sites = {site.site.name for site in own.sites}
        for name in m_step.closed:  # those that are in locations of the set, and nowhere else where it counts
            if all(use.slot == "loc" and use.site in sites for use in m_step.uses[name]):
                starts[name] = size
                size += problem.parameters[name].value.numel()
        blocks += _Slopes(own, columns_of(route), m_step, starts).blocks(engine)
    return Expansion(tuple(starts), tuple(blocks)) if blocks else None


class _Slopes:
    """Which entry of a parameter stands in which cell of the slopes of the latents of one set (numbered from 1 on) and
    of the intercepts (0): arrays (E,), sorted by latent and cell."""

    def __init__(self, own: PooledSet, columns: Sequence[Column], m_step: MStep, starts: Mapping[str, int]) -> None:
        self.own, self.columns = own, columns
        self.known: set[int] = set()  # latents with a slope that is a number, or a parameter that must not move
        records = m_step.problem.parameters
        self._numbers = {name: i for i, name in enumerate(records)}
        self._begins = np.array([starts.get(name, -1) for name in records])  # -1: it must not move
        real = [base_constraint(record.constraint) is constraints.real for record in records.values()]
        sites = [s for s in own.sites if not any(c.site == s.site.name for c in columns)]
        found = [entries for i, site in enumerate(sites) for entries in self._read(i, site)]
        joined = [np.concatenate(x) for x in zip(*found, strict=True)] if found else [np.zeros(0, dtype=int)] * 7
        cell = _code(*joined[1:4])
        order = np.lexsort((cell, joined[0]))
        latent, number, index, self.factor = (joined[i][order] for i in (0, 4, 5, 6))
        self.cell, self.place = cell[order], self._begins[number] + index
        self._bounds = np.searchsorted(latent, np.arange(len(columns) + 2))  # where the entries of each latent begin
        key = _code(number, index)
        self._once = _counts(key) == 1
        self._inside = _counts(key) == _counts(_code(key, latent))  # in the slopes of one latent alone
        self._free = self._once & (self._begins >= 0)[number] & np.array(real)[number]

    def _read(self, i: int, site: PooledSite) -> Iterable[tuple[Array, ...]]:
        """Of every parameter in a site: latent; site, feature and cell; number and entry of the parameter; factor."""
        form, width = site.form, site.form.num_columns
        shared = site.shared * width
        known = (form.base[:shared] != 0).any(1).nonzero().squeeze(-1).tolist()
        self.known.update(row % width for row in known if row % width)
        for entries in form.entries:
            number = self._numbers[entries.parameter]
            columns = (entries.row, entries.cell, entries.index, entries.coefficient)
            row, cell, index, factor = (x.cpu().numpy() for x in columns)
            meets = row < shared
            latent = np.where(meets, row % width, 0)
            if self._begins[number] < 0:
                self.known.update(latent[meets].tolist())
            feature = np.where(meets, row // width, -1 - row)
            yield latent, np.full_like(row, i), feature, cell, np.full_like(row, number), index, factor

    def blocks(self, engine: Pooled) -> Iterable[Block]:
        groups: dict[tuple[str, bytes, int], list[int]] = {}
        for j, column in enumerate(self.columns, 1):
            own = self._entries(j)
            cells = self.cell[own]
            # One entry in a cell, which is in the slopes of this latent alone, and may be scaled.
            separate = bool((np.diff(cells) > 0).all() and self._inside[own].all())
            if not len(cells) or j in self.known or column.element is not None or not separate:
                continue
            mixed = bool(
                self._free[own].all()
            )  # what is in several cells is scaled in all of them, and mixed with none
            groups.setdefault((column.site, cells.tobytes(), 0 if mixed else j), []).append(j)
        for latents in groups.values():
            made = self._block(latents, engine)
            if made is not None:
                yield made

    def _entries(self, j: int) -> slice:
        return slice(self._bounds[j], self._bounds[j + 1])

    def _intercepts(self, cells: Array) -> Array | None:
        """Which entries are the intercepts of some cells, if each has one of its own, which may be any real number."""
        own = self.cell[self._entries(0)]
        at = np.searchsorted(own, cells)
        alone = np.searchsorted(own, cells, side="right") == at + 1
        return at if bool(alone.all()) and bool(self._free[at].all()) else None

    def _block(self, latents: list[int], engine: Pooled) -> Block | None:
        columns = [self.columns[j - 1] for j in latents]
        latent = next(s for s in self.own.sites if s.site.name == columns[0].site)
        known = _known(latent, engine)
        if known is None:
            return None
        at = torch.tensor([c.event for c in columns])
        slopes = [self._entries(j) for j in latents]
        intercepts = self._intercepts(self.cell[slopes[0]])
        mean, scale = (x[at] for x in known)
        factor = np.stack([self.factor[own] for own in slopes])
        of_intercepts = self.factor[[] if intercepts is None else intercepts]
        same = bool((factor == factor[0, 0]).all() and (of_intercepts == factor[0, 0]).all())
        return Block(
            columns[0].site,
            at,
            mean,
            None if bool((scale == 1).all()) else scale,
            torch.tensor(np.stack([self.place[own] for own in slopes])),
            None if same else torch.tensor(factor),
            None if intercepts is None else torch.tensor(self.place[intercepts]),
            None if same or intercepts is None else torch.tensor(of_intercepts),
        )


def _code(*columns: Array) -> Array:
    """One number for each row of some columns of integers, in the order of these."""
    code = np.zeros_like(columns[0])
    for x in columns:
        low, high = (int(end) for end in (x.min(initial=0), x.max(initial=0)))
        code = code * (high - low + 1) + (x - low)
    return code


def _counts(x: Array) -> Array:
    """How often each of these numbers occurs among them."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return counts[where]


def _known(latent: PooledSite, engine: Pooled) -> tuple[Tensor, Tensor] | None:
    """Mean and scale of the cells of a latent, if both are numbers and it hangs on no other one."""
    form = latent.form
    uses = [use for own in engine.problem.uses.values() for use in own if use.site == latent.site.name]
    if uses or latent.vector or not latent.scaled or form.entries or latent.alone or form.ones is None:
        return None
    mean = -form.base[form.ones]
    if bool((form.base - form.value).count_nonzero(1).index_fill(0, torch.tensor([form.ones]), 0).any()):
        return None
    return mean, per_cell(engine.arguments.start[latent.site.name]["scale"], latent.site)
