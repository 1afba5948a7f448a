"""G2–G5 on random conjugate models: evidence, moments and score against one-dimensional integrals and closed forms,
to 1e-10.

The integral over u = log z (or the logit of a probability) is a trapezoid sum, whose error falls geometrically for a
smooth integrand that vanishes at both ends. Probabilities of several categories have closed forms only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyro_em
from tests.conjugate_forms import closed_form
from tests.conjugate_graphs import KINDS, ConjugateGraph, conjugate_graph
from tests.laws import largest_score, to_constrained, to_free
from tests.oracles import constraints

EPS = torch.finfo(torch.float64).eps
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")


def _integrated(graph: ConjugateGraph, params: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x) of every element, and the mean and variance of its latent."""
    u = torch.linspace(-36.0, 36.0, 24_001)
    if graph.kind == "Beta":
        z, jacobian = u.sigmoid(), torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)
        inside = (z > 0) & (z < 1)
    else:
        z, jacobian, inside = u.exp(), u, torch.ones_like(u, dtype=torch.bool)
    z, jacobian = z[inside], jacobian[inside]
    joint = graph.log_joint(params, z) + jacobian
    log_z = joint.logsumexp(-1) + float(np.log(float(u[1] - u[0])))
    weight = (joint - joint.logsumexp(-1, keepdim=True)).exp()
    mean = (weight * z).sum(-1)
    return log_z, mean, (weight * (z - mean.unsqueeze(-1)) ** 2).sum(-1)


GRAPHS = [(kind, seed) for kind in KINDS for seed in range(8)]
over_graphs = pytest.mark.parametrize(("kind", "seed"), GRAPHS, ids=[f"{k}-{s}" for k, s in GRAPHS])


@cache
def _fitted(kind: str, seed: int) -> tuple[ConjugateGraph, Any]:
    graph = conjugate_graph(kind, seed)
    return graph, pyro_em.fit(graph.model, init=graph.start, roles={"z": "latent"}, max_iter=2, tol=0)


def test_what_is_drawn_covers_all_there_is() -> None:
    graphs = [conjugate_graph(kind, seed) for kind, seed in GRAPHS]
    for kind, families in KINDS.items():
        own = [graph for graph in graphs if graph.kind == kind]
        assert {site.family for graph in own for site in graph.sites} == set(families)
        assert {site.layout for graph in own for site in graph.sites} == {"groups", "nested", "long"}
        assert {graph.classes for graph in own} == {graph.common for graph in own} == {False, True}


@over_graphs
def test_evidence_and_moments_are_the_closed_forms(kind: str, seed: int) -> None:
    graph, result = _fitted(kind, seed)
    objective = np.array(result.history["objective"])
    assert (np.diff(objective) >= -16 * EPS * (np.abs(objective).max() + 10)).all()
    assert result.exact
    _same(result, *closed_form(graph, result.params))


@pytest.mark.parametrize(("kind", "seed"), [(k, s) for k, s in GRAPHS if k != "Dirichlet"])
def test_evidence_and_moments_are_the_integrals(kind: str, seed: int) -> None:
    graph, result = _fitted(kind, seed)
    _same(result, *_integrated(graph, result.params))


def _same(result: Any, log_z: Tensor, mean: Tensor, variance: Tensor) -> None:
    assert abs(result.log_likelihood - float(log_z.sum())) <= 1e-10 * (1 + float(log_z.abs().sum()))
    posterior = result.posterior()
    torch.testing.assert_close(posterior.mean("z").reshape(mean.shape), mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.variance("z").reshape(mean.shape), variance, rtol=1e-10, atol=1e-10)


@over_graphs
def test_the_score_is_the_slope_of_the_closed_form(kind: str, seed: int) -> None:
    graph, result = _fitted(kind, seed)
    support = constraints(graph.model, (), graph.start)
    free = {n: v.requires_grad_() for n, v in to_free(graph.start, support).items()}
    first, *_ = closed_form(graph, to_constrained(free, support))
    gradient = dict(zip(free, torch.autograd.grad(first.sum(), list(free.values())), strict=True))
    assert result.problem is not None
    found = result.history["score"][0] * result.problem.graph.num_observations
    assert found == pytest.approx(largest_score(gradient, graph.start, support), rel=1e-8, abs=1e-9)
