"""G2–G5 on random linear-Gaussian models: evidence, moments and score against one dense joint normal, to 1e-10."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_em
from tests.dense import dense
from tests.laws import largest_score, to_constrained, to_free
from tests.linear_graphs import DESIGNS, Graph, linear_graph
from tests.oracles import constraints

EPS = torch.finfo(torch.float64).eps
GRAPHS = [linear_graph(design, seed) for design in DESIGNS for seed in range(16)]
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_evidence_moments_and_score(graph: Graph) -> None:
    free_of_parameters = not graph.start
    result = pyro_em.fit(graph.model, init=graph.start or None, max_iter=0, tol=0)
    support = constraints(graph.model, (), graph.start)
    free = {n: u.requires_grad_() for n, u in to_free(graph.start, support).items()}
    params = to_constrained(free, support)
    truth = dense(graph.model, (), params)
    value = float(truth.log_evidence.detach())
    assert result.exact
    assert abs(result.log_likelihood - value) <= 1e-10 * (1 + abs(value))
    posterior = result.posterior()
    assert abs(posterior.log_evidence - value) <= 1e-10 * (1 + abs(value))
    for site, mean in truth.mean.items():
        torch.testing.assert_close(posterior.mean(site), mean.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(posterior.variance(site), truth.variance[site].detach(), rtol=1e-10, atol=1e-10)
        if graph.design != "mixed" and mean.dim() and posterior.marginal(site).event_shape:
            found = posterior.marginal(site).covariance_matrix
            torch.testing.assert_close(found, truth.covariance[site].detach(), rtol=1e-10, atol=1e-10)
    if free_of_parameters:
        return
    gradient = torch.autograd.grad(truth.log_evidence, list(free.values()), allow_unused=True)
    known = {n: torch.zeros_like(u) if g is None else g for (n, u), g in zip(free.items(), gradient, strict=True)}
    largest = largest_score(known, graph.start, support)
    assert result.problem is not None
    found_score = result.history["score"][0] * result.problem.graph.num_observations
    assert found_score == pytest.approx(largest, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("graph", [g for g in GRAPHS if g.seed % 3 == 0 and g.start], ids=str)
def test_updates_climb(graph: Graph) -> None:
    """G1, and the evidence of the last iterate is the dense one."""
    result = pyro_em.fit(graph.model, init=graph.start, max_iter=4, tol=0)
    objective = np.array(result.history["objective"])
    scale = float(result.log_prob().abs().sum()) + np.abs(objective).max()
    assert (np.diff(objective) >= -16 * EPS * scale).all()
    value = float(dense(graph.model, (), result.params).log_evidence.detach())
    assert abs(result.log_likelihood - value) <= 1e-10 * (1 + abs(value))
