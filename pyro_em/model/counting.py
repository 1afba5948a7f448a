"""n of BIC: how many rows of data a model has, a series counting each step at which it is seen.

    n = Σ over components: elements of their plates,
        for series: max over their observed sites y_t of Σ_t Σ_elements multiplicity (weights, masks)
                for a site that is a series itself (GaussianHMM): Σ_elements weight · number of steps with data

The steps of a series are its observations (Zucchini, MacDonald and Langrock 2016, section 6.1), however its loop is
written, so that one series of T steps has n = T and not 1. The stopping rule divides by `FactorGraph.num_observations`
instead, the number of independent terms of log p(x), for which a series is one.

Sites of a `pyro.markov` loop are told to be one site at several steps by their names, which differ in numbers only.
"""

from __future__ import annotations

import math
import re

from pyro_em.families import family_for
from pyro_em.model.capture import Capture
from pyro_em.model.compat import base_distribution, dims_of, pack
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.packing import align


def num_rows(graph: FactorGraph, capture: Capture) -> float:
    """n; without series `FactorGraph.num_observations`."""
    series = [_series(component, graph, capture) for component in graph.components]
    whole = [n for n in (*graph.constants, *(n for c in graph.components for n in c.factors)) if _is_series(n, capture)]
    if not any(series) and not whole:
        return graph.num_observations
    others = [c for c, own in zip(graph.components, series, strict=True) if not own and not set(whole) & set(c.factors)]
    total = sum(graph.elements(component.root) for component in others)
    total += max((_steps(name, graph, capture) for name in whole), default=0.0)
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


def _is_series(name: str, capture: Capture) -> bool:
    """Whether the site's distribution is a chain with its states inside; the first of its event dims are steps."""
    site = capture.sites.get(name)
    if site is None or not site.observed:
        return False
    family = family_for(base_distribution(site.fn))
    return family is not None and family.integrates and site.fn.event_dim == 2


def _steps(name: str, graph: FactorGraph, capture: Capture) -> float:
    """Steps at which a series has data, NaN being none, over all elements of its plates."""
    site, info = capture.sites[name], graph.factors[name]
    seen = (~site.value.isnan()).any(-1).double().sum(-1).expand(site.fn.batch_shape)
    if info.weight is None:
        return float(seen.sum())
    symbols = {p.dim: d for d in info.plates for p in site.plates if graph.plate_names[d] == p.name}
    packed = pack(seen, symbols)
    dims = "".join(dict.fromkeys(dims_of(packed) + dims_of(info.weight)))
    return float((align(packed, dims) * align(info.weight, dims)).sum())


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
