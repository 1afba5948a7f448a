"""A positive scale times a latent (tau * e[g]) is solved for like an unconstrained one, and stays positive."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.linear import Linear
from pyro_em.m_step.positive import inside
from pyro_em.problem import bind

RNG = np.random.default_rng(0)
GROUP, X, NOISE = RNG.integers(0, 12, 80), RNG.normal(size=80), RNG.normal(size=80)
Y = 1 + 0.5 * X + 0.8 * RNG.normal(size=12)[GROUP] + 0.5 * NOISE
T = torch.as_tensor
REAL, POSITIVE = dist.constraints.real, dist.constraints.positive


def _model(constraint: dist.constraints.Constraint) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
        tau = pyro.param("tau", torch.tensor(1.0), constraint=constraint)
        s = pyro.param("s", torch.tensor(1.0), constraint=POSITIVE)
        with pyro.plate("groups", 12):
            e = pyro.sample("e", dist.Normal(0.0, 1.0), infer={"em": "latent"})
        with pyro.plate("rows", 80):
            pyro.sample("y", dist.Normal(a + b * T(X) + tau * e[T(GROUP)], s), obs=y)

    return model


def test_iterates_are_those_without_the_constraint() -> None:
    free = pyro_em.fit(_model(REAL), T(Y), max_iter=25, tol=0)
    pyro.clear_param_store()
    positive = pyro_em.fit(_model(POSITIVE), T(Y), max_iter=25, tol=0)
    assert positive.plan.route("tau") == "closed"
    for name, value in free.params.items():
        torch.testing.assert_close(positive.params[name], value, rtol=1e-10, atol=1e-12)
    ends = pyro_em.fit(_model(POSITIVE), T(Y), init=positive.params, tol=1e-7)
    assert ends.converged


def test_groups_without_effect_end_close_to_zero() -> None:
    result = pyro_em.fit(_model(POSITIVE), T(0.5 * NOISE), max_iter=60, tol=0)
    assert (np.diff(result.history["objective"]) >= -1e-10).all()
    assert 0 < float(result.params["tau"]) < 0.05
    init = {**result.params, "tau": torch.tensor(1e-8)}
    without = pyro_em.fit(_model(POSITIVE), T(0.5 * NOISE), init=init, m_step={"tau": "fixed"})
    assert result.log_likelihood == pytest.approx(without.log_likelihood, abs=1e-2)


def test_a_step_beyond_zero_is_cut_and_raises_q() -> None:
    """The whole step ends at the maximum of a concave Q, so that its first part rises."""
    problem = bind(_model(POSITIVE), (T(Y),), {}, with_prior=False)
    unit = next(u for u in MStep(problem, "auto", "em").units if isinstance(u, Linear))
    step = torch.zeros(unit.size)
    step[unit.starts["tau"]], step[unit.starts["a"]] = -4.0, 2.0
    cut = inside(step, unit._positive(problem.start))
    torch.testing.assert_close(cut, step / 8)  # tau from 1 to 1/2
    step[unit.starts["tau"]] = -0.9
    assert torch.equal(inside(step, unit._positive(problem.start)), step)
