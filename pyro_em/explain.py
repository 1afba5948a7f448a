"""Builds the `Plan` of a problem: the choices that the E-step and M-step made, in words."""

from __future__ import annotations

import math

from pyro_em.e_step.base import Engine
from pyro_em.evidence.integrated import has_states
from pyro_em.m_step.auto import MStep
from pyro_em.model.compat import base_distribution
from pyro_em.model.folding import chain_rows, folds_of
from pyro_em.model.plan import Plan, Row
from pyro_em.model.resources import predicted_bytes
from pyro_em.problem import Problem

OBJECTIVES = {
    "cem": "log p(x,z|θ) at the most probable z (the classification log-likelihood)",
    "sem": "log p(x|θ) on average, with no claim for a single step",
}


def explain(
    problem: Problem,
    m_step: MStep,
    engine: Engine,
    algorithm: str,
    annealed: bool = False,
    remarks: tuple[str, ...] = (),
) -> Plan:
    """The plan of an exact algorithm; `remarks` go to its notes."""
    e_rows, m_rows, notes = [], [], list(remarks)
    graph = problem.graph
    for name, role in problem.roles.items():
        site = problem.capture.sites[name]
        family = type(base_distribution(site.fn)).__name__
        plates = ", ".join(f"{plate.name}={plate.size}" for plate in site.plates)
        if role.role == "data":
            inside = ", its states integrated out by a Kalman filter" if has_states(site.fn) else ""
            where = f" in plates {plates}" if plates else ""
            e_rows.append(Row(name, "data", "observed", family + where + inside))
        elif role.role == "latent" and not site.enumerable:
            assert problem.continuous is not None
            number = problem.continuous.set_of(name)
            assert number is not None
            own = problem.continuous.routes[number]
            reason = f"{family}" + (f" in plates {plates}" if plates else "") + f", {own.reason}, {own.cost}"
            e_rows.append(Row(name, "latent", own.name, f"{reason}; {role.reason}"))
        elif role.role == "latent":
            elements = math.prod(plate.size for plate in site.plates)
            reason = f"{family}, {site.num_states} states x {elements} elements{_read_by(problem, name)}; {role.reason}"
            e_rows.append(Row(name, "latent", "enumerate", reason))
        for fold in folds_of(problem.model):
            if fold.site == name:
                e_rows += [Row(latent, "latent", "Kalman", own) for latent, own in chain_rows(fold)]
        if role.role == "parameter":
            counted = "its prior counts" if problem.with_prior else f"its prior is ignored by '{algorithm}'"
            # Random effects written as e ~ N(0, 1), scaled elsewhere, look the same as priors of component means.
            other = f'; roles={{"{name}": "latent"}} integrates it out, where that is exact' if site.plates else ""
            notes.append(f"'{name}' is a parameter ({role.reason}); {counted}{other}.")
        if role.override and role.role == "latent":
            notes.append(f"'{name}' is taken as latent ({role.reason}); {role.override}.")
    for name, record in problem.parameters.items():
        choice = m_step.choices[name]
        kind = {"param": "pyro.param", "module": "module", "sample": "pyro.sample"}[record.kind]
        m_rows.append(Row(name, kind, choice.route, choice.reason))
    for component in graph.components:
        shared = [graph.plate_names[d] for d in component.root]
        latents = [graph.symbol_sites[s] for s in component.symbols if s in graph.symbol_sites]
        if len(latents) > 1 and len(latents) <= 6:
            notes.append(
                f"latents {', '.join(repr(x) for x in sorted(latents))} are summed out jointly"
                + (f" within each element of {', '.join(sorted(shared))}" if shared else "")
                + "."
            )
    objective = "log p(x|θ) + log p(θ)" if problem.with_prior else OBJECTIVES.get(algorithm, "log p(x|θ)")
    if annealed:
        notes.append("updates at other temperatures than 1 run the model (reference path); then ordinary EM goes on.")
    return Plan(
        algorithm=algorithm,
        exact=algorithm not in OBJECTIVES,
        objective=objective,
        e_step=tuple(e_rows),
        m_step=tuple(m_rows),
        predicted_bytes=predicted_bytes(problem.capture),
        engine=f"{engine.name} ({engine.reason})" if engine.reason else engine.name,
        notes=tuple(notes),
    )


def _read_by(problem: Problem, latent: str) -> str:
    """Sites of other plates that read the latent by an index, in words."""
    plates = {plate.name for plate in problem.capture.sites[latent].plates}
    for indexed in problem.indexed.latents if problem.indexed is not None else ():
        if indexed.name == latent:
            sites = [n for n in problem.capture.sites if n in indexed.readers | indexed.through]
            outside = [n for n in sites if not plates <= {p.name for p in problem.capture.sites[n].plates}]
            return f", read by an index from the rows of {', '.join(map(repr, outside))} (long format)"
    return ""
