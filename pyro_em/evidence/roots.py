"""Over which plates log p(x) of a component with continuous latents is a sum of terms.

A set of continuous latents that is integrated out stands in the place of its factors, with the plates over which its
evidence is a sum (elimination.py): the rows of `b[subject]` lie in a plate of their own, yet the subjects are
independent. Rows that read the latents by an index are nested in these plates (model/nests.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pyro_em.errors import Refusal
from pyro_em.evidence.assembly import Reading
from pyro_em.evidence.columns import Index
from pyro_em.evidence.elimination import Continuous, LatentSet, Route
from pyro_em.evidence.quadrature import QuadratureRoute
from pyro_em.model.compat import dims_of
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.nested import merged, nests_of
from pyro_em.model.trace import Run


def rerooted(graph: FactorGraph, continuous: Continuous, run: Run) -> FactorGraph:
    """The graph with these plates, and the nests of its rows.

    :param run: of the model at atoms.
    """
    components = []
    for component in graph.components:
        inside = [
            (s, r) for s, r in zip(continuous.sets, continuous.routes, strict=True) if s.symbol in component.symbols
        ]
        if inside:
            component = _with_nests(component, inside, run, graph)
            gone = {name for latents, _ in inside for name in latents.factors}
            rest = [graph.factors[name].plates for name in component.factors if name not in gone]
            plates = [component.ordinal(own) for own in (*rest, *(route.plates for _, route in inside))]
            component = dataclasses.replace(component, root=component.root | frozenset.intersection(*plates))
        if len(inside) == 1 and component.weight is not None:
            latents, route = inside[0]
            if component.symbols == {latents.symbol} and not set(dims_of(component.weight)) <= route.plates:
                raise Refusal(
                    latents.names[0],
                    "weights were given for a plate whose elements it couples, so that a weighted log-evidence is "
                    "not defined.",
                    "give the weights for a plate of which all sites read their own elements only.",
                )
        components.append(component)
    return dataclasses.replace(graph, components=tuple(components))


def _with_nests(component: Component, inside: list[tuple[LatentSet, Route]], run: Run, graph: FactorGraph) -> Component:
    """Rows that read the continuous latents, nested in the plates of these."""
    if not any(symbol in graph.symbol_sites for symbol in component.symbols):
        return component  # nothing else is connected with the set
    nests = dict(component.nests)
    for latents, route in inside:
        for name, index in _indices(route).items():
            if index is not None and route.plates:
                nests = merged(nests, nests_of(run.sites[name], run.sites[latents.names[0]], index))
    return dataclasses.replace(component, nests=nests)


def _indices(route: Route) -> Mapping[str, Index]:
    """Element that each row of a factor reads, by site."""
    if isinstance(route, QuadratureRoute):
        return route.layout.rows
    readings: tuple[Reading, ...] = getattr(route, "readings", ())
    return {reading.site: reading.index for reading in readings}
