"""G7 over loops with Gaussian states: EM ends at a maximum of the marginal likelihood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import pyro_em
from pyro_em.information import log_objective
from tests.dense import dense
from tests.laws import to_constrained, to_free
from tests.loop_chains import BY_NAME
from tests.oracles import constraints


def _longer(name: str) -> tuple[Tensor, ...]:
    """Data on which no variance of the model goes to 0, as it does on the few steps of the table."""
    g = torch.Generator().manual_seed(3)
    steps, noise = torch.randn(30, generator=g), torch.randn(30, generator=g)
    if name == "local_level":
        return (torch.cumsum(steps, 0) + noise,)
    x = [torch.tensor(0.0)]
    for step in steps:
        x.append(0.8 * x[-1] + step)
    return torch.stack(x[1:]) + 0.5 * noise + 1.0, torch.rand(30, generator=g) < 0.8


@pytest.mark.parametrize("name", ["local_level", "autoregression"])
def test_the_limit_is_a_maximum_of_the_marginal_likelihood(name: str) -> None:
    """G7: L-BFGS on the log-evidence, without a posterior, from the same start, ends where EM ends.

    The evidence is that of the Kalman filter, which G2 and G4 hold to the dense normal; at the end it is the latter's.
    """
    problem, args = BY_NAME[name], _longer(name)
    result = pyro_em.fit(problem.model, *args, init=problem.start(), max_iter=500, tol=1e-8, accelerate="anderson")
    assert result.converged and result.problem is not None
    bound, support = result.problem, constraints(problem.model, args, problem.init)
    free = to_free(problem.start(), support)
    sizes = [u.numel() for u in free.values()]

    def params(u: Tensor) -> dict[str, Tensor]:
        pieces = zip(free, u.split(sizes), strict=True)
        return to_constrained({name: piece.reshape(free[name].shape) for name, piece in pieces}, support)

    def loss(u: Any) -> tuple[float, Any]:
        leaf = torch.tensor(u, requires_grad=True)
        value, _ = log_objective(bound, params(leaf))
        return -float(value.detach()), -torch.autograd.grad(value, leaf)[0].numpy()

    first = torch.cat([u.detach().flatten() for u in free.values()]).numpy()
    climbed = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 0, "gtol": 1e-6})
    limit = params(torch.as_tensor(climbed.x))
    evidence = dense(problem.model, args, limit).log_evidence
    assert result.log_likelihood == pytest.approx(float(evidence.detach()), rel=1e-10)
    for site, value in limit.items():
        torch.testing.assert_close(result.params[site], value, rtol=1e-4, atol=1e-4)
