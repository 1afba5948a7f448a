"""Networks in models, and M-steps of several kinds at once: a linear solve, Newton and gradient steps on the same Q."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from pyro.nn.module import to_pyro_module_
from torch import Tensor

import pyro_em
from tests.classics import positive

N = 80
RNG = np.random.default_rng(4)
X = torch.tensor(RNG.uniform(-2, 2, (N, 2)))
INSIDE = (X**2).sum(1) < 1.5  # a gate that no linear predictor can draw
Y = torch.where(INSIDE, 2 * X[:, 0], -1.0 - X[:, 1]) + 0.2 * torch.tensor(RNG.normal(size=N))
COUNTS = torch.tensor(RNG.poisson(np.exp(np.where(INSIDE.numpy(), 1.5, 0.3)))).double()


class Experts(PyroModule):
    """The gate is a network; the experts are linear in one response and log-linear in the other."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = torch.nn.Sequential(
            torch.nn.Linear(2, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)
        ).double()
        to_pyro_module_(self.gate)
        self.a = PyroParam(torch.tensor([0.5, -0.5]))
        self.b = PyroParam(torch.tensor([[1.0, 0.0], [0.0, -0.5]]))
        self.c = PyroParam(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        self.sd = PyroParam(torch.ones(2), constraint=positive)

    def forward(self) -> None:
        with pyro.plate("rows", N):
            z = pyro.sample("z", dist.Bernoulli(logits=self.gate(X).squeeze(-1))).long()
            pyro.sample("y", dist.Normal(self.a[z] + (X * self.b[z]).sum(-1), self.sd[z]), obs=Y)
            pyro.sample("count", dist.Poisson(torch.exp(self.c[z, 0] + self.c[z, 1] * X[:, 0])), obs=COUNTS)


def test_several_kinds_of_m_step_in_one_model() -> None:
    """161 weights of a gate climb, its last bias and the counts go by Newton, lines by a solve: none lowers Q."""
    model = Experts(40)
    result = pyro_em.fit(model, max_iter=6, tol=1e-5)
    routes = {row.name: row.route for row in result.plan.m_step}
    assert (routes["a"], routes["b"], routes["sd"]) == ("closed", "closed", "closed")
    assert routes["gate.0.weight"] == "numeric" and routes["gate.2.bias"] == routes["c"] == "newton"
    reasons = {row.name: row.reason for row in result.plan.m_step}
    assert "L-BFGS steps that raise Q" in reasons["gate.0.weight"]
    objective = result.history["objective"]
    assert all(later >= earlier - 1e-11 * abs(earlier) for earlier, later in pairwise(objective))
    right = (result.posterior().mode()["z"].reshape(-1) == 1) == INSIDE
    assert max(float(right.double().mean()), 1 - float(right.double().mean())) > 0.9
    for name, value in model.named_parameters():
        if name.startswith("gate"):
            assert torch.equal(value.detach(), result.params[name])


def test_a_network_for_the_mean_learns_what_least_squares_learns() -> None:
    """One row of data each, no latent: the M-step is nonlinear least squares."""

    class Curve(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
            to_pyro_module_(self.net)

        def forward(self, x: Tensor, y: Tensor) -> None:
            sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(self.net(x).squeeze(-1), sd), obs=y)

    x = torch.linspace(-2, 2, 40).unsqueeze(-1)
    y = torch.tanh(2 * x[:, 0]) + 0.05 * torch.tensor(RNG.normal(size=40))
    result = pyro_em.fit(Curve(), x, y, max_iter=3, tol=1e-6)
    assert float(result.params["sd"]) < 0.08
    objective: Any = np.diff(result.history["objective"])
    assert (objective >= -1e-10 * abs(result.log_likelihood)).all()


def test_transformed_tied_and_fixed_parameters() -> None:
    """One vector behind cumsum, a square and a shift, at two sites; one entry held at 0 by the program."""
    y = torch.tensor(RNG.normal(size=(30, 3))) + torch.tensor([1.0, 2.0, 4.0])
    u = torch.tensor(RNG.normal(size=30)) + 2.0

    def model(y: Tensor, u: Tensor) -> None:
        step = pyro.param("step", torch.ones(3))
        free = pyro.param("free", torch.tensor([0.5]))
        levels = torch.cat([torch.zeros(1), free, free.new_ones(1)])  # fixed, free, fixed
        with pyro.plate("rows", 30):
            pyro.sample("y", dist.Normal(step.cumsum(0) + levels, 1.0).to_event(1), obs=y)
            pyro.sample("u", dist.Normal(2 * step[1] - 1, 0.5), obs=u)

    result = pyro_em.fit(model, y, u, max_iter=1, tol=0)
    A = np.zeros((4, 4))
    A[:3, :3], A[1, 3], A[3, 1] = np.tril(np.ones((3, 3))), 1.0, 2.0
    target = np.r_[y.mean(0).numpy() - [0, 0, 1], float(u.mean()) + 1]
    weight = np.diag([30.0, 30.0, 30.0, 120.0])
    expected = np.linalg.solve(A.T @ weight @ A, A.T @ weight @ target)
    found = torch.cat([result.params["step"], result.params["free"]]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert {row.route for row in result.plan.m_step} == {"closed"}
