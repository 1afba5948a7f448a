"""n of BIC: how many rows of data a model has, a series counting each step at which it is seen.

    n = Σ over components: elements of their plates,
        for series: max over their observed sites y_t of Σ_t Σ_elements multiplicity (weights, masks)

The steps of a series are its observations (Zucchini, MacDonald and Langrock 2016, section 6.1), however its loop is
written, so that one series of T steps has n = T and not 1. The stopping rule divides by `FactorGraph.num_observations`
instead, the number of independent terms of log p(x), for which a series is one.

Sites of a `pyro.markov` loop are told to be one site at several steps by their names, which differ in numbers only.
"""

from __future__ import annotations

import math
import re

from pyro_em.model.capture import Capture
from pyro_em.model.compat import dims_of
from pyro_em.model.graph import Component, FactorGraph


def num_rows(graph: FactorGraph, capture: Capture) -> float:
    """n; without series `FactorGraph.num_observations`."""
    series = [_series(component, graph, capture) for component in graph.components]
    if not any(series):
        return graph.num_observations
    others = [c for c, own in zip(graph.components, series, strict=True) if not own]
    total = sum(graph.elements(component.root) for component in others)
    for component, own in zip(graph.components, series, strict=True):
        by_template: dict[str, float] = {}
        for name in own:
            template = re.sub(r"\d+(:\d+)?", "{}", name)
            by_template[template] = by_template.get(template, 0.0) + _count(name, component, graph)
        total += max(by_template.values(), default=0.0)
    return total


def _series(component: Component, graph: FactorGraph, capture: Capture) -> list[str]:
    """Observed sites of the component inside of a loop over time."""
    found = [name for name in component.factors if name in capture.sites and capture.sites[name].observed]
    return [name for name in found if capture.sites[name].markov]


def _count(name: str, component: Component, graph: FactorGraph) -> float:
    """Steps and elements at which a site is seen; plates inside of a step are one observation."""
    info = graph.factors[name]
    rows = component.root | {loop.plate for loop in component.loops}
    sizes = {d: graph.plate_sizes[d] for d in info.plates & rows}
    if info.weight is None:
        return float(math.prod(sizes.values()))
    weight, dims = info.weight, dims_of(info.weight)
    inner = [i for i, d in enumerate(dims) if d not in sizes]
    if inner:
        weight = weight.amax(inner)
    return float(weight.double().sum()) * math.prod(n for d, n in sizes.items() if d not in dims)
