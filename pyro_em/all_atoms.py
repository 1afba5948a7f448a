"""Problems of which the tables at all atoms of the continuous latents are large: these are made where they are needed.

Atoms have the moments of the latents' posterior (evidence/elimination.py): one more than the effects that couple the
elements, each of which is a table of the size of the data. Compiled engines and log-likelihoods need none, so that a
problem is bound with two of them where all would be large (`GaussianRoute.few`).
"""

from __future__ import annotations

import dataclasses

from pyro_em.errors import NonFiniteError
from pyro_em.evidence.elimination import Route, atoms_of
from pyro_em.evidence.gaussian import GaussianRoute
from pyro_em.problem import Problem


def has_few_atoms(problem: Problem) -> bool:
    """Some continuous latents stand at atoms without the moments of their posterior."""
    routes = () if problem.continuous is None else problem.continuous.routes
    return any(isinstance(route, GaussianRoute) and route.few for route in routes)


def with_all_atoms(problem: Problem) -> Problem:
    """The same problem, whose E-steps give the atoms that Q needs.

    :raises ResourceError: if the tables of its sites would be too large.
    """
    continuous = problem.continuous
    if continuous is None or not has_few_atoms(problem):
        return problem
    routes: list[Route] = []
    for latents, route in zip(continuous.sets, continuous.routes, strict=True):
        if isinstance(route, GaussianRoute) and route.few:
            route = route.whole(max(problem.capture.sites[name].value.numel() for name in latents.factors))
        routes.append(route)
    whole = dataclasses.replace(continuous, routes=tuple(routes))
    values = atoms_of(whole.eliminate(problem.start))
    return dataclasses.replace(problem, continuous=dataclasses.replace(whole, values=values))


def with_atoms_at_start(problem: Problem) -> Problem:
    """The same problem, whose continuous latents stand at the atoms of their posterior at the start.

    Problems are bound at others where an engine may tell all that is asked of these (`Continuous.sketch`).
    """
    continuous = problem.continuous
    if continuous is None or not continuous.sketch:
        return problem
    try:
        values = atoms_of(continuous.eliminate(problem.start))
    except NonFiniteError:  # one of several sets, at a start that the caller may have replaced
        return problem
    return dataclasses.replace(problem, continuous=dataclasses.replace(continuous, values=values, sketch=False))
