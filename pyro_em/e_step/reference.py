"""log p(x|θ) by the reference path alone: what a fit's last E-step is compared with.

Where all factors of a model read Gaussian or other continuous latents, integrating these out is the whole evidence:

    log p(x|θ) = Σ log Z of the sets,

and the run of the model at the posterior's atoms, which serves an M-step, is spared. Everything that integration
certifies (evidence/gaussian.py: residuals that are affine around the posterior) is certified as ever.
"""

from __future__ import annotations

import torch

from pyro_em.evidence.discrete import evaluate
from pyro_em.latents import cancelled, integral, reduced_factors
from pyro_em.problem import Problem
from pyro_em.types import Params


def reference_likelihood(problem: Problem, params: Params) -> tuple[float, float]:
    """log p(x|θ), and the size of the terms that cancel in it.

    :raises NonFiniteError, Refusal: as `Problem.evidence`.
    """
    continuous = problem.continuous
    inside = set() if continuous is None else {name for latents in continuous.sets for name in latents.factors}
    if continuous is not None and problem.graph.factors.keys() <= inside:
        with torch.no_grad():
            parts = continuous.eliminate(params)
            found = evaluate(problem.reduced_graph, reduced_factors(continuous, {}, parts))
            states = [found.weights[integral(latents)] for latents in continuous.sets]
            size = found.magnitude + cancelled(continuous, problem.reduced_graph, parts, states)
        if bool(found.log_likelihood.isfinite()):
            return float(found.log_likelihood), float(size)
    evidence, _ = problem.evidence(params)  # which also says why it is not finite
    return float(evidence.log_likelihood), float(evidence.magnitude)
