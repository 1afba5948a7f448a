"""The M-step of a problem: which parameter is served by which rule, the joint update, its certificate.

Conditional closed forms are applied in turn, locations before scales, each given the others' newest
values. Where blocks do not couple one round is the joint argmax; where they do (a mean shared by
components of different variance: ECM) rounds are repeated until the certificate max|∂Q/∂u| holds, and
finished by Newton on all parameters together if rounds alone are slow.

The same kernels, evaluated before the update, give the score ∂log p(x|θ)/∂u for nothing (Fisher's
identity), which is what the stopping rule reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_em.e_step.base import Expectation
from pyro_em.errors import InputError, Refusal
from pyro_em.families import LOCATIONS
from pyro_em.m_step.closed import NotClosed
from pyro_em.m_step.linear import linear_blocks
from pyro_em.m_step.numeric import Block, ascend, ascend_with, maximise
from pyro_em.m_step.responses import not_completed
from pyro_em.m_step.separate import Separate
from pyro_em.m_step.states import state_blocks
from pyro_em.m_step.unit import Unit
from pyro_em.model.compat import with_dims
from pyro_em.model.slicing import rows_like_others
from pyro_em.model.trace import Run
from pyro_em.model.use import Use
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors, SiteMoments, expected_moments
from pyro_em.sufficient import MomentsOf, Sufficient, raw_arguments
from pyro_em.types import Params

Route = Literal["closed", "numeric", "gradient", "fixed", "unused"]
# Bounds on max|∂Q/∂u| / N after an update; parameters kept in float32 are rounded, and Q is flat to their rounding.
CERTIFICATE, CERTIFICATE_FLOAT32 = 1e-10, 1e-4
MAX_ROUNDS = 30


@dataclass(frozen=True)
class Choice:
    """How one parameter is updated, and why."""

    route: Route
    reason: str


@dataclass(frozen=True)
class MStepInfo:
    """`rounds` of conditional updates, and the certificate max|∂Q/∂u| / N (None if not checked)."""

    rounds: int
    certificate: float | None
    empty: tuple[str, ...]


class MStep:
    """Made once a fit; `score` and `update` are called once an iteration."""

    def __init__(self, problem: Problem, option: Any, algorithm: str, optim: Any = None) -> None:
        self.problem, self.optim = problem, optim
        self.uses = {n: self._counted(n) for n in problem.parameters}
        self.units: list[Unit] = []
        self.collinear: set[str] = set()  # parameters that no data of this design can tell apart
        self.choices = self._choose(*self._wanted(option, algorithm))
        names = list(self.choices)
        self.units.sort(key=lambda unit: min(map(self._order, unit.names)))
        self.closed = tuple(name for unit in self.units for name in unit.names)
        self.numeric = tuple(n for n in names if self.choices[n].route == "numeric")
        self.gradient = tuple(n for n in names if self.choices[n].route == "gradient")
        self._count = 0
        self._coupled = bool(self.numeric and self.closed)

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters that move."""
        return (*self.closed, *self.numeric, *self.gradient)

    @property
    def all_closed(self) -> bool:
        """Every moving parameter has a closed form."""
        return not (self.numeric or self.gradient)

    @property
    def separate(self) -> bool:
        """Every moving parameter has a closed form of its own, on the moments of its sites."""
        return self.all_closed and all(isinstance(unit, Separate) for unit in self.units)

    def _counted(self, name: str) -> tuple[Use, ...]:
        """Uses that enter Q: without priors when they do not count."""
        priors = () if self.problem.with_prior else self.problem.graph.priors
        return tuple(use for use in self.problem.uses[name] if use.site not in priors)

    def _order(self, name: str) -> int:
        return 0 if any(use.slot in LOCATIONS for use in self.uses[name]) else 1

    def _wanted(self, option: Any, algorithm: str) -> tuple[dict[str, str], str]:
        """What the caller asks for some parameters, and for all others."""
        wanted: dict[str, str] = {}
        default = "gradient" if algorithm == "gem" and option == "auto" else option
        if isinstance(option, Mapping):
            unknown = [name for name in option if name not in self.problem.parameters]
            if unknown:
                known = ", ".join(self.problem.parameters)
                raise InputError(f"m_step: the model has no parameter '{unknown[0]}'. Its parameters: {known}.")
            wanted, default = dict(option), "gradient" if algorithm == "gem" else "auto"
        valid = ("auto", "closed", "gradient", "fixed")
        for value in (default, *wanted.values()):
            if value not in valid:
                raise InputError(f"m_step: '{value}' is none of {', '.join(valid)}.")
        return wanted, default

    def _choose(self, wanted: Mapping[str, str], default: str) -> dict[str, Choice]:
        with torch.no_grad():
            run = self.problem.run(self.problem.start)
        unweighted = all(info.weight is None for info in self.problem.graph.factors.values())
        uniform = _uniform(self.problem, rows_like_others(run) if unweighted else run)
        start = self.problem.start
        options = {name: wanted.get(name, default) for name in self.problem.parameters}
        exact = {n: self.uses[n] for n, own in options.items() if own in ("auto", "closed") and self.uses[n]}
        choices: dict[str, Choice] = {}
        for block in linear_blocks(self.problem, run, exact):
            self.units.append(block)
            open_ended = block.unidentified(block.precision(start, _opened(uniform)))
            self.collinear |= open_ended
            choices |= {name: Choice("closed", block.rule(name, run, open_ended)) for name in block.names}
        for states in state_blocks(self.problem, run.sites, {n: own for n, own in exact.items() if n not in choices}):
            self.units.append(states)
            choices |= dict.fromkeys(states.names, Choice("closed", states.rule()))
        for name, own in options.items():
            if name not in choices:
                choices[name] = self._choice(name, own, uniform.sufficient)
        numeric = [name for name, choice in choices.items() if choice.route == "numeric"]
        for unit, reason in not_completed(self.units, numeric, self.uses, run.sites):
            self.units.remove(unit)
            choices |= {name: Choice("numeric", reason) for name in unit.names}
        return {name: choices[name] for name in self.problem.parameters}

    def _choice(self, name: str, wanted: str, uniform: Sufficient) -> Choice:
        if wanted == "fixed":
            return Choice("fixed", "as told")
        if not self.uses[name]:
            return Choice("unused", "nothing that counts depends on it; it keeps its value")
        if wanted == "gradient":
            return Choice("gradient", "gradient M-step, as told")
        unit = Separate(self.problem, name, self.uses[name])
        try:
            choice = Choice("closed", unit.combined(self.problem.start[name], uniform).rule)
        except NotClosed as error:
            if wanted == "closed":
                raise Refusal(
                    self.uses[name][0].site,
                    f"parameter '{name}' has no closed-form M-step: {error}.",
                    "use m_step='auto', which maximises Q numerically for it.",
                ) from error
            return Choice("numeric", str(error))
        self.units.append(unit)
        return choice

    def score(self, params: Params, expectation: Expectation) -> float:
        """max|∂ objective/∂u| over the parameters that move (Fisher's identity), not divided by N."""
        largest = float(self.closed_score(params, _opened(expectation)))
        rest = (*self.numeric, *self.gradient)
        if rest:
            block = Block.of_q(self.problem, params, expectation.weights, rest)
            largest = max(largest, _largest(block.slope()))
        return largest

    def closed_score(self, params: Params, sufficient: Sufficient) -> Tensor:
        """The part of `score` of the parameters in closed form, ()."""
        slopes = [unit.slope(params, sufficient) for unit in self.units]
        return torch.stack(slopes).amax() if slopes else torch.zeros((), dtype=torch.float64)

    def closed_update(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """One round of conditional closed forms, and the parameters of which some entry saw no data."""
        empty: set[str] = set()
        for unit in self.units:
            params, unseen = unit.update(params, sufficient)
            empty |= unseen
        return params, empty

    @property
    def coupled(self) -> bool:
        """One round of closed forms is not the joint argmax: rounds are repeated, under a certificate."""
        return self._coupled

    def update(self, params: Params, expectation: Expectation) -> tuple[Params, MStepInfo]:
        """θ with Q at its maximum (at a higher value where the route is "gradient").

        :raises DegenerateLikelihoodError: if a variance collapses.
        """
        sufficient = _opened(expectation)
        self._count += 1
        check = self._coupled or self._count <= 3 or self._count % 10 == 0
        scale = self.problem.graph.num_observations
        bound = _bound(params)
        certificate, empty = None, set()
        rounds = 0
        while rounds < MAX_ROUNDS:
            rounds += 1
            before = params
            params, found = self._round(params, expectation)
            empty |= found
            if not check or not (self.closed or self.numeric):
                break
            certificate = self._certificate(params, expectation, sufficient) / scale
            if certificate <= bound or all(torch.equal(before[n], params[n]) for n in self.free):
                break
            self._coupled = True
        if certificate is not None and certificate > bound:
            block = Block.of_q(self.problem, params, expectation.weights, (*self.closed, *self.numeric))
            params = maximise(block, tolerance=bound * scale)
            certificate = self._certificate(params, expectation, self._refreshed(params, expectation)) / scale
        if self.gradient:
            block = Block.of_q(self.problem, params, expectation.weights, self.gradient)
            params = ascend(block) if self.optim is None else ascend_with(block, self.optim)
        return params, MStepInfo(rounds, certificate, tuple(sorted(empty - self.collinear)))

    def _round(self, params: Params, expectation: Expectation) -> tuple[Params, set[str]]:
        sufficient = expectation.sufficient
        params, empty = self.closed_update(params, sufficient)
        if self.numeric:
            block = Block.of_q(self.problem, params, expectation.weights, self.numeric)
            scale = self.problem.graph.num_observations
            params = maximise(block, tolerance=0.1 * _bound(params) * scale)
            if self.closed:
                sufficient.take(self._refreshed(params, expectation))
        return params, empty

    def _refreshed(self, params: Params, expectation: Expectation) -> Sufficient:
        with torch.no_grad():
            run = self.problem.run(params)
        moments_of = _moments(self.problem, run, expectation.weights)
        fresh = Sufficient(self.problem, run.sites, raw_arguments(run.sites), moments_of)
        fresh.posterior = expectation.sufficient.posterior
        return fresh

    def _certificate(self, params: Params, expectation: Expectation, sufficient: Sufficient) -> float:
        largest = float(self.closed_score(params, sufficient))
        if self.numeric:
            block = Block.of_q(self.problem, params, expectation.weights, self.numeric)
            _, gradient, _ = block.gradient(block.free())
            largest = max(largest, _largest(gradient))
        return largest


def _opened(expectation: Expectation) -> Sufficient:
    """The statistics of an E-step, with the way to its posterior weights for the units that need them."""
    expectation.sufficient.posterior = lambda: expectation.weights
    return expectation.sufficient


def _bound(params: Params) -> float:
    double = all(value.dtype == torch.float64 for value in params.values())
    return CERTIFICATE if double else CERTIFICATE_FLOAT32


def _moments(problem: Problem, run: Run, weights: Posteriors) -> MomentsOf:
    """Moments from posterior weights, at the arguments of a fresh run."""

    def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
        return expected_moments(run.sites[name], problem.graph.factors[name], weights.get(name), arguments)

    return moments_of


def _uniform(problem: Problem, run: Run) -> Expectation:
    """Statistics of the data without any latent: enough to see which rules apply, at the cost of one pass."""
    weights = {}
    for component in problem.graph.components:
        for name in component.factors:
            site = run.sites[name]
            sizes = {site.symbols[plate.dim]: plate.size for plate in site.plates if plate.size > 1}
            weights[name] = with_dims(torch.ones(list(sizes.values())), "".join(sizes))
    sufficient = Sufficient(problem, run.sites, raw_arguments(run.sites), _moments(problem, run, weights))
    return Expectation(0.0, 0.0, 0.0, sufficient, lambda: weights)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
