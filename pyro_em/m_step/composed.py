"""Parameters whose arguments are functions of several of them: Newton's method on Q(a(θ)), without running the model.

    Q(θ) = Σ_sites K(a(θ)) + log p(θ),      b ~ Normal(0, diag(τ) L), σ² ρ^|i−j|, Beta(φ m(x), φ (1 − m(x))), ...

The functions a(θ) come from a recording of the model (model/composed.py). K is the kernel of the argument on the
moments of its site, where it is the site's only such argument and has one, else the family's log-density of the rows.
A block is what is connected through arguments and sites. Steps are those of climb.py in free coordinates, with
derivatives by torch: a block has few parameters.

Not handled: arguments that move with continuous latents, sites with latents inside, probabilities (whose zeros are
events that cannot be, with a logarithm that has no derivative), priors with a kink or with hyperparameters that move,
more than `MAX_SIZE` free coordinates; numeric.py maximises these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_em.charts import Chart, chart
from pyro_em.evidence.discrete import weighted_sum
from pyro_em.families.base import CHOLESKY
from pyro_em.kernels import WishartKernel
from pyro_em.m_step.climb import EPS, Climb, Value
from pyro_em.m_step.kinks import Kinks, kink_of
from pyro_em.m_step.location import full_cells
from pyro_em.m_step.numeric import no_derivative
from pyro_em.m_step.unit import connected, weight_of
from pyro_em.model.composed import Composed as Function
from pyro_em.model.composed import Place, composed
from pyro_em.model.density import clean_value, packed_log_density
from pyro_em.model.recognise import second_point
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.shapes import broadcast_shapes
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

MAX_SIZE = 60  # free coordinates: the curvature takes a backward pass for each

Uses = Mapping[str, tuple[Use, ...]]
_Slots = Mapping[str, Sequence[str]]  # by site
Term = Callable[[Mapping[str, Tensor]], Tensor]  # of all arguments of a site, or of the parameters; any shape


@dataclass(frozen=True, eq=False)
class Composed:
    """A block; made by `composed_blocks`. `tolerance` bounds max|∂Q/∂u| at the end."""

    problem: Problem
    names: tuple[str, ...]
    uses: Uses
    functions: Mapping[Place, Function]
    tolerance: float

    @property
    def compressed(self) -> bool:
        """It reads the moments of its sites alone."""
        sites = self.problem.first.sites
        return all(compressed(sites[site], slots) for site, slots in _by_site(self.functions).items())

    def slope(self, params: Params, sufficient: Sufficient) -> Tensor:
        """∂Q/∂u, (P,)."""
        q = self._open(params, sufficient)
        found = q.slope(q.free())
        if not bool(found.isfinite().all()):  # a maximum would pass over it
            raise no_derivative(self.names[0])
        return found

    def update(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """The argmax of Q."""
        q = self._open(params, sufficient)
        found = q.parameters(q.maximised(self.tolerance))
        moved = {**params, **{n: found[n].detach().to(params[n].dtype) for n in self.names}}
        for name in self.names:
            sufficient.put(moved[name], tuple(use for use in self.uses[name] if use.slot == VALUE))
        for (site, slot), function in self.functions.items():
            sufficient.arguments[site][slot] = function(moved).detach()
            sufficient.touch(site)
        return moved, set()

    def rule(self, name: str) -> str:
        """What the plan says of a member."""
        labels = []
        for use in self.uses[name]:
            family = self.problem.family(use.site)
            known = type(self.problem.capture.sites[use.site].fn).__name__ if family is None else family.name
            labels.append(f"prior {known}" if use.slot == VALUE else f"{known}.{use.slot}, as the model computes it")
        others = ", ".join(f"'{n}'" for n in self.names if n != name)
        return f"Newton ({', '.join(dict.fromkeys(labels))})" + (f", jointly with {others}" if others else "")

    def _open(self, params: Params, sufficient: Sufficient) -> _Q:
        uses = tuple(use for uses in self.uses.values() for use in uses)
        return sufficient.once(self.names, uses, lambda: _Q(self, params, sufficient))


class _Q(Climb):
    """Q of a block in free coordinates, around the current parameters."""

    def __init__(self, own: Composed, params: Params, sufficient: Sufficient) -> None:
        records = own.problem.parameters
        self.own, self.names = own, own.names
        self.values = {n: v.detach().double() for n, v in params.items()}
        self.charts: dict[str, Chart] = {n: chart(records[n].constraint, self.values[n]) for n in self.names}
        self.sizes = [self.charts[n].size for n in self.names]
        by_site = _by_site(own.functions).items()
        self.terms = [(site, slots, _term(own.problem, site, slots, sufficient)) for site, slots in by_site]
        priors = [(n, use.site) for n in self.names for use in own.uses[n] if use.slot == VALUE]
        self.priors = [(n, _prior(own.problem, site, sufficient)) for n, site in priors]

    @property
    def kinks(self) -> Kinks | None:
        return None

    def free(self) -> Tensor:
        return torch.cat([self.charts[n].to_free(self.values[n]) for n in self.names])

    def parameters(self, u: Tensor) -> Params:
        """All parameters, those of the block at `u`."""
        parts = torch.split(u, self.sizes)
        return {**self.values, **{n: self.charts[n].from_free(part) for n, part in zip(self.names, parts, strict=True)}}

    def _all(self, u: Tensor) -> list[Tensor]:
        params = self.parameters(u)
        found = [term({s: self.own.functions[site, s](params) for s in slots}) for site, slots, term in self.terms]
        return found + [term(params) for _, term in self.priors]

    def value(self, u: Tensor) -> Value:
        with torch.no_grad():
            try:
                terms = self._all(u)
            except LinAlgError:  # a matrix that is not positive definite: no step ends there
                nothing = torch.full((), torch.nan, dtype=torch.float64)
                return Value(nothing, nothing)
            size = torch.stack([term.abs().sum() for term in terms]).sum()
            return Value(torch.stack([term.sum() for term in terms]).sum(), 16 * EPS * size)

    def _total(self, u: Tensor) -> Tensor:
        return torch.stack([term.sum() for term in self._all(u)]).sum()

    def slope(self, u: Tensor) -> Tensor:
        leaf = u.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self._total(leaf), leaf)
        return slope

    def curvature(self, u: Tensor) -> Tensor:
        leaf = u.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self._total(leaf), leaf, create_graph=True)
            rows = [torch.autograd.grad(own, leaf, retain_graph=True)[0] for own in slope.unbind()]
        return -torch.stack(rows)


def _term(problem: Problem, name: str, slots: Sequence[str], sufficient: Sufficient) -> Term:
    """Q of one site as a function of those of its arguments that the block moves."""
    site, arguments = sufficient.sites[name], dict(sufficient.arguments[name])
    family = site.family
    assert family is not None

    def inside(moved: Mapping[str, Tensor], value: Tensor) -> Tensor:
        outside = family.outside(moved)
        return value if outside is None else torch.where(outside, torch.nan, value)

    if compressed(site, slots):
        (slot,) = slots
        own = sufficient.moments(name)
        kernel = family.kernel(slot, own.moments, {**site.constants, **arguments, **own.override}, own.center)
        assert kernel is not None

        by_factor = kernel.factor_value if isinstance(kernel, WishartKernel) and family.link(slot) is CHOLESKY else None

        def of_kernel(moved: Mapping[str, Tensor]) -> Tensor:
            if by_factor is not None:  # the matrix need not be made, and factorised again
                value = by_factor(moved[slot])
            else:
                value = kernel.value(family.link(slot).to_canonical(moved[slot]))
            value = inside(moved, value)
            return value.expand(broadcast_shapes(value.shape, own.cells))  # each cell counts

        return of_kernel
    cells, data = full_cells(site), clean_value(site)
    weight = weight_of(problem, name, sufficient).expand(cells)

    def of_rows(moved: Mapping[str, Tensor]) -> Tensor:
        density = inside(moved, family.log_prob({**site.constants, **arguments, **moved}, data))
        return torch.where(weight == 0, 0.0, density.expand(cells) * weight)

    return of_rows


def _prior(problem: Problem, name: str, sufficient: Sufficient) -> Term:
    site = dataclasses.replace(sufficient.sites[name], arguments=sufficient.arguments[name] or None)

    def log_prior(params: Mapping[str, Tensor]) -> Tensor:
        here = dataclasses.replace(site, value=params[name])
        return weighted_sum(packed_log_density(here), problem.graph.factors[name].weight)

    return log_prior


def compressed(site: SiteRecord, slots: Sequence[str]) -> bool:
    """Whether these arguments of a site are one, with a kernel on its moments."""
    return len(slots) == 1 and site.family is not None and slots[0] in site.family.closed


def composed_blocks(
    problem: Problem, run: Run, uses: Uses, movable: set[str], elsewhere: set[str], tolerance: float
) -> list[Composed]:
    """Blocks among some parameters.

    :param uses: of all parameters, as they count in Q.
    :param movable: the parameters that may take part.
    :param elsewhere: sites whose location a linear solve moves: their rows are not read here.
    """
    movable = {n for n in movable if problem.parameters[n].kind != "module" and _has_prior(problem, run, uses, n)}
    places = {(u.site, u.slot): n for n in movable for u in uses[n] if u.slot != VALUE}
    for site, slot in list(places):
        family = run.sites[site].family
        if family is None or family.integrates or family.latent_response or slot in ("probs", "logits"):
            del places[site, slot]
    if not places or any(r.value.dtype != torch.float64 for r in problem.parameters.values()):
        return []
    functions = composed(_runner(problem), list(places), _points(problem))
    while True:  # a parameter needs functions of all of its arguments, a function all of its parameters
        by_site = _by_site(functions)

        def is_served(use: Use, known: Mapping[Place, Function] = functions, own: _Slots = by_site) -> bool:
            if use.slot == VALUE:
                return True
            whole = use.site in elsewhere and not compressed(run.sites[use.site], own.get(use.site, ()))
            return (use.site, use.slot) in known and not whole

        kept = {n for n in movable if all(map(is_served, uses[n]))}
        left = {place: f for place, f in functions.items() if set(_moving(f, uses, place)) <= kept}
        if kept == movable and left.keys() == functions.keys():
            break
        movable, functions = kept, left
    names = [n for n in problem.parameters if n in movable and any(u.slot != VALUE for u in uses[n])]
    touched = {n: {u.site for u in uses[n] if u.slot != VALUE} for n in names}
    blocks = []
    for block in connected(names, touched):
        own = {p: f for p, f in functions.items() if set(_moving(f, uses, p)) & set(block)}
        size = sum(chart(problem.parameters[n].constraint, problem.start[n]).size for n in block)
        if size <= MAX_SIZE:
            blocks.append(Composed(problem, block, {n: uses[n] for n in block}, own, tolerance))
    return blocks


def _by_site(places: Iterable[Place]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site, slot in places:
        found.setdefault(site, []).append(slot)
    return found


def _moving(function: Function, uses: Uses, place: Place) -> list[str]:
    """Parameters that enter an argument and have a use of it that counts."""
    return [n for n in function.reads if any((u.site, u.slot) == place for u in uses[n])]


def _has_prior(problem: Problem, run: Run, uses: Uses, name: str) -> bool:
    """Its prior, if it counts, has no kink and hyperparameters that stay; no other site's value is made of it."""
    own = [use.site for use in uses[name] if use.slot == VALUE]
    moved = {use.site for others in uses.values() for use in others if use.slot != VALUE}
    return not any(site != name or site in moved or kink_of(run.sites[site]) is not None for site in own)


def _runner(problem: Problem) -> Callable[[Params, int], Run]:
    def run(params: Params, point: int) -> Run:
        if problem.continuous is None:
            return problem.run(params)
        runs = problem.continuous.runs
        return runs.one(params, runs.atom(problem.continuous.values, point))

    return run


def _points(problem: Problem) -> tuple[Params, Params]:
    generator = torch.Generator().manual_seed(1)
    return problem.start, {n: second_point(record, generator) for n, record in problem.parameters.items()}
