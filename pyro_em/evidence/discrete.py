"""Exact evidence of discrete latents, and every factor's posterior weights, from one backward pass.

With log-factors ℓ_f and log Z = log Σ_z exp Σ_f ℓ_f, the gradient ∂log Z/∂ℓ_f is the posterior weight of
every configuration of factor f, pairwise and higher ones included: no forward-backward recursion is
written for any model. Components are contracted by `pyro.ops.contract.contract_tensor_tree` over the
ring of ring.py; loops over time whose steps were run together enter it as one factor each (timed.py).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from pyro_em import settings
from pyro_em.errors import Refusal
from pyro_em.evidence.elimination import Eliminated
from pyro_em.evidence.ring import Elimination, LogDensityRing
from pyro_em.evidence.timed import loop_factor
from pyro_em.model.compat import detached, dims_of, with_dims
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.packing import align

Packed = Mapping[str, Tensor]


@dataclass(frozen=True)
class Evidence:
    """log p(x|θ) and the posterior weights behind it.

    `terms[i]` is log Z of component i over its root plates, unweighted; `weights[site]` the posterior
    weights of the site's factor (packed like the factor); `log_likelihood` is weighted and scaled,
    accumulated in float64; `log_prior` is log p(θ) of the parameter-role sites; `magnitude` is Σ|ll_n|, the
    scale of rounding in `log_likelihood`. `parts` are the sets of continuous latents,
    integrated out, `states` the posterior weights of the discrete states (and plates) in the evidence of each.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    magnitude: Tensor
    terms: tuple[Tensor, ...]
    weights: dict[str, Tensor]
    parts: tuple[Eliminated, ...] = ()
    states: tuple[Tensor, ...] = ()


def contract(graph: FactorGraph, component: Component, factors: Packed, elimination: Elimination = "sum") -> Tensor:
    """Eliminate the latents of one component; the result is packed over its root plates."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    ring = LogDensityRing(
        elimination,
        names=graph.symbol_sites,
        max_bytes=settings.max_table_bytes,
        nests=component.nests,
        sizes=graph.plate_sizes,
    )
    chained: set[str] = set()
    for loop in component.loops:
        chained |= {*loop.heads, *loop.rest}
        shared, term = loop_factor(graph, loop, factors, ring, component.symbols)
        tree.setdefault(shared, []).append(term)
    for name in component.factors:
        if name not in chained:
            tree.setdefault(component.ordinal(graph.factors[name].plates), []).append(factors[name])
    outside = component.symbols - {graph.factors[name].symbol for name in chained}
    try:
        # A component of continuous latents alone has been integrated out already.
        contracted = contract_tensor_tree(tree, set(outside), ring=ring) if component.symbols else tree
    except NotImplementedError as error:
        plates = sorted({graph.plate_names[p] for name in component.factors for p in graph.factors[name].plates})
        raise Refusal(
            component.factors[-1],
            f"its latents are coupled across the crossing plates {plates}; exact elimination would be "
            "exponential in their sizes.",
            "write one of the plates as a Python loop if it is small, or use algorithm='svi'.",
        ) from error
    total: Tensor | None = None
    for terms in contracted.values():
        for term in terms:
            term = ring.product(term, set(dims_of(term)) - component.root)
            kept = dims_of(term)
            if total is None:
                total = term
            else:
                union = "".join(dict.fromkeys(dims_of(total) + kept))
                total = with_dims(align(total, union) + align(term, union), union)
    assert total is not None
    return total


def weighted_sum(x: Tensor, weight: Tensor | None) -> Tensor:
    """Σ w·x in float64 over packed tensors; rows of weight zero count nothing, even where x is -inf."""
    x64 = x.double()
    if weight is None:
        return x64.sum()
    dims = dims_of(x)
    w = align(weight, dims).double() if dims_of(weight) else weight.double()
    return torch.where(w == 0, torch.zeros_like(x64), w * x64).sum()


def evaluate(graph: FactorGraph, factors: Packed) -> Evidence:
    """Exact E-step: evidence and posterior weights for detached log-factors.

    :param factors: packed log-density of every site.
    """
    leaves: dict[str, Tensor] = {}
    with torch.enable_grad():  # packing makes a view, through which the gradient has to come back
        for component in graph.components:
            for name in component.factors:
                leaf = factors[name].detach().clone().requires_grad_(True)
                leaves[name] = with_dims(leaf, dims_of(factors[name]))
        terms = tuple(contract(graph, component, leaves) for component in graph.components)
        names = list(leaves)
        finite = [torch.where(term.isfinite(), term, torch.zeros_like(term)).sum() for term in terms]
        gradients = torch.autograd.grad(sum(finite), [leaves[n] for n in names]) if finite else ()  # type: ignore[arg-type]
    weights = {
        name: with_dims(gradient, dims_of(leaves[name])) for name, gradient in zip(names, gradients, strict=True)
    }
    terms = tuple(detached(term) for term in terms)
    parts = [(term, component.weight) for term, component in zip(terms, graph.components, strict=True)]
    parts += [(detached(factors[name]), graph.factors[name].weight) for name in graph.constants]
    priors = [(detached(factors[name]), graph.factors[name].weight) for name in graph.priors]
    return Evidence(
        log_likelihood=_total(parts),
        log_prior=_total(priors),
        magnitude=_total([(with_dims(x.abs(), dims_of(x)), weight) for x, weight in parts]),
        terms=terms,
        weights=weights,
    )


def _total(parts: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    return sum((weighted_sum(x, weight) for x, weight in parts), torch.zeros((), dtype=torch.float64))


def with_plate(graph: FactorGraph, symbol: str) -> FactorGraph:
    """The same graph inside of one more plate (over draws)."""
    factors = {n: dataclasses.replace(f, plates=f.plates | {symbol}) for n, f in graph.factors.items()}
    components = tuple(dataclasses.replace(c, root=c.root | {symbol}) for c in graph.components)
    names = {**graph.plate_names, symbol: "draws"}
    return dataclasses.replace(graph, factors=factors, components=components, plate_names=names)
