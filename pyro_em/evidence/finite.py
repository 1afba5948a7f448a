"""An evidence that is not finite, explained: which site, which rows, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.errors import NonFiniteError
from pyro_em.evidence.discrete import Evidence, contract
from pyro_em.evidence.forward import filtered
from pyro_em.evidence.ring import LogDensityRing
from pyro_em.evidence.timed import potentials
from pyro_em.model.compat import detached, dims_of
from pyro_em.model.data import outside_of_space
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.trace import SiteRecord


def check_finite(
    graph: FactorGraph,
    evidence: Evidence,
    factors: Mapping[str, Tensor],
    sites: Mapping[str, SiteRecord],
    with_prior: bool = True,
) -> Evidence:
    """The evidence itself.

    :param sites: of the run that gave the factors.
    :param with_prior: priors count; otherwise a parameter may lie where its prior's density is zero.
    :raises NonFiniteError: if a log-density is NaN or +infinite, or an observation has density zero.
    """
    if bool(evidence.log_likelihood.isfinite()) and (bool(evidence.log_prior.isfinite()) or not with_prior):
        return evidence
    for name, factor in factors.items():
        if bool(factor.isnan().any()) or bool((factor == torch.inf).any()):
            site = sites.get(name)
            raise NonFiniteError(name, _no_mode(name, site) if name in graph.priors else _no_density(name, site))
    for term, component in zip(evidence.terms, graph.components, strict=True):
        if bool((term == -torch.inf).any()):
            name, term = _first_site(graph, component, factors, term)
            raise NonFiniteError(name, _impossible(graph, term, name, _step(graph, component, factors)))
    for name in (*graph.constants, *graph.priors):
        if bool((factors[name] == -torch.inf).any()):
            raise NonFiniteError(name, _impossible(graph, detached(factors[name]), name))
    raise NonFiniteError("", "The log-likelihood is not finite, though every factor is.")


def is_unbounded(fn: Any) -> bool:
    """Whether a distribution is one of real numbers: its density grows without limit only as its spread goes to 0."""
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def spread_to_zero(name: str) -> tuple[str, str]:
    """Why a prior whose spread is free has no mode with its parameter, and what to do."""
    return (
        f"the spread of the prior of '{name}' is a free parameter itself and has gone to 0, with '{name}' at the "
        "prior's center: there the log posterior rises without limit, whatever the data, so that it has no maximum.",
        f"integrate this site out (roles={{'{name}': 'latent'}}), which leaves the spread a maximum, fix the spread, "
        "or give it a prior that vanishes at 0 faster than any power (InverseGamma or LogNormal).",
    )


def _no_mode(name: str, site: SiteRecord | None) -> str:
    """Why the density of a prior is infinite."""
    if site is not None and is_unbounded(site.fn):
        reason, remedy = spread_to_zero(name)
        return f"Site '{name}': {reason} Remedy: {remedy}"
    return (
        f"Site '{name}': its density is infinite or NaN at the parameter's value, which has moved to the edge of its "
        "space. A Dirichlet, Beta or Gamma prior with a concentration below 1 has no mode inside: the log posterior "
        "rises without limit where an entry goes to 0. Use concentrations of at least 1, or integrate this site out "
        f"(roles={{'{name}': 'latent'}})."
    )


def _no_density(name: str, site: SiteRecord | None) -> str:
    """Why a log-density is NaN or +infinite: the argument that has left its space, if one has."""
    outside = None if site is None else outside_of_space(site.fn, site.arguments or {})
    why = outside or "A parameter has left its space, a component has collapsed, or the data are not finite."
    return f"Site '{name}': its log-density is NaN or +infinite: {why}"


def _first_site(
    graph: FactorGraph, component: Component, factors: Mapping[str, Tensor], term: Tensor
) -> tuple[str, Tensor]:
    """The first site in program order with which the data are impossible, and log Z of the sites so far.

    Found by bisection: sites that are still to come sum to one, and what is impossible stays so.
    """
    if component.loops:  # its sites are of many steps at once; `_step` tells which
        blocking = [n for n in component.factors if bool((factors[n] == -torch.inf).any())]
        return (blocking or component.factors)[-1], term
    possible, impossible = 0, len(component.factors)
    while impossible - possible > 1:
        middle = (possible + impossible) // 2
        names = component.factors[:middle]
        symbols = component.symbols & set("".join(dims_of(factors[name]) for name in names))
        found = detached(contract(graph, replace(component, factors=names, symbols=symbols), factors))
        if bool((found == -torch.inf).any()):
            impossible, term = middle, found
        else:
            possible = middle
    return component.factors[impossible - 1], term


def _step(graph: FactorGraph, component: Component, factors: Mapping[str, Tensor]) -> str:
    """At which step of a loop over time the first chain that is impossible ends."""
    for loop in component.loops:
        own = potentials(graph, loop, factors, LogDensityRing("sum", names=graph.symbol_sites), component.symbols)
        _, evidences = filtered(own.start, own.unary, own.pair)
        ends = (evidences == -torch.inf).any(1).nonzero()
        if len(ends):
            return f", from step {int(ends[0]) + loop.loop.history - 1} on,"
    return ""


def _impossible(graph: FactorGraph, term: Tensor, name: str, step: str = "") -> str:
    rows = (term == -torch.inf).nonzero().tolist()
    plates = [graph.plate_names[d] for d in dims_of(term)]
    shown = ", ".join(str(row[0]) if len(row) == 1 else str(tuple(row)) for row in rows[:5])
    where = f" in rows {shown}{' ...' if len(rows) > 5 else ''} of plate {plates}" if plates else ""
    return (
        f"Site '{name}': the data{where}{step} have probability zero under the parameters (a probability or rate "
        "that is exactly 0 meets an observation that needs it, or labels contradict each other or leave no "
        "state). Change the starting values or the structural zeros, or check these rows."
    )
