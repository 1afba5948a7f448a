"""What the edition on one page refuses or reports, and that it leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
import pyro_em.mini
from tests.test_mini import poisson_mixture


def _child_of_a_parameter(y: Tensor) -> None:
    spread = pyro.sample("spread", dist.Gamma(2.0, 1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, spread))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def _random_effects(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def _scaled(y: Tensor) -> None:
    with pyro.plate("rows", len(y)), pyro.poutine.scale(scale=0.5):
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=y)


@pytest.mark.parametrize("model", [_child_of_a_parameter, _random_effects, _scaled])
def test_mini_refuses_what_it_cannot_do(model: Any) -> None:
    with pytest.raises(ValueError, match=r"'mu'.*pyro_em\.fit"):
        pyro_em.mini.fit(model, torch.tensor([0.5, 1.0]))


def test_mini_says_what_is_wrong_with_its_arguments() -> None:
    y = torch.tensor([0.0, 2.0, 5.0])
    with pytest.raises(ValueError, match="'em', 'map-em' or 'gem'"):
        pyro_em.mini.fit(poisson_mixture, y, algorithm="vi")
    with pytest.raises(ValueError, match="tol=nan"):
        pyro_em.mini.fit(poisson_mixture, y, tol=float("nan"))
    for init in ({"lambda": torch.ones(2)}, {"rate": torch.ones(3)}, {"rate": torch.tensor([1.0, -1.0])}):
        with pytest.raises(ValueError, match=next(iter(init))):
            pyro_em.mini.fit(poisson_mixture, y, init=init)


def _forgetful(y: Tensor, drift: list[float]) -> None:
    drift[0] += 1.0
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(pyro.param("mu", torch.tensor(0.0)) + drift[0], 1.0), obs=y)


def test_a_falling_objective_is_an_error_with_both_numbers() -> None:
    """A model that changes from call to call has no likelihood to climb."""
    with pytest.raises(ArithmeticError, match=r"from -\d+\.\d+ to -\d+\.\d+"):
        pyro_em.mini.fit(_forgetful, torch.tensor([0.5, 1.0]), [0.0])


def _free_scales(y: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 5.0]))
    sd = pyro.param("sd", torch.tensor([0.3, 0.01]), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("y", dist.Normal(mu[z], sd[z]), obs=y)


def test_a_collapse_is_an_error() -> None:
    """The second component sits on the single point 5: its scale goes to 0, the likelihood to infinity."""
    with pytest.raises(ArithmeticError, match="collapsed"):
        pyro_em.mini.fit(_free_scales, torch.tensor([0.0, 0.1, -0.2, 0.3, 5.0]))


def test_mini_leaves_the_store_and_the_random_state_alone() -> None:
    pyro.param("rate", torch.tensor([7.0, 9.0]), constraint=constraints.positive)
    before, state, python = pyro.param("rate").tolist(), torch.get_rng_state(), random.getstate()
    result = pyro_em.mini.fit(poisson_mixture, torch.tensor([0.0, 2.0, 5.0]), max_iter=2, tol=0.0)
    assert list(pyro.get_param_store()) == ["rate"]
    assert pyro.param("rate").tolist() == before
    assert not any(value.requires_grad for value in result.params.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
