"""log p(x_n|θ) of every data element, from the terms of an E-step's evidence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.evidence.discrete import Evidence
from pyro_em.model.compat import detached, dims_of, with_dims
from pyro_em.model.packing import align
from pyro_em.model.trace import Run
from pyro_em.problem import Problem


def pointwise(problem: Problem, evidence: Evidence, run: Run, factors: Mapping[str, Tensor] | None = None) -> Tensor:
    """log p(x_n|θ) over the data plates: every term summed over all other plates, unweighted.

    :param factors: those of the run, where the caller has them already.
    """
    graph = problem.graph
    factors = problem.factors(run) if factors is None else factors
    dims = "".join(sorted(graph.data_plates, key=lambda d: _plate_dim(run, graph.plate_names[d])))
    parts = [*evidence.terms, *(detached(factors[name]) for name in graph.constants)]
    total = torch.zeros([graph.plate_sizes[d] for d in dims], dtype=torch.float64)
    for part in parts:
        gone = [i for i, d in enumerate(dims_of(part)) if d not in dims]
        kept = "".join(d for d in dims_of(part) if d in dims)
        own = with_dims(part.double().sum(gone) if gone else part.double(), kept)
        total = total + align(own, dims)
    return total


def _plate_dim(run: Run, name: str) -> int:
    return next(plate.dim for site in run.sites.values() for plate in site.plates if plate.name == name)
