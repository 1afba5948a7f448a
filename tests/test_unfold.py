"""Pyro's `DiscreteHMM` as an observed site: its own density is the oracle of log p(x), and of the score at the end."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em


def model(y: Tensor, varying: Tensor | None = None) -> None:
    """Sequences (N, T, 2) of normal vectors; the initial state comes before the first transition."""
    initial = pyro.param("initial", torch.tensor([0.1, -0.2]))
    transition = pyro.param("transition", torch.tensor([[0.8, -0.5], [-0.3, 0.6]]))
    loc = pyro.param("loc", torch.tensor([[0.0, 0.5], [2.0, -1.0]]))
    scale = pyro.param("scale", torch.tensor([[1.0, 1.2], [0.9, 1.1]]), constraint=constraints.positive)
    table = transition if varying is None else transition + varying
    with pyro.plate("sequences", len(y)):
        emission = dist.Normal(loc, scale).to_event(1)
        pyro.sample("y", dist.DiscreteHMM(initial, table, emission, duration=y.shape[1]), obs=y)


def _data(sequences: int = 4, steps: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shift = 2.0 * (torch.arange(steps) // 4 % 2).reshape(1, -1, 1)
    return torch.randn(sequences, steps, 2, generator=generator) + shift * torch.tensor([1.0, -0.5])


def _log_prob(params: dict[str, Tensor], y: Tensor, varying: Tensor | None = None) -> Tensor:
    table = params["transition"] if varying is None else params["transition"] + varying
    emission = dist.Normal(params["loc"], params["scale"]).to_event(1)
    return dist.DiscreteHMM(params["initial"], table, emission, duration=y.shape[1]).log_prob(y)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
@pytest.mark.parametrize(("sequences", "steps"), [(20, 3), (4, 12)])
def test_likelihood_and_limit(sequences: int, steps: int) -> None:
    y = _data(sequences, steps)
    start = pyro_em.fit(model, y, max_iter=0)
    torch.testing.assert_close(start.log_prob(), _log_prob(start.params, y), rtol=1e-12, atol=1e-12)
    result = pyro_em.fit(model, y, max_iter=30, tol=0)
    assert result.log_likelihood == pytest.approx(float(_log_prob(result.params, y).sum()), rel=1e-12)
    score = result.history["score"]
    assert score[-1] < 0.1 * score[0]
    leaves = {name: value.clone().requires_grad_() for name, value in result.params.items()}
    gradient = torch.autograd.grad(_log_prob(leaves, y).sum(), leaves["loc"])[0]
    assert float(gradient.abs().max()) / len(y) <= 1.5 * score[-1] + 1e-9
    states = result.posterior().responsibilities("y_state")
    assert states.shape == (steps, sequences, 2)


def test_transitions_that_vary_with_time() -> None:
    y, varying = _data(), torch.linspace(-0.5, 0.5, 12).reshape(12, 1, 1) * torch.eye(2)
    result = pyro_em.fit(model, y, varying, max_iter=2, tol=0)
    torch.testing.assert_close(result.log_prob(), _log_prob(result.params, y, varying), rtol=1e-12, atol=1e-12)
    found = result.history["log_likelihood"]
    assert found[0] < found[1] < found[2]


def test_elsewhere_it_is_what_it_was() -> None:
    nodes = pyro.poutine.trace(model).get_trace(_data()).nodes
    assert "y" in nodes and not any(name.startswith("y_state") for name in nodes)
