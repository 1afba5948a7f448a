"""Hidden Markov model of an animal's track: lengths of its steps and the angles by which it turns.

    z_0 ~ Categorical(initial),  z_t | z_{t-1} ~ Categorical(transition[z_{t-1}])
    step_t | z_t = k ~ Gamma(shape_k, rate_k),   angle_t | z_t = k ~ VonMises(direction_k, concentration_k)

Resting animals make short steps in all directions, travelling ones long steps straight on (Morales et al. 2004;
Langrock et al. 2012). `step` > 0 and `angle` in radians are one track, (T,) each; an angle needs three positions, so
that the first one of a track, NaN, is none.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def simulate(num_steps: int = 60, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rest (mean step 0.5) and travel (mean step 4, straight on), each kept with probability 0.9. (T,) each."""
    generator = torch.Generator().manual_seed(seed)
    z, states = 0, []
    for _ in range(num_steps):
        z = z if torch.rand((), generator=generator) < 0.9 else 1 - z
        states.append(z)
    travels = torch.tensor(states).double()
    # Sums of two exponentials, and angles of points around (±1, 0) of the plane.
    waits = -torch.rand(2, num_steps, generator=generator, dtype=torch.float64).log().sum(0)
    at = 0.8 * torch.randn(2, num_steps, generator=generator, dtype=torch.float64)
    angle = torch.atan2(at[1], at[0] + 2.5 * travels - 0.5)
    angle[0] = torch.nan
    return waits * (0.25 + 1.75 * travels), angle


def model(step: Tensor, angle: Tensor, num_states: int = 2) -> None:
    """Starts with states of ever longer and straighter steps."""
    rank = (torch.arange(num_states, dtype=torch.float64) + 0.5) / num_states
    start = torch.full((num_states,), 1 / num_states, dtype=torch.float64)
    initial = pyro.param("initial", start, constraint=constraints.simplex)
    sticky = 0.8 * torch.eye(num_states, dtype=torch.float64) + 0.2 * start
    transition = pyro.param("transition", sticky, constraint=constraints.simplex)
    shape = pyro.param("shape", torch.ones_like(start), constraint=constraints.positive)
    rate = pyro.param("rate", lambda: step.double().quantile(rank).reciprocal(), constraint=constraints.positive)
    direction = pyro.param("direction", torch.zeros_like(start))
    concentration = pyro.param("concentration", 2 * rank, constraint=constraints.positive)
    z = None
    for t in pyro.markov(range(len(step))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"step_{t}", dist.Gamma(shape[z], rate[z]), obs=step[t])
        if not angle[t].isnan():
            pyro.sample(f"angle_{t}", dist.VonMises(direction[z], concentration[z]), obs=angle[t])
