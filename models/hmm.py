"""Hidden Markov model with Gaussian, categorical or Poisson emissions.

    z_0 ~ Categorical(initial),  z_t | z_{t-1} ~ Categorical(transition[z_{t-1}]),  x_t | z_t ~ emission[z_t]
    initial (K,), transition (K, K), rows sum to 1

`data` is one sequence (T,) or S sequences (S, T), which share the parameters. Sequences of unequal
`lengths` (S,) are padded to T with any valid value: steps at and beyond a sequence's length are masked and
have no influence. The initial distribution is free, not the stationary one.

Data: earthquakes of magnitude 7 or more in the world, 1900-2006 (Zucchini, MacDonald and Langrock 2016).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> Tensor:
    """Number of great earthquakes in each year from 1900 to 2006. (107,)."""
    return torch.from_numpy(np.loadtxt(DATA / "earthquakes.csv", delimiter=",", skiprows=1, usecols=1))


def simulate(
    num_steps: int = 50,
    num_sequences: int | None = None,
    *,
    emission: Literal["gaussian", "categorical", "poisson"] = "gaussian",
    seed: int = 0,
) -> Tensor:
    """Two states, each kept with probability 0.9: (T,), or (S, T) when `num_sequences` is given."""
    generator = torch.Generator().manual_seed(seed)
    num_chains = num_sequences or 1
    z = torch.randint(2, (num_chains,), generator=generator)
    steps = []
    for _ in range(num_steps):
        steps.append(z)
        z = torch.where(torch.rand(num_chains, generator=generator) < 0.9, z, 1 - z)
    states = torch.stack(steps, -1)  # (S, T)
    if emission == "gaussian":
        data = 4.0 * states + torch.randn(states.shape, generator=generator, dtype=torch.float64)
    elif emission == "poisson":
        data = torch.poisson(torch.tensor([2.0, 10.0], dtype=torch.float64)[states], generator=generator)
    else:
        table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
        data = torch.multinomial(table[states].flatten(0, 1), 1, generator=generator).view(states.shape)
    return data if num_sequences else data.squeeze(0)


def _seen(data: Tensor, lengths: Tensor | None) -> Tensor:
    """All observations in one row, without padding: starting values must not depend on it."""
    if lengths is None:
        return data.flatten()
    return data[torch.arange(data.shape[-1]) < lengths.unsqueeze(-1)]


def _chain(
    data: Tensor, num_states: int, lengths: Tensor | None, emission: Callable[[Tensor], dist.Distribution]
) -> None:
    start = torch.full((num_states,), 1 / num_states, dtype=torch.float64)
    initial = pyro.param("initial", start, constraint=constraints.simplex)
    # States are kept with probability at least 0.8 at the start: without that they only make a mixture.
    sticky = 0.8 * torch.eye(num_states, dtype=torch.float64) + 0.2 * start
    transition = pyro.param("transition", sticky, constraint=constraints.simplex)
    sequences = pyro.plate("sequences", len(data), dim=-1) if data.dim() == 2 else nullcontext()
    with sequences:
        z = None
        for t in pyro.markov(range(data.shape[-1])):
            # As in Pyro's own HMM examples the mask covers state and emission of a step alike.
            with nullcontext() if lengths is None else pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
                pyro.sample(f"x_{t}", emission(z), obs=data[..., t])


def gaussian(data: Tensor, num_states: int = 2, lengths: Tensor | None = None) -> None:
    """x_t | z_t = k ~ N(loc_k, scale_k²); starts at quantiles of the data and the overall scale."""
    ranks = (torch.arange(num_states, dtype=torch.float64) + 0.5) / num_states
    loc = pyro.param("loc", lambda: _seen(data, lengths).double().quantile(ranks))
    scale = pyro.param(
        "scale",
        lambda: _seen(data, lengths).double().std(correction=0).repeat(num_states),
        constraint=constraints.positive,
    )
    _chain(data, num_states, lengths, lambda z: dist.Normal(loc[z], scale[z]))


def poisson(data: Tensor, num_states: int = 2, lengths: Tensor | None = None) -> None:
    """x_t | z_t = k ~ Poisson(rate_k); starts at rates evenly spaced around the mean count."""
    spread = (2 * torch.arange(num_states, dtype=torch.float64) + 1) / num_states
    rate = pyro.param("rate", lambda: _seen(data, lengths).double().mean() * spread, constraint=constraints.positive)
    _chain(data, num_states, lengths, lambda z: dist.Poisson(rate[z]))


def categorical(data: Tensor, num_states: int = 2, lengths: Tensor | None = None, num_symbols: int = 3) -> None:
    """x_t | z_t = k ~ Categorical(probs_k), symbols 0..C-1; the first state leans to low symbols."""

    def tilted_shares() -> Tensor:
        # One added to every count keeps a symbol that was never seen at a positive probability.
        counts = 1.0 + torch.bincount(_seen(data, lengths), minlength=num_symbols)
        tilt = (2 * torch.arange(num_states, dtype=torch.float64) + 1) / num_states - 1
        tilted = counts * torch.exp(tilt.unsqueeze(-1) * torch.arange(num_symbols))
        return tilted / tilted.sum(-1, keepdim=True)

    probs = pyro.param("probs", tilted_shares, constraint=constraints.simplex)
    _chain(data, num_states, lengths, lambda z: dist.Categorical(probs[z]))
