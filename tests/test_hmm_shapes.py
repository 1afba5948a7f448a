"""The shapes of Pyro's `examples/hmm.py` afresh: plain, batched, autoregressive, factorial, coupled, neural,
of order two.

A small set of three sequences of chords over four tones, of unequal length, fitted by `em` and `map-em`. Every shape
is written once, with time first; the loop is `pyro.markov` over single steps or `pyro_em.markov` over all at once,
and both must climb alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em

Loop = Callable[..., Iterable[Any]]
LENGTHS = torch.tensor([9, 6, 4])


def chords() -> Tensor:
    """(T, sequences, tones): two chords in turn, with wrong notes."""
    rng = np.random.default_rng(3)
    chord = np.array([[0.9, 0.8, 0.1, 0.1], [0.1, 0.2, 0.9, 0.7]])[
        np.arange(9)[:, None] // 2 % 2 + np.zeros((9, 3), int)
    ]
    return torch.as_tensor(rng.random(chord.shape) < chord).double()


def one_by_one(steps: int, history: int = 1) -> Iterable[int]:
    return pyro.markov(range(steps), history=history)


def _tables(K: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Transitions with a sticky prior, and probabilities of tones."""
    with pyro.plate("states", K, dim=-1):
        x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(K) + 1.1))
    y = pyro.sample("probs_y", dist.Beta(torch.full(shape, 1.1), torch.full(shape, 1.9)).to_event(len(shape)))
    return x, y


def _steps(y: Tensor, loop: Loop, history: int = 1) -> Iterable[tuple[Any, Any]]:
    seen = torch.arange(len(y)).reshape(-1, 1, 1) < LENGTHS.unsqueeze(-1)
    tones = pyro.plate("tones", 4, dim=-1)
    for t in loop(len(y), history):
        with poutine.mask(mask=seen[t]):
            yield t, tones


def plain(y: Tensor, loop: Loop) -> None:
    """Model 0: one sequence after the other, in a Python loop."""
    A, B = _tables(2, 2, 4)
    for i, length in enumerate(LENGTHS.tolist()):
        x = torch.tensor(0)
        for t in loop(length, 1):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(A[x]))
            with pyro.plate(f"tones_{i}_{t}", 4, dim=-1):
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(B[x.squeeze(-1)]), obs=y[t, i])


def batched(y: Tensor, loop: Loop) -> None:
    """Models 1 and 4's frame: sequences in a plate, masked beyond their ends."""
    A, B = _tables(2, 2, 4)
    with pyro.plate("sequences", 3, dim=-2):
        x = torch.tensor(0)
        for t, tones in _steps(y, loop):
            x = pyro.sample(f"x_{t}", dist.Categorical(A[x]))
            with tones as tone:
                pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(B)[x, tone]), obs=y[t])


def autoregressive(y: Tensor, loop: Loop) -> None:
    """Model 2: a tone depends on the state and on itself a step before."""
    A, B = _tables(2, 2, 2, 4)
    before = torch.cat([torch.zeros_like(y[:1]), y[:-1]]).long()
    with pyro.plate("sequences", 3, dim=-2):
        x = torch.tensor(0)
        for t, tones in _steps(y, loop):
            x = pyro.sample(f"x_{t}", dist.Categorical(A[x]))
            with tones as tone:
                pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(B)[x, before[t], tone]), obs=y[t])


def factorial(y: Tensor, loop: Loop) -> None:
    """Model 3: two chains, and tones that depend on both."""
    A, B = _tables(2, 2, 2, 4)
    with pyro.plate("others", 2, dim=-1):
        C = pyro.sample("probs_w", dist.Dirichlet(0.9 * torch.eye(2) + 1.1))
    with pyro.plate("sequences", 3, dim=-2):
        w, x = torch.tensor(0), torch.tensor(1)
        for t, tones in _steps(y, loop):
            w = pyro.sample(f"w_{t}", dist.Categorical(C[w]))
            x = pyro.sample(f"x_{t}", dist.Categorical(A[x]))
            with tones as tone:
                pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(B)[w, x, tone]), obs=y[t])


def coupled(y: Tensor, loop: Loop) -> None:
    """Model 4: the second chain reads the first."""
    A, B = _tables(2, 2, 2, 4)
    with pyro.plate("first", 2, dim=-2), pyro.plate("second", 2, dim=-1):
        C = pyro.sample("probs_w", dist.Dirichlet(0.9 * torch.eye(2) + 1.1))
    with pyro.plate("sequences", 3, dim=-2):
        w, x = torch.tensor(0), torch.tensor(1)
        for t, tones in _steps(y, loop):
            w = pyro.sample(f"w_{t}", dist.Categorical(A[w]))
            x = pyro.sample(f"x_{t}", dist.Categorical(Vindex(C)[w, x]))
            with tones as tone:
                pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(B)[w, x, tone]), obs=y[t])


def second_order(y: Tensor, loop: Loop) -> None:
    """Model 6: the state looks two steps back."""
    with pyro.plate("before", 2, dim=-2), pyro.plate("last", 2, dim=-1):
        A = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 1.1))
    shape = torch.ones(2, 4)
    B = pyro.sample("probs_y", dist.Beta(1.1 * shape, 1.9 * shape).to_event(2))
    with pyro.plate("sequences", 3, dim=-2):
        before, x = torch.tensor(0), torch.tensor(1)
        for t, tones in _steps(y, loop, 2):
            before, x = x, pyro.sample(f"x_{t}", dist.Categorical(Vindex(A)[before, x]))
            with tones as tone:
                pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(B)[x, tone]), obs=y[t])


class Tones(torch.nn.Module):
    """Logits of the tones from the state and the tones a step before, through one hidden layer."""

    def __init__(self, states: int = 2, hidden: int = 3, tones: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.of_state = torch.nn.Linear(states, hidden)
        self.of_before = torch.nn.Linear(tones, hidden)
        self.logits = torch.nn.Linear(hidden, tones)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        state = torch.nn.functional.one_hot(x, self.of_state.in_features).to(before.dtype)
        return self.logits(torch.tanh(self.of_state(state) + self.of_before(before)))


def network(y: Tensor, loop: Loop, tones: Tones) -> None:
    """Model 5: a network makes the tones from the state and from the tones a step before."""
    pyro.module("tones", tones)
    with pyro.plate("states", 2, dim=-1):
        A = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 1.1))
    before = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
    seen = torch.arange(len(y)).unsqueeze(-1) < LENGTHS
    with pyro.plate("sequences", 3, dim=-1):
        x = torch.tensor(0)
        for t in loop(len(y)):
            with poutine.mask(mask=seen[t]):
                x = pyro.sample(f"x_{t}", dist.Categorical(A[x]))
                pyro.sample(f"y_{t}", dist.Bernoulli(logits=tones(x, before[t])).to_event(1), obs=y[t])


SHAPES = [plain, batched, autoregressive, factorial, coupled, second_order]


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")  # tones that a chord never has
@pytest.mark.filterwarnings("ignore::pyro_em.UnidentifiedParameter")
@pytest.mark.parametrize("model", SHAPES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("algorithm", ["em", "map-em"])
def test_shape(model: Callable[..., None], algorithm: str) -> None:
    y = chords()
    options = {"algorithm": algorithm, "seed": 1, "tol": 0}
    start = pyro_em.fit(model, y, one_by_one, max_iter=1, **options).params
    alone = pyro_em.fit(model, y, one_by_one, init=start, max_iter=4, **options)
    together = pyro_em.fit(model, y, pyro_em.markov, init=start, max_iter=4, **options)
    assert together.exact
    rise = np.diff(together.history["objective"])
    assert (rise > -1e-12).all() and rise[0] > 1e-3
    assert together.history["objective"] == pytest.approx(alone.history["objective"], rel=1e-11)
    for name, value in together.params.items():
        torch.testing.assert_close(value, alone.params[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("algorithm", ["em", "map-em", "gem"])
def test_network(algorithm: str) -> None:
    """Model 5: a gradient M-step for the network, a closed form for the transitions."""
    y, weights = chords(), [f"tones$$${name}" for name, _ in Tones().named_parameters()]
    chosen: Any = "auto" if algorithm == "gem" else dict.fromkeys(weights, "gradient")
    options = {"algorithm": algorithm, "m_step": chosen, "tol": 0, "max_iter": 4}
    alone, together = (
        pyro_em.fit(network, y, loop, Tones(), init={"probs_x": torch.tensor([[0.6, 0.4], [0.3, 0.7]])}, **options)
        for loop in (one_by_one, pyro_em.markov)
    )
    for result in (alone, together):
        rise = np.diff(result.history["objective"])
        assert result.exact and (rise > -1e-12).all() and rise.sum() > 1e-2
        assert set(result.params) == {"probs_x", *weights}
    # The first update is the same; later the steps' lengths may turn on the last digit.
    assert together.history["objective"][:2] == pytest.approx(alone.history["objective"][:2], rel=1e-11)
