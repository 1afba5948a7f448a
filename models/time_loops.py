"""State-space models as plain loops over time: what the textbook writes, one sample statement a step.

    x_t ~ N(A x_{t-1}, Q),      y_t ~ N(C x_t, R)

`data` is one series, (T,) or (T, P); NaN in `autoregression` is a step that was not observed. The same kinds of model
as one sample site, whose distribution integrates the states out, are in state_space.py.

Data: annual flow of the Nile at Aswan, 1871-1970 (Cobb 1978).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DATA = Path(__file__).parent / "data"


def load() -> Tensor:
    """Annual flow of the Nile, 10⁸ m³. (100,)."""
    return torch.from_numpy(np.loadtxt(DATA / "nile.csv", delimiter=",", skiprows=1, usecols=1))


def simulate(num_steps: int = 40, num_observed: int = 1, seed: int = 0) -> Tensor:
    """A slowly rotating state seen through noise: (T,), or (T, P) if `num_observed` > 1."""
    g = torch.Generator().manual_seed(seed)
    turn = 0.95 * torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]], dtype=torch.float64)
    C = torch.randn(num_observed, 2, generator=g, dtype=torch.float64)
    x, steps = torch.randn(2, generator=g, dtype=torch.float64), []
    for _ in range(num_steps):
        x = turn @ x + 0.5 * torch.randn(2, generator=g, dtype=torch.float64)
        steps.append(C @ x + 0.5 * torch.randn(num_observed, generator=g, dtype=torch.float64))
    data = torch.stack(steps)
    return data[:, 0] if num_observed == 1 else data


def simulate_gaps(num_steps: int = 40, seed: int = 0) -> Tensor:
    """An autoregression around 2 of which every sixth step or so was not observed, and two in a row once."""
    g = torch.Generator().manual_seed(seed)
    y, steps = torch.tensor(2.0, dtype=torch.float64), []
    for _ in range(num_steps):
        y = 0.6 + 0.7 * y + 0.5 * torch.randn((), generator=g, dtype=torch.float64)
        steps.append(y)
    data = torch.stack(steps)
    data[4::6] = torch.nan
    data[11] = torch.nan
    return data


def _scale(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value.clone(), constraint=constraints.positive)


def local_level(data: Tensor) -> None:
    """A random walk seen through noise. The first level is around the first observation, as wide as the data."""
    spread = data.double().std(correction=0)
    level, noise = _scale("level", 0.5 * spread), _scale("noise", 0.5 * spread)
    x = data[0].double()
    for t in pyro.markov(range(len(data))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, spread if t == 0 else level))
        pyro.sample(f"y_{t}", dist.Normal(x, noise), obs=data[t])


def trend_and_seasonal(data: Tensor, period: int = 4) -> None:
    """Local linear trend and a seasonal of effects that sum to 0 but for noise (Harvey 1989, section 2.3).

    level_t = level_{t-1} + slope_{t-1} + noise,   slope_t = slope_{t-1} + noise,   s_t = -s_{t-1} - ... + noise
    """
    spread = data.double().std(correction=0)
    scales = {name: _scale(name, 0.2 * spread) for name in ("level_scale", "slope_scale", "season_scale")}
    noise = _scale("noise", 0.3 * spread)
    zero = torch.zeros((), dtype=torch.float64)
    level, slope, season = data[0].double(), zero, [zero] * (period - 1)
    for t in pyro.markov(range(len(data)), history=period - 1):
        wide = {name: spread if t == 0 else scale for name, scale in scales.items()}
        level = pyro.sample(f"level_{t}", dist.Normal(level + slope, wide["level_scale"]))
        slope = pyro.sample(f"slope_{t}", dist.Normal(slope, wide["slope_scale"]))
        effect = pyro.sample(f"season_{t}", dist.Normal(-sum(season, zero), wide["season_scale"]))
        season = [effect, *season[:-1]]
        pyro.sample(f"y_{t}", dist.Normal(level + effect, noise), obs=data[t])


def diffuse_trend(data: Tensor, period: int = 4) -> None:
    """Local linear trend and seasonal of whose start nothing is known: flat priors, the exact diffuse likelihood.

    The first level, slope and `period` - 1 effects are flat, which is written `.mask(False)` (`ImproperUniform` would
    say the same, but cannot be drawn from). Durbin and Koopman (2012, section 3.2.2).
    """
    spread = data.double().std(correction=0)
    level_scale, slope_scale, season_scale = (
        _scale(name, 0.2 * spread) for name in ("level_scale", "slope_scale", "season_scale")
    )
    noise = _scale("noise", 0.3 * spread)
    flat = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).mask(False)
    level = slope = torch.zeros((), dtype=torch.float64)
    season: list[Tensor] = []
    for t in pyro.markov(range(len(data)), history=period - 1):
        level, slope = (
            pyro.sample(f"level_{t}", flat if t == 0 else dist.Normal(level + slope, level_scale)),
            pyro.sample(f"slope_{t}", flat if t == 0 else dist.Normal(slope, slope_scale)),
        )
        known = len(season) == period - 1
        effect = pyro.sample(f"season_{t}", dist.Normal(-sum(season), season_scale) if known else flat)
        season = [effect, *season][: period - 1]
        pyro.sample(f"y_{t}", dist.Normal(level + effect, noise), obs=data[t])


def dynamic_factor(data: Tensor) -> None:
    """P series driven by one factor, f_t = φ₁ f_{t-1} + φ₂ f_{t-2} + N(0, 1), with noises of their own."""
    spread = data.double().std(0, correction=0)
    phi = pyro.param("phi", torch.tensor([0.5, 0.1], dtype=torch.float64))
    loadings = pyro.param("loadings", 0.5 * spread)
    noise = _scale("noise", 0.7 * spread)
    before = f = torch.zeros((), dtype=torch.float64)
    for t in pyro.markov(range(len(data)), history=2):
        before, f = f, pyro.sample(f"f_{t}", dist.Normal(phi[0] * f + phi[1] * before, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(loadings * f.unsqueeze(-1), noise).to_event(1), obs=data[t])


def lds(data: Tensor, num_states: int = 2) -> None:
    """Linear dynamical system with every matrix free; the states are determined up to a linear map."""
    D, P = num_states, data.shape[-1]
    variance = data.double().var(0, correction=0)
    eye = torch.eye(D, dtype=torch.float64)
    A = pyro.param("A", 0.9 * eye + 0.1 * torch.tril(torch.ones_like(eye), -1))
    waves = torch.cos(torch.outer(1.0 + torch.arange(P), 1.0 + torch.arange(D)).double())
    C = pyro.param("C", variance.sqrt().unsqueeze(-1) * waves)
    Q = pyro.param("Q", 0.5 * eye, constraint=constraints.positive_definite)
    R = pyro.param("R", 0.5 * torch.diag(variance), constraint=constraints.positive_definite)
    x = torch.zeros(D, dtype=torch.float64)
    for t in pyro.markov(range(len(data))):
        x = pyro.sample(f"x_{t}", dist.MultivariateNormal(x @ A.mT, eye if t == 0 else Q))
        pyro.sample(f"y_{t}", dist.MultivariateNormal(x @ C.mT, R), obs=data[t])


def autoregression(data: Tensor) -> None:
    """y_t = c + φ y_{t-1} + N(0, s²), conditional on y_0; a step that was not observed is a latent."""
    c = pyro.param("c", data.nanmean().double() * 0.5)
    phi = pyro.param("phi", torch.tensor(0.5, dtype=torch.float64))
    s = _scale("s", torch.tensor(math.sqrt(0.75) * float(data[~data.isnan()].std()), dtype=torch.float64))
    y = data[0]
    for t in pyro.markov(range(1, len(data))):
        seen = not bool(data[t].isnan())
        y = pyro.sample(f"y_{t}", dist.Normal(c + phi * y, s), obs=data[t] if seen else None)
