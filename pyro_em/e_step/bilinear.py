"""Residuals of normal sites as bilinear forms in the parameters and in the Gaussian latents, read off from the model.

With ζ = (1, z_1, ..., z_K) the residual (value minus location) of cell p in row n of a site is

    r_np = y_np + Σ_q g_nq C_qp,        C_qp = base_qp + Σ_i coefficient · θ_i,

with *regressors* g_nq = φ_nv ζ_j (a known feature of the row times a latent) or g_nq = φ_nv (where the feature meets
no latent). In factor analysis the only feature is 1, and C holds minus the loadings and the mean; for y ~ x·β + x·b_g
the features are x. The latents' own sites are of the same kind, their value being an entry of ζ.

One run of the model with the latents at 0 and at the unit vectors gives location and slopes for all of them: tangents
along the parameters, as in model/affine.py, are the coefficients.

Letters: N rows (the site's plates flattened), V features, K latents of one element, P cells of a row.
Not handled: locations that are not affine in the parameters, scales that differ from row to row by a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.evidence.columns import Column
from pyro_em.model.affine import terms_at
from pyro_em.model.predictor import linear_part
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.types import Params

Array = NDArray[Any]
MAX_FEATURES = 512
MAX_PICKED = 64  # entries of a parameter that the rows of one site pick by an index
CONSTANT = -1  # in place of an entry of a parameter
TAKEN_OFF = -1  # in place of a latent: what every slope has too much, as the intercept is in the location at 1


@dataclass(frozen=True)
class Entries:
    """Which entry `index` of `parameter` stands, times `coefficient`, at C[row, cell]: (E,) each."""

    parameter: str
    row: Tensor
    cell: Tensor
    index: Tensor
    coefficient: Tensor


@dataclass(frozen=True)
class Form:
    """The residual of one site.

    `shared` (N, V₁) are the features that meet latents, `alone` (N, V₀) the others. The rows of C are (v, j) for
    the former, v K' + j with K' = K + 1, then v for the latter. `value` is the part of `base` that is the site's own
    value, for latents; `ones` the row of C of the feature 1 without latent, if it is among the shared ones.
    """

    shared: Tensor
    alone: Tensor
    num_columns: int  # K + 1
    base: Tensor
    value: Tensor
    entries: tuple[Entries, ...]
    ones: int | None

    @property
    def num_regressors(self) -> int:
        return self.base.shape[0]

    def coefficients(self, params: Params) -> Tensor:
        """C (regressors, P) at some parameters."""
        if not self.entries:  # the same object every time, by which what follows from it is known again
            return self.base
        flat = self.base.reshape(-1)
        for own, place in zip(self.entries, self._places, strict=True):
            theta = params[own.parameter].detach().double().reshape(-1)
            flat = flat.index_add(0, place, own.coefficient * theta.index_select(0, own.index))
        return flat.reshape(self.base.shape)

    @cached_property
    def _places(self) -> tuple[Tensor, ...]:
        """Of all entries in the flattened C."""
        return tuple(own.row * self.base.shape[1] + own.cell for own in self.entries)


@dataclass
class _Reader:
    """Collects coefficients by (feature, latent, cell, parameter, entry): of each parameter many of them at a time, as
    arrays of these numbers and of what they count."""

    cells: int
    num_rows: int
    features: list[Tensor] = field(default_factory=list)
    known: dict[bytes, int] = field(default_factory=dict)
    found: dict[str, list[tuple[Array, ...]]] = field(default_factory=dict)

    def feature(self, row: Tensor) -> int:
        key = row.cpu().numpy().tobytes()
        if key not in self.known:
            if len(self.features) >= MAX_FEATURES:
                raise NotCompiled(f"a site has more than {MAX_FEATURES} different covariates")
            self.known[key] = len(self.features)
            self.features.append(row)
        return self.known[key]

    def add(self, j: int, p: int, parameter: str, index: int, row: Tensor, factor: float) -> None:
        """A coefficient that varies from row to row, or not: `row` (N,) or (1,)."""
        if row.numel() == 1 or bool((row == row[0]).all()):
            self.put(0, j, p, parameter, index, factor * float(row[0]))
        else:
            self.put(self.feature(row.contiguous() + 0.0), j, p, parameter, index, factor)

    def put(self, v: int, j: int, p: Any, parameter: str, index: Any, number: Any) -> None:
        """One coefficient, or arrays of them at some cells."""
        parts = np.broadcast_arrays(*np.atleast_1d(v, j, p, index, number))
        self.found.setdefault(parameter, []).append(tuple(parts))


def read_form(
    site: SiteRecord,
    run: Run,
    params: Params,
    names: Sequence[str],
    columns: Sequence[Column],
    m: int,
    scale: Tensor,
    state: int | None = None,
) -> Form:
    """The form of one site, as it is in a run at one value of the latents.

    :param run: with the latents at 0, then at 1 in one column after the other (S = K + 1 along the atoms' dim), and
        with gradients to the parameters `names` that reach the location.
    :param m: number of plate-like dims, the atoms' dim first.
    :param scale: known part of the noise scale of every row, (N,) or (1,); residuals are divided by it.
    :param state: of the one discrete latent on which the location depends, if it may.
    :raises NotCompiled: see the module docstring.
    """
    elements = len(site.fn.event_shape)
    sizes = (1,) * (m - 1 - len(site.batch_shape)) + tuple(site.batch_shape)
    cells = tuple(site.fn.event_shape)
    rows, size = torch.Size(sizes).numel(), torch.Size(cells).numel()
    argument = (run.sites[site.name].arguments or {})["loc"]
    terms = [(name, term) for name in names for term in terms_at(name, run.leaves[name], argument)]
    reader = _Reader(size, rows)
    reader.feature(torch.ones(rows, dtype=torch.float64))
    over, count = 1.0 / scale, len(columns) + 1

    def laid_out(x: Tensor) -> Tensor:
        """Atoms, rows and cells (S, N, P), with size 1 where nothing varies. Sets with more columns have more atoms."""
        x = x.reshape((1,) * (m + elements - x.dim()) + tuple(x.shape))
        lead = x.shape[: x.dim() - m - elements]
        if lead.numel() > 1 and state is None:
            raise NotCompiled("a location depends on discrete latents")
        x = x.reshape(-1, *x.shape[len(lead) :])
        x = x[state if state is not None and len(x) > 1 else 0]
        flat_rows = tuple(sizes) if any(s > 1 for s in x.shape[1:m]) else (1,) * (m - 1)
        flat_cells = cells if any(s > 1 for s in x.shape[m:]) else (1,) * elements
        x = x.expand(x.shape[0], *flat_rows, *flat_cells)
        return x.reshape(x.shape[0], torch.Size(flat_rows).numel(), -1)[:count]

    alike = over.numel() == 1
    for name, term in terms:
        index, coefficient = laid_out(term.index), laid_out(term.coefficient)
        if index.shape[1] == coefficient.shape[1] == 1 and alike:
            _in_all_rows(reader, name, index.expand(count, 1, size), coefficient.expand(count, 1, size) * over)
            continue
        for s in range(count):
            own, factor = (x[min(s, len(x) - 1)] for x in (index, coefficient))
            _add_term(reader, s, name, own, factor, over)
    value = argument.detach().double()
    linear = linear_part([t for _, t in terms], params, torch.zeros_like(value))
    offset = value - linear
    rounding = 1e-13 * max(float(value.abs().max()), float(linear.abs().max()))
    offset = torch.where(offset.abs() <= rounding, torch.zeros_like(offset), offset)
    fixed = laid_out(offset)
    if fixed.shape[1] == 1 and alike:
        numbers = fixed.expand(count, 1, size) * over
        _in_all_rows(reader, "", torch.full_like(numbers, CONSTANT, dtype=torch.long), numbers)
    else:
        for s in range(count):
            own = fixed[min(s, len(fixed) - 1)]
            for p in (own != 0).any(0).expand(size).nonzero().squeeze(-1).tolist():
                row = own[:, min(p, own.shape[1] - 1)]
                row = row[:1] if bool(((row - row[0]).abs() <= rounding).all()) else row
                _at_atom(reader, s, p, "", CONSTANT, row * over)
    values = {
        key: number
        for j, column in enumerate(columns)
        if column.site == site.name
        for key, number in _value_of(reader, column, j + 1, rows, over)
    }
    return _assembled(reader, values, count, size, bool(values))


def _add_term(reader: _Reader, s: int, name: str, index: Tensor, coefficient: Tensor, over: Tensor) -> None:
    """One affine term at one atom; index and coefficient (N or 1, P or 1)."""
    if index.shape[0] > 1:
        picked = index.unique()
        if len(picked) > MAX_PICKED:
            raise NotCompiled(f"the rows of a site pick more than {MAX_PICKED} entries of '{name}'")
        for i in picked.tolist():
            if i >= 0:
                own = torch.where(index == i, coefficient, 0.0)
                _add_term(reader, s, name, torch.full((1, 1), i), own, over)
        return
    for p, i in enumerate(index.expand(1, reader.cells)[0].tolist()):
        row = coefficient[:, min(p, coefficient.shape[1] - 1)]
        if i >= 0 and bool((row != 0).any()):
            _at_atom(reader, s, p, name, i, row * over)


def _in_all_rows(reader: _Reader, name: str, index: Tensor, coefficient: Tensor) -> None:
    """What all rows have in every cell at every atom, (S, 1, P) each, as `_at_atom`."""
    entries, numbers = (x[:, 0].cpu().numpy() for x in (index, coefficient))
    at, cells = ((numbers != 0) & ((entries >= 0) | (not name))).nonzero()
    if len(cells):
        entries, numbers, first = entries[at, cells], numbers[at, cells], at == 0
        reader.put(0, at, cells, name, entries, numbers)
        reader.put(0, TAKEN_OFF, cells[first], name, entries[first], numbers[first])


def _at_atom(reader: _Reader, s: int, p: int, name: str, index: int, row: Tensor) -> None:
    """What the location has at atom s: that at 0 is the intercept, the difference from it the slope of a latent."""
    if s > 0:
        reader.add(s, p, name, index, row, 1.0)
        return
    reader.add(0, p, name, index, row, 1.0)
    reader.add(TAKEN_OFF, p, name, index, row, 1.0)


def _value_of(
    reader: _Reader, column: Column, j: int, rows: int, over: Tensor
) -> list[tuple[tuple[int, int, int], float]]:
    """The site's own value: column j at its cell, in all rows or in that of one element."""
    if column.element is None and over.numel() == 1:
        return [((0, j, column.event), float(over))]
    row = torch.ones(rows, dtype=torch.float64)
    if column.element is not None:
        row = torch.zeros(rows, dtype=torch.float64)
        row[column.element] = 1.0
    row = row * over
    if rows == 1:
        return [((0, j, column.event), float(row[0]))]
    return [((reader.feature(row), j, column.event), 1.0)]


def _assembled(reader: _Reader, values: dict[tuple[int, int, int], float], count: int, size: int, latent: bool) -> Form:
    found = {name: _summed(own, count, size) for name, own in reader.found.items()}
    largest = max((float(np.abs(own[-1]).max()) for own in found.values() if own[-1].size), default=0.0)
    found = {name: tuple(x[np.abs(own[-1]) > 1e-13 * largest] for x in own) for name, own in found.items()}
    used = {int(v) for own in found.values() for v in np.unique(own[0])}
    meets = {int(v) for v_, j_, *_ in found.values() for v in np.unique(v_[j_ > 0])} | {
        k[0] for k in values if k[1] > 0
    }
    if latent:
        meets.add(0)  # the mean of a latent's value is taken around a constant
    shared, alone = sorted(meets), sorted(used - meets)
    place = {v: at * count for at, v in enumerate(shared)} | {v: len(shared) * count + i for i, v in enumerate(alone)}
    regressors = len(shared) * count + len(alone)
    base, value = (torch.zeros(regressors, size, dtype=torch.float64) for _ in range(2))
    for (v, j, p), number in values.items():
        value[place[v] + j, p] += number
    entries = []
    begins = np.array([place.get(v, 0) for v in range(len(reader.features))])
    for name, (at, column, p_all, i, numbers) in found.items():
        row, cell, index, coefficient = map(torch.tensor, (begins[at] + column, p_all, i, -numbers))
        if name:
            entries.append(Entries(name, row, cell, index, coefficient))
        else:
            base[row, cell] = coefficient
    empty = torch.zeros(reader.num_rows, 0, dtype=torch.float64)
    columns = [torch.stack([reader.features[v] for v in own], -1) if own else empty for own in (shared, alone)]
    return Form(columns[0], columns[1], count, base + value, value, tuple(entries), place[0] if latent else None)


def _summed(parts: Sequence[tuple[Array, ...]], count: int, size: int) -> tuple[Array, ...]:
    """(feature, latent, cell, entry) of all coefficients of one parameter, each once, and its sum."""
    v, j, p, i, number = (np.concatenate(x) for x in zip(*parts, strict=True))
    off = j == TAKEN_OFF
    if off.any():  # of every slope
        kept, taken, slopes = ~off, int(off.sum()), np.arange(1, count)
        again = [np.repeat(x[off], count - 1) for x in (v, p, i, -number)]
        v, p, i, number = (np.concatenate([x[kept], y]) for x, y in zip((v, p, i, number), again, strict=True))
        j = np.concatenate([j[kept], np.tile(slopes, taken)])
    entries = int(i.max()) + 2 if len(i) else 1
    code = ((v * count + j) * size + p) * entries + i + 1
    keys, where = np.unique(code, return_inverse=True)
    rest, own = np.divmod(keys, entries)
    rest, p = np.divmod(rest, size)
    return (*np.divmod(rest, count), p, own - 1, np.bincount(where, number, len(keys)))
