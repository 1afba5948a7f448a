"""Affine locations: all parameters of a coupled block by one linear solve.

For a block θ = (intercepts, slopes, ...) whose members enter normal locations affinely (model/affine.py), Q is
quadratic: with g = ∂Q/∂θ and Λ = −∂²Q/∂θ², summed over sites and normal priors, the argmax is θ + Λ⁻¹g. Given
the scales that is exact whatever their structure; scales follow at the new residuals (location.py). Intercept and
slopes are different parameters of one block, so that no rounds of conditional updates are needed between them.

If the design is rank deficient (collinear covariates, an empty component), the step is the one of least length,
and directions without information stay where they are.

Positive parameters that multiply a latent (tau * e[g]) take part; a step that would leave their space is cut.

Not handled: other constrained parameters (a solve would leave their space), parameters that also enter elsewhere (a
scale, another family); these are maximised numerically.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.charts import base_constraint
from pyro_em.design import Design
from pyro_em.kernels import QuadraticKernel
from pyro_em.kernels.quadratic import null_directions, well_conditioned
from pyro_em.m_step.location import Location, LocationSite, full_cells, other_cells, terms_of, total_moments
from pyro_em.m_step.moving import designs_at, run_at_atoms
from pyro_em.m_step.parts import cells_of, parts_of
from pyro_em.m_step.positive import in_logarithms, inside, is_positive_slope
from pyro_em.m_step.unit import begins_of, connected, weight_of
from pyro_em.model.predictor import at_entry
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

MAX_SIZE = 4000  # entries of a block; its matrix has the square


def is_linear(name: str, uses: Sequence[Use], problem: Problem, sites: Mapping[str, SiteRecord]) -> bool:
    """Whether Q is quadratic in this parameter, jointly with others of its kind."""
    if not all(_is_location(use, sites[use.site]) for use in uses):
        return False
    constraint = base_constraint(problem.parameters[name].constraint)
    return constraint is constraints.real or is_positive_slope(constraint, uses)


def _is_location(use: Use, site: SiteRecord) -> bool:
    family = site.family
    if family is None or site.arguments is None:
        return False
    everything = {**site.constants, **site.arguments}
    if use.slot == VALUE:
        return use.index is not None and isinstance(family.value_kernel(everything), QuadraticKernel)
    if use.slot != "loc" or use.slot not in family.closed or not family.centered:
        return False
    if use.predictor is not None:
        return use.predictor.linear
    return use.index is not None and use.power == 1 and not use.exponential


@dataclass(frozen=True)
class Linear:
    """A block; made by `linear_blocks`. `starts` says where each parameter begins in the flattened block."""

    problem: Problem
    names: tuple[str, ...]
    uses: Mapping[str, tuple[Use, ...]]
    starts: Mapping[str, int]
    size: int
    sites: tuple[str, ...]
    site_of: Callable[[str], LocationSite] = field(repr=False, compare=False)  # made where the engine opens none itself
    plans: dict[str, list[Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def gradient(self, params: Params, sufficient: Sufficient) -> Tensor:
        """∂Q/∂θ, (P,)."""
        first, *others = (location.gradient() for location in self._locations(params, sufficient))
        priors = self._priors(sufficient)
        total = sum(others, first.clone() if priors and not others else first)
        for name, kernel in priors:
            theta = params[name].detach().double()
            total[self._slice(name, theta)] += kernel.gradient(theta).expand(theta.shape).reshape(-1)
        return total

    def slope(self, params: Params, sufficient: Sufficient) -> Tensor:
        """max|∂Q/∂u|, ()."""
        return in_logarithms(self.gradient(params, sufficient), self._positive(params)).abs().amax()

    def _positive(self, params: Params) -> dict[int, Tensor]:
        """Parameters that must stay above 0, by their places."""
        return {self.starts[n]: params[n].detach().double().reshape(-1) for n in self._bounded}

    @cached_property
    def _bounded(self) -> list[str]:
        records = self.problem.parameters
        return [n for n in self.names if base_constraint(records[n].constraint) is not constraints.real]

    def precision(self, params: Params, sufficient: Sufficient) -> Tensor:
        """Λ = −∂²Q/∂θ², (P, P)."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64)
        for location in self._locations(params, sufficient):
            total += location.precision()
        for name, kernel in self._priors(sufficient):
            part = self._slice(name, params[name])
            total[part, part] += prior_precision(kernel, params[name])
        return (total + total.mT) / 2

    def update(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """θ + Λ⁻¹g."""
        gradient = self.gradient(params, sufficient)
        step, empty = torch.zeros_like(gradient), set()
        parts = self._parts(sufficient)
        for part, own in zip(parts, self._blocks(parts, params, sufficient), strict=True):
            kernel = QuadraticKernel(gradient[part], own, vector=True)
            step = step.index_add(0, part.reshape(-1), kernel.argmax().reshape(-1))
            if not kernel.is_conditioned:
                empty |= self._unidentified(own, part)
        return self._moved(params, inside(step, self._positive(params)), sufficient), empty

    def rule(self, name: str, run: Run, open_ended: set[str]) -> str:
        """What the plan says of a member; `open_ended` are those that the design cannot tell apart."""
        labels = []
        for use in self.uses[name]:
            family = run.sites[use.site].family.name  # type: ignore[union-attr]
            labels.append(f"prior {family}" if use.slot == VALUE else f"{family}.{use.slot}")
        others = [f"'{n}'" for n in self.names if n != name]
        text = f"linear solve ({', '.join(dict.fromkeys(labels))})"
        text += f", jointly with {', '.join(others)}" if others else ""
        return text + ("; the design is collinear: step of least length" if name in open_ended else "")

    def unidentified(self, params: Params, sufficient: Sufficient) -> set[str]:
        """Parameters that take part in a direction without information."""
        self._locations(params, sufficient)
        parts = self._parts(sufficient)
        blocks = self._blocks(parts, params, sufficient)
        return set().union(*(self._unidentified(own, part) for own, part in zip(blocks, parts, strict=True)))

    def _unidentified(self, precision: Tensor, part: Tensor) -> set[str]:
        """Of blocks (B, n, n) on the diagonal of Λ; `part` (B, n) are their entries."""
        if well_conditioned(precision):
            return set()
        touched = torch.zeros(self.size, dtype=torch.bool)
        for own, index in zip(precision, part, strict=True):
            null = null_directions(own)
            if null.shape[1]:
                touched[index] = (null / null.abs().amax(0)).abs().amax(1) > 1e-6
        return {n for n in self.names if bool(touched[self._slice(n, self.problem.parameters[n].value)].any())}

    def _parts(self, sufficient: Sufficient) -> list[Tensor]:
        """Entries that the data couple, as blocks of equal size (B, n): one block where an engine does not say."""
        if "parts" not in self.plans:
            couplings = [sufficient.locations[name].coupling() for name in self.sites]
            priors = any(kernel.vector for _, kernel in self._priors(sufficient))
            if priors or any(coupling is None for coupling in couplings):
                return [torch.arange(self.size).unsqueeze(0)]
            self.plans["parts"] = parts_of(torch.cat([c for c in couplings if c is not None], -1), self.size)
        return self.plans["parts"]

    def _blocks(self, parts: list[Tensor], params: Params, sufficient: Sufficient) -> list[Tensor]:
        """Λ of every block (B, n, n): nothing of the size of Λ where the data say what they couple."""
        locations = self._locations(params, sufficient)
        if "parts" not in self.plans or any(location.coupling() is None for location in locations):
            precision = self.precision(params, sufficient)
            return [precision[part.unsqueeze(-1), part.unsqueeze(-2)] for part in parts]
        if "cells" not in self.plans:
            self.plans["cells"] = cells_of(parts, self.size)
        rows, columns = self.plans["cells"]
        sizes = [part.shape[0] * part.shape[1] ** 2 for part in parts]
        first, *others = (location.coupled(rows, columns, sum(sizes)) for location in locations)
        flat = sum(others, first)
        for name, kernel in self._priors(sufficient):
            own = self._slice(name, params[name])
            diagonal = kernel.precision.expand(params[name].shape).reshape(-1)
            flat = flat.index_add(0, rows[own] + columns[own], diagonal)
        pieces = zip(flat.split(sizes), parts, strict=True)
        blocks = [piece.reshape(*part.shape, part.shape[1]) for piece, part in pieces]
        return [(block + block.mT) / 2 for block in blocks]

    def _slice(self, name: str, theta: Tensor) -> slice:
        return slice(self.starts[name], self.starts[name] + theta.numel())

    def _locations(self, params: Params, sufficient: Sufficient) -> list[Location]:
        """Opened at the first question after an E-step."""
        for name in self.sites:
            if name in sufficient.locations:
                continue
            opened = None if sufficient.opens is None else sufficient.opens(name, self.starts, self.size)
            if opened is None:
                own, weight = self.site_of(name), weight_of(self.problem, name, sufficient)
                designs = self._designs_at(own, params, sufficient) if own.moving else own.designs
                opened = dataclasses.replace(own, designs=designs).open(weight, sufficient, self.size)
            sufficient.locations[name] = opened
        return [sufficient.locations[name] for name in self.sites]

    def _designs_at(self, own: LocationSite, params: Params, sufficient: Sufficient) -> tuple[Design, ...]:
        """Designs whose coefficients are values of continuous latents: at the atoms of this E-step."""
        run = run_at_atoms(self.names, params, sufficient)
        reached = [n for n in self.names if any(use.site == own.name and use.slot != VALUE for use in self.uses[n])]
        cells = full_cells(run.sites[own.name])
        return designs_at(run, own.name, own.slot, reached, self.starts, self.size, cells, vector=own.vector)

    def _priors(self, sufficient: Sufficient) -> list[tuple[str, QuadraticKernel]]:
        found = []
        for name, uses in self.uses.items():
            for use in uses:
                if use.slot == VALUE:
                    site = sufficient.sites[use.site]
                    assert site.family is not None
                    kernel = site.family.value_kernel({**site.constants, **sufficient.arguments[use.site]})
                    assert isinstance(kernel, QuadraticKernel)
                    found.append((name, kernel))
        return found

    def _moved(self, params: Params, step: Tensor, sufficient: Sufficient) -> Params:
        moved = dict(params)
        for name, uses in self.uses.items():
            theta = params[name]
            change = step[self._slice(name, theta)].reshape(theta.shape)
            moved[name] = (theta.detach().double() + change).to(theta.dtype)
            sufficient.put(moved[name], tuple(use for use in uses if use.slot == VALUE))
        for name in self.sites:
            location = sufficient.locations[name]
            location.move(location.delta + step)
        return moved


def prior_precision(kernel: QuadraticKernel, theta: Tensor) -> Tensor:
    """Λ of a normal prior over the entries of θ."""
    if not kernel.vector:
        return torch.diag(kernel.precision.expand(theta.shape).reshape(-1))
    width = theta.shape[-1]
    blocks = kernel.precision.expand(*theta.shape[:-1], width, width).reshape(-1, width, width)
    return torch.block_diag(*blocks)


def linear_blocks(problem: Problem, run: Run, uses: Mapping[str, tuple[Use, ...]]) -> list[Linear]:
    """Blocks among some parameters: those that share a location are solved together, if some argument mixes entries.

    :param uses: of the parameters that may take part, as they count in Q.
    """
    names = [n for n, own in uses.items() if is_linear(n, own, problem, run.sites)]
    sites = {n: {use.site for use in uses[n] if use.slot != VALUE} for n in names}
    blocks = connected(names, sites)
    mixed = [b for b in blocks if any(use.predictor is not None for name in b for use in uses[name])]
    found = [_block(problem, run, block, uses) for block in mixed]
    return [block for block in found if block is not None]


def _block(problem: Problem, run: Run, names: tuple[str, ...], uses: Mapping[str, tuple[Use, ...]]) -> Linear | None:
    starts, size = begins_of(names, problem.start)
    if size > MAX_SIZE:
        return None
    at: dict[str, list[Use]] = {}
    for name in names:
        for use in uses[name]:
            if use.slot != VALUE:
                at.setdefault(use.site, []).append(use)
    records = {site: run.sites[site] for site in at}

    @cache
    def site_of(name: str) -> LocationSite:
        return _location_site(records[name], at[name], starts, size, problem.uses)

    return Linear(problem, names, {n: uses[n] for n in names}, starts, size, tuple(at), site_of)


def _location_site(
    site: SiteRecord, own: Sequence[Use], starts: Mapping[str, int], size: int, uses: Mapping[str, tuple[Use, ...]]
) -> LocationSite:
    slot = own[0].slot
    assert site.family is not None
    vector = site.family.arguments[slot] == 1
    cells, terms = full_cells(site), terms_of(own)
    width = max(t.index.shape[-1] for t in terms) if vector else 1
    width = max(width, (site.arguments or {})[slot].shape[-1]) if vector else 1
    parts = [[at_entry(t, d) for t in terms] for d in range(width)] if vector else [terms]
    designs = tuple(Design(part, starts, size, cells) for part in parts)
    predictor = next((use.predictor for use in own if use.predictor is not None), None)
    fixed = None if predictor is None else predictor.fixed
    free = None if fixed is None else fixed.isnan().double()
    others = other_cells(site, slot, len(cells))
    varying = {d for design in designs for group in design.groups for d in group.dims}
    elsewhere = [u for u in _others_uses(site.name, slot, uses) if u.index is None]
    summed = not vector and not (others & varying) and not elsewhere
    moving = predictor is not None and predictor.moving
    kept = others if summed else None
    total = cache(partial(total_moments, site, vector))
    return LocationSite(site.name, slot, designs, vector, kept, free, total, moving)


def _others_uses(site: str, slot: str, uses: Mapping[str, tuple[Use, ...]]) -> list[Use]:
    return [use for own in uses.values() for use in own if use.site == site and use.slot != slot]
