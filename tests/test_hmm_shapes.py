"""The shapes of Pyro's `examples/hmm.py` afresh: plain, batched, autoregressive, factorial, coupled, neural,
of order two.

Every shape is written once, with time first; the loop is `pyro.markov` over single steps or `pyro_em.markov` over all
at once. On three short sequences of chords over four tones both must climb alike. On a bundled set, seven business
cycles of unequal length in which seven series "sound" or not (models/data/growth.csv), all shapes are fitted by `em`
and `map-em` to convergence, and held to Pyro's own TraceEnum_ELBO of the unrolled model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em

Loop = Callable[..., Iterable[Any]]
LENGTHS = torch.tensor([9, 6, 4])
GROWTH = Path(__file__).parent.parent / "models" / "data" / "growth.csv"


@cache
def cycles() -> tuple[Tensor, Tensor]:
    """Seven business cycles: (T, sequences, series), 0 behind the end of the shorter ones, and their lengths."""
    table = torch.as_tensor(np.genfromtxt(GROWTH, delimiter=",", skip_header=1))
    own = [table[table[:, 2] == cycle, 3:] for cycle in range(7)]
    lengths = torch.tensor([len(x) for x in own])
    return torch.nn.utils.rnn.pad_sequence(own), lengths


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


def _steps(y: Tensor, lengths: Tensor, loop: Loop, history: int = 1) -> Iterable[tuple[Any, Any]]:
    seen = torch.arange(len(y)).reshape(-1, 1, 1) < lengths.unsqueeze(-1)
    tones = pyro.plate("tones", y.shape[-1], dim=-1)
    for t in loop(len(y), history):
        with poutine.mask(mask=seen[t]):
            yield t, tones


def plain(y: Tensor, lengths: Tensor, loop: Loop) -> None:
    """Model 0: one sequence after the other, in a Python loop."""
    A, B = _tables(2, 2, y.shape[-1])
    for i, length in enumerate(lengths.tolist()):
        x = torch.tensor(0)
        for t in loop(length, 1):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(A[x]))
            with pyro.plate(f"tones_{i}_{t}", y.shape[-1], dim=-1):
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(B[x.squeeze(-1)]), obs=y[t, i])


def batched(y: Tensor, lengths: Tensor, loop: Loop) -> None:
    """Models 1 and 4's frame: sequences in a plate, masked beyond their ends."""
    A, B = _tables(2, 2, y.shape[-1])
    with pyro.plate("sequences", y.shape[1], dim=-2):
        x = torch.tensor(0)
        for t, tones in _steps(y, lengths, loop):
            x = pyro.sample(f"x_{t}", dist.Categorical(A[x]))
            with tones as tone:
                pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(B)[x, tone]), obs=y[t])


def autoregressive(y: Tensor, lengths: Tensor, loop: Loop) -> None:
    """Model 2: a tone depends on the state and on itself a step before."""
    A, B = _tables(2, 2, 2, y.shape[-1])
    before = torch.cat([torch.zeros_like(y[:1]), y[:-1]]).long()
    with pyro.plate("sequences", y.shape[1], dim=-2):
        x = torch.tensor(0)
        for t, tones in _steps(y, lengths, loop):
            x = pyro.sample(f"x_{t}", dist.Categorical(A[x]))
            with tones as tone:
                pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(B)[x, before[t], tone]), obs=y[t])


def factorial(y: Tensor, lengths: Tensor, loop: Loop) -> None:
    """Model 3: two chains, and tones that depend on both."""
    A, B = _tables(2, 2, 2, y.shape[-1])
    with pyro.plate("others", 2, dim=-1):
        C = pyro.sample("probs_w", dist.Dirichlet(0.9 * torch.eye(2) + 1.1))
    with pyro.plate("sequences", y.shape[1], dim=-2):
        w, x = torch.tensor(0), torch.tensor(1)
        for t, tones in _steps(y, lengths, loop):
            w = pyro.sample(f"w_{t}", dist.Categorical(C[w]))
            x = pyro.sample(f"x_{t}", dist.Categorical(A[x]))
            with tones as tone:
                pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(B)[w, x, tone]), obs=y[t])


def coupled(y: Tensor, lengths: Tensor, loop: Loop) -> None:
    """Model 4: the second chain reads the first."""
    A, B = _tables(2, 2, 2, y.shape[-1])
    with pyro.plate("first", 2, dim=-2), pyro.plate("second", 2, dim=-1):
        C = pyro.sample("probs_w", dist.Dirichlet(0.9 * torch.eye(2) + 1.1))
    with pyro.plate("sequences", y.shape[1], dim=-2):
        w, x = torch.tensor(0), torch.tensor(1)
        for t, tones in _steps(y, lengths, loop):
            w = pyro.sample(f"w_{t}", dist.Categorical(A[w]))
            x = pyro.sample(f"x_{t}", dist.Categorical(Vindex(C)[w, x]))
            with tones as tone:
                pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(B)[w, x, tone]), obs=y[t])


def second_order(y: Tensor, lengths: Tensor, loop: Loop) -> None:
    """Model 6: the state looks two steps back."""
    with pyro.plate("before", 2, dim=-2), pyro.plate("last", 2, dim=-1):
        A = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 1.1))
    shape = torch.ones(2, y.shape[-1])
    B = pyro.sample("probs_y", dist.Beta(1.1 * shape, 1.9 * shape).to_event(2))
    with pyro.plate("sequences", y.shape[1], dim=-2):
        before, x = torch.tensor(0), torch.tensor(1)
        for t, tones in _steps(y, lengths, loop, 2):
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


def network(y: Tensor, lengths: Tensor, loop: Loop, tones: Tones) -> None:
    """Model 5: a network makes the tones from the state and from the tones a step before."""
    pyro.module("tones", tones)
    with pyro.plate("states", 2, dim=-1):
        A = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 1.1))
    before = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
    seen = torch.arange(len(y)).unsqueeze(-1) < lengths
    with pyro.plate("sequences", y.shape[1], dim=-1):
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
    start = pyro_em.fit(model, y, LENGTHS, one_by_one, max_iter=1, **options).params
    alone = pyro_em.fit(model, y, LENGTHS, one_by_one, init=start, max_iter=4, **options)
    together = pyro_em.fit(model, y, LENGTHS, pyro_em.markov, init=start, max_iter=4, **options)
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
        pyro_em.fit(
            network, y, LENGTHS, loop, Tones(), init={"probs_x": torch.tensor([[0.6, 0.4], [0.3, 0.7]])}, **options
        )
        for loop in (one_by_one, pyro_em.markov)
    )
    for result in (alone, together):
        rise = np.diff(result.history["objective"])
        assert result.exact and (rise > -1e-12).all() and rise.sum() > 1e-2
        assert set(result.params) == {"probs_x", *weights}
    # The first update is the same; later the steps' lengths may turn on the last digit.
    assert together.history["objective"][:2] == pytest.approx(alone.history["objective"][:2], rel=1e-11)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
@pytest.mark.filterwarnings("ignore::pyro_em.UnidentifiedParameter")
@pytest.mark.parametrize("model", [*SHAPES, network], ids=lambda m: m.__name__)
@pytest.mark.parametrize("algorithm", ["em", "map-em"])
def test_business_cycles(model: Callable[..., None], algorithm: str) -> None:
    """Climbs to a stationary point, whose log-likelihood is that which Pyro finds in the unrolled model."""
    y, lengths = cycles()
    module = [Tones(tones=y.shape[-1])] if model is network else []
    options: dict[str, Any] = {"algorithm": algorithm, "seed": 3, "tol": 1e-4, "accelerate": "anderson"}
    if module:  # which climbs for long: a gradient step for its weights at each of a few updates
        chosen = {f"tones$$${name}": "gradient" for name, _ in module[0].named_parameters()}
        options |= {"max_iter": 5, "accelerate": None, "m_step": chosen}
    pyro.clear_param_store()
    result = pyro_em.fit(model, y, lengths, pyro_em.markov, *module, **options)
    assert result.exact and (result.converged or module)
    assert result.history["objective"][-1] > result.history["objective"][0] + 1.0
    assert (np.diff(result.history["objective"]) > -1e-10).all()
    fixed = {name: value for name, value in result.params.items() if name.startswith("probs")}
    unrolled = poutine.block(poutine.condition(model, data=fixed), hide=list(fixed))  # their priors are not counted
    pyro_loss = TraceEnum_ELBO(max_plate_nesting=2).loss
    loss = pyro_loss(config_enumerate(unrolled, default="parallel"), lambda *_: None, y, lengths, one_by_one, *module)
    assert result.log_likelihood == pytest.approx(-loss, rel=1e-10)


def test_the_bundled_set_is_what_it_says() -> None:
    """Made from statsmodels' `macrodata` as models/data/README.md tells."""
    from statsmodels.datasets import macrodata

    data = macrodata.load_pandas().data
    names = ["realgdp", "realcons", "realinv", "realgovt", "realdpi", "m1"]
    rises = np.column_stack([np.diff(np.log(data[names].to_numpy()), axis=0), -np.diff(data["unemp"].to_numpy())])
    table = np.genfromtxt(GROWTH, delimiter=",", skip_header=1)
    quarter = (table[:, 0] - 1959) * 4 + table[:, 1] - 2  # of the differences, the first of which is 1959Q2
    above = rises > np.median(rises, axis=0)
    assert np.array_equal(table[:, 3:], above[quarter.astype(int)])
    ends = [(1969, 4), (1973, 4), (1980, 1), (1981, 3), (1990, 3), (2001, 1), (2007, 4)]
    last = [tuple(table[table[:, 2] == cycle][-1, :2].astype(int)) for cycle in range(7)]
    assert last == ends
