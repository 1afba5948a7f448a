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


def symbols(y: Tensor) -> None:
    """Categories (N, T); a left-right chain, and a category that no state emits."""
    transition = pyro.param("A", torch.tensor([[0.7, 0.3], [0.0, 1.0]]), constraint=constraints.simplex)
    B = pyro.param("B", torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.8, 0.0]]), constraint=constraints.simplex)
    with pyro.plate("sequences", len(y)):
        emission, start = dist.Categorical(B), torch.tensor([0.6, 0.4]).log()
        pyro.sample("y", dist.DiscreteHMM(start, transition.log(), emission, duration=y.shape[1]), obs=y)


def test_what_cannot_be_is_named() -> None:
    y = torch.arange(12).reshape(2, 6) % 2
    with pytest.raises(pyro_em.InputError, match="'y': a sequence of length 0"):
        pyro_em.fit(symbols, y[:, :0])
    out, impossible = y.clone(), y.clone()
    out[1, 4], impossible[1, 4] = 3, 2
    with pytest.raises(pyro_em.InputError, match=r"row 1 of step 4 lies outside of the support"):
        pyro_em.fit(symbols, out)
    with pytest.raises(pyro_em.NonFiniteError, match=r"rows 1 of plate \['sequences'\], from step 4 on"):
        pyro_em.fit(symbols, impossible)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
def test_zeros_stay_and_an_outlier_is_finite() -> None:
    result = pyro_em.fit(symbols, torch.arange(12).reshape(2, 6) % 2, max_iter=5, tol=0)
    assert float(result.params["A"][1, 0]) == 0.0
    y = _data()
    y[1, 5] = 1e4
    result = pyro_em.fit(model, y, m_step={"scale": "fixed"}, max_iter=5, tol=0)
    assert all(bool(value.isfinite().all()) for value in result.params.values())
    torch.testing.assert_close(result.log_prob(), _log_prob(result.params, y), rtol=1e-9, atol=1e-9)
