"""Markov-switching regressions: an autoregression, and a hidden Markov model whose transitions depend on covariates.

    autoregression   y_t | z_t = k ~ N(intercept_k + Σ_i coefficient_i y_{t-i}, scale_k²), given the first values
    covariates       y_t | z_t = k ~ N(loc_k, scale_k²),  logit p(z_t = 1 | z_{t-1} = j) = offset_j + slope_j x_t
    z_0 ~ Categorical(initial), free; K states, two for `covariates`

`y` is one series (T,). In Hamilton's (1989) autoregression the deviation from a state's mean is carried over
instead, so that y_t depends on the states of all steps that it looks back to.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def simulate(num_steps: int = 60, *, seed: int = 0) -> Tensor:
    """Two states, kept with probability 0.9, with means 0 and 4; the value before counts for 0.3. (T,)."""
    generator = torch.Generator().manual_seed(seed)
    z, y, values = 0, torch.zeros((), dtype=torch.float64), []
    for _ in range(num_steps):
        z = z if torch.rand((), generator=generator) < 0.9 else 1 - z
        y = 2.8 * z + 0.3 * y + 0.7 * torch.randn((), generator=generator, dtype=torch.float64)
        values.append(y)
    return torch.stack(values)


def simulate_covariates(num_steps: int = 60, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Series and covariate, (T,) each: where x is large the second state, of mean 4, is likely."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_steps, generator=generator, dtype=torch.float64)
    z, states = 0, []
    for t in range(num_steps):
        high = torch.sigmoid(3.0 * z - 1.5 + x[t])
        z = int(torch.rand((), generator=generator) < high)
        states.append(z)
    noise = torch.randn(num_steps, generator=generator, dtype=torch.float64)
    return 4.0 * torch.tensor(states) + noise, x


def _quantiles(y: Tensor, num_states: int) -> Tensor:
    return y.double().quantile((torch.arange(num_states, dtype=torch.float64) + 0.5) / num_states)


def _spread(y: Tensor, num_states: int) -> Tensor:
    return y.double().std(correction=0).repeat(num_states)


def _initial(num_states: int) -> Tensor:
    start = torch.full((num_states,), 1 / num_states, dtype=torch.float64)
    return pyro.param("initial", start, constraint=constraints.simplex)


def autoregression(y: Tensor, num_states: int = 2, order: int = 1) -> None:
    """Intercepts and scales switch, the coefficients do not; starts without dependence on the past."""
    initial = _initial(num_states)
    sticky = 0.8 * torch.eye(num_states, dtype=torch.float64) + 0.2 / num_states
    transition = pyro.param("transition", sticky, constraint=constraints.simplex)
    intercept = pyro.param("intercept", lambda: _quantiles(y, num_states))
    coefficient = pyro.param("coefficient", torch.zeros(order, dtype=torch.float64))
    scale = pyro.param("scale", lambda: _spread(y, num_states), constraint=constraints.positive)
    z = None
    for t in pyro.markov(range(order, len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        past = y[t - order : t].flip(0)
        pyro.sample(f"y_{t}", dist.Normal(intercept[z] + coefficient @ past, scale[z]), obs=y[t])


def covariates(y: Tensor, x: Tensor) -> None:
    """Two states; their chances depend on a covariate `x` (T,). Starts with states that last, and no effect."""
    initial = _initial(2)
    offset = pyro.param("offset", torch.tensor([-1.5, 1.5], dtype=torch.float64))
    slope = pyro.param("slope", torch.zeros(2, dtype=torch.float64))
    loc = pyro.param("loc", lambda: _quantiles(y, 2))
    scale = pyro.param("scale", lambda: _spread(y, 2), constraint=constraints.positive)
    z = None
    for t in pyro.markov(range(len(y))):
        if z is None:
            z = pyro.sample(f"z_{t}", dist.Categorical(initial))
        else:
            high = torch.sigmoid(offset[z] + slope[z] * x[t])
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.stack([1 - high, high], -1)))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=y[t])
