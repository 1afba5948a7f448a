"""States that a `pyro.markov` loop has let go of: Pyro gives their dim to another latent, so reading them is refused.

The shapes are right then, and drawn states agree by chance in short series: the reading itself is what is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em
from tests.oracles import enumerate_model

X = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
TRANSITION = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
Loop = Callable[[int], Iterable[int]]


def markov(steps: int, history: int = 1) -> Iterable[int]:
    return pyro.markov(range(steps), history=history)


def state(name: str, before: Any) -> Tensor:
    value: Tensor = pyro.sample(name, dist.Categorical(TRANSITION[before]))
    return value


def two_steps_back(x: Tensor, loop: Loop) -> None:
    level = pyro.param("level", torch.zeros((), dtype=torch.float64))
    older = old = z = torch.tensor(0)
    for t in loop(len(x)):
        older, old, z = old, z, state(f"z_{t}", z)
        pyro.sample(f"x_{t}", dist.Normal(level + Vindex(MEANS)[older, z], 1.0), obs=x[t])


def all_read_the_first(x: Tensor, loop: Loop) -> None:
    level = pyro.param("level", torch.zeros((), dtype=torch.float64))
    first = z = None
    for t in loop(len(x)):
        z = state(f"z_{t}", 0 if z is None else z)
        first = z if first is None else first
        pyro.sample(f"x_{t}", dist.Normal(level + Vindex(MEANS)[first, z], 1.0), obs=x[t])


def one_loop_after_another(x: Tensor, loop: Loop) -> None:
    level = pyro.param("level", torch.zeros((), dtype=torch.float64))
    z = torch.tensor(0)
    for name in "zy":
        for t in loop(3):
            z = state(f"{name}_{t}", z)
            pyro.sample(f"x{name}_{t}", dist.Normal(level + MEANS[1, z], 1.0), obs=x[t])


def after_the_loop(x: Tensor, loop: Loop) -> None:
    level = pyro.param("level", torch.zeros((), dtype=torch.float64))
    z = torch.tensor(0)
    for t in loop(len(x)):
        z = state(f"z_{t}", z)
        pyro.sample(f"x_{t}", dist.Normal(level + MEANS[1, z], 1.0), obs=x[t])
    pyro.sample("end", dist.Bernoulli(logits=MEANS[1, z]), obs=torch.tensor(1.0))


@pytest.mark.parametrize("model", [two_steps_back, all_read_the_first, one_loop_after_another, after_the_loop])
def test_what_the_loop_has_let_go_of_is_refused(model: Callable[[Tensor, Loop], None]) -> None:
    for seed in range(3):  # a certificate by drawn states would pass some of these
        pyro.set_rng_seed(seed)
        with pytest.raises(pyro_em.Refusal, match=r"reads '[zy]_\d', which its pyro.markov loop has let go of.*range"):
            pyro_em.fit(model, X, markov, max_iter=1)
    found = pyro_em.fit(model, X, range, max_iter=1, tol=0)
    enumerated = enumerate_model(model, (X, range), found.params)
    assert found.log_likelihood == pytest.approx(float(enumerated.log_evidence.sum()), rel=1e-12)


def test_a_longer_history_keeps_it() -> None:
    def longer(steps: int) -> Iterable[int]:
        return markov(steps, history=2)

    found = pyro_em.fit(two_steps_back, X, longer, max_iter=1, tol=0)
    apart = pyro_em.fit(two_steps_back, X, range, max_iter=1, tol=0)
    assert found.log_likelihood == pytest.approx(apart.log_likelihood, rel=1e-12)
