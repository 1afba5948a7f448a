"""Random mixtures by their seed (mixtures.py)."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import torch

from tests.mixture_parts import N, P, Site
from tests.mixtures import Mixture


def random_mixture(seed: int) -> Mixture:
    """A mixture that is a function of its seed alone; every row says something about its class."""
    rng = np.random.default_rng(seed)
    while True:
        mixture = _draw(rng)
        if mixture.informed().all() and len(mixture.fixed) < len(mixture.parameters):
            return mixture


def _draw(rng: np.random.Generator) -> Mixture:
    mixture = Mixture(rng, K=int(rng.integers(2, 4)))
    if mixture.chance(0.3):
        X, free = mixture.X, mixture.parameter("real", P, mixture.K - 1)
        mixture.words.append("gate")
        mixture.gate = lambda v: dist.Categorical(logits=torch.cat([torch.zeros(N, 1), X @ v[free]], -1))
    else:
        w = mixture.parameter("simplex", mixture.K)
        mixture.gate = lambda v: dist.Categorical(v[w])
    for i in range(int(rng.integers(1, 4))):
        make = mixture.distribution()
        mask = torch.as_tensor(rng.random(N) < 0.8) if mixture.chance(0.25) else None
        mixture.sites.append(Site(f"y{i}", make, mask))
    if mixture.chance(0.4):
        whole = mixture.chance(0.5)
        weights = rng.integers(0, 3, N) if whole else rng.uniform(0.2, 2.0, N)
        mixture.weights = torch.as_tensor(weights.astype(float))
    return mixture
