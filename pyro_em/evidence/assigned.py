"""Posterior weights of other kinds than the exact one: the mode, a draw, a tempered posterior.

With log-factors ℓ_f and elimination of the latents by (ring.py)

    max       value Σ w max_z log p(x,z),           weights: the indicator of the joint mode
    sample    value log p(x),                       weights: the indicator of one joint posterior draw
    sum, T    value Σ w T log Σ_z p(x,z)^(1/T),     weights: q(z) ∝ p(z|x)^(1/T), which maximises
                                                    E_q log p(x,z) + T H(q)

the weights are the gradient of the value, as for the exact posterior (discrete.py). A row of weight w is drawn once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.evidence.discrete import contract, weighted_sum
from pyro_em.evidence.ring import Elimination
from pyro_em.model.compat import detached, dims_of, with_dims
from pyro_em.model.graph import FactorGraph


def assign(
    graph: FactorGraph, factors: Mapping[str, Tensor], elimination: Elimination, temperature: float = 1.0
) -> tuple[float, dict[str, Tensor]]:
    """The value above, weighted and with the sites that no latent reaches, and every factor's weights.

    :param factors: packed log-density of every site.
    """
    leaves = {
        name: with_dims((factors[name].detach() / temperature).requires_grad_(True), dims_of(factors[name]))
        for component in graph.components
        for name in component.factors
    }
    with torch.enable_grad():
        terms = [contract(graph, component, leaves, elimination) for component in graph.components]
        total = sum((term.sum() for term in terms), torch.zeros(()))
        gradients = torch.autograd.grad(total, list(leaves.values())) if leaves else ()
    weights = {n: with_dims(g, dims_of(leaves[n])) for n, g in zip(leaves, gradients, strict=True)}
    value = torch.zeros((), dtype=torch.float64)
    for term, component in zip(terms, graph.components, strict=True):
        value = value + temperature * weighted_sum(detached(term), component.weight)
    for name in graph.constants:
        value = value + weighted_sum(detached(factors[name]), graph.factors[name].weight)
    return float(value), weights
