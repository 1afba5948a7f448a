"""Sequences of states of any history, or with a latent outside of their loop: filtered, smoothed, forecast, by steps.

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


def test_a_class_of_all_sequences() -> None:
    """What all sequences have shown so far tells on their class; their one-step density is a joint one."""
    y, age = _data()
    everywhere = torch.ones(y.shape, dtype=torch.bool)
    result = pyro_em.fit(kinds, y, age, everywhere, True, max_iter=0)
    states = result.posterior().sequence("z")
    torch.testing.assert_close(states.smooth(), result.posterior().responsibilities("z"), rtol=0, atol=1e-13)
    before = torch.tensor([0.5, 0.3, 0.2]).log() + dist.Normal(0.5 * torch.arange(3), 1.0).log_prob(age[:, None]).sum(0)
    for t in range(len(y)):
        so_far = (torch.arange(len(y)) <= t).unsqueeze(-1).expand(y.shape)
        cut = pyro_em.fit(kinds, y, age, so_far, True, max_iter=0)
        torch.testing.assert_close(states.filter()[t], cut.posterior().responsibilities("z")[t], rtol=0, atol=1e-13)
        evidence = before.logsumexp(-1) + states.one_step()[: t + 1].sum()
        assert float(evidence) == pytest.approx(cut.log_likelihood, rel=1e-13)
    blank = torch.cat([y, torch.zeros(2, 4)])
    more = (torch.arange(7) < 5).unsqueeze(-1).expand(blank.shape)
    ahead = pyro_em.fit(kinds, blank, age, more, True, max_iter=0).posterior().responsibilities("z")[5:]
    torch.testing.assert_close(states.forecast(2), ahead, rtol=0, atol=1e-13)


def nested(y: Tensor) -> None:
    """A class of all sequences, and one of each that depends on it."""
    all_of = pyro.sample("all_of", dist.Categorical(torch.tensor([0.4, 0.6])))
    mu = pyro.param("mu", torch.tensor([-1.0, 1.5]))
    with pyro.plate("sequences", y.shape[1]):
        c = pyro.sample("c", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[all_of]))
        z = torch.zeros_like(c)
        for t in pyro_em.markov(len(y)):
            z = pyro.sample(
                f"z_{t}", dist.Categorical(torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.4, 0.6]]])[c, z])
            )
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])


def test_classes_of_sequences_in_classes_are_refused() -> None:
    posterior = pyro_em.fit(nested, _data()[0], max_iter=0).posterior()
    with pytest.raises(pyro_em.InputError, match=r"in several plates; ask for the marginal"):
        posterior.sequence("z")


def lags(y: Tensor, seen: Tensor, history: int, reach: int, classes: bool) -> None:
    """A chain that reaches `reach` of its `history` steps back, of sequences (T, N) of one of two kinds."""
    mu = pyro.param("mu", torch.tensor([-1.0, 1.5]))
    table = torch.rand((2, *[K] * (reach + 1)), generator=torch.Generator().manual_seed(reach)) + 0.2
    table = table / table.sum(-1, keepdim=True)
    with pyro.plate("sequences", y.shape[1]):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7]))) if classes else torch.tensor(0)
        z = [torch.tensor(0)] * reach
        for t in pyro_em.markov(len(y), history=history):
            with pyro.poutine.mask(mask=seen[t]):  # type: ignore[call-overload]
                z = [*z[1:], pyro.sample(f"z_{t}", dist.Categorical(Vindex(table)[(c, *z)]))]
                pyro.sample(f"y_{t}", dist.Normal(mu[z[-1]] + 0.5 * mu[z[0]], 1.0), obs=y[t])


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize(("history", "reach"), [(2, 2), (3, 3), (3, 2), (2, 1)])
def test_longer_histories(history: int, reach: int, classes: bool) -> None:
    """Filtered, smoothed, one step at a time and forecast: the steps before the first joint state, too."""
    y, steps = _data(6)[0], torch.arange(6).unsqueeze(-1)
    ends = torch.tensor([6, 4, 5, 6])
    rest = (history, reach, classes)
    result = pyro_em.fit(lags, y, steps < ends, *rest, max_iter=0)
    states = result.posterior().sequence("z")
    torch.testing.assert_close(states.smooth(), result.posterior().responsibilities("z"), rtol=0, atol=1e-13)
    torch.testing.assert_close(states.one_step().sum(0), result.log_prob(), rtol=1e-13, atol=1e-13)
    for t in range(6):
        cut = pyro_em.fit(lags, y, (steps < ends) & (steps <= t), *rest, max_iter=0)
        torch.testing.assert_close(states.filter()[t], cut.posterior().responsibilities("z")[t], rtol=0, atol=1e-13)
        torch.testing.assert_close(states.one_step()[: t + 1].sum(0), cut.log_prob(), rtol=1e-13, atol=1e-13)
    blank = torch.cat([y, torch.zeros(2, 4)])
    more = torch.cat([steps < ends, torch.zeros(2, 4, dtype=torch.bool)])
    ahead = pyro_em.fit(lags, blank, more, *rest, max_iter=0).posterior().responsibilities("z")[6:]
    torch.testing.assert_close(states.forecast(2), ahead, rtol=0, atol=1e-13)


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
    with pytest.raises(pyro_em.InputError, match="asked for without the step"):
        pyro_em.fit(unrolled, y, max_iter=0).posterior().sequence("z_0")
