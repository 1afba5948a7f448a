"""Sites behind linear predictors, as a Newton step sees them: Q, its gradient and curvature in a block θ.

Every argument that the block enters is a function of η = A θ (design.py), so that with Q's slopes s_a and curvatures
c_ab in the predictors of one site

    ∂Q/∂θ = Σ_a A_aᵀ s_a,        −∂²Q/∂θ² = Σ_ab A_aᵀ diag(c_ab) A_b

and a step costs one pass over the cells and Gram matrices, without running the model. One argument with a kernel works
on its compressed data (curves.py); several arguments of one site, and those without a kernel (concentrations, total
counts), on the family's log-density.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.design import Design
from pyro_em.families import SOFTMAX
from pyro_em.families.base import IDENTITY, NORMALISED
from pyro_em.m_step.curves import Curve, cellwise_derivatives, curve_of, rowwise_derivatives
from pyro_em.m_step.location import full_cells, terms_of
from pyro_em.m_step.moving import terms_of_run
from pyro_em.m_step.slot import Slot
from pyro_em.m_step.unit import weight_of
from pyro_em.model.density import clean_value
from pyro_em.model.predictor import Term
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.model.use import Use
from pyro_em.problem import Problem
from pyro_em.shapes import broadcast_shapes
from pyro_em.statistics import SiteMoments, argument_cells
from pyro_em.sufficient import Sufficient
from pyro_em.vector_design import Curvature, VectorDesign


@dataclass(frozen=True, eq=False)
class PredictorSite:
    """A site and those of its arguments that the block enters; `compressed` if one argument has a kernel.

    `unbounded` are arguments that a move may take out of their spaces: a rate a + b x, a scale without a constraint.
    """

    name: str
    slots: tuple[Slot, ...]
    compressed: bool
    unbounded: frozenset[str] = frozenset()

    @property
    def moving(self) -> bool:
        """Designs of it depend on continuous latents."""
        return any(slot.moving for slot in self.slots)

    def at(self, run: Run, starts: Mapping[str, int], size: int) -> PredictorSite:
        """The site with the designs of a run at the atoms (moving.py)."""
        slots = []
        for slot in self.slots:
            if slot.moving:
                assert slot.use.predictor is not None
                names = [name for name in slot.use.predictor.parameters if name in starts]
                terms, entries = terms_of_run(run, self.name, slot.name, names, slot.use.predictor.link)
                width = entries if slot.vector else None
                slot = dataclasses.replace(slot, design=_design(terms, starts, size, slot.design.cells, width))
            slots.append(slot)
        return dataclasses.replace(self, slots=tuple(slots))

    def open(self, problem: Problem, theta: Tensor, sufficient: Sufficient) -> OpenSite:
        """The site at the block's current place θ and the current other arguments."""
        site, arguments = sufficient.sites[self.name], sufficient.arguments[self.name]
        etas = [slot.eta(arguments[slot.name], theta) for slot in self.slots]
        if self.compressed:
            (slot,) = self.slots
            moments = sufficient.moments(self.name)
            # Those of residuals are sums over what tells locations apart only: each cell has to count once.
            rank = len(slot.design.cells)
            cells = torch.Size((*(1,) * (rank - len(moments.cells)), *moments.cells))
            slot = dataclasses.replace(slot, design=slot.design.over(cells))
            own = dataclasses.replace(self, slots=(slot,))
            return _Compressed(own, etas, site, _curve(slot, site, moments, arguments), arguments[slot.name])
        weight = weight_of(problem, self.name, sufficient)
        return _Whole(self, etas, site, dict(arguments), weight)


class OpenSite:
    """Q of one site as a function of a move δ of the block; what was found at the last δ is kept."""

    def __init__(self, own: PredictorSite, etas: Sequence[Tensor], site: SiteRecord) -> None:
        self.own, self.start, self.site, self.name = own, list(etas), site, own.name
        self._delta: Tensor | None = None
        self._etas: list[Tensor] = []
        self._found: tuple[list[Tensor], list[list[Curvature]]] | None = None
        self._gradient: Tensor | None = None

    def etas(self, delta: Tensor) -> list[Tensor]:
        """Predictors after a move."""
        if self._delta is None or not torch.equal(self._delta, delta):
            self._delta, self._found, self._gradient = delta.clone(), None, None
            moved = bool((delta != 0).any())
            pairs = zip(self.start, self.own.slots, strict=True)
            self._etas = [eta + slot.change(delta) if moved else eta for eta, slot in pairs]
        return self._etas

    def value(self, delta: Tensor) -> Tensor:
        """Q up to a constant, one term for each cell."""
        raise NotImplementedError

    def _cellwise(self, etas: list[Tensor]) -> tuple[list[Tensor], list[list[Curvature]]]:
        raise NotImplementedError

    def _bounded(self, value: Tensor, moved: Mapping[str, Tensor]) -> Tensor:
        """The value, NaN where an argument has left its space, so that no step ends there."""
        if not self.own.unbounded:
            return value
        family = self.site.family
        assert family is not None
        outside = family.outside({name: x for name, x in moved.items() if name in self.own.unbounded})
        return value if outside is None else torch.where(outside, torch.nan, value)

    def _derivatives(self, delta: Tensor) -> tuple[list[Tensor], list[list[Curvature]]]:
        etas = self.etas(delta)
        if self._found is None:
            self._found = self._cellwise(etas)
        return self._found

    def gradient(self, delta: Tensor) -> Tensor:
        """∂Q/∂θ (P,)."""
        slopes, _ = self._derivatives(delta)
        if self._gradient is None:
            self._gradient = torch.stack([s.pull(x) for s, x in zip(self.own.slots, slopes, strict=True)]).sum(0)
        return self._gradient

    def hessian(self, delta: Tensor) -> Tensor:
        """−∂²Q/∂θ² (P, P)."""
        slots = self.own.slots
        _, curvatures = self._derivatives(delta)
        size = slots[0].design.size
        hessian = torch.zeros(size, size, dtype=torch.float64)
        for i, slot in enumerate(slots):
            hessian += slot.gram(curvatures[i][i], slot)
            for j in range(i):
                cross = slot.gram(curvatures[i][j], slots[j])
                hessian += cross + cross.mT
        return hessian

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Change of the predictor of each argument."""
        return {slot.name: slot.change(delta) for slot in self.own.slots}

    def write(self, sufficient: Sufficient, delta: Tensor) -> None:
        """Put what the arguments are after the move into the statistics."""
        arguments = sufficient.arguments[self.name]
        for slot, eta in zip(self.own.slots, self.etas(delta), strict=True):
            if slot.use.predictor is not None:
                arguments[slot.name] = slot.forward(arguments[slot.name])(eta)
        sufficient.touch(self.name)


class _Compressed(OpenSite):
    """One argument, on its kernel's coefficients."""

    def __init__(
        self, own: PredictorSite, etas: Sequence[Tensor], site: SiteRecord, curve: Curve, argument: Tensor
    ) -> None:
        super().__init__(own, etas, site)
        self.curve, self.forward = curve, own.slots[0].forward(argument)
        self.cells = own.slots[0].design.cells

    def value(self, delta: Tensor) -> Tensor:
        (slot,) = self.own.slots
        (eta,) = self.etas(delta)
        value = self.curve.value(eta)
        if self.own.unbounded:
            value = self._bounded(value, {slot.name: self.forward(eta)})
        value = slot._reached(value)
        return value.expand(broadcast_shapes(value.shape, self.cells))

    def _cellwise(self, etas: list[Tensor]) -> tuple[list[Tensor], list[list[Curvature]]]:
        slope, curvature = self.curve.derivatives(etas[0])
        return [slope], [[curvature]]


class _Whole(OpenSite):
    """Any arguments, on the family's log-density at every cell of the data."""

    def __init__(
        self, own: PredictorSite, etas: Sequence[Tensor], site: SiteRecord, arguments: dict[str, Tensor], weight: Tensor
    ) -> None:
        super().__init__(own, etas, site)
        self.arguments = arguments
        self.cells = own.slots[0].design.cells
        self.weight = weight.expand(self.cells)
        self.data = clean_value(site)
        self.forwards = [slot.forward(arguments[slot.name]) for slot in own.slots]

    def _density(self, etas: list[Tensor]) -> Tensor:
        moved = {s.name: f(eta) for s, f, eta in zip(self.own.slots, self.forwards, etas, strict=True)}
        assert self.site.family is not None
        density = self.site.family.log_prob({**self.site.constants, **self.arguments, **moved}, self.data)
        density = self._bounded(density, moved)
        return torch.where(self.weight == 0, 0.0, density.expand(self.cells) * self.weight)

    def value(self, delta: Tensor) -> Tensor:
        return self._density(self.etas(delta))

    def _cellwise(self, etas: list[Tensor]) -> tuple[list[Tensor], list[list[Curvature]]]:
        if self.own.slots[0].vector:  # the only one
            slope, curvature = rowwise_derivatives(lambda eta: self._density([eta]), _per_cell(etas[0], self.cells))
            return [slope], [[curvature]]
        slopes, curvatures = cellwise_derivatives(self._density, [eta.expand(self.cells) for eta in etas])
        return slopes, [[*own] for own in curvatures]


def _per_cell(eta: Tensor, cells: torch.Size) -> Tensor:
    """A vector for every cell."""
    return eta.expand(*cells, eta.shape[-1])


def _curve(slot: Slot, site: SiteRecord, own: SiteMoments, arguments: Mapping[str, Tensor]) -> Curve:
    family = site.family
    assert family is not None
    kernel = family.kernel(slot.name, own.moments, {**site.constants, **arguments, **own.override}, own.center)
    assert kernel is not None
    return curve_of(kernel, slot.link, family.link(slot.name), slot.forward(arguments[slot.name]))


def is_behind_predictor(use: Use, site: SiteRecord) -> bool:
    """Whether this use of a parameter is one that a `PredictorSite` serves."""
    family = site.family
    if family is None or site.arguments is None or family.integrates or family.latent_response:
        return False
    if family.arguments[use.slot] == 0 or use.slot in family.by_row:
        return use.index is not None or use.predictor is not None
    canonical, predictor = family.link(use.slot), use.predictor
    if predictor is None or use.slot not in family.closed:
        return False
    vectors = (("identity", SOFTMAX), ("softmax", NORMALISED))
    return (predictor.link.name, canonical) in (*vectors, *([("identity", IDENTITY)] if use.slot == "loc" else []))


def predictor_site(
    site: SiteRecord,
    own: Mapping[str, Sequence[Use]],
    starts: Mapping[str, int],
    size: int,
    logs: frozenset[str],
    real: frozenset[str],
) -> PredictorSite:
    """A site with the block's uses of each of its arguments.

    :param logs: parameters whose logarithms the block holds; :param real: those without a constraint.
    """
    family = site.family
    assert family is not None and site.arguments is not None
    (first, *rest) = own
    compressed = not rest and first in family.closed and first not in family.by_row
    cells = argument_cells(site, dict(site.arguments)) if compressed else full_cells(site)
    slots = []
    for name, uses in own.items():
        width = site.arguments[name].shape[-1] if family.arguments[name] == 1 else None
        terms = terms_of(uses) if uses[0].predictor is not None else [_entry(uses[0])]
        predictor = uses[0].predictor
        whole = predictor is None or all(parameter in starts for parameter in predictor.parameters)
        by_log = predictor is None and uses[0].parameter in logs
        slots.append(Slot(name, uses[0], _design(terms, starts, size, cells, width), whole, by_log))
    unbounded = frozenset(name for name, uses in own.items() if _may_leave(site, name, uses, real))
    return PredictorSite(site.name, tuple(slots), compressed, unbounded)


def _design(
    terms: Sequence[Term], starts: Mapping[str, int], size: int, cells: torch.Size, entries: int | None
) -> Design | VectorDesign:
    """Of a scalar argument, or a vector of some entries."""
    if entries is None:
        return Design(terms, starts, size, cells)
    return VectorDesign(terms, starts, size, entries, cells)


def _may_leave(site: SiteRecord, name: str, uses: Sequence[Use], real: frozenset[str]) -> bool:
    assert site.family is not None
    predictor = uses[0].predictor
    if predictor is not None:
        return predictor.link.name == "identity" and site.family.bounded(name)
    return site.family.bounded(name) and any(use.parameter in real and not use.exponential for use in uses)


def _entry(use: Use) -> Term:
    """One entry as a predictor of its own."""
    assert use.index is not None
    return Term(use.parameter, use.index, torch.ones((), dtype=torch.float64))
