"""Hidden semi-Markov model with free durations 1..D, as a Markov model of the state and the steps that are left.

    where a stay has ended: z_t ~ Categorical(transition[z_{t-1}]), left_t ~ Categorical(duration[z_t])
    otherwise:              z_t = z_{t-1},                           left_t = left_{t-1} - 1
    x_t | z_t ~ N(loc[z_t], scale²);  initial (K,), transition (K, K) without stays, duration (K, D)

The first stay begins at t = 0; the last may be cut off by the end. `data` is one sequence (T,). The certain moves
are structural zeros and ones: they take no part in the M-step, which is the ratio of counts of stays.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def simulate(num_steps: int = 40, *, seed: int = 0) -> Tensor:
    """Two states of means 0 and 4 in turn, which last 2 to 3 and 3 to 4 steps. (T,)."""
    generator = torch.Generator().manual_seed(seed)
    states: list[int] = []
    z = 0
    while len(states) < num_steps:
        states += [z] * (2 + z + int(torch.randint(2, (), generator=generator)))
        z = 1 - z
    noise = torch.randn(num_steps, generator=generator, dtype=torch.float64)
    return 4.0 * torch.tensor(states[:num_steps]) + noise


def model(data: Tensor, num_states: int = 2, max_duration: int = 4) -> None:
    """Starts at quantiles of the data, with all durations alike."""

    def table(*shape: int) -> Tensor:
        return torch.full(shape, 1 / shape[-1], dtype=torch.float64)

    ranks = (torch.arange(num_states, dtype=torch.float64) + 0.5) / num_states
    initial = pyro.param("initial", table(num_states), constraint=constraints.simplex)
    elsewhere = (1 - torch.eye(num_states, dtype=torch.float64)) / (num_states - 1)
    transition = pyro.param("transition", elsewhere, constraint=constraints.simplex)
    duration = pyro.param("duration", table(num_states, max_duration), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: data.double().quantile(ranks))
    scale = pyro.param("scale", lambda: data.double().std(correction=0) / num_states, constraint=constraints.positive)
    stays = torch.eye(num_states, dtype=torch.float64)
    one_less = torch.eye(max_duration, dtype=torch.float64)[[0, *range(max_duration - 1)]]
    z = left = None
    for t in pyro.markov(range(len(data))):
        if z is None or left is None:
            z = pyro.sample(f"z_{t}", dist.Categorical(initial))
            left = pyro.sample(f"left_{t}", dist.Categorical(duration[z]))
        else:
            ended = (left == 0).unsqueeze(-1)
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.where(ended, transition[z], stays[z])))
            left = pyro.sample(f"left_{t}", dist.Categorical(torch.where(ended, duration[z], one_less[left])))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], scale), obs=data[t])
