"""Mixture of Bernoullis: binary images, each pixel independent given the prototype it was drawn from.

    z_n ~ Categorical(weights),    x_nd | z_n = k ~ Bernoulli(probs_kd)
    x (N, D), weights (K,), probs (K, D)

Bishop, Pattern Recognition and Machine Learning, section 9.3.3. A pixel that is never on in a component gets
probability exactly 0; nothing is smoothed.

Data: the 8x8 handwritten digits that scikit-learn carries (`load` imports it), binarised at half intensity.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def load() -> Tensor:
    """1797 digits of 8x8 pixels, 1 where the intensity (0 to 16) is 8 or more. (1797, 64)."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().data >= 8).double()


def simulate(num_rows: int = 300, *, seed: int = 0) -> Tensor:
    """Two prototypes on 16 pixels, the upper and the lower half on, one pixel in ten flipped. (N, 16)."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.tensor([[0.9] * 8 + [0.1] * 8, [0.1] * 8 + [0.9] * 8], dtype=torch.float64)
    z = torch.randint(2, (num_rows,), generator=generator)
    return torch.bernoulli(prototypes[z], generator=generator)


def _blurred_rows(data: Tensor, num_components: int) -> Tensor:
    """Random rows, always the same, drawn half-way to 1/2 so that no pixel is impossible at the start."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(data), generator=generator)[:num_components]
    return 0.25 + 0.5 * data[rows].double()


def model(data: Tensor, num_components: int = 2) -> None:
    """Start: equal weights, blurred random rows."""
    start = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
    weights = pyro.param("weights", start, constraint=constraints.simplex)
    probs = pyro.param("probs", lambda: _blurred_rows(data, num_components), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Bernoulli(probs[z]).to_event(1), obs=data)
