"""Which parameter is served by which rule: an ordered choice, made once from the structure and explained by the plan.

1. linear solve     affine locations of normal sites, with all that share them
2. closed form      the sum of the kernels of its uses has an argmax; weighted medians
3. Newton           everything else behind linear predictors or taken entry by entry, with the closed forms of the
                    same density (the rate of a Gamma whose concentration is free: rounds would be slow)
4. composed         functions of several parameters that make one argument: diag(τ) L, σ² ρ^|i-j| (Newton)
5. numeric          what is opaque: networks (in minibatches of many rows), unknown families
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_em.e_step.base import Expectation
from pyro_em.errors import InputError, Refusal
from pyro_em.m_step.closed import NotClosed
from pyro_em.m_step.composed import Composed, composed_blocks
from pyro_em.m_step.kinks import kinked
from pyro_em.m_step.linear import is_linear, linear_blocks
from pyro_em.m_step.median import RULE, Median, is_laplace_location, is_median
from pyro_em.m_step.newton import Newton, is_newton, newton_blocks
from pyro_em.m_step.numeric import NEWTON_LIMIT
from pyro_em.m_step.responses import not_completed
from pyro_em.m_step.separate import Separate
from pyro_em.m_step.states import state_blocks
from pyro_em.m_step.unit import Unit
from pyro_em.model.compat import with_dims
from pyro_em.model.counting import num_rows
from pyro_em.model.slicing import rows_like_others
from pyro_em.model.trace import Run
from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors, SiteMoments, expected_moments
from pyro_em.sufficient import MomentsOf, Sufficient, raw_arguments
from pyro_em.types import Params

Route = Literal["closed", "newton", "numeric", "gradient", "fixed", "unused"]
Uses = Mapping[str, tuple[Use, ...]]
# Bounds on max|∂Q/∂u| / N after an update; parameters kept in float32 are rounded, and Q is flat to their rounding.
CERTIFICATE, CERTIFICATE_FLOAT32 = 1e-10, 1e-4
OPTIONS = ("auto", "closed", "gradient", "fixed")


@dataclass(frozen=True)
class Choice:
    """How one parameter is updated, and why."""

    route: Route
    reason: str


@dataclass(frozen=True)
class Choices:
    """The choice for every parameter, the units that it needs, and parameters that the design cannot tell apart."""

    choices: dict[str, Choice]
    units: list[Unit]
    collinear: set[str]


def options_of(problem: Problem, option: Any, algorithm: str) -> dict[str, str]:
    """What the caller asks for each parameter.

    :raises InputError: for an unknown parameter or option.
    """
    wanted: dict[str, str] = {}
    default = "gradient" if algorithm == "gem" and option == "auto" else option
    if isinstance(option, Mapping):
        unknown = [name for name in option if name not in problem.parameters]
        if unknown:
            known = ", ".join(problem.parameters)
            raise InputError(f"m_step: the model has no parameter '{unknown[0]}'. Its parameters: {known}.")
        wanted, default = dict(option), "gradient" if algorithm == "gem" else "auto"
    for value in (default, *wanted.values()):
        if value not in OPTIONS:
            raise InputError(f"m_step: '{value}' is none of {', '.join(OPTIONS)}.")
    return {name: wanted.get(name, default) for name in problem.parameters}


def choose(problem: Problem, uses: Uses, options: Mapping[str, str], statistics: Sufficient | None = None) -> Choices:
    """The rules of all parameters.

    :param uses: those that count in Q.
    :param statistics: of an E-step at the start, if an engine has made one; else the data without latents are passed.
    :raises Refusal: if a closed form is asked for where there is none, or none can be had where it is needed.
    """
    run = problem.first
    if statistics is None:
        unweighted = problem.continuous is None and all(info.weight is None for info in problem.graph.factors.values())
        statistics = opened(_uniform(problem, rows_like_others(run) if unweighted else run))
    choices = {n: _told(uses[n], own) for n, own in options.items() if own in ("fixed", "gradient") or not uses[n]}
    units: list[Unit] = []
    collinear: set[str] = set()
    for linear in linear_blocks(problem, run, _not_moved_otherwise(problem, run, uses, set(options) - set(choices))):
        unidentified = linear.unidentified(problem.start, statistics)
        collinear |= unidentified
        units.append(linear)
        choices |= {name: Choice("closed", linear.rule(name, run, unidentified)) for name in linear.names}
    for states in state_blocks(problem, run.sites, {n: uses[n] for n in options if n not in choices}):
        units.append(states)
        choices |= dict.fromkeys(states.names, Choice("closed", states.rule()))
    for name in [n for n in options if n not in choices and is_median(uses[n], run)]:
        units.append(Median(problem, name, uses[name]))
        choices[name] = Choice("closed", RULE)
    closed: dict[str, tuple[Separate, Choice]] = {}
    rest: dict[str, Choice] = {}
    for name in [n for n in options if n not in choices]:
        unit = Separate(problem, name, uses[name])
        try:
            rule = unit.combined(problem.start[name].detach().double(), statistics).rule
            closed[name] = unit, Choice("closed", rule)
        except NotClosed as error:
            if options[name] == "closed":
                raise Refusal(
                    uses[name][0].site,
                    f"parameter '{name}' has no closed-form M-step: {error}.",
                    "use m_step='auto', which maximises Q numerically for it.",
                ) from error
            rest[name] = Choice("numeric", str(error))
    movable = [n for n in closed if options[n] == "auto"]
    for newton in _newton(problem, run, uses, list(rest), movable):
        units.append(newton)
        choices |= {name: Choice("newton", newton.rule(name, run)) for name in newton.names}
    for name, (unit, choice) in closed.items():
        if name not in choices:
            units.append(unit)
            choices[name] = choice
    for block in _composed(problem, run, uses, choices, rest, closed):
        units = [unit for unit in units if not set(unit.names) <= set(block.names)] + [block]
        choices |= {name: Choice("newton", block.rule(name)) for name in block.names}
    choices = {name: choices.get(name) or rest[name] for name in options}
    numeric = [name for name, choice in choices.items() if choice.route == "numeric"]
    for left, reason in not_completed(units, numeric, uses, run.sites):
        units.remove(left)
        choices |= {name: Choice("numeric", reason) for name in left.names}
    for name, choice in choices.items():
        median = next((u.site for u in uses[name] if is_laplace_location(u, run)), None)
        if median is not None and choice.route in ("newton", "numeric"):
            raise Refusal(
                median,
                f"parameter '{name}' enters the location of a Laplace density, which has a kink at every datum: its "
                "M-step is a weighted median only where the location is the parameter itself, without a prior.",
                f"use m_step={{'{name}': 'gradient'}}, which only climbs, or a StudentT density.",
            )
    bent = sorted(kinked({n: uses[n] for n in rest if choices[n].route == "numeric"}, run.sites))
    if bent and sum(problem.parameters[n].value.numel() for n in rest if choices[n].route == "numeric") > NEWTON_LIMIT:
        raise Refusal(
            bent[0],
            "its Laplace prior has a kink, at which L-BFGS does not converge, and so many parameters have no other "
            f"M-step ({choices[bent[0]].reason}).",
            f"use a Normal or StudentT prior, or m_step={{'{bent[0]}': 'gradient'}}, which only climbs.",
        )
    return Choices(choices, units, collinear)


def _told(uses: tuple[Use, ...], option: str) -> Choice:
    if option == "fixed":
        return Choice("fixed", "as told")
    if not uses:
        return Choice("unused", "nothing that counts depends on it; it keeps its value")
    return Choice("gradient", "gradient M-step, as told")


def _not_moved_otherwise(problem: Problem, run: Run, uses: Uses, names: set[str]) -> Uses:
    """Uses of parameters that enter no location together with one that Newton moves: such a one takes them along."""
    kept = [n for n in problem.parameters if n in names]
    curved = {n for n in kept if not is_linear(n, uses[n], problem, run.sites)}
    while True:
        places = {_place(u) for n in curved if is_newton(uses[n], run) for u in uses[n] if u.predictor is not None}
        more = {n for n in kept if n not in curved and places & set(map(_place, uses[n]))}
        if not more:
            return {n: uses[n] for n in kept if n not in curved}
        curved |= more


def _place(use: Use) -> tuple[str, str]:
    return use.site, use.slot


def _newton(problem: Problem, run: Run, uses: Uses, rest: list[str], closed: list[str]) -> list[Newton]:
    served = {n for n in rest if is_newton(uses[n], run)}
    sites = {use.site for n in served for use in uses[n] if use.slot != VALUE}
    served |= {n for n in closed if any(use.site in sites for use in uses[n]) and is_newton(uses[n], run)}
    tolerance = 0.1 * certificate_bound(problem.start) * num_elements(problem)
    return newton_blocks(problem, run, {n: uses[n] for n in problem.parameters if n in served}, tolerance)


def _composed(
    problem: Problem,
    run: Run,
    uses: Uses,
    choices: Mapping[str, Choice],
    rest: Mapping[str, Choice],
    closed: Mapping[str, tuple[Separate, Choice]],
) -> list[Composed]:
    left = {name for name in rest if name not in choices}
    if not left:
        return []
    tolerance = 0.1 * certificate_bound(problem.start) * num_elements(problem)
    # Only what is moved by no rule: an argument that a closed form moves too is a matter of rounds.
    elsewhere = {u.site for n in choices if n not in closed for u in uses[n] if u.slot != VALUE}
    return composed_blocks(problem, run, uses, left, elsewhere, tolerance)


def opened(expectation: Expectation) -> Sufficient:
    """The statistics of an E-step, with the way to its posterior weights for the units that need them.

    No cycle of references: what the E-step has made is gone with it, not when the next cycles are looked for.
    """
    expectation.sufficient.posterior = expectation.posterior
    return expectation.sufficient


def num_elements(problem: Problem) -> float:
    """Elements of the data plates, or steps of longer series: the rounding of ∂Q/∂u grows with them."""
    graph = problem.graph
    return max(graph.num_observations, *(loop.loop.steps for loop in graph.loops), num_rows(graph, problem.capture))


def certificate_bound(params: Params) -> float:
    """Bound on the certificate."""
    double = all(value.dtype == torch.float64 for value in params.values())
    return CERTIFICATE if double else CERTIFICATE_FLOAT32


def moments_by_weight(problem: Problem, run: Run, weights: Posteriors) -> MomentsOf:
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
    sufficient = Sufficient(problem, run.sites, raw_arguments(run.sites), moments_by_weight(problem, run, weights))
    return Expectation(0.0, 0.0, 0.0, sufficient, lambda: weights)
