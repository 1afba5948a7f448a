"""Steps run at once where they could be mistaken: for elements of a plate as large, for one parameter, for no loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from tests.test_markov import one_by_one

Loop = Callable[[int], Any]
TRANSITION = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)


def test_a_parameter_of_every_step_is_refused() -> None:
    """Its later steps would share one; the model as written has T."""

    def model(y: Tensor, loop: Loop) -> None:
        z = torch.tensor(0)
        for t in loop(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
            mu = pyro.param(f"mu_{t}", torch.tensor([0.0, 1.0]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    y = torch.tensor([0.3, 1.0, -0.5, 0.2])
    with pytest.raises(pyro_em.Refusal, match=r"'mu_1:4': a parameter of its own at every step.*m\[t\]"):
        pyro_em.fit(model, y, pyro_em.markov)
    assert set(pyro_em.fit(model, y, one_by_one, max_iter=1).params) == {"mu_0", "mu_1", "mu_2", "mu_3"}


@pytest.mark.parametrize("sequences", [2, 3, 4])
def test_lengths_of_as_many_sequences_as_steps(sequences: int) -> None:
    """`t < lengths` is a row for each step, also where there are as many sequences as steps run together (3)."""

    def model(y: Tensor, lengths: Tensor, loop: Loop) -> None:
        mu, z = pyro.param("mu", torch.tensor([0.0, 1.0])), torch.tensor(0)
        with pyro.plate("sequences", y.shape[1]):
            for t in loop(len(y)):
                with pyro.poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
                    pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    def quadratic(y: Tensor, lengths: Tensor, loop: Loop) -> None:
        mu, z = pyro.param("mu", torch.tensor([0.0, 1.0])), torch.tensor(0)
        for t in loop(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z] + 0.01 * (t * t), 1.0), obs=y[t, 0])

    y = torch.randn(4, sequences, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor([4, 0, 2, 3])[:sequences]
    for own in (model, quadratic):
        loops = pyro_em.markov, one_by_one
        together, alone = (pyro_em.fit(own, y, lengths, loop, max_iter=2, tol=0) for loop in loops)
        assert together.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_sequences(steps: int) -> None:
    """Two steps are a sequence like longer ones; one step is none, and says so."""
    y = torch.randn(steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def chain(y: Tensor) -> None:
        mu, z = pyro.param("mu", torch.tensor([0.0, 1.0])), torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    result = pyro_em.fit(chain, y, max_iter=1)
    posterior = result.posterior()
    if steps == 1:
        with pytest.raises(pyro_em.InputError, match="steps of a loop over time, at least two"):
            posterior.sequence("z")
        return
    assert posterior.latents == ("z",)
    states = posterior.sequence("z")
    torch.testing.assert_close(states.filter()[-1], posterior.responsibilities("z")[-1], rtol=0, atol=1e-13)
    assert float(states.one_step().sum()) == pytest.approx(result.log_likelihood, rel=1e-12)


def test_plates_that_every_step_makes_for_arviz() -> None:
    """`items_{t}` is another plate at every step; for ArviZ the steps are one variable all the same."""

    def model(y: Tensor, loop: Loop) -> None:
        mu, z = pyro.param("mu", torch.tensor([0.0, 1.0])), torch.tensor(0)
        for t in loop(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
            with pyro.plate(f"items_{t}", y.shape[1]):
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    y = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for loop in (pyro_em.markov, one_by_one):
        tree = pyro_em.fit(model, y, loop, max_iter=1, tol=0).to_inference_data(num_draws=2, predictive=2)
        assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "time", "items")
        assert tree["observed_data"]["y"].dims == ("time", "items")
        assert tree["observed_data"]["y"].values.tolist() == y.tolist()
