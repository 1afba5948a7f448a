"""Locations of one site as data of a linear solve, and the residual moments that its other parameters need.

With η₀ the location at the parameters of the E-step, e = y − η₀, and a block moved by δ from there, the site's part
of Q is, for every cell of its other arguments (precision Π: 1/σ², or Σ⁻¹),

    Q(δ) = Π·(Aᵀ W e)·δ − ½ Π·δᵀ (Aᵀ W A) δ,        Σ w (y − η)² = Σ w e² − 2 δ·(Aᵀ W e) + δᵀ (Aᵀ W A) δ

Statistics are centred at η₀, not at the mean of the data: near the optimum δ is small, and the residual sum of
squares keeps its digits. If the other arguments do not vary along the rows, Aᵀ W A and Aᵀ W e are summed once per
E-step for every cell (`Summed`), and no later question touches the data. Otherwise (a scale that differs from row
to row, vectors with a covariance) each question is one pass over them (`Direct`).

A family takes part if its kernel of that argument is quadratic (Normal, LogNormal, MultivariateNormal). Shapes as in
design.py; D event dims of a vector, 1 design each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.design import Column, Design, Piece
from pyro_em.families import Statistic
from pyro_em.model.density import clean_value
from pyro_em.model.predictor import Term
from pyro_em.model.trace import SiteRecord
from pyro_em.model.use import Use
from pyro_em.statistics import SiteMoments, argument_cells, complete_count, site_moments, site_statistics
from pyro_em.sufficient import Sufficient

LOST = 1e-5  # share of the residual sum of squares below which it is summed anew instead of updated


@dataclass(frozen=True, eq=False)
class LocationSite:
    """What does not change during a fit. `keep` are the cell dims of the other arguments, None for `Direct`."""

    name: str
    slot: str
    designs: tuple[Design, ...]
    vector: bool
    keep: frozenset[int] | None
    free: Tensor | None  # 0/1 over the cells: where a parameter reaches the location
    total: Callable[[], SiteMoments]  # of all data around their mean, one cell; made if somebody asks
    moving: bool = False  # the designs depend on continuous latents, and are those of one E-step

    def open(self, weight: Tensor, sufficient: Sufficient, size: int) -> Location:
        """The site at the parameters of an E-step."""
        return Direct(self, weight, sufficient, size) if self.keep is None else Summed(self, weight, sufficient, size)


class Location(ABC):
    """A site's location near the parameters of one E-step; `move` follows the block to `delta` from there."""

    delta: Tensor

    @abstractmethod
    def move(self, delta: Tensor) -> None:
        """The block at δ from the E-step's parameters."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """∂Q/∂θ of this site at the block's current place, (P,)."""

    @abstractmethod
    def precision(self) -> Tensor:
        """−∂²Q/∂θ² of this site, (P, P)."""

    @abstractmethod
    def moments(self) -> SiteMoments:
        """Moments of the residuals at the block's current place, at the cells of the other arguments."""

    def coupling(self) -> Tensor | None:
        """All pairs (2, n) of entries of the block that `precision` may couple, if that is known without the data."""
        return None

    def coupled(self, rows: Tensor, columns: Tensor, count: int) -> Tensor:
        """`precision` at these pairs alone, entry (i, j) at the cell rows[i] + columns[j] of (count,)."""
        pairs = self.coupling()
        assert pairs is not None
        one, other = pairs
        return torch.zeros(count, dtype=torch.float64).index_put(
            (rows[one] + columns[other],), self.precision()[one, other]
        )


class _ByRows(Location):
    """From the rows of the data, with their weights."""

    def __init__(self, own: LocationSite, weight: Tensor, sufficient: Sufficient, size: int) -> None:
        self.own, self.sufficient = own, sufficient
        self.site: SiteRecord = sufficient.sites[own.name]
        # A response seen only in part is completed at the arguments of the E-step, whatever moves since.
        self._at = dict(sufficient.arguments[own.name])
        count = complete_count(self.site, self._at)
        self.weight = weight if isinstance(count, float) else weight * count
        self.reached = self.weight if own.free is None else self.weight * own.free
        self.delta = torch.zeros(size, dtype=torch.float64)

    @property
    def _others(self) -> dict[str, Tensor]:
        return {a: v for a, v in self.sufficient.arguments[self.own.name].items() if a != self.own.slot}

    @property
    def _zero(self) -> dict[str, Tensor]:
        """The location in statistics that are centred at it."""
        size = (len(self.own.designs),) if self.own.vector else ()
        return {self.own.slot: torch.zeros(size, dtype=torch.float64)}

    def _precision(self) -> Tensor:
        """Π over the cells of the other arguments, (cells) or (cells, D, D)."""
        family = self.site.family
        assert family is not None
        one, zero = torch.ones((), dtype=torch.float64), self._zero[self.own.slot]
        square = torch.zeros(2 * tuple(zero.shape), dtype=torch.float64)
        everything = {**self.site.constants, **self._others, **self._zero}
        kernel = family.kernel(self.own.slot, (one, zero, square), everything, zero)
        precision: Tensor = kernel.precision  # type: ignore[union-attr]
        return precision

    def _residuals_around(self, location: Tensor) -> tuple[Tensor, SiteMoments]:
        """y − location at the cells, and its moments at the cells of the other arguments."""
        others = self._others
        statistics = site_statistics(self.site, self._at, location)
        moments = site_moments(self.site, others, self.weight, None, statistics)
        first = statistics[0]
        assert isinstance(first, Statistic)
        return first.dense(), SiteMoments(moments.moments, moments.cells, None, self._zero, self.own.total())


class Summed(_ByRows):
    """Gram statistics once per E-step, per cell of the other arguments."""

    def __init__(self, own: LocationSite, weight: Tensor, sufficient: Sufficient, size: int) -> None:
        super().__init__(own, weight, sufficient, size)
        (self.design,) = own.designs
        assert own.keep is not None
        self.keep = own.keep
        residual, self._start = self._residuals_around(sufficient.arguments[own.name][own.slot])
        self._columns: Sequence[Column] = self.design.pulled(self.reached * residual, self.keep)

    @cached_property
    def _pieces(self) -> Sequence[Piece]:
        return self.design.gram(self.reached, self.keep)

    def move(self, delta: Tensor) -> None:
        self.delta = delta
        self.sufficient.touch(self.own.name)

    def gradient(self) -> Tensor:
        precision = self._precision()
        gradient = self.design.gathered([c.scaled(precision) for c in self._columns])
        return gradient - self.precision() @ self.delta if bool((self.delta != 0).any()) else gradient

    def precision(self) -> Tensor:
        precision = self._precision()
        return self.design.scatter([p.scaled(precision) for p in self._pieces])

    def moments(self) -> SiteMoments:
        if not bool((self.delta != 0).any()):
            return self._start
        weight, first, second = self._start.moments
        shape = second.shape
        falls = 2 * self.design.inner(self._columns, self.delta, self.keep)
        rises = self.design.quadratic(self._pieces, self.delta, self.keep)
        squares = second + (rises - falls).reshape(shape)
        if bool((squares < LOST * second).any()):
            change = self.design.predict(self.delta)
            change = change if self.own.free is None else change * self.own.free
            location = self.sufficient.arguments[self.own.name][self.own.slot] + change
            return self._residuals_around(location)[1]
        moments = (weight, torch.zeros_like(first), squares)
        return SiteMoments(moments, self._start.cells, None, self._zero, self.own.total())


class Direct(_ByRows):
    """A pass over the data for every question; the location argument is kept current."""

    def move(self, delta: Tensor) -> None:
        change = [design.predict(delta - self.delta) for design in self.own.designs]
        if self.own.free is not None:
            change = [own * self.own.free for own in change]
        arguments = self.sufficient.arguments[self.own.name]
        step = torch.stack(torch.broadcast_tensors(*change), -1) if self.own.vector else change[0]
        arguments[self.own.slot] = arguments[self.own.slot] + step
        self.delta = delta
        self.sufficient.touch(self.own.name)

    def gradient(self) -> Tensor:
        residual, _ = self._residuals_around(self.sufficient.arguments[self.own.name][self.own.slot])
        precision = self._precision()
        if not self.own.vector:
            return self.own.designs[0].pull(self.reached * precision * residual)
        pulled = self.reached.unsqueeze(-1) * (precision @ residual.unsqueeze(-1)).squeeze(-1)
        parts = [design.pull(pulled[..., d]) for d, design in enumerate(self.own.designs)]
        return torch.stack(parts).sum(0)

    def precision(self) -> Tensor:
        precision, designs = self._precision(), self.own.designs
        if not self.own.vector:
            return designs[0].scatter(designs[0].gram(self.reached * precision))
        total = torch.zeros(designs[0].size, designs[0].size, dtype=torch.float64)
        for d, first in enumerate(designs):
            total += first.scatter(first.gram(self.reached * precision[..., d, d]))
            for e, second in enumerate(designs[:d]):
                weight = self.reached * precision[..., d, e]
                cross = first.scatter(first.gram(weight, other=second), symmetric=False)
                total += cross + cross.mT
        return total

    def moments(self) -> SiteMoments:
        return self._residuals_around(self.sufficient.arguments[self.own.name][self.own.slot])[1]


def other_cells(site: SiteRecord, slot: str, rank: int) -> frozenset[int]:
    """Cell dims along which the other arguments vary, counted from the left of `rank` dims."""
    others = {a: v for a, v in (site.arguments or {}).items() if a != slot}
    cells = argument_cells(site, others)
    return frozenset(rank - len(cells) + i for i, size in enumerate(cells) if size > 1)


def total_moments(site: SiteRecord, vector: bool) -> SiteMoments:
    """Moments of all data of a site around their mean, one cell: what a collapse is judged against."""
    arguments = site.arguments or {}
    assert site.family is not None
    if site.family.latent_response:  # where the observations lie: the same for all states of the latents
        x = site.family.location(clean_value(site)).double()
        x = x[x.isfinite()]
        total = (torch.tensor(float(len(x)), dtype=torch.float64), (x - x.mean()).sum(), (x - x.mean()).square().sum())
        return SiteMoments(total, torch.Size(), x.mean())
    first = site_statistics(site, arguments, None)[0]
    assert isinstance(first, Statistic)
    x = first.dense().double()
    batch = list(range(x.dim() - int(vector)))
    mean = x.mean(batch) if batch else x
    found = site_moments(site, {}, torch.ones((), dtype=torch.float64), None, site_statistics(site, arguments, mean))
    return SiteMoments(found.moments, found.cells, mean)


def full_cells(site: SiteRecord) -> torch.Size:
    """Batch shape of the site, `.to_event` elements included."""
    value = clean_value(site)
    event = site.family.event_dim if site.family is not None else 0
    own = value.shape[: value.dim() - event]
    elements = site.fn.event_shape[: site.element_dims]
    return torch.broadcast_shapes(own, (*site.batch_shape, *elements))


def terms_of(uses: Sequence[Use]) -> list[Term]:
    """All affine terms that these uses (of one argument) have, those of a predictor once."""
    found: list[Term] = []
    for use in uses:
        if use.predictor is not None:
            found += [term for term in use.predictor.terms if term.parameter == use.parameter]
        else:
            assert use.index is not None
            one = torch.ones((), dtype=torch.float64)
            found.append(Term(use.parameter, use.index, one if use.coefficient is None else use.coefficient.double()))
    return found
