"""A site's share of Q from pseudo-rows: what the linear solve of the M-step and the scales after it need.

The pseudo-rows of a site (pooled_data.py), at the pseudo-elements and at the spread of the posterior, and the rows left
over are a least squares problem with residuals r = Y + G C, G the regressors (bilinear.py). With precision Π of the
cells and entries C_qp = base + Σ a θ_i

    Q = -½ tr Π Σ r rᵀ,     ∂Q/∂θ_i = -Σ a (Gᵀr Π)_qp,     -∂²Q/∂θ_i∂θ_k = Σ a a' (GᵀG)_qq' Π_pp'.

Residuals are formed anew at every place, so that nothing cancels.
Shapes: R pseudo-rows of all classes together, q regressors, P cells.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.bilinear import Form
from pyro_em.e_step.pooled_data import Pooled
from pyro_em.e_step.pooled_pairs import Pairs, pairs_of
from pyro_em.families.numerics import precision_matrix
from pyro_em.m_step.location import Location
from pyro_em.model.trace import SiteRecord
from pyro_em.statistics import SiteMoments, argument_cells
from pyro_em.sufficient import Sufficient

MAX_PAIRS = 2**23  # of coefficients whose precision is summed


class PooledSite:
    """What does not change during a fit."""

    def __init__(self, site: SiteRecord, form: Form, pooled: Pooled, scaled: bool, moves: bool) -> None:
        """`scaled`: the noise scale is an argument, not known; `moves`: the location is no plain argument."""
        self.site, self.form, self.pooled = site, form, pooled
        self.cells = form.base.shape[1]
        assert site.family is not None
        self.vector = site.family.event_dim == 1
        self.shared, self.alone = form.shared.shape[1], form.alone.shape[1]
        self.has_data = pooled.data.shape[2] > self.alone
        self.scaled = scaled
        self.moves = moves
        cells = torch.cat([entries.cell for entries in form.entries]) if form.entries else torch.zeros(0)
        if len(cells) ** 2 > MAX_PAIRS * (1 if self.vector else self.cells):
            raise NotCompiled(f"the location of '{site.name}' has {len(cells)} coefficients")
        self._pairs: dict[tuple[tuple[str, int], ...], Pairs] = {}
        # The same in every E-step: Y by its number of columns; the number of elements at cells, and zeros like it.
        self._known_values: dict[int, Tensor | None] = {}
        self._counts: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self._cells: tuple[Tensor, Tensor] | None = None

    def at(self, pooled: Pooled) -> PooledSite:
        """The same site with other rows."""
        found = copy.copy(self)
        found.pooled, found._known_values, found._counts = pooled, {}, {}
        return found

    def pairs(self, starts: Mapping[str, int], size: int) -> Pairs:
        """Of the parameters that have a place in the block."""
        if (key := tuple(starts.items())) not in self._pairs:
            self._pairs[key] = pairs_of(self.form, starts, size, self.vector)
        return self._pairs[key]

    def value_in(self, cells: Tensor) -> Tensor:
        """Of a latent, the part of C that is its value in some cells."""
        if self._cells is None or self._cells[0] is not cells:
            self._cells = cells, self.form.value[:, cells]
        return self._cells[1]

    def rows(self, zeta: Tensor) -> tuple[Tensor, Tensor | None]:
        """G (R, q) and Y (R, P) at the atoms ζ (U, K + 1, c + K), of which the last K hold the spread."""
        return self._regressors(zeta), self._values(zeta.shape[2])

    def _regressors(self, zeta: Tensor) -> Tensor:
        """The first atoms have data; the rows left over come last."""
        # By element, row of it, atom; feature and latent.
        if self.pooled.plain and not self.alone and not len(self.pooled.left):
            return zeta.squeeze(0).mT
        found = (self.pooled.features * zeta.mT.unsqueeze(1).unsqueeze(3)).flatten(-2)
        if self.alone:
            alone = self.padded(self.pooled.data[:, :, : self.alone], zeta.shape[2])
            found = torch.cat([found, alone.transpose(-1, -2)], -1)
        found = found.flatten(0, -2)
        if not len(self.pooled.left):
            return found
        before = (found.shape[1] - self.alone, 0)
        return torch.cat([found, torch.nn.functional.pad(self.pooled.left[:, : self.alone], before)])

    def _values(self, count: int) -> Tensor | None:
        """Zero where the posterior spreads."""
        if not self.has_data:
            return None
        if count not in self._known_values:
            found = self.padded(self.pooled.data[:, :, self.alone :], count).transpose(-1, -2).flatten(0, -2)
            self._known_values[count] = torch.cat([found, self.pooled.left[:, self.alone :]])
        return self._known_values[count]

    @staticmethod
    def padded(x: Tensor, count: int) -> Tensor:
        """With zeros for the pseudo-elements that hold no data."""
        return torch.nn.functional.pad(x, (0, count - x.shape[-1]))

    def precision(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """Π (P, P) of a vector, else its diagonal (P,)."""
        if self.vector:
            precision = precision_matrix(dict(arguments))
            return precision.reshape(precision.shape[-2:])
        if not self.scaled:
            return torch.ones(self.cells, dtype=torch.float64)
        return per_cell(arguments["scale"], self.site).pow(-2)

    def moments(
        self, second: Tensor, first: Tensor | None, others: Mapping[str, Tensor], center: Tensor | None
    ) -> SiteMoments:
        """Moments of the whole site at the cells of `others`; second (P, P) or (P,), first (P,), None for 0."""
        cells = argument_cells(self.site, dict(others))
        count = self.pooled.count
        if self.vector:
            lead = (1,) * len(cells)
            first = torch.zeros(self.cells, dtype=torch.float64) if first is None else first
            return SiteMoments(
                (count.expand(lead), first.expand(*lead, -1), second.expand(*lead, -1, -1)), cells, center
            )
        event = self.site.fn.event_shape
        own = (1,) * (len(event) - len(cells)) + tuple(cells[len(cells) - len(event) :] if event else ())
        if cells not in self._counts:
            weight = fold(count.expand(self.cells), event, own).reshape(cells)
            self._counts[cells] = weight, torch.zeros_like(weight)
        (weight, zero), second = self._counts[cells], fold(second, event, own).reshape(cells)
        first = zero if first is None else fold(first, event, own).reshape(cells)
        return SiteMoments((weight, first, second), cells, center)


def fold(x: Tensor, event: torch.Size, cells: tuple[int, ...]) -> Tensor:
    """Sum a quantity of the cells of a row over those that share arguments."""
    x = x.reshape(event)
    gone = [i for i, (full, own) in enumerate(zip(event, cells, strict=True)) if own == 1 and full > 1]
    return x.sum(gone, keepdim=True) if gone else x


def per_cell(x: Tensor, site: SiteRecord) -> Tensor:
    """An argument of a scalar family over the cells of a row (P,)."""
    event = site.fn.event_shape
    x = x.reshape(x.shape[x.dim() - len(event) :]) if x.dim() > len(event) else x
    return (x if x.shape == event else x.expand(event)).double().reshape(-1)


class PooledLocation(Location):
    """One site at the atoms of one E-step."""

    def __init__(
        self,
        own: PooledSite,
        C: Tensor,
        rows: tuple[Tensor, Tensor | None],
        sufficient: Sufficient,
        total: SiteMoments | None,
        state: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> None:
        """`rows` as of `PooledSite.rows`; `state` picks from the arguments those of one state of a discrete latent."""
        self.own, self.sufficient, self.total, self._state = own, sufficient, total, state
        self.C = self._start = C
        self._regressors, self._data = rows
        self._block: Pairs | None = None
        self._slope: tuple[list[Tensor], Tensor] | None = None
        self._noise: tuple[list[Tensor], Tensor] | None = None
        self._left: tuple[Tensor, Tensor] | None = None  # with the C that it was made at, as the next
        self._found: tuple[Tensor, SiteMoments] | None = None

    def opened(self, starts: Mapping[str, int], size: int) -> PooledLocation:
        """As the location of a block of the M-step."""
        self._block, self._slope = self.own.pairs(starts, size), None
        self.delta = self._block.zero
        return self

    @property
    def _here(self) -> Tensor:
        """Residuals at the current coefficients; asked for the slope, and for the moments."""
        if self._left is None or self._left[0] is not self.C:
            self._left = self.C, self._residual(self.C)
        return self._left[1]

    def _residual(self, C: Tensor) -> Tensor:
        residual = self._regressors @ C
        return residual if self._data is None else residual + self._data

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Current arguments of the site (in its state)."""
        return self._state(self.sufficient.arguments[self.own.site.name])

    @property
    def _precision(self) -> Tensor:
        arguments = self.arguments
        made_of = list(arguments.values())
        if self._noise is None or not all(x is y for x, y in zip(self._noise[0], made_of, strict=True)):
            self._noise = made_of, self.own.precision(arguments)
        return self._noise[1]

    def move(self, delta: Tensor) -> None:
        assert self._block is not None
        self.delta = delta
        change = self._block.coefficient * delta.index_select(0, self._block.index)
        self.C = self._start.reshape(-1).index_add(0, self._block.place, change).reshape(self._start.shape)
        self.sufficient.touch(self.own.site.name)

    def gradient(self) -> Tensor:
        """Asked for the score, and once more for the update, of the same coefficients and arguments."""
        made_of = [self.C, *self.arguments.values()]
        if self._slope is None or not all(x is y for x, y in zip(self._slope[0], made_of, strict=True)):
            self._slope = made_of, self._gradient()
        return self._slope[1]

    def _gradient(self) -> Tensor:
        assert self._block is not None
        cross = self._regressors.mT @ self._here
        precision = self._precision
        slope = cross @ precision if self.own.vector else cross * precision
        own = self._block.falling * slope.reshape(-1).index_select(0, self._block.place)
        return self._block.zero.index_add(0, self._block.index, own)

    @cached_property
    def _gram(self) -> Tensor:
        return self._regressors.mT @ self._regressors

    def precision(self) -> Tensor:
        assert self._block is not None
        size = len(self.delta)
        flat = torch.zeros(size**2, dtype=torch.float64).index_add(0, self._block.target, self._pair_values())
        return flat.reshape(size, size)

    def coupled(self, rows: Tensor, columns: Tensor, count: int) -> Tensor:
        """As `Location.coupled`."""
        assert self._block is not None
        target = self._block.at(rows, columns)
        return torch.zeros(count, dtype=torch.float64).index_add(0, target, self._pair_values())

    def _pair_values(self) -> Tensor:
        block = self._block
        assert block is not None
        gram, precision = self._gram.reshape(-1), self._precision.reshape(-1)
        return block.product * gram.index_select(0, block.regressors) * precision.index_select(0, block.cells)

    def coupling(self) -> Tensor:
        """As `Location.coupling`: the pairs of entries whose precision is summed."""
        assert self._block is not None
        return self._block.coupling

    def moments(self) -> SiteMoments:
        """Of the residuals, at the cells of all arguments but the location; asked again until it moves."""
        if self._found is None or self._found[0] is not self.C:
            residual, own = self._here, self.own
            second = residual.mT @ residual if own.vector else residual.square().sum(0)
            found = own.moments(second, None, {a: v for a, v in self.arguments.items() if a != "loc"}, None)
            zero = torch.zeros(own.cells, dtype=torch.float64) if own.vector else 0.0
            self._found = self.C, replace(found, override={"loc": zero}, total=self.total)
        return self._found[1]

    def mean(self) -> Tensor:
        """Of a latent's value (P,)."""
        value, ones = self._values()
        return (ones * value).sum(0) / self.own.pooled.count

    def spread(self, cells: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean of some cells of a latent's value over elements and posterior, and covariance around it or `center`."""
        form, count = self.own.form, self.own.pooled.count
        assert form.ones is not None
        value, ones = self._regressors @ self.own.value_in(cells), self._regressors[:, form.ones : form.ones + 1]
        center = (ones * value).sum(0) / count if center is None else center
        around = value - ones * center
        return center, around.mT @ around / count

    def value_moments(self, mean: Tensor | None = None) -> SiteMoments:
        """Of a latent's value, around its own mean in the cells of all arguments or around another one."""
        own, arguments = self.own, self.arguments
        value, ones = self._values()
        mean = self.mean() if mean is None else mean
        if not own.vector:
            event = own.site.fn.event_shape
            cells = argument_cells(own.site, arguments)
            kept = (1,) * (len(event) - len(cells)) + tuple(cells[len(cells) - len(event) :] if event else ())
            folded = fold(mean, event, kept) / (own.cells // max(1, torch.Size(kept).numel()))
            center = folded.reshape(cells)
            mean = folded.expand(event).reshape(-1)
        else:
            center = mean
        around = value - ones * mean
        second = around.mT @ around if own.vector else (around**2).sum(0)
        return own.moments(second, (ones * around).sum(0), arguments, center)

    def _values(self) -> tuple[Tensor, Tensor]:
        form = self.own.form
        assert form.ones is not None
        return self._regressors @ form.value, self._regressors[:, form.ones : form.ones + 1]
