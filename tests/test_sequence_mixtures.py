"""Sequences of states that depend on a latent outside of their loop: filtered, smoothed, forecast, one step at a time.

The oracle is the same model with the data cut off after each step, and the class summed by hand.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em

K, M = 2, 3  # states; classes


def kinds(y: Tensor, age: Tensor | None, seen: Tensor, shared: bool = False) -> None:
    """A class for each sequence (or one for all of them) chooses the transitions, and tells on its age."""
    w = pyro.param("w", torch.tensor([0.5, 0.3, 0.2]), constraint=constraints.simplex)
    stay = torch.tensor([0.9, 0.5, 0.2])
    A = torch.stack([torch.stack([stay, 1 - stay], -1), torch.stack([1 - stay, stay], -1)], -2)  # (M, K, K)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.5]))
    if shared:
        c = pyro.sample("c", dist.Categorical(w))
    with pyro.plate("sequences", y.shape[1]):
        if not shared:
            c = pyro.sample("c", dist.Categorical(w))
        if age is not None:
            pyro.sample("age", dist.Normal(0.5 * c, 1.0), obs=age)
        z = torch.zeros_like(c)
        for t in pyro_em.markov(len(y)):
            with pyro.poutine.mask(mask=seen[t]):  # type: ignore[call-overload]
                z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(A)[c, z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])


def _data(steps: int = 5, sequences: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(steps, sequences, generator=generator) * 2, torch.randn(sequences, generator=generator)


@pytest.mark.parametrize("observed", [False, True])
def test_a_class_for_each_sequence(observed: bool) -> None:
    y, age = _data()
    own = age if observed else None
    result = pyro_em.fit(kinds, y, own, torch.ones(y.shape, dtype=torch.bool), max_iter=0)
    posterior = result.posterior()
    states = posterior.sequence("z")
    torch.testing.assert_close(states.smooth(), posterior.responsibilities("z"), rtol=0, atol=1e-13)
    before = torch.zeros(4)
    if observed:
        before = torch.tensor([0.5, 0.3, 0.2]).log() + dist.Normal(0.5 * torch.arange(3), 1.0).log_prob(age[:, None])
        before = before.logsumexp(-1)
    torch.testing.assert_close(before + states.one_step().sum(0), result.log_prob(), rtol=1e-13, atol=1e-13)
    for t in range(len(y)):
        so_far = (torch.arange(len(y)) <= t).unsqueeze(-1).expand(y.shape)
        cut = pyro_em.fit(kinds, y, own, so_far, max_iter=0)
        torch.testing.assert_close(states.filter()[t], cut.posterior().responsibilities("z")[t], rtol=0, atol=1e-13)
        torch.testing.assert_close(before + states.one_step()[: t + 1].sum(0), cut.log_prob(), rtol=1e-13, atol=1e-13)
    blank = torch.cat([y, torch.zeros(2, 4)])
    more = (torch.arange(7) < 5).unsqueeze(-1).expand(blank.shape)
    ahead = pyro_em.fit(kinds, blank, own, more, max_iter=0).posterior().responsibilities("z")[5:]
    torch.testing.assert_close(states.forecast(2), ahead, rtol=0, atol=1e-13)


def test_a_class_of_all_sequences_is_refused() -> None:
    y, age = _data()
    posterior = pyro_em.fit(kinds, y, age, torch.ones(y.shape, dtype=torch.bool), True, max_iter=0).posterior()
    with pytest.raises(pyro_em.InputError, match=r"share latents outside of their loop.*ask for the marginal"):
        posterior.sequence("z")


def test_the_way_to_other_sequences_is_told() -> None:
    """Gaussian states are asked for by their data; steps of a loop that is run one by one have no sequence."""

    def level(y: Tensor) -> None:
        q = pyro.param("q", torch.tensor(1.0), constraint=constraints.positive)
        x = torch.tensor(0.0)
        for t in pyro_em.markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(x, q))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    def unrolled(y: Tensor) -> None:
        mu, z = pyro.param("mu", torch.tensor([-1.0, 1.0])), torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.7, 0.3], [0.2, 0.8]])[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    y = _data()[0][:, 0]
    with pytest.raises(pyro_em.InputError, match=r"posterior.states\('y'\)"):
        pyro_em.fit(level, y, max_iter=0).posterior().sequence("x")
    assert pyro_em.fit(level, y, max_iter=0).posterior().states("y").log_prob_steps().shape == (5,)
    with pytest.raises(pyro_em.InputError, match=r"for t in pyro_em.markov\(T\)"):
        pyro_em.fit(unrolled, y, max_iter=0).posterior().sequence("z_0")
