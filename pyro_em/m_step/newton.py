"""Generalised linear sites: Newton's method (IRLS) on compressed work, to the argmax of Q.

For parameters that enter their sites through a link of a linear predictor (model/affine.py) or entry by entry, Q has
the gradient and Hessian of predictors.py. Newton steps with backtracking (objective.py) start from the current
parameters, so that near convergence of EM one or two suffice.

Where the maximum lies at infinity (complete separation in a logistic regression, a class without events in a Poisson
one) the gradient vanishes along a direction in which η keeps growing: the steps end there, with finite parameters,
and `diverging` names them.

Not handled: opaque arguments, vector arguments other than categories; these are maximised by numeric.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.charts import base_constraint, chart
from pyro_em.kernels import FlatKernel, Kernel, QuadraticKernel
from pyro_em.m_step.climb import ascent
from pyro_em.m_step.kinks import kinked
from pyro_em.m_step.moving import run_at_atoms
from pyro_em.m_step.objective import Objective, Prior
from pyro_em.m_step.predictors import PredictorSite, is_behind_predictor, predictor_site
from pyro_em.m_step.unit import begins_of, connected
from pyro_em.model.trace import Run
from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

MAX_SIZE = 1500  # entries of a block
EDGE = 1e-5  # of the largest entry of an argument: closer to the edge of its space, it is there
FLAT = 1e-6  # of a slope, for every observation


@dataclass(frozen=True)
class Newton:
    """A block; made by `newton_blocks`. `tolerance` bounds max|∂Q/∂u| at the end.

    Of the positive parameters in `logs`, which enter some predictor by their logarithm, it holds that.
    """

    problem: Problem
    names: tuple[str, ...]
    uses: Mapping[str, tuple[Use, ...]]
    starts: Mapping[str, int]
    size: int
    sites: tuple[PredictorSite, ...]
    tolerance: float
    logs: frozenset[str]

    def slope(self, params: Params, sufficient: Sufficient) -> Tensor:
        """max|∂Q/∂u|, ()."""
        q = self._open(params, sufficient)
        return q.subslope(q.free(), q.pulled(q.gradient(torch.zeros(self.size, dtype=torch.float64)))).abs().amax()

    def update(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """The argmax of Q."""
        q = self._open(params, sufficient)
        u = q.maximised(self.tolerance)
        theta = q.theta(u)
        moved = dict(params)
        for name, uses in self.uses.items():
            own = theta[self._slice(name, params[name])].reshape(params[name].shape)
            own = own.exp() if name in self.logs else own
            moved[name] = own.to(params[name].dtype)
            sufficient.put(moved[name], tuple(use for use in uses if use.index is not None))
        delta = theta - q.start
        for opened in q.sites:
            opened.write(sufficient, delta)
        return moved, set()

    def at_edge(self, params: Params) -> dict[str, str]:
        """Sites of which an argument has ended at the edge of its space (a rate a + b x of 0), and the argument.

        No step can go on from there, and the maximum has a slope.
        """
        found: dict[str, str] = {}
        if any(site.unbounded for site in self.sites):
            with torch.no_grad():
                run = self.problem.replayed(params) if self.problem.recognised else self.problem.run(params)
            for own in self.sites:
                site = run.sites[own.name]
                assert site.family is not None and site.arguments is not None
                for name in own.unbounded:
                    if site.family.at_edge(name, site.arguments[name], EDGE):
                        found[own.name] = name
        return found

    def rule(self, name: str, run: Run) -> str:
        """What the plan says of a member."""
        labels = []
        for use in self.uses[name]:
            family = run.sites[use.site].family.name  # type: ignore[union-attr]
            link = "" if use.predictor is None else f" behind {use.predictor.link.name}"
            labels.append(f"prior {family}" if use.slot == VALUE else f"{family}.{use.slot}{link}")
        others = [f"'{n}'" for n in self.names if n != name]
        text = f"Newton ({', '.join(dict.fromkeys(labels))})"
        return text + (f", jointly with {', '.join(others)}" if others else "")

    def diverging(self, params: Params, sufficient: Sufficient) -> set[str]:
        """Parameters that would move on, by much in η, though Q has nothing to gain: the maximum is at infinity."""
        q = self._open(params, sufficient)
        zero = torch.zeros(self.size, dtype=torch.float64)
        gradient, hessian = q.gradient(zero), q.hessian(zero)
        gradient = q.subslope(q.free(), gradient) if q.real else gradient
        if float(gradient.abs().max()) > self._flat or any(c.size != v.numel() for c, v in q.charts):
            return set()
        step = ascent(gradient, hessian)
        found = set()
        for opened in q.sites:
            for slot, change in opened.changes(step).items():
                if float(change.abs().max()) > 0.1:
                    here = (opened.name, slot)
                    found |= {n for n, uses in self.uses.items() if any((u.site, u.slot) == here for u in uses)}
        return found | self._rising(q, gradient)

    def _rising(self, q: Objective, gradient: Tensor) -> set[str]:
        """Of the parameters held by their logarithms those for which Q rises still at ten times (a tenth of) them.

        The size of a negative binomial without overdispersion: there the curvature has no digits left for a step.
        """
        away = torch.zeros_like(gradient)
        parts = {n: self._slice(n, self.problem.parameters[n].value) for n in self.logs}
        for part in parts.values():
            away[part] = gradient[part].sign()
        onwards = away * q.gradient(math.log(10) * away) > 0 if parts else away
        return {name for name, part in parts.items() if bool(onwards[part].any())}

    @property
    def _flat(self) -> float:
        """Slope of Q below which it has nothing to gain; in float32 the tolerance is wider than that."""
        return max(self.tolerance, FLAT * self.problem.graph.num_observations)

    def _slice(self, name: str, value: Tensor) -> slice:
        return slice(self.starts[name], self.starts[name] + value.numel())

    def _open(self, params: Params, sufficient: Sufficient) -> Objective:
        """Q around the current place; that of the score serves the update."""
        uses = tuple(use for uses in self.uses.values() for use in uses)
        return sufficient.once(self.names, uses, lambda: self._opened(params, sufficient))

    def _opened(self, params: Params, sufficient: Sufficient) -> Objective:
        values = {n: params[n].detach().double() for n in self.names}
        values |= {n: values[n].log() for n in self.logs}
        start = torch.cat([value.reshape(-1) for value in values.values()])
        made = {}
        if sufficient.predictors is not None:
            made = {own.name: sufficient.predictors(own, self.starts, start) for own in self.sites}
        own = tuple(site for site in self.sites if made.get(site.name) is None)
        if any(site.moving for site in own):
            run = run_at_atoms(self.names, params, sufficient)
            own = tuple(site.at(run, self.starts, self.size) if site.moving else site for site in own)
        opened = {site.name: site.open(self.problem, start, sufficient) for site in own}
        sites = [made.get(site.name) or opened[site.name] for site in self.sites]
        charts = []
        for name, value in values.items():
            constraint = constraints.real if name in self.logs else self.problem.parameters[name].constraint
            charts.append((chart(constraint, value), value))
        priors = [
            Prior(self._slice(name, params[name]), use, sufficient, params[name].shape, name in self.logs)
            for name, uses in self.uses.items()
            for use in uses
            if use.slot == VALUE
        ]
        real = all(name in self.logs or _is_real(self.problem, name) for name in self.names)
        return Objective(start, sites, charts, priors, real)


def _is_real(problem: Problem, name: str) -> bool:
    return base_constraint(problem.parameters[name].constraint) is constraints.real


def is_newton(uses: tuple[Use, ...], run: Run) -> bool:
    """Whether every use of a parameter is behind a predictor, or is a prior with a kernel."""
    kinds = {_by_log(use) for use in uses if use.predictor is not None}
    if len(kinds) > 1 or (True in kinds and kinked({"": uses}, run.sites)):
        return False  # linear here, by its logarithm there
    return all(_has_kernel(u, run) if u.slot == VALUE else is_behind_predictor(u, run.sites[u.site]) for u in uses)


def _by_log(use: Use) -> bool:
    return use.predictor is not None and use.parameter in use.predictor.logarithmic


def _has_kernel(use: Use, run: Run) -> bool:
    site = run.sites[use.site]
    if use.index is None or site.family is None or site.arguments is None:
        return False
    kernel: Kernel | None = site.family.value_kernel({**site.constants, **site.arguments})
    if kernel is None or isinstance(kernel, FlatKernel):
        return False
    return kernel.event_dim == 0 or isinstance(kernel, QuadraticKernel)


def newton_blocks(problem: Problem, run: Run, uses: Mapping[str, tuple[Use, ...]], tolerance: float) -> list[Newton]:
    """Blocks among some parameters: those that share a site move together.

    :param uses: of the parameters that may take part, as they count in Q.
    """
    at: dict[tuple[str, str], set[str | int]] = {}
    for name, own in uses.items():
        for use in own:
            if use.slot != VALUE:
                at.setdefault((use.site, use.slot), set()).add(name if use.predictor is None else id(use.predictor))
    # One argument that takes entries of several parameters has no common link.
    mixed = {key for key, kinds in at.items() if len(kinds) > 1}
    names = [n for n, own in uses.items() if is_newton(own, run) and not any((u.site, u.slot) in mixed for u in own)]
    sites = {n: {use.site for use in uses[n] if use.slot != VALUE} for n in names}
    found = [_block(problem, run, block, uses, tolerance) for block in connected(names, sites)]
    return [block for block in found if block is not None]


def _block(
    problem: Problem, run: Run, names: tuple[str, ...], uses: Mapping[str, tuple[Use, ...]], tolerance: float
) -> Newton | None:
    starts, size = begins_of(names, problem.start)
    if size > MAX_SIZE:
        return None
    at: dict[str, dict[str, list[Use]]] = {}
    for name in names:
        for use in uses[name]:
            if use.slot != VALUE:
                at.setdefault(use.site, {}).setdefault(use.slot, []).append(use)
    logs = frozenset(name for name in names if any(_by_log(use) for use in uses[name]))
    real = frozenset(name for name in names if _is_real(problem, name))
    sites = tuple(predictor_site(run.sites[site], own, starts, size, logs, real) for site, own in at.items())
    return Newton(problem, names, {n: uses[n] for n in names}, starts, size, sites, tolerance, logs)
