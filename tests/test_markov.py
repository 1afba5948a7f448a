"""`pyro_em.markov`: all steps of a loop run together mean what they mean one by one, or are refused.

The oracle is the same model with `pyro.markov(range(T))`, which the package unrolls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from tests import zoo_time
from tests.problems import BY_NAME

Loop = Callable[[int], Iterable[Any]]
TIMED = [name for name in BY_NAME if name.startswith("timed_")]


def one_by_one(steps: int | range, history: int = 1) -> Iterable[int]:
    return pyro.markov(range(steps) if isinstance(steps, int) else steps, history=history)


def mixture_in_states(y: Tensor, x: Tensor, seen: Tensor, loop: Loop) -> None:
    """Two items a step (dim -1), a component that no later step reads, transitions gated by a covariate."""
    gate = pyro.param("gate", torch.tensor([[-1.0, 0.5], [1.0, -0.3]]))
    w = pyro.param("w", torch.tensor([[0.6, 0.4], [0.3, 0.7]]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([[0.0, 1.0], [2.0, 4.0]]))
    items = pyro.plate("items", 2, dim=-1)
    with pyro.plate("sequences", y.shape[1], dim=-2):
        z = torch.tensor(0)
        for t in loop(len(y)):
            high = torch.sigmoid(gate[z, 0] + gate[z, 1] * x[t])
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.stack([1 - high, high], -1)))
            with items, poutine.mask(mask=seen[t]):
                c = pyro.sample(f"c_{t}", dist.Categorical(w[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z, c], 1.0), obs=y[t])


def _data(steps: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(steps, 3, 2, generator=generator) + 2.0 * (torch.arange(steps) % 5 > 2).reshape(-1, 1, 1)
    return y, torch.randn(steps, 1, 1, generator=generator), torch.rand(steps, 3, 2, generator=generator) < 0.8


def _close(a: Any, b: Any) -> None:
    assert a.history["log_likelihood"] == pytest.approx(b.history["log_likelihood"], rel=1e-12)
    for name, value in a.params.items():
        torch.testing.assert_close(value, b.params[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_together_is_one_by_one(steps: int) -> None:
    args = _data(steps)
    options = {"max_iter": 3, "tol": 0}
    together = pyro_em.fit(mixture_in_states, *args, pyro_em.markov, **options)
    alone = pyro_em.fit(mixture_in_states, *args, one_by_one, **options)
    _close(together, alone)
    here = pyro_em.fit(mixture_in_states, *args, one_by_one, init=together.params, max_iter=0)
    a, b = together.posterior(), here.posterior()
    assert a.entropy() == pytest.approx(b.entropy(), rel=1e-10)
    mode, other = a.mode(), b.mode()
    for t in range(steps):
        assert torch.equal(mode[f"z_{t}"].reshape(-1), other[f"z_{t}"].reshape(-1))
        assert torch.equal(mode[f"c_{t}"], other[f"c_{t}"])
        for site in (f"z_{t}", f"c_{t}"):
            torch.testing.assert_close(a.marginal(site).probs, b.marginal(site).probs, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")  # four iterations in: curvature need not be proper
@pytest.mark.parametrize("name", TIMED)
def test_problems_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every iterate, its score and the standard errors, which differentiate twice."""
    problem = BY_NAME[name]
    algorithm = "map-em" if problem.priors else "em"
    together = pyro_em.fit(problem.model, *problem.args, init=problem.start(), algorithm=algorithm, max_iter=4, tol=0)
    errors = together.standard_errors()
    monkeypatch.setattr(zoo_time, "markov", one_by_one)
    alone = pyro_em.fit(problem.model, *problem.args, init=problem.start(), algorithm=algorithm, max_iter=4, tol=0)
    _close(together, alone)
    assert together.history["score"] == pytest.approx(alone.history["score"], rel=1e-6)
    for parameter, value in alone.standard_errors().items():
        torch.testing.assert_close(errors[parameter], value, rtol=1e-6, atol=1e-9)


def test_a_sequence_is_named_without_the_step() -> None:
    problem = BY_NAME["timed_ragged"]
    result = pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=1, tol=0)
    posterior = result.posterior()
    steps, sequences = problem.args[0].shape
    assert posterior.latents == ("z",)
    assert posterior.responsibilities("z").shape == (steps, sequences, 2)
    torch.testing.assert_close(posterior.responsibilities("z")[3], posterior.responsibilities("z_3"))
    assert list(posterior.mode()) == ["z"]
    draws = posterior.sample(2000)
    assert draws["z"].shape == (2000, steps, sequences)
    assert torch.equal(draws["z_4"], draws["z"][:, 4])
    moved = (draws["z"].double().mean(0) - posterior.mean("z")).abs()
    assert float(moved.max()) < 5 * 0.5 / 2000**0.5
    with pytest.raises(pyro_em.InputError, match="no latent 'z_5'"):
        posterior.marginal("z_5")


def test_draws_are_joint() -> None:
    """Pairs of neighbours in drawn paths are as frequent as their posterior says."""
    problem = BY_NAME["timed_switching"]
    result = pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=1, tol=0)
    truth = problem.oracle(result.params)
    z = result.posterior().sample(4000)["z"].double()
    weights = truth.responsibilities[0]  # (assignments, N)
    both = torch.stack([(a["z_1"] * a["z_2"]).double().reshape(()) for a in truth.local])
    expected = (both.unsqueeze(-1) * weights).sum(0)
    assert float(((z[:, 1] * z[:, 2]).mean(0) - expected).abs().max()) < 5 * 0.5 / 4000**0.5


def _refused(body: Callable[[Any, Tensor, Tensor], Tensor], match: str) -> None:
    x = torch.linspace(-1.0, 1.0, 7)

    def model() -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
        z = torch.tensor(0)
        for t in pyro_em.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[z]))
            z = body(t, z, mu)

    with pytest.raises(pyro_em.Refusal, match=match):
        pyro_em.fit(model, max_iter=1)


def test_what_differs_between_steps_is_refused() -> None:
    x = torch.linspace(-1.0, 1.0, 7)
    calls = []

    def one_special_step(t: Any, z: Tensor, mu: Tensor) -> Tensor:
        pyro.sample(f"x_{t}", dist.Normal(mu[z] + (3.0 if t == 5 else 0.0), 1.0), obs=x[t])
        return z

    def counting(t: Any, z: Tensor, mu: Tensor) -> Tensor:
        calls.append(t)
        pyro.sample(f"x_{t}", dist.Normal(mu[z] * len(calls), 1.0), obs=x[t])
        return z

    def reversed_data(t: Any, z: Tensor, mu: Tensor) -> Tensor:
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[-1] if t == 0 else x[1:])
        return z

    _refused(one_special_step, "another answer at some steps")
    _refused(counting, "two runs of the model")
    _refused(reversed_data, "at step . alone|dims that belong to none")


def test_a_latent_of_the_first_step_is_refused() -> None:
    x = torch.linspace(-1.0, 1.0, 7)
    first = []

    def reads_the_first(t: Any, z: Tensor, mu: Tensor) -> Tensor:
        if t == 0:
            first[:] = [z]
        pyro.sample(f"x_{t}", dist.Normal(mu[first[0]], 1.0), obs=x[t])
        return z

    _refused(reads_the_first, "at step . alone")


def test_plain_pyro_unrolls() -> None:
    x = torch.linspace(-1.0, 1.0, 4)

    def model() -> None:
        z = torch.tensor(0)
        for t in pyro_em.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[z]))
            pyro.sample(f"x_{t}", dist.Normal(z.double(), 1.0), obs=x[t])

    assert [n for n in poutine.trace(model).get_trace().nodes if n.startswith("z")] == ["z_0", "z_1", "z_2", "z_3"]


@pytest.mark.parametrize("steps", [0, range(2, 5)])
def test_steps_that_are_none(steps: Any) -> None:
    with pytest.raises(pyro_em.InputError, match="markov"):
        pyro_em.markov(steps)


def test_filtered_smoothed_forecast() -> None:
    """Filtering is smoothing of the data so far; the one-step densities add up to the evidence."""
    problem = BY_NAME["timed_ragged"]
    y, seen = problem.args
    result = pyro_em.fit(problem.model, y, seen, init=problem.start(), max_iter=2, tol=0)
    posterior = result.posterior()
    states = posterior.sequence("z")
    torch.testing.assert_close(states.smooth(), posterior.responsibilities("z"), rtol=0, atol=1e-12)
    torch.testing.assert_close(states.one_step().sum(0), result.log_prob(), rtol=1e-12, atol=1e-12)
    for t in (0, 2):
        so_far = seen & (torch.arange(len(y)).unsqueeze(-1) <= t)
        there = pyro_em.fit(problem.model, y, so_far, init=result.params, max_iter=0).posterior()
        torch.testing.assert_close(states.filter()[t], there.responsibilities("z")[t], rtol=0, atol=1e-12)
    ahead = states.forecast(3)
    last, A = states.smooth()[-1], result.params["A"]
    torch.testing.assert_close(ahead[2], last @ A @ A @ A, rtol=0, atol=1e-12)
    with pytest.raises(pyro_em.InputError, match="no sequence"):
        posterior.sequence("y")
    with pytest.raises(pyro_em.InputError, match="at least 1"):
        states.forecast(0)


def test_a_forecast_needs_the_transitions_to_come() -> None:
    result = pyro_em.fit(mixture_in_states, *_data(6), pyro_em.markov, max_iter=0)
    posterior = result.posterior()
    assert posterior.sequence("z").filter().shape == (6, 3, 2)
    with pytest.raises(pyro_em.InputError, match="vary with time"):
        posterior.sequence("z").forecast(2)
    with pytest.raises(pyro_em.InputError, match="no later step reads"):
        posterior.sequence("c")
