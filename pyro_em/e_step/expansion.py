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

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
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

Key = tuple[str, int]  # a parameter, and an entry of it
Cell = tuple[int, int, int]  # a site, a feature, a cell of its rows


@dataclass(frozen=True)
class Block:
    """Latents that are mixed: `cells` of their site's value, the known mean and scale (K,) there; where the slopes
    stand among all parameters taken in a row, and what they count (K, m); the same for the intercepts (m,), if all
    cells have one."""

    site: str
    cells: Tensor
    mean: Tensor
    scale: Tensor
    slopes: Tensor
    factor: Tensor
    intercepts: Tensor | None
    intercept_factor: Tensor


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
            A = root / own.scale
            slopes = flat[own.slopes] * own.factor
            if own.intercepts is not None:
                shift = (mean - A @ own.mean) @ slopes
                flat = flat.index_put((own.intercepts,), flat[own.intercepts] + shift / own.intercept_factor)
            flat = flat.index_put((own.slopes,), (A.mT @ slopes) / own.factor)
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
    """The slopes of all latents of one set, by latent and cell."""

    def __init__(self, own: PooledSet, columns: Sequence[Column], m_step: MStep, starts: Mapping[str, int]) -> None:
        self.own, self.columns, self.starts = own, columns, starts
        self.records = m_step.problem.parameters
        self.sites = [s for s in own.sites if not any(c.site == s.site.name for c in columns)]
        self.found: dict[tuple[int, Cell], list[tuple[Key, float]]] = {}  # by latent, from 1 on, 0 for the intercept
        self.cells: dict[int, set[Cell]] = {}  # of each of these
        self.known: set[int] = set()  # latents with a slope that is a number, or a parameter that must not move
        for i, site in enumerate(self.sites):
            self._read(i, site)
        self.count = Counter(key for entries in self.found.values() for key, _ in entries)

    def _read(self, i: int, site: PooledSite) -> None:
        form, width = site.form, site.form.num_columns
        shared = site.shared * width
        for row, _ in (form.base[:shared] != 0).nonzero().tolist():
            if row % width:
                self.known.add(row % width)
        for entries in form.entries:
            held = entries.parameter not in self.starts
            columns = (entries.row, entries.cell, entries.index, entries.coefficient)
            for row, cell, index, factor in zip(*(x.tolist() for x in columns), strict=True):
                if held and row < shared:
                    self.known.add(row % width)
                j, at = (row % width, (i, row // width, cell)) if row < shared else (0, (i, -1 - row, cell))
                self.found.setdefault((j, at), []).append(((entries.parameter, index), factor))
                self.cells.setdefault(j, set()).add(at)

    def blocks(self, engine: Pooled) -> Iterable[Block]:
        groups: dict[tuple[str, tuple[Cell, ...], int], list[int]] = {}
        for j, column in enumerate(self.columns, 1):
            cells = tuple(sorted(self.cells.get(j, ())))
            if not cells or j in self.known or column.element is not None or not self._own(j, cells):
                continue
            mixed = self._each(j, cells)  # an entry in several cells is scaled in all of them, and mixed with none
            groups.setdefault((column.site, cells, 0 if mixed else j), []).append(j)
        for (_, cells, _), latents in groups.items():
            made = self._block(cells, latents, engine)
            if made is not None:
                yield made

    def _own(self, j: int, cells: Sequence[Cell]) -> bool:
        """The entries of a latent are in its slopes alone, one in a cell, and may be scaled."""
        keys = Counter(key for at in cells for key, _ in self.found[j, at])
        return all(len(self.found[j, at]) == 1 for at in cells) and all(self.count[k] == n for k, n in keys.items())

    def _each(self, j: int, cells: Sequence[Cell]) -> bool:
        """Every cell has an entry of its own, which may be any real number."""
        keys = [self.found[j, at][0][0] for at in cells if len(self.found.get((j, at), ())) == 1]
        return len(keys) == len(cells) and all(self.count[key] == 1 and self._is_free(key[0]) for key in keys)

    def _is_free(self, name: str) -> bool:
        return name in self.starts and base_constraint(self.records[name].constraint) is constraints.real

    def _block(self, cells: tuple[Cell, ...], latents: list[int], engine: Pooled) -> Block | None:
        columns = [self.columns[j - 1] for j in latents]
        latent = next(s for s in self.own.sites if s.site.name == columns[0].site)
        known = _known(latent, engine)
        if known is None:
            return None
        at = torch.tensor([c.event for c in columns])
        entries = [[self.found[j, cell][0] for cell in cells] for j in latents]
        intercepts = [self.found.get((0, cell), []) for cell in cells] if self._each(0, cells) else None
        mean, scale = known
        return Block(
            columns[0].site,
            at,
            mean[at],
            scale[at],
            torch.tensor([[self._place(key) for key, _ in row] for row in entries]),
            torch.tensor([[factor for _, factor in row] for row in entries], dtype=torch.float64),
            None if intercepts is None else torch.tensor([self._place(own[0][0]) for own in intercepts]),
            torch.tensor([own[0][1] for own in intercepts or ()], dtype=torch.float64),
        )

    def _place(self, key: Key) -> int:
        name, index = key
        return self.starts[name] + index


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
