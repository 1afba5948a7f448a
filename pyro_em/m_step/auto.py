"""The M-step of a problem: which parameter is served by which rule, the joint update, its certificate.

Conditional closed forms are applied in turn, locations before scales, each given the others' newest
values. Where blocks do not couple one round is the joint argmax; where they do (a mean shared by
components of different variance: ECM) rounds are repeated until the certificate max|∂Q/∂u| holds, and
finished by Newton on all parameters together if rounds alone are slow.

The same kernels, evaluated before the update, give the score ∂log p(x|θ)/∂u for nothing (Fisher's
identity), which is what the stopping rule reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.all_atoms import with_atoms_at_start
from pyro_em.e_step.base import Expectation
from pyro_em.families import LOCATIONS
from pyro_em.m_step.choose import certificate_bound, choose, moments_by_weight, num_elements, opened, options_of
from pyro_em.m_step.minibatches import adam, climb, minibatches
from pyro_em.m_step.newton import Newton
from pyro_em.m_step.numeric import NEWTON_LIMIT, Block, ascend, ascend_with, maximise
from pyro_em.m_step.reads import Reads
from pyro_em.m_step.rows import Rows
from pyro_em.m_step.separate import Separate
from pyro_em.model.use import Use
from pyro_em.problem import Problem
from pyro_em.sufficient import Sufficient, raw_arguments
from pyro_em.types import Params

MAX_ROUNDS = 30
NUMERIC_ROUNDS = 4  # where one of the rules is iterative itself: all together is cheaper then
CLIMB, STEPS = 20, 5  # L-BFGS steps of an M-step over many opaque parameters, and of a gradient M-step


class NotCertified(Exception):
    """Rounds of closed forms do not end at the certificate."""


@dataclass(frozen=True)
class MStepInfo:
    """`rounds` of conditional updates, and the certificate max|∂Q/∂u| / N (None if not checked)."""

    rounds: int
    certificate: float | None
    empty: tuple[str, ...]


class MStep:
    """Made once a fit; `score` and `update` are called once an iteration."""

    def __init__(
        self,
        problem: Problem,
        option: Any,
        algorithm: str,
        optim: Any = None,
        statistics: Sufficient | None = None,
    ) -> None:
        """`statistics` of an E-step at the start, if an engine has made one, save `choose` a pass over the data."""
        problem = problem if statistics is not None else with_atoms_at_start(problem)
        self.problem, self.optim = problem, optim
        self.uses = {n: self._counted(n) for n in problem.parameters}
        found = choose(problem, self.uses, options_of(problem, option, algorithm), statistics)
        self.choices, self.collinear = found.choices, found.collinear
        self.units = sorted(found.units, key=lambda unit: min(map(self._order, unit.names)))
        self.reads = Reads(self.units)
        names = list(self.choices)
        self.closed = tuple(name for unit in self.units for name in unit.names)
        self.numeric = tuple(n for n in names if self.choices[n].route == "numeric")
        self.gradient = tuple(n for n in names if self.choices[n].route == "gradient")
        self._large = self._many(self.numeric)
        self._rows: Rows | None = None
        climbing = self.numeric if self._large else self.gradient if self._many(self.gradient) and not optim else ()
        if climbing:  # a network: each M-step climbs, a maximum of it is not worth to be found
            self._rows, how = minibatches(problem)
            for name in climbing:
                self.choices[name] = replace(self.choices[name], reason=f"{self.choices[name].reason}; {how}")
        self._count = 0
        self._coupled = bool(self.numeric and self.closed)
        # Where sites stand for groups: the same M-step of single sites, for statistics that the reference made.
        self.single: MStep | None = None
        # What goes on from the maximum of Q to where log p(x|θ) is no lower; not in plain EM (e_step/expansion.py).
        self.expansion: Callable[[Params, Sufficient], Params] | None = None

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters that move."""
        return (*self.closed, *self.numeric, *self.gradient)

    @property
    def is_iterated(self) -> bool:
        """Some parameters are updated by runs of the model."""
        return bool(self.numeric or self.gradient)

    @property
    def separate(self) -> bool:
        """Every moving parameter has a closed form of its own, on the moments of its sites."""
        return not self.is_iterated and self.reads.separate

    def _many(self, names: tuple[str, ...]) -> bool:
        """Too many entries for Newton's method."""
        return sum(self.problem.parameters[n].value.numel() for n in names) > NEWTON_LIMIT

    def _counted(self, name: str) -> tuple[Use, ...]:
        """Uses that enter Q: without priors when they do not count."""
        priors = () if self.problem.with_prior else self.problem.graph.priors
        return tuple(use for use in self.problem.uses[name] if use.site not in priors)

    def _order(self, name: str) -> int:
        return 0 if any(use.slot in LOCATIONS for use in self.uses[name]) else 1

    def score(self, params: Params, expectation: Expectation) -> float:
        """max|∂ objective/∂u| over the parameters that move (Fisher's identity), not divided by N."""
        if (other := self._other(expectation)) is not None:
            return other.score(params, expectation)
        largest = float(self.closed_score(params, opened(expectation)))
        rest = (*self.numeric, *self.gradient)
        if rest:
            block = _block(params, expectation, rest)
            largest = max(largest, _largest(block.slope()))
        return largest

    def closed_score(self, params: Params, sufficient: Sufficient) -> Tensor:
        """The part of `score` of the parameters in closed form, ()."""
        slopes = [unit.slope(params, sufficient).reshape(-1) for unit in self.units]
        found = torch.cat(slopes) if slopes else torch.zeros(1, dtype=torch.float64)
        return found.abs().amax() if found.numel() else found.new_zeros(())

    def _certified(self, slope: Tensor | float, params: Params, sufficient: Sufficient) -> bool:
        """Whether Q is at its maximum in the parameters with closed forms, up to the rounding of its slopes.

        :param slope: max|∂Q/∂u|, of these parameters or of more.
        """
        bound = certificate_bound(params) * self._elements
        if bool(slope <= bound):
            return True
        for unit in self.units:
            rounding = unit.rounding(params, sufficient) if isinstance(unit, Separate) else 0.0
            if bool((unit.slope(params, sufficient).abs() - rounding > bound).any()):
                return False
        return not self.numeric

    def closed_update(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """One round of conditional closed forms, and the parameters of which some entry saw no data."""
        empty: set[str] = set()
        for unit in self.units:
            params, unseen = unit.update(params, sufficient)
            empty |= unseen
        return params, empty

    def closed_map(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """`update` of parameters that all have closed forms, in tensor operations alone; the empty ones with it.

        :raises NotCertified: if rounds of them do not reach the certificate; `update` then goes on by Newton's method.
        """
        empty: set[str] = set()
        for _ in range(MAX_ROUNDS):
            before = params
            params, found = self.closed_update(params, sufficient)
            empty |= found
            if not self._coupled:
                return params, empty - self.collinear
            if self._certified(self.closed_score(params, sufficient), params, sufficient):
                return params, empty - self.collinear
            if all(torch.equal(before[n], params[n]) for n in self.free):
                break
        raise NotCertified

    def expanded(self, params: Params, sufficient: Sufficient) -> Params:
        """The end of an update, of which `closed_map` gives the maximum of Q. The reference has none."""
        none = self.expansion is None or sufficient.spread_of is None
        return params if none else self.expansion(params, sufficient)  # type: ignore[misc]

    def certify(self, params: Params, sufficient: Sufficient) -> None:
        """Whether Q is at its maximum in the parameters with closed forms, after `closed_map`.

        :raises NotCertified: if it is not.
        """
        if not self._certified(self.closed_score(params, sufficient), params, sufficient):
            raise NotCertified

    def diverging(self, params: Params, expectation: Expectation) -> set[str]:
        """Parameters whose maximum is at infinity, as far as an iterate near convergence tells."""
        if (other := self._other(expectation)) is not None:
            return other.diverging(params, expectation)
        blocks = [unit for unit in self.units if isinstance(unit, Newton)]
        found: set[str] = set()
        for block in blocks:
            found |= block.diverging(params, opened(expectation))
        return found

    def at_edge(self, params: Params) -> dict[str, str]:
        """Sites of which an argument has ended at the edge of its space, and the argument."""
        blocks = [unit for unit in self.units if isinstance(unit, Newton)]
        return {site: argument for block in blocks for site, argument in block.at_edge(params).items()}

    @cached_property
    def _elements(self) -> float:
        return num_elements(self.problem)

    @property
    def coupled(self) -> bool:
        """One round of closed forms is not the joint argmax: rounds are repeated, under a certificate."""
        return self._coupled

    def update(self, params: Params, expectation: Expectation) -> tuple[Params, MStepInfo]:
        """θ with Q at its maximum (at a higher value where the route is "gradient").

        :raises DegenerateLikelihoodError: if a variance collapses.
        """
        if (other := self._other(expectation)) is not None:
            return other.update(params, expectation)
        sufficient = opened(expectation)
        self._count += 1
        check = self._coupled or self._count <= 3 or self._count % 10 == 0
        scale = self._elements
        bound = certificate_bound(params)
        certificate, empty, certified = None, set(), True
        rounds = 0
        while rounds < (NUMERIC_ROUNDS if self.numeric else MAX_ROUNDS):
            rounds += 1
            before = params
            params, found = self._round(params, expectation)
            empty |= found
            if not check or self._large or not (self.closed or self.numeric):
                break
            certificate = self._certificate(params, expectation, sufficient) / scale
            certified = self._certified(certificate * scale, params, sufficient)
            if certified or all(torch.equal(before[n], params[n]) for n in self.free):
                break
            self._coupled = True
        if not certified:
            block = _block(params, expectation, (*self.closed, *self.numeric))
            params = maximise(block, tolerance=bound * scale)
            certificate = self._certificate(params, expectation, self._refreshed(params, expectation)) / scale
        if self.gradient:
            block = _block(params, expectation, self.gradient)
            params = self._climbed(block, expectation, STEPS) if not self.optim else ascend_with(block, self.optim)
        params = self.expanded(params, sufficient)
        return params, MStepInfo(rounds, certificate, tuple(sorted(empty - self.collinear)))

    def _other(self, expectation: Expectation) -> MStep | None:
        return None if expectation.sufficient.weight_of is not None else self.single

    def _round(self, params: Params, expectation: Expectation) -> tuple[Params, set[str]]:
        sufficient = expectation.sufficient
        params, empty = self.closed_update(params, sufficient)
        if self.numeric:
            block = _block(params, expectation, self.numeric)
            scale = self._elements
            if self._large:
                return self._climbed(block, expectation, CLIMB), empty
            params = maximise(block, tolerance=0.1 * certificate_bound(params) * scale)
            if self.closed:
                sufficient.take(self._refreshed(params, expectation))
        return params, empty

    def _climbed(self, block: Block, expectation: Expectation, num_steps: int) -> Params:
        """Parameters at which Q is no lower; the rows in parts, if they are many."""
        if self._rows is None or len(block.free()) <= NEWTON_LIMIT:
            return ascend(block, num_steps=num_steps)
        return climb(self._rows, block, expectation.weights, num_steps=num_steps, optimiser=self.optim or adam)

    def _refreshed(self, params: Params, expectation: Expectation) -> Sufficient:
        if expectation.sufficient.at is not None:
            return expectation.sufficient.at(params)
        weights = expectation.weights  # before the problem: see `_block`
        problem = expectation.sufficient.problem
        with torch.no_grad():
            run = problem.run(params)
        moments_of = moments_by_weight(problem, run, weights)
        fresh = Sufficient(problem, run.sites, raw_arguments(run.sites), moments_of)
        fresh.posterior = expectation.sufficient.posterior
        return fresh

    def _certificate(self, params: Params, expectation: Expectation, sufficient: Sufficient) -> float:
        largest = float(self.closed_score(params, sufficient))
        if self.numeric:
            largest = max(largest, _largest(_block(params, expectation, self.numeric).slope()))
        return largest


def _block(params: Params, expectation: Expectation, names: tuple[str, ...]) -> Block:
    """Q in some parameters. The weights come first: an engine that has none makes them, and leaves in the statistics
    the problem with its continuous latents at the atoms that the weights belong to."""
    weights = expectation.weights
    return Block.of_q(expectation.sufficient.problem, params, weights, names)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
