"""Locations of sites with latents inside: transition and observation matrices, offsets, initial means.

As functions of all their entries these are quadratic in Q (families/linear_gaussian.py), and a matrix couples with
the offset beside it. With every argument affine in the parameters of the block, x = x₀ + G θ,

    h·x − ½ xᵀΛx   becomes   (Gᵀh)·θ − ½ θᵀ(GᵀΛG)θ

around the current values, so that one linear solve is the joint argmax, whatever the structure: fixed, tied or
scaled entries, companion rows, several parameters in one matrix, controls (an offset that is covariates times
coefficients). Normal priors on the parameters add their own Λ.

Not handled, but maximised numerically: constrained parameters, and parameters that also enter elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.charts import base_constraint
from pyro_em.families import LOCATIONS, Family
from pyro_em.kernels import QuadraticKernel
from pyro_em.m_step.location import terms_of
from pyro_em.m_step.unit import begins_of
from pyro_em.model.trace import SiteRecord
from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

MAX_SIZE = 1500  # entries of a block; its matrix has the square
Uses = Mapping[str, tuple[Use, ...]]


@dataclass(frozen=True)
class _Entries:
    """Term c·θ[i] of one argument: numbers of the block's entries (the block's size for none) and coefficients.

    Shapes U + (k,), the entries of a matrix argument in a row.
    """

    index: Tensor
    coefficient: Tensor


@dataclass(frozen=True)
class States:
    """A block; made by `state_blocks`. `starts` says where each parameter begins in the flattened block."""

    problem: Problem
    names: tuple[str, ...]
    uses: Uses
    starts: Mapping[str, int]
    size: int
    sites: Mapping[str, Mapping[str, tuple[_Entries, ...]]]  # terms by site and slot

    def rule(self) -> str:
        """What `plan()` prints."""
        slots = dict.fromkeys(slot for own in self.sites.values() for slot in own)
        return f"linear solve ({', '.join(slots)})"

    def slope(self, params: Params, sufficient: Sufficient) -> Tensor:
        """max|∂Q/∂θ|, ()."""
        return self._quadratic(params, sufficient).linear.abs().amax()

    def update(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """All parameters of the block at the argmax of Q."""
        kernel = self._quadratic(params, sufficient)
        best = kernel.argmax()
        step = best - kernel.origin
        moved, empty = dict(params), set()
        for name in self.names:
            own = slice(self.starts[name], self.starts[name] + params[name].numel())
            moved[name] = best[own].reshape(params[name].shape).to(params[name].dtype)
            if bool((kernel.precision[own].diagonal(self.starts[name]) == 0).any()):
                empty.add(name)
            priors = tuple(use for use in self.uses[name] if use.slot == VALUE)
            sufficient.put(moved[name], priors)
        wide = torch.cat([step, step.new_zeros(1)])
        for site, slots in self.sites.items():
            arguments = sufficient.arguments[site]
            for slot, terms in slots.items():
                change = sum((t.coefficient * wide[t.index] for t in terms), torch.zeros(()))
                arguments[slot] = arguments[slot] + change.reshape(arguments[slot].shape)
            sufficient.touch(site)
        return moved, empty

    def _quadratic(self, params: Params, sufficient: Sufficient) -> QuadraticKernel:
        """Q around the current values, over all entries; what was made for the score serves the update."""
        uses = tuple(use for name in self.names for use in self.uses[name])
        return sufficient.once(self.names, uses, lambda: self._summed(params, sufficient))

    def _summed(self, params: Params, sufficient: Sufficient) -> QuadraticKernel:
        size = self.size + 1  # the last place takes what is fixed
        h = torch.zeros(size, dtype=torch.float64)
        square = torch.zeros(size * size, dtype=torch.float64)

        def add(block: Tensor, rows: _Entries, columns: _Entries) -> None:
            block = block * rows.coefficient.unsqueeze(-1) * columns.coefficient.unsqueeze(-2)
            places = rows.index.unsqueeze(-1) * size + columns.index.unsqueeze(-2)
            shape = torch.broadcast_shapes(places.shape, block.shape)
            square.index_add_(0, places.expand(shape).reshape(-1), block.expand(shape).reshape(-1))

        for site, slots in self.sites.items():
            record = sufficient.sites[site]
            family, moments = record.family, sufficient.moments(site).moments
            assert family is not None
            arguments = {**record.constants, **sufficient.arguments[site]}
            for slot, terms in slots.items():
                kernel = family.kernel(slot, moments, arguments)
                assert isinstance(kernel, QuadraticKernel)
                for term in terms:
                    linear = kernel.linear * term.coefficient
                    shape = torch.broadcast_shapes(linear.shape, term.index.shape)
                    h.index_add_(0, term.index.expand(shape).reshape(-1), linear.expand(shape).reshape(-1))
                for other, columns in slots.items():
                    if other != slot and not family.couples(slot, other):
                        continue
                    block = kernel.precision
                    if other != slot:
                        block = family.cross_precision(slot, other, moments, arguments)
                    for row in terms:
                        for column in columns:
                            add(block, row, column)
        for name in self.names:
            for use in self.uses[name]:
                if use.slot == VALUE:
                    self._add_prior(name, params[name].detach().double(), sufficient, h, add)
        theta = torch.cat([params[name].detach().double().reshape(-1) for name in self.names])
        matrix = square.reshape(size, size)[: self.size, : self.size]
        return QuadraticKernel(h[: self.size], matrix, theta, vector=True)

    def _add_prior(self, name: str, theta: Tensor, sufficient: Sufficient, h: Tensor, add: object) -> None:
        kernel = _prior(sufficient.sites[name])
        assert kernel is not None and callable(add)
        own = kernel.rebase(theta)
        places = torch.arange(theta.numel()).reshape(theta.shape) + self.starts[name]
        h.index_add_(0, places.reshape(-1), own.linear.expand(theta.shape).reshape(-1))
        precision = own.precision
        if not own.vector:
            precision, places = own.precision.expand(theta.shape)[..., None, None], places.unsqueeze(-1)
        entries = _Entries(places, torch.ones(places.shape, dtype=torch.float64))
        add(precision, entries, entries)


def state_blocks(problem: Problem, sites: Mapping[str, SiteRecord], uses: Uses) -> list[States]:
    """Blocks among some parameters, those of one coupled location together.

    :param uses: of the parameters that may take part, as they count in Q.
    """
    names = [name for name, own in uses.items() if _takes_part(name, own, problem, sites)]
    blocks: list[set[str]] = []
    for name in names:
        near = [b for b in blocks if any(_couple(u, v, sites) for u in uses[name] for o in b for v in uses[o])]
        blocks = [*(b for b in blocks if b not in near), {name}.union(*near)]
    found = [_block(problem, sites, tuple(n for n in names if n in block), uses) for block in blocks]
    return [block for block in found if block.size <= MAX_SIZE]


def _takes_part(name: str, uses: tuple[Use, ...], problem: Problem, sites: Mapping[str, SiteRecord]) -> bool:
    constraint = base_constraint(problem.parameters[name].constraint)
    inside = any(use.slot != VALUE for use in uses)
    return inside and constraint is constraints.real and all(_is_location(use, sites[use.site]) for use in uses)


def _is_location(use: Use, site: SiteRecord) -> bool:
    if use.slot == VALUE:
        return use.index is not None and _prior(site) is not None
    if site.family is None or not site.family.integrates or use.slot not in LOCATIONS:
        return False
    if use.predictor is not None:
        return use.predictor.linear
    return use.index is not None and use.power == 1 and not use.exponential


def _prior(site: SiteRecord) -> QuadraticKernel | None:
    if site.family is None or site.arguments is None:
        return None
    kernel = site.family.value_kernel({**site.constants, **site.arguments})
    return kernel if isinstance(kernel, QuadraticKernel) else None


def _couple(one: Use, other: Use, sites: Mapping[str, SiteRecord]) -> bool:
    family: Family | None = sites[one.site].family
    if VALUE in (one.slot, other.slot) or one.site != other.site or family is None:
        return False
    return family.couples(one.slot, other.slot)


def _block(problem: Problem, sites: Mapping[str, SiteRecord], names: tuple[str, ...], uses: Uses) -> States:
    starts, size = begins_of(names, problem.start)
    found: dict[str, dict[str, tuple[_Entries, ...]]] = {}
    for name in names:
        for use in uses[name]:
            if use.slot == VALUE:
                continue
            site = sites[use.site]
            assert site.family is not None and site.arguments is not None
            argument, events = site.arguments[use.slot], site.family.arguments[use.slot]
            entries = []
            for term in terms_of([use]):
                index = torch.where(term.index < 0, size, term.index + starts[name]).expand(argument.shape)
                coefficient = term.coefficient.double().expand(argument.shape)
                entries.append(_Entries(index.flatten(-events), coefficient.flatten(-events)))
            at = found.setdefault(use.site, {})
            at[use.slot] = (*at.get(use.slot, ()), *entries)
    return States(problem, names, {n: uses[n] for n in names}, starts, size, found)
