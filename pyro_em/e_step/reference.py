"""log p(x|θ) by the reference path alone: what a fit's last E-step is compared with.

Where all factors of a model read continuous latents, and none a discrete one, integrating these out is all there is:

    log p(x|θ) = Σ log Z of the sets,

and the run of the model at the posterior's atoms, which serves an M-step, is spared. Everything that integration
certifies (evidence/gaussian.py: residuals that are affine around the posterior) is certified as ever.
"""

from __future__ import annotations

import math

import torch

from pyro_em.evidence.discrete import contract, weighted_sum
from pyro_em.latents import cancelled, reduced_factors
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.problem import Problem
from pyro_em.types import Params


def reference_likelihood(problem: Problem, params: Params) -> tuple[float, float]:
    """log p(x|θ), and the size of the terms that cancel in it.

    :raises NonFiniteError, Refusal: as `Problem.evidence`.
    """
    continuous = problem.continuous
    inside = set() if continuous is None else {name for latents in continuous.sets for name in latents.factors}
    if continuous is not None and not problem.graph.symbol_sites and problem.graph.factors.keys() <= inside:
        reduced = problem.reduced_graph
        with torch.no_grad():
            parts = continuous.eliminate(params)
            factors = reduced_factors(continuous, {}, parts)
            terms = [(contract(reduced, component, factors), component.weight) for component in reduced.components]
            found = sum(float(weighted_sum(term, weight)) for term, weight in terms)
            size = sum(float(weighted_sum(with_dims(x.abs(), dims_of(x)), weight)) for x, weight in terms)
            size += float(cancelled(continuous, reduced, parts, [None for _ in parts]))
        if math.isfinite(found):
            return found, size
    evidence, _ = problem.evidence(params)  # which also says why it is not finite
    return float(evidence.log_likelihood), float(evidence.magnitude)
