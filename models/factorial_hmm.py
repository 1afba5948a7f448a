"""Factorial hidden Markov model (Ghahramani and Jordan 1997): two chains, independent a priori, behind one series.

    u_t | u_{t-1} ~ Categorical(A[u_{t-1}]),  v_t | v_{t-1} ~ Categorical(B[v_{t-1}]),  y_t ~ N(loc[u_t, v_t], scale²)
    both chains start in their first state before the data; A, B (K, K), loc (K, K)

`data` is one series (T,) or S series (S, T), which share the parameters.
"""

from __future__ import annotations

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def simulate(num_steps: int = 40, num_series: int | None = None, *, seed: int = 0) -> Tensor:
    """Two chains of two states, kept with probability 0.9 and 0.8, which add 3 and 7. (T,), or (S, T)."""
    generator = torch.Generator().manual_seed(seed)
    count = num_series or 1

    def chain(keep: float) -> Tensor:
        z, steps = torch.zeros(count, dtype=torch.long), []
        for _ in range(num_steps):
            z = torch.where(torch.rand(count, generator=generator) < keep, z, 1 - z)
            steps.append(z)
        return torch.stack(steps, -1)

    noise = torch.randn(count, num_steps, generator=generator, dtype=torch.float64)
    data = 3.0 * chain(0.9) + 7.0 * chain(0.8) + noise
    return data if num_series else data.squeeze(0)


def model(data: Tensor, num_states: int = 2) -> None:
    """Starts at a grid of means over the range of the data, and states that last."""

    def grid() -> Tensor:
        low, high = data.double().min(), data.double().max()
        fine = torch.arange(num_states, dtype=torch.float64)
        place = fine.unsqueeze(-1) + num_states * fine  # the second chain takes the larger steps
        return low + (high - low) * (place + 0.5) / num_states**2

    sticky = 0.8 * torch.eye(num_states, dtype=torch.float64) + 0.2 / num_states
    A = pyro.param("A", sticky, constraint=constraints.simplex)
    B = pyro.param("B", sticky.clone(), constraint=constraints.simplex)
    loc = pyro.param("loc", grid)
    scale = pyro.param("scale", lambda: data.double().std(correction=0) / num_states, constraint=constraints.positive)
    series = pyro.plate("series", len(data), dim=-1) if data.dim() == 2 else nullcontext()
    with series:
        u = v = torch.tensor(0)
        for t in pyro.markov(range(data.shape[-1])):
            u = pyro.sample(f"u_{t}", dist.Categorical(A[u]))
            v = pyro.sample(f"v_{t}", dist.Categorical(B[v]))
            pyro.sample(f"y_{t}", dist.Normal(loc[u, v], scale), obs=data[..., t])
