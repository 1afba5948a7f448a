"""Exact integration of Gaussian latents that enter normal sites through affine locations.

With whitened residuals w(z) = w + T z (residuals.py) the log joint is -½|w(z)|² + c, quadratic in z, so

    J = TᵀT,   h = -Tᵀw,   z|x ~ N(J⁻¹h, J⁻¹),   log Z = c - ½|w(m)|² - ½ log|J| + (D/2) log 2π,   m = J⁻¹h.

Written at the mean m nothing cancels; one step of refinement there mends the rounding of the first solve. The
blocks of J come from what rows read (columns.py, assembly.py). Each E-step is certified at a random point: the
residuals there must be those predicted. Source: Rasmussen and Williams (2006), eq. A.7; Bates et al. (2015).

Atoms: k + n_B + 1 points of a simplex (blocks.py) have the posterior's mean and covariance for every element
together with B, which is all that a row reads. Elements of A share them, as elements of a plate share states.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em import settings
from pyro_em.device import seeded_normal
from pyro_em.errors import NonFiniteError, Refusal, ResourceError
from pyro_em.evidence.assembly import Geometry, Reading, Rows, assemble, gradient, to_elements
from pyro_em.evidence.blocks import factor, least_pivot, simplex
from pyro_em.evidence.columns import Column, Index, Tangents, direction, push
from pyro_em.evidence.elimination import Atoms, Eliminated, LatentSet, RunAt, Values
from pyro_em.evidence.gaussian_posterior import GaussianPosterior
from pyro_em.evidence.normal_sites import AFFINE, AFFINE_SINGLE, Parts, deviates, not_affine
from pyro_em.evidence.residuals import whitened
from pyro_em.evidence.shared_plates import entries_over, over
from pyro_em.model.compat import detached, pack, with_dims

LOG_2PI = math.log(2 * math.pi)
UNDETERMINED = 1e-12  # least share of a precision that is told from rounding


@dataclass(frozen=True)
class GaussianRoute:
    """The route of one set, made by `recognise_gaussian`. `symbols` names the dims of the layout.

    With `few` it gives two atoms that have no moments of the posterior: all of them would make large tables of a
    model's sites, and compiled engines need none. `whole` is the route that gives all.
    """

    latents: LatentSet
    geometry: Geometry
    readings: tuple[Reading, ...]
    symbols: Mapping[int, str]
    plates: frozenset[str]
    reason: str
    cost: str
    dtypes: Mapping[str, torch.dtype]
    few: bool = False
    flat: tuple[str, ...] = ()  # latents with a flat prior, which the data have to determine
    shared: tuple[int, ...] = ()  # with effects of several plates, dims of those that all sites share
    at_start: Values = field(default_factory=dict, repr=False, compare=False)  # the first atoms
    name: str = "Gaussian"

    def eliminate(self, run_at: RunAt, *, differentiable: bool = False) -> Eliminated:
        """See the module docstring.

        :raises Refusal: if a residual is not affine at the values at hand.
        :raises NonFiniteError: if the precision is not positive definite.
        """
        with torch.enable_grad():
            rows = self._rows(run_at, differentiable)
        return self.certified(run_at, rows)

    def certified(self, run_at: RunAt, rows: Sequence[Rows]) -> Eliminated:
        """What `eliminate` gives, of these rows."""
        geometry = self.geometry
        system = assemble(rows, geometry)
        factored = factor(system)
        if self.flat and (factored is None or least_pivot(system, factored) < UNDETERMINED):
            raise undetermined(self.flat[0])
        if factored is None:
            raise NonFiniteError(
                self.latents.names[0],
                f"Site '{self.latents.names[0]}': the posterior precision of the Gaussian latents is not positive "
                "definite. A scale has become infinite or 0, or the data are not finite.",
            )
        z_a, z_b = factored.solve(system.linear, system.linear_b)
        residuals = [r.at(z_a, z_b, geometry) for r in rows]
        h, h_b = gradient(rows, residuals, geometry)
        d_a, d_b = factored.solve(h, h_b)
        gain = 0.5 * (h * d_a).sum(-1)
        own, _ = factored.log_det()
        two_pi = 0.5 * len(geometry.columns_a) * LOG_2PI
        unsure = 0.5 * factored.rounding(system.precision)
        energy, size = gain - 0.5 * own + two_pi, gain.abs() + 0.5 * own.abs() + two_pi + unsure
        squares = [0.5 * (w * w).sum(-1) for w in residuals]
        terms = [r.log_norm - square for r, square in zip(rows, squares, strict=True)]
        sizes = [r.log_norm.abs() + square for r, square in zip(rows, squares, strict=True)]
        z_a = z_a + d_a
        if geometry.num_b:
            assert h_b is not None and d_b is not None and z_b is not None
            log_roots = factored.lower_b.diagonal().log()  # type: ignore[union-attr]
            gains, half = 0.5 * h_b * d_b, 0.5 * LOG_2PI
            log_evidence = self._in_all(rows, terms, energy, gains - log_roots + half)
            magnitude = self._in_all(rows, sizes, size, gains.abs() + log_roots.abs() + half)
            z_b = z_b + d_b
        else:
            for r, term, own in zip(rows, terms, sizes, strict=True):
                energy = energy + to_elements(term, 0, r, geometry)
                size = size + to_elements(own, 0, r, geometry)
            log_evidence, magnitude = self._packed(energy), self._packed(size)
        self._certify(run_at, rows, z_a.detach(), None if z_b is None else z_b.detach())
        posterior = GaussianPosterior(self.latents, geometry, factored, z_a, z_b)
        made, peak = (lambda: self._atoms(posterior)), (lambda: self._packed(posterior.log_peak()))
        return Eliminated(log_evidence, posterior, made, peak, magnitude=detached(magnitude))

    def _atoms(self, posterior: GaussianPosterior) -> Atoms:
        size = len(self.geometry.columns_a) + self.geometry.num_b
        points = simplex(1).expand(2, size) if self.few else simplex(size)
        values = posterior.values(*posterior.deviate(points))
        num = len(points)
        weights = with_dims(torch.full((num,), 1.0 / num, dtype=torch.float64), self.latents.symbol)
        return Atoms({name: value.to(self.dtypes[name]).detach() for name, value in values.items()}, weights)

    def _in_all(self, rows: Sequence[Rows], terms: Sequence[Tensor], per_element: Tensor, entries: Tensor) -> Tensor:
        """What the rows, the elements of A and the entries of B add up to, for each element of shared plates."""
        geometry, shared = self.geometry, self.shared
        if not shared:
            return with_dims(_total(rows, terms, per_element, geometry) + entries.sum(), "")
        total = over(per_element, geometry.layout, shared) + entries_over(entries, self.latents, geometry, shared)
        for r, term in zip(rows, terms, strict=True):
            total = total + over(term, r.sizes, shared)
        return pack(total, self.symbols)

    def whole(self, cells: int) -> GaussianRoute:
        """The route that gives all atoms.

        :param cells: of the largest site at one atom.
        :raises ResourceError: if its tables would be too large.
        """
        check_memory(self.geometry, self.latents.names, cells)
        return dataclasses.replace(self, few=False)

    def _packed(self, per_element: Tensor) -> Tensor:
        """A quantity of every element in the layout, packed (summed if elements are not told apart)."""
        m = len(self.geometry.layout)
        if per_element.dim() == 0:
            return with_dims(per_element, "")
        full = per_element.expand(*per_element.shape[: per_element.dim() - m], *self.geometry.layout)
        return pack(full if self.plates else full.sum(tuple(range(-m, 0)), keepdim=True), self.symbols)

    def known_rows(self, parts: Parts, tangents: Tangents, values: Values) -> list[Rows]:
        """Rows from residuals at some values of the latents, and their tangents along the columns there."""
        z_a, z_b = GaussianPosterior.unknowns(self.latents, self.geometry, values)
        rows = self._made(parts, tangents, False)
        b = None if z_b is None else -z_b
        return [dataclasses.replace(r, w=r.at(-z_a, b, self.geometry)) for r in rows]

    def certify(self, rows: Sequence[Rows], parts: Parts, values: Values) -> None:
        """Refuse unless residuals at other values are those that the rows predict: that is what all columns, and what
        is said of the elements that rows read, have to give."""
        z_a, z_b = GaussianPosterior.unknowns(self.latents, self.geometry, values)
        for r, (w, _) in zip(rows, parts, strict=True):
            found, predicted = _padded(w.detach(), 1, len(self.geometry.layout)), r.at(z_a, z_b, self.geometry)
            if deviates(found, predicted, float((predicted - r.w).abs().max()) if r.w.numel() else 0.0, self._single):
                raise not_affine(r.reading.site, r.reading.columns[0].site)

    @property
    def _single(self) -> bool:
        return any(t == torch.float32 for t in self.dtypes.values())

    def _rows(self, run_at: RunAt, differentiable: bool) -> list[Rows]:
        shapes = self.latents.shapes
        leaves = {
            n: torch.zeros((*shapes[n][0], *shapes[n][1]), dtype=self.dtypes[n], requires_grad=True)
            for n in self.latents.names
        }
        run = run_at(leaves)
        parts = [whitened(run.sites[r.site]) for r in self.readings]
        outputs = [w for w, _ in parts]
        columns = list(dict.fromkeys(c for r in self.readings for c in r.columns))
        ways = {
            c: direction(c, shapes[c.site], torch.ones(shapes[c.site][0].numel(), dtype=torch.float64)) for c in columns
        }
        pushed: dict[Column, list[Tensor]] = {}
        for name in self.latents.names:
            own = [c for c in columns if c.site == name]
            found = push(outputs, leaves[name], [ways[c] for c in own], graph=differentiable)
            pushed.update(zip(own, found, strict=True))
        return self._made(parts, pushed, differentiable)

    def _made(self, parts: Parts, pushed: Tangents, differentiable: bool) -> list[Rows]:
        """Rows whose residuals are not yet those at z = 0, if the parts are not."""
        rows, m = [], len(self.geometry.layout)
        for i, reading in enumerate(self.readings):
            w, log_norm = (x if differentiable else x.detach() for x in parts[i])
            own_ways = [pushed[c][i] for c in reading.columns]  # none where all cells are missing
            tangents = torch.stack(own_ways, -1) if own_ways else w.new_zeros(*w.shape, 0)
            w, tangents, log_norm = _padded(w, 1, m), _padded(tangents, 2, m), _padded(log_norm, 0, m)
            sizes = tuple(int(x) for x in w.shape[w.dim() - 1 - m : -1])
            tangents = tangents if differentiable else _collapsed(tangents, m)
            rows.append(Rows(reading, w, tangents, log_norm, sizes))
        return rows

    def _certify(self, run_at: RunAt, rows: Sequence[Rows], z_a: Tensor, z_b: Tensor | None) -> None:
        """Residuals at a random point must be those that the tangents predict."""
        generator = torch.Generator().manual_seed(2)
        m, lead = len(self.geometry.layout), tuple(range(z_a.dim() - 1 - len(self.geometry.layout)))
        a = z_a.mean(lead) if lead else z_a
        a = a + 2 * (1 + a.abs()) * seeded_normal(a.shape, generator)
        b = z_b
        if b is not None:
            b = b + 2 * (1 + b.abs()) * seeded_normal(b.shape, generator)
        values = self._drawn(a, b)
        with torch.no_grad():
            run = run_at(values)
            for r in rows:
                site = run.sites[r.reading.site]
                found, _ = whitened(site)
                found = _padded(found, 1, m)
                predicted = r.at(a, b, self.geometry).detach()
                scale = 1 + found.abs().max() + r.w.detach().abs().max()
                bound = (AFFINE_SINGLE if self._single else AFFINE) * scale
                deviation = (found - predicted).abs().max()
                if not bool(deviation.isfinite()):  # what has overflowed says nothing of the model's form
                    raise NonFiniteError(
                        r.reading.site,
                        f"Site '{r.reading.site}': its residuals are not finite at the posterior of the latents. A "
                        "scale has become infinite or 0, or the data are not finite.",
                    )
                if bool(deviation > bound):
                    raise not_affine(r.reading.site, r.reading.columns[0].site)

    def _drawn(self, a: Tensor, b: Tensor | None) -> Values:
        values = GaussianPosterior.place(self.latents, self.geometry, a, b)
        return {n: v.reshape((*self.latents.shapes[n][0], *self.latents.shapes[n][1])).to(self.dtypes[n])
                for n, v in values.items()}  # fmt: skip


def undetermined(site: str) -> Refusal:
    """The refusal of a flat latent that the data say nothing of."""
    return Refusal(
        site,
        "its prior is flat (improper), and the data do not determine it given the other latents: there is no "
        "likelihood.",
        "give it a proper prior, or leave out what the data do not tell apart.",
    )


def _total(rows: Sequence[Rows], terms: Sequence[Tensor], per_element: Tensor, geometry: Geometry) -> Tensor:
    """Sum of the terms of all rows and of all elements."""
    total = per_element.expand(geometry.layout).sum()
    for r, term in zip(rows, terms, strict=True):
        total = total + term.sum() * (torch.Size(r.sizes).numel() // max(1, term.numel()))
    return total


def _padded(x: Tensor, trailing: int, m: int) -> Tensor:
    """At least m dims before the trailing ones."""
    missing = m - (x.dim() - trailing)
    return x.reshape((1,) * missing + tuple(x.shape)) if missing > 0 else x


def _collapsed(tangents: Tensor, m: int) -> Tensor:
    """Size 1 along plate dims where the tangents are constant: then so is the covariance."""
    for d in range(-m - 2, -2):
        if tangents.shape[d] > 1:
            first = tangents.narrow(d, 0, 1)
            if torch.equal(first.expand_as(tangents), tangents):
                tangents = first
    return tangents


def check_memory(geometry: Geometry, names: Sequence[str], cells: int) -> int:
    """Bytes of the largest table: of the system, or of the `cells` of a site at all atoms, which the M-step sees.

    :raises ResourceError: if they exceed `settings.max_table_bytes`.
    """
    k, n_b = len(geometry.columns_a), geometry.num_b
    needed = 8 * max(geometry.elements * k * max(k, n_b), n_b * n_b, (k + n_b + 1) * cells if n_b else 0)
    if needed > settings.max_table_bytes:
        raise ResourceError(
            f"Integrating the Gaussian latents {', '.join(map(repr, names))} needs a table of {needed / 2**20:.0f} MiB "
            f"({geometry.elements} elements x {k} columns, {n_b} common entries, {cells} cells of data), more than the "
            f"limit of {settings.max_table_bytes / 2**20:.0f} MiB. Use fewer crossing groups, or raise "
            "pyro_em.settings.max_table_bytes."
        )
    return needed


__all__ = ["GaussianRoute", "Index", "check_memory"]
