"""Latents of one state, as in a search for the number of states: every element is in it, and all results say so."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from tests.test_sequence_input import LOOPS, Loop


@LOOPS
def test_one_state(loop: Loop) -> None:
    """A chain without a choice of states is a sample of independent values."""

    def model(y: Tensor) -> None:
        mu, A, z = pyro.param("mu", torch.zeros(1)), torch.ones(1, 1), torch.tensor(0)
        for t in loop(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    y = torch.tensor([1.0, 4.0, -2.0, 0.5])
    result = pyro_em.fit(model, y)
    assert result.params["mu"].item() == pytest.approx(0.875, rel=1e-14)
    assert result.log_likelihood == pytest.approx(float(dist.Normal(0.875, 1.0).log_prob(y).sum()), rel=1e-13)
    posterior = result.posterior()
    for t in range(len(y)):
        assert posterior.mode()[f"z_{t}"] == 0 and posterior.marginal(f"z_{t}").probs.tolist() == [1.0]
        assert posterior.sample(3)[f"z_{t}"].tolist() == [0, 0, 0]
    if loop is pyro_em.markov:
        assert posterior.responsibilities("z").tolist() == [[1.0]] * 4
    with pytest.raises(pyro_em.InputError, match="one state"):
        posterior.sequence("z")
    draws = result.to_inference_data(num_draws=2, latent_draws=2)
    assert {"latent_posterior", "latent_draws"} <= set(draws.groups() if callable(draws.groups) else draws.children)


def test_one_component() -> None:
    """A mixture of one component, as in a search for the number of components: every row is in it."""

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.ones(1, dtype=torch.float64), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.zeros(1, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    x = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    result = pyro_em.fit(model, x)
    posterior = result.posterior()
    assert posterior.responsibilities("z").tolist() == [[1.0]] * 3
    assert posterior.mode()["z"].tolist() == [0] * 3 and posterior.sample(2)["z"].tolist() == [[0] * 3] * 2
    assert "no latent has more than one state" in str(result.plan)
    assert result.icl == result.bic and posterior.entropy() == 0
    torch.testing.assert_close(result.log_prob(), dist.Normal(x.mean(), 1.0).log_prob(x), rtol=1e-13, atol=0)
