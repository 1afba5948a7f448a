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

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.evidence.columns import Column
from pyro_em.model.affine import terms_at
from pyro_em.model.predictor import linear_part
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.types import Params

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
    """Collects coefficients by (feature, latent, cell, parameter, entry)."""

    cells: int
    num_rows: int
    features: list[Tensor] = field(default_factory=list)
    known: dict[bytes, int] = field(default_factory=dict)
    found: dict[tuple[int, int, int, str, int], float] = field(default_factory=dict)

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

    def put(self, v: int, j: int, p: int, parameter: str, index: int, number: float) -> None:
        key = (v, j, p, parameter, index)
        self.found[key] = self.found.get(key, 0.0) + number


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
    over = 1.0 / scale

    def by_atom(x: Tensor) -> list[Tensor]:
        """Rows and cells at each atom, (N, P) or with size 1 where nothing varies."""
        x = x.reshape((1,) * (m + elements - x.dim()) + tuple(x.shape))
        lead = x.shape[: x.dim() - m - elements]
        if lead.numel() > 1 and state is None:
            raise NotCompiled("a location depends on discrete latents")
        x = x.reshape(-1, *x.shape[len(lead) :])
        x = x[state if state is not None and len(x) > 1 else 0]
        flat_rows = tuple(sizes) if any(s > 1 for s in x.shape[1:m]) else (1,) * (m - 1)
        flat_cells = cells if any(s > 1 for s in x.shape[m:]) else (1,) * elements
        x = x.expand(x.shape[0], *flat_rows, *flat_cells)
        x = x.reshape(x.shape[0], torch.Size(flat_rows).numel(), -1)
        count = len(columns) + 1
        return [x[min(s, x.shape[0] - 1)] for s in range(count)]

    for name, term in terms:
        for s, (index, coefficient) in enumerate(zip(by_atom(term.index), by_atom(term.coefficient), strict=True)):
            _add_term(reader, s, name, index, coefficient, over)
    value = argument.detach().double()
    linear = linear_part([t for _, t in terms], params, torch.zeros_like(value))
    offset = value - linear
    rounding = 1e-13 * max(float(value.abs().max()), float(linear.abs().max()))
    offset = torch.where(offset.abs() <= rounding, torch.zeros_like(offset), offset)
    for s, own in enumerate(by_atom(offset)):
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
    return _assembled(reader, values, len(columns) + 1, size, bool(values))


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
    entries = index.expand(1, reader.cells)[0].tolist()
    if coefficient.shape[0] == 1 and over.numel() == 1:
        for p, (i, number) in enumerate(zip(entries, coefficient.expand(1, reader.cells)[0].tolist(), strict=True)):
            if i >= 0 and number != 0:
                reader.put(0, s, p, name, i, number * float(over))
                if s == 0:
                    reader.put(0, TAKEN_OFF, p, name, i, number * float(over))
        return
    for p, i in enumerate(entries):
        row = coefficient[:, min(p, coefficient.shape[1] - 1)]
        if i >= 0 and bool((row != 0).any()):
            _at_atom(reader, s, p, name, i, row * over)


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
    coefficients: dict[tuple[int, int, int, str, int], float] = {}
    for (v, j, p, name, i), number in reader.found.items():
        own = [(j, number)] if j >= 0 else [(k, -number) for k in range(1, count)]
        for k, part in own:
            key = (v, k, p, name, i)
            coefficients[key] = coefficients.get(key, 0.0) + part
    largest = max((abs(x) for x in coefficients.values()), default=0.0)
    coefficients = {k: x for k, x in coefficients.items() if abs(x) > 1e-13 * largest}
    meets = {key[0] for key in coefficients if key[1] > 0} | {key[0] for key in values if key[1] > 0}
    if latent:
        meets.add(0)  # the mean of a latent's value is taken around a constant
    used = meets | {key[0] for key in coefficients}
    shared, alone = sorted(meets), sorted(used - meets)
    place = {(v, j): shared.index(v) * count + j for v in shared for j in range(count)}
    place |= {(v, 0): len(shared) * count + i for i, v in enumerate(alone)}
    regressors = len(shared) * count + len(alone)
    base, value = (torch.zeros(regressors, size, dtype=torch.float64) for _ in range(2))
    for (v, j, p), number in values.items():
        value[place[v, j], p] += number
    by_name: dict[str, list[tuple[int, int, int, float]]] = {}
    for (v, j, p, name, i), number in coefficients.items():
        if i == CONSTANT:
            base[place[v, j], p] -= number
        else:
            by_name.setdefault(name, []).append((place[v, j], p, i, -number))
    entries = []
    for name, found in by_name.items():
        row, cell, index, coefficient = zip(*found, strict=True)
        numbers = torch.tensor(coefficient, dtype=torch.float64)
        entries.append(Entries(name, torch.tensor(row), torch.tensor(cell), torch.tensor(index), numbers))
    empty = torch.zeros(reader.num_rows, 0, dtype=torch.float64)
    columns = [torch.stack([reader.features[v] for v in own], -1) if own else empty for own in (shared, alone)]
    return Form(
        columns[0], columns[1], count, base + value, value, tuple(entries), place.get((0, 0)) if latent else None
    )
