"""What sequences get that are not as they should be, or not all known; by `pyro.markov` and by `pyro_em.markov`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from tests.published import read

simplex = constraints.simplex
Loop = Callable[[int], Any]
START = {
    "pi": torch.tensor([0.6, 0.4], dtype=torch.float64),
    "A": torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64),
    "B": torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], dtype=torch.float64),
}


def one_by_one(steps: int) -> Any:
    return pyro.markov(range(steps))


LOOPS = pytest.mark.parametrize("loop", [pyro_em.markov, one_by_one], ids=["together", "one by one"])


def chain(x: Tensor, loop: Loop, labels: Tensor | None = None, known: Tensor | None = None) -> None:
    """Symbols (T, N); where `known` (T, N) the states are `labels`."""
    pi, A, B = (pyro.param(name, value, constraint=simplex) for name, value in START.items())
    with pyro.plate("sequences", x.shape[1]):
        z = None
        for t in loop(len(x)):
            seen = {} if known is None or labels is None else {"obs": labels[t], "obs_mask": known[t]}
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]), **seen)
            pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=x[t])


def _symbols(steps: int = 6, sequences: int = 3) -> Tensor:
    return torch.randint(3, (steps, sequences), generator=torch.Generator().manual_seed(0))


@LOOPS
def test_no_steps(loop: Loop) -> None:
    with pytest.raises(pyro_em.InputError, match=r"0 steps|sequence of length 0"):
        pyro_em.fit(chain, _symbols()[:0], loop)


@LOOPS
def test_one_step(loop: Loop) -> None:
    x = _symbols(1)
    found = pyro_em.fit(chain, x, loop, max_iter=0).log_likelihood
    assert found == pytest.approx(float((START["pi"] @ START["B"])[x[0]].log().sum()), rel=1e-13)


@pytest.mark.parametrize(
    ("loop", "where"),
    [(pyro_em.markov, "'x_1:6': the observation in row 1 of step 4"), (one_by_one, "'x_4': the observation in row 1")],
)
def test_symbols_out_of_range(loop: Loop, where: str) -> None:
    x = _symbols()
    x[4, 1] = 3
    with pytest.raises(pyro_em.InputError, match=where + " lies outside of the support"):
        pyro_em.fit(chain, x, loop)
    y = _symbols().double()
    y[4, 1] = torch.nan
    with pytest.raises(pyro_em.InputError, match=where + " is NaN"):
        pyro_em.fit(chain, y, loop)


@pytest.mark.parametrize(
    ("loop", "where"),
    [
        (pyro_em.markov, r"rows 2 of plate \['sequences'\], from step 3 on,"),
        (one_by_one, r"'x_3': the data in rows 2 of plate \['sequences'\]"),
    ],
)
def test_impossible_sequences_are_named(loop: Loop, where: str) -> None:
    """The first state never gives the last symbol, and is never left."""
    start = {"A": torch.eye(2), "pi": torch.tensor([1.0, 0.0]), "B": torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.3, 0.6]])}
    x = _symbols().clamp(max=1)
    x[3, 2] = 2
    with pytest.raises(pyro_em.NonFiniteError, match=where):
        pyro_em.fit(chain, x, loop, init={name: value.double() for name, value in start.items()})


@LOOPS
def test_labels_that_contradict_the_chain_are_named(loop: Loop) -> None:
    labels = torch.tensor([[0], [0], [1], [0]])
    start = {**START, "A": torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)}
    with pytest.raises(pyro_em.NonFiniteError, match="step 3" if loop is pyro_em.markov else "'z_3"):
        pyro_em.fit(chain, _symbols(4, 1), loop, labels, torch.ones(4, 1, dtype=torch.bool), init=start)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")  # of the forbidden one
@LOOPS
def test_forbidden_transitions_stay_zero(loop: Loop) -> None:
    start = {**START, "A": torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)}
    x = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 2, 2], [2, 2, 1]])
    found = pyro_em.fit(chain, x, loop, init=start, max_iter=5, tol=0).params["A"]
    assert float(found[1, 0]) == 0.0 and float(found[0, 1]) > 0.0


@LOOPS
def test_every_step_is_an_observation(loop: Loop) -> None:
    """n of BIC: 6 steps of 3 sequences, a weight counting its sequence's steps, a series of one sequence."""
    assert pyro_em.fit(chain, _symbols(), loop, max_iter=0).num_observations == 18
    weights = {"sequences": torch.tensor([1.0, 2.0, 0.5])}
    assert pyro_em.fit(chain, _symbols(), loop, max_iter=0, weights=weights).num_observations == 21
    assert pyro_em.fit(chain, _symbols(6, 1), loop, max_iter=0).num_observations == 6


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")  # the published first state is certain
def test_published_bic() -> None:
    """depmixS4's vignette: AIC 191.46 and BIC 220.05 of two states on one series of 439 reaction times."""

    def model(y: Tensor) -> None:
        pi = pyro.param("pi", torch.tensor([0.0, 1.0]), constraint=simplex)
        A = pyro.param("A", torch.tensor([[0.883504, 0.116496], [0.084334, 0.915666]]), constraint=simplex)
        mu = pyro.param("mu", torch.tensor([5.510355, 6.385047]))
        sd = pyro.param("sd", torch.tensor([0.191743, 0.244164]), constraint=constraints.positive)
        z = None
        for t in pyro_em.markov(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], sd[z]), obs=y[t])

    result = pyro_em.fit(model, read("speed", "rt")[:, 0], max_iter=0)
    assert result.num_observations == 439
    assert result.aic == pytest.approx(191.46, abs=0.005)
    assert result.bic == pytest.approx(220.05, abs=0.005)


@LOOPS
def test_partly_known_states(loop: Loop) -> None:
    """One update against the sums over all paths that agree with what is known."""
    x = _symbols(5, 3)
    generator = torch.Generator().manual_seed(1)
    labels, known = torch.randint(2, (5, 3), generator=generator), torch.rand(5, 3, generator=generator) < 0.4
    assert bool(known.any()) and not bool(known.all())
    result = pyro_em.fit(chain, x, loop, labels, known, max_iter=1, tol=0)
    evidence, pairs, symbols = 0.0, torch.zeros(2, 2), torch.zeros(2, 3)
    for i in range(3):
        total, own = 0.0, (torch.zeros(2, 2), torch.zeros(2, 3))
        for path in itertools.product(range(2), repeat=5):
            if any(known[t, i] and path[t] != labels[t, i] for t in range(5)):
                continue
            p = float(START["pi"][path[0]]) * math.prod(float(START["A"][path[t - 1], path[t]]) for t in range(1, 5))
            p *= math.prod(float(START["B"][path[t], x[t, i]]) for t in range(5))
            total += p
            for t in range(5):
                own[1][path[t], x[t, i]] += p
                if t:
                    own[0][path[t - 1], path[t]] += p
        evidence += math.log(total)
        pairs, symbols = pairs + own[0] / total, symbols + own[1] / total
    assert result.history["log_likelihood"][0] == pytest.approx(evidence, rel=1e-12)
    for name, counts in (("A", pairs), ("B", symbols)):
        torch.testing.assert_close(result.params[name], counts / counts.sum(1, keepdim=True), rtol=0, atol=1e-12)
    if loop is pyro_em.markov:
        mode = result.posterior().mode()["z"]
        assert bool((mode == labels)[known].all())


def test_series_inside_of_one_site_count_their_steps() -> None:
    """n of BIC, for states that a distribution has inside: steps with data, times weights of the series."""
    one = torch.eye(1)

    def inside(y: Tensor) -> None:
        mean = pyro.param("mean", torch.zeros(1))
        normal, seen = (dist.MultivariateNormal(m, one) for m in (torch.zeros(1), mean))
        with pyro.plate("series", len(y)):
            pyro.sample("y", dist.GaussianHMM(normal, one, normal, one, seen, duration=y.shape[1]), obs=y)

    def symbols(x: Tensor) -> None:
        B = pyro.param("B", START["B"], constraint=simplex)
        with pyro.plate("series", len(x)):
            pyro.sample("x", dist.DiscreteHMM(START["pi"].log(), START["A"].log(), dist.Categorical(B)), obs=x)

    def level(y: Tensor, seen: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("series", y.shape[1]):
            x = torch.tensor(0.0)
            for t in pyro_em.markov(len(y)):
                x = pyro.sample(f"x_{t}", dist.Normal(x, scale))
                with pyro.poutine.mask(mask=seen[t]):
                    pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    y = torch.randn(3, 7, 1, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(7, 3, dtype=torch.bool)
    seen[4:, 1] = False
    weights = {"series": torch.tensor([1.0, 2.0, 0.0])}
    assert pyro_em.fit(inside, y, max_iter=0).num_observations == 21
    assert pyro_em.fit(symbols, (y[..., 0] > 0).long(), max_iter=0).num_observations == 21
    assert pyro_em.fit(level, y[..., 0].mT, seen, max_iter=0).num_observations == 18
    assert pyro_em.fit(level, y[..., 0].mT, seen, max_iter=0, weights=weights).num_observations == 7 + 2 * 4


def test_steps_of_a_chain_have_no_weights() -> None:
    with pytest.raises(pyro_em.InputError, match=r"no vectorised plate 'markov_0'. Its plates: 'sequences'"):
        pyro_em.fit(chain, _symbols(), pyro_em.markov, weights={"markov_0": torch.ones(5)})


def test_a_body_that_tells_steps_apart_is_refused_in_a_sentence() -> None:
    def model(y: Tensor) -> None:
        mu, z = pyro.param("mu", torch.tensor([0.0, 1.0])), torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            if t % 2 == 0:
                z = pyro.sample(f"z_{t}", dist.Categorical(START["A"][z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    with pytest.raises(pyro_em.Refusal, match=r"^The body of a pyro_em.markov loop compares the step with a number"):
        pyro_em.fit(model, torch.zeros(6))


def test_steps_in_names() -> None:
    """Zeros before the step are part of the name; a step that is no single number is refused with the way to write."""

    def model(y: Tensor, name: Callable[[str, Any], str]) -> None:
        A, mu = pyro.param("A", START["A"], constraint=simplex), pyro.param("mu", torch.tensor([0.0, 1.0]))
        z = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            z = pyro.sample(name("z", t), dist.Categorical(A[z]))
            pyro.sample(name("y", t), dist.Normal(mu[z], 1.0), obs=y[t])

    y = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64)
    plain = pyro_em.fit(model, y, lambda stem, t: f"{stem}_{t}", max_iter=3, tol=0)
    other = pyro_em.fit(model, y, lambda stem, t: f"{stem}.{t:03d}", max_iter=3, tol=0)
    assert other.history["objective"] == plain.history["objective"]
    posterior, expected = other.posterior(), plain.posterior()
    assert posterior.latents == ("z",)
    for t in (0, 1, 11):
        assert torch.equal(posterior.responsibilities(f"z.{t:03d}"), expected.responsibilities(f"z_{t}"))
    with pytest.raises(pyro_em.InputError, match=r"no latent 'z\.11'"):
        posterior.marginal("z.11")
    with pytest.raises(pyro_em.Refusal, match=r'as a Python integer \(in a name, write f"z_\{t\}" for "z_%d" % t\)'):
        pyro_em.fit(model, y, lambda stem, t: "%s_%d" % (stem, t))  # noqa: UP031


def test_what_cannot_be_run_together_says_how_to_write_it() -> None:
    """A step as a key of a dict, data with time as their second dim, a site that reads the last state."""

    def keyed(y: Tensor) -> None:
        states: dict[Any, Tensor] = {}
        for t in pyro_em.markov(len(y)):
            before = torch.tensor(0) if t == 0 else states[t - 1]
            states[t] = pyro.sample(f"z_{t}", dist.Categorical(START["A"][before]))
            pyro.sample(f"y_{t}", dist.Normal(states[t].double(), 1.0), obs=y[t])

    def second(y: Tensor) -> None:
        z = torch.tensor(0)
        with pyro.plate("sequences", len(y)):
            for t in pyro_em.markov(y.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Categorical(START["A"][z]))
                pyro.sample(f"y_{t}", dist.Normal(z.double(), 1.0), obs=y[:, t])

    def after(y: Tensor) -> None:
        z = torch.tensor(0)
        for t in pyro_em.markov(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(START["A"][z]))
            pyro.sample(f"y_{t}", dist.Normal(z.double(), 1.0), obs=y[t])
        pyro.sample("end", dist.Normal(z.double(), 1.0), obs=y[0])

    with pytest.raises(pyro_em.Refusal, match=r"uses the step as a key \(carry"):
        pyro_em.fit(keyed, torch.zeros(5))
    with pytest.raises(pyro_em.Refusal, match=r"time \(4 steps at once\) right of a plate's dim.*y\.mT\[t\] for y"):
        pyro_em.fit(second, torch.zeros(3, 5))
    with pytest.raises(pyro_em.Refusal, match=r"'end': it reads 'z_1:5' from outside of the pyro_em.markov loop"):
        pyro_em.fit(after, torch.zeros(5))
