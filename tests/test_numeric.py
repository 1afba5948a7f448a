"""Numeric M-steps: the argmax of Q against SciPy and closed forms, and that no step ever lowers Q."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch
from pyro.nn import PyroModule
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.m_step import numeric
from pyro_em.m_step.numeric import Block, ascend, ascend_with, maximise
from pyro_em.problem import bind
from tests.problems import BY_NAME


def _block(name: str, names: tuple[str, ...] = ()) -> Block:
    """Q of a problem of the table, with the posterior at its start."""
    problem = BY_NAME[name]
    bound = bind(problem.model, problem.args, {}, with_prior=problem.priors)
    params = {**bound.start, **problem.start()}
    evidence, _ = bound.evidence(params)
    return Block.of_q(bound, params, evidence.weights, names or tuple(bound.parameters))


def _q(block: Block, params: dict[str, Tensor]) -> float:
    return float(block.objective(params)[0].detach())


def _responsibilities(block: Block) -> Tensor:
    """Posterior weights (N, K) of the only latent."""
    return pyro_em.Posterior(block.problem, block.params).responsibilities("z")


@pytest.mark.parametrize("limit", [numeric.NEWTON_LIMIT, 0], ids=["newton", "lbfgs"])
def test_argmax_behind_a_link_is_the_weighted_moment(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """loc = 4 tanh(a), scale = softplus(b): at the argmax both equal the weighted mean and deviation."""
    monkeypatch.setattr(numeric, "NEWTON_LIMIT", limit)
    block = _block("transformed")
    weights = _responsibilities(block)
    (y,) = block.problem.args
    mean = (weights * y[:, None]).sum(0) / weights.sum(0)
    sd = ((weights * (y[:, None] - mean) ** 2).sum(0) / weights.sum(0)).sqrt()
    tolerance = 1e-9 if limit else 1e-5
    best = maximise(block, tolerance=1e-10, max_iter=300)
    torch.testing.assert_close(4 * best["a"].tanh(), mean, atol=tolerance, rtol=0)
    torch.testing.assert_close(torch.nn.functional.softplus(best["b"]), sd, atol=tolerance, rtol=0)
    torch.testing.assert_close(best["w"], weights.mean(0), atol=tolerance, rtol=0)


def test_argmax_of_a_beta_mixture_is_scipys() -> None:
    block = _block("beta_mixture", ("a", "b"))
    weights, (y,) = _responsibilities(block).numpy(), block.problem.args
    best = maximise(block, tolerance=1e-10)
    for k in range(2):

        def negative(log_ab: Any, k: int = k) -> float:
            return -float(np.sum(weights[:, k] * scipy.stats.beta.logpdf(y.numpy(), *np.exp(log_ab))))

        found = scipy.optimize.minimize(
            negative, [0.5, 0.5], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12}
        )
        np.testing.assert_allclose([float(best["a"][k]), float(best["b"][k])], np.exp(found.x), rtol=1e-6)
    assert torch.equal(best["w"], block.params["w"]), "parameters outside of the block are held"


@pytest.mark.parametrize("name", ["additive", "linkage", "heavy_prior_map", "gmm_full", "categorical_hmm"])
def test_argmax_is_a_maximum(name: str) -> None:
    """The gradient vanishes and no feasible neighbour is higher."""
    block = _block(name)
    best = maximise(block, tolerance=1e-9, max_iter=300)
    there = Block(block.problem, best, block.objective, block.names)
    u = there.free()
    _, gradient, _ = there.gradient(u)
    assert float(gradient.abs().max()) < 1e-6
    top = there.q(u)
    assert top >= _q(block, block.params)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step = 0.05 * torch.randn(u.shape, generator=generator)
        assert there.q(u + step) < top


@pytest.mark.parametrize("name", ["transformed", "gmm_full", "additive", "latent_class_map", "gaussian_hmm"])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_a_gradient_step_never_lowers_q(name: str, num_steps: int) -> None:
    block = _block(name)
    moved = ascend(block, num_steps=num_steps)
    assert _q(block, moved) > _q(block, block.params)
    at_top = Block(block.problem, maximise(block, tolerance=1e-9, max_iter=300), block.objective, block.names)
    assert _q(block, ascend(at_top, num_steps=num_steps)) >= _q(block, at_top.params)


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, lr=1e-3),
        lambda p: torch.optim.SGD(p, lr=1e3),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=50.0),
    ],
    ids=["small", "far too large", "adam", "adam too large"],
)
def test_the_users_optimiser_is_halved_until_q_does_not_fall(
    optimiser: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
) -> None:
    block = _block("gmm_diagonal")
    moved = ascend_with(block, optimiser)
    assert all(bool(value.isfinite().all()) for value in moved.values())
    assert _q(block, moved) > _q(block, block.params)


def test_the_users_optimiser_takes_its_own_step_where_it_may() -> None:
    """One SGD step of learning rate h in free coordinates is u + h ∇Q."""
    block = _block("gmm_diagonal")
    u = block.free()
    _, gradient, _ = block.gradient(u)
    moved = ascend_with(block, lambda p: torch.optim.SGD(p, lr=1e-4))
    expected = block.values(u + 1e-4 * gradient)
    for name, value in moved.items():
        torch.testing.assert_close(value, expected[name])
        assert not value.requires_grad


def test_a_step_that_cannot_help_changes_nothing() -> None:
    """An optimiser that walks downhill: Q stays where it is, at the start."""
    block = _block("poisson_mixture")
    moved = ascend_with(block, lambda p: torch.optim.SGD(p, lr=0.1, maximize=True))
    for name, value in moved.items():
        torch.testing.assert_close(value, block.params[name], rtol=1e-10, atol=1e-12)


def test_hessian_is_the_derivative_of_the_gradient() -> None:
    block = _block("transformed")
    u = block.free()
    _, gradient, hessian = block.hessian(u)
    assert torch.equal(gradient, block.gradient(u)[1])
    h = 1e-5
    for i in range(len(u)):
        step = torch.zeros_like(u)
        step[i] = h
        difference = (block.gradient(u + step)[1] - block.gradient(u - step)[1]) / (2 * h)
        torch.testing.assert_close(hessian[i], difference, rtol=1e-5, atol=1e-5)


def test_gem_takes_the_users_optimiser() -> None:
    problem = BY_NAME["gmm_diagonal"]
    result = pyro_em.fit(
        problem.model,
        *problem.args,
        algorithm="gem",
        init=problem.start(),
        max_iter=8,
        tol=0,
        optim=lambda p: torch.optim.Adam(p, lr=0.3),
    )
    objective = result.history["objective"]
    assert all(later > earlier for earlier, later in pairwise(objective))


class _Network(PyroModule):
    """Locations of two components, from a network with a hidden layer; the model is `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[torch.nn.Sequential](
            PyroModule[torch.nn.Linear](1, 3), PyroModule[torch.nn.Tanh](), PyroModule[torch.nn.Linear](3, 2)
        )

    def forward(self, x: Tensor, y: Tensor) -> None:
        loc = self.net(x.unsqueeze(-1))
        sd = pyro.param("sd", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("y", dist.Normal(Vindex(loc)[torch.arange(len(y)), z], sd), obs=y)


def _network() -> tuple[_Network, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 30)
    y = torch.where(torch.rand(30) < 0.5, 2 * x.sin(), -x) + 0.2 * torch.randn(30)
    return _Network(), x, y


def test_gradients_of_a_network_are_those_at_the_values_given() -> None:
    """Not at the values in the module's own memory, which the run borrows and gives back before the backward pass."""
    model, x, y = _network()
    problem = bind(model, (x, y), {}, with_prior=False)
    evidence, _ = problem.evidence(problem.start)
    names = tuple(n for n, record in problem.parameters.items() if record.kind == "module")
    block = Block.of_q(problem, problem.start, evidence.weights, names)
    u = block.free() + torch.randn(len(block.free()), generator=torch.Generator().manual_seed(1))
    _, gradient, hessian = block.hessian(u)
    eye = 1e-6 * torch.eye(len(u))
    expected = torch.tensor([(block.q(u + e) - block.q(u - e)) / 2e-6 for e in eye])
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    slopes = [(block.gradient(u + e)[1] - block.gradient(u - e)[1]) / 2e-6 for e in eye]
    torch.testing.assert_close(hessian, torch.stack(slopes), rtol=1e-5, atol=1e-5)


def test_a_mixture_of_networks_ends_where_the_evidence_has_no_slope() -> None:
    model, x, y = _network()
    found = pyro_em.fit(model, x, y, max_iter=60, tol=1e-5)
    assert found.converged
    leaves = {name: value.clone().requires_grad_() for name, value in found.params.items()}
    weight, bias, out, shift, sd = (
        leaves[n] for n in ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "sd")
    )
    loc = torch.tanh(x.unsqueeze(-1) @ weight.mT + bias) @ out.mT + shift
    value = (dist.Normal(loc, sd).log_prob(y.unsqueeze(-1)).logsumexp(-1) - np.log(2)).sum()
    assert found.log_likelihood == pytest.approx(float(value.detach()), rel=1e-10)
    for gradient in torch.autograd.grad(value, list(leaves.values())):
        assert float(gradient.abs().max()) < 1e-3


def test_a_hessian_beyond_floating_point() -> None:
    """On its way out to infinity the likelihood of `b` has no second derivative left (eigh raised in the middle)."""
    x = torch.tensor([0.85, 0.62, 0.53, 0.25, 0.14], dtype=torch.float64)

    def model(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor([0.7, 2.0], dtype=torch.float64), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor([1.5, 2.0], dtype=torch.float64), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            pyro.sample("x", dist.Kumaraswamy(a[z], b[z]), obs=x)

    result = pyro_em.fit(model, x, max_iter=12, tol=0)
    assert all(bool(value.isfinite().all()) for value in result.params.values())
    assert (np.diff(result.history["objective"]) > -1e-12).all()
