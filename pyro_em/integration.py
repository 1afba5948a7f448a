"""Is a log-likelihood that was integrated numerically as accurate as its rules promise?

Adaptive rules double their nodes (evidence/quadrature.py), fixed grids halve their spacing, at given parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyro_em.distributions.grid import GridNormal
from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.plated import log_likelihood
from pyro_em.errors import InputError, Refusal
from pyro_em.evidence.grids import refined
from pyro_em.evidence.quadrature import QuadratureRoute
from pyro_em.model.compat import base_distribution
from pyro_em.problem import Problem
from pyro_em.types import Params


@dataclass(frozen=True)
class NumericalError:
    """`size` is that of the log-likelihood, 0 where nothing is integrated numerically; `notes` says it in words."""

    size: float = 0.0
    notes: tuple[str, ...] = ()


def adaptive_routes(problem: Problem) -> list[QuadratureRoute]:
    """Routes of adaptive nodes. Where one is `due`, the next E-step of the reference finds its error."""
    routes = () if problem.continuous is None else problem.continuous.routes
    return [route for route in routes if isinstance(route, QuadratureRoute)]


def numerical_error(problem: Problem, params: Params, known: bool = False) -> NumericalError:
    """The error of the log-likelihood at `params`.

    :param known: that of adaptive nodes has just been found there.
    :raises Refusal: if it exceeds the tolerance of a rule.
    :raises InputError: for the rule of a site that the model does not have.
    """
    if not problem.rules:
        return NumericalError()
    fixed = {name: rule for name, rule in problem.rules.items() if not rule.adaptive}
    for name in fixed:
        site = problem.capture.sites.get(name)
        if site is None or not isinstance(base_distribution(site.fn), GridNormal):
            raise InputError(f"e_step: the model has no continuous latent '{name}'.")
    routes = adaptive_routes(problem)
    if routes and not known:
        for route in routes:
            route.due = True
        problem.evidence(params)
    notes = [_sentence(route.latents.names, route.error) for route in routes]
    size = sum((route.error for route in routes), 0.0)
    if fixed:
        coarse = _log_likelihood(problem, params)
        with refined():
            fine = _log_likelihood(problem, params)
        error, first = abs(fine - coarse), next(iter(fixed))
        allowed = min(rule.tolerance for rule in fixed.values()) * (1.0 + abs(coarse))
        if not error <= allowed:
            count = fixed[first].num_nodes
            raise Refusal(
                first,
                f"a fixed grid of {count} nodes leaves an error of {error:.1e} in the log-likelihood (found by halving "
                f"its spacing), more than the tolerance allows ({allowed:.1e}).",
                f"use num_nodes={2 * count - 1}, or adaptive nodes.",
            )
        notes.append(_sentence(tuple(fixed), error))
        size += error
    return NumericalError(size, tuple(notes))


def _log_likelihood(problem: Problem, params: Params) -> float:
    try:
        return log_likelihood(problem, params)
    except NotCompiled:
        return float(problem.evidence(params)[0].log_likelihood)


def _sentence(names: tuple[str, ...], error: float) -> str:
    return (
        f"{', '.join(map(repr, names))} integrated numerically; error of the log-likelihood by doubling the nodes "
        f"{error:.1e}."
    )
