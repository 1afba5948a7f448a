"""Data with missing cells for the tests of `missing="nan"`: rows of two normal classes, and rows of mixed kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

NAN = float("nan")
Array = np.ndarray[Any, Any]


def rows(n: int = 40, D: int = 3, seed: int = 0, share: float = 0.3) -> Tensor:
    """Correlated rows of two groups with cells missing at random, the last row wholly."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) @ (np.eye(D) + 0.5 * np.triu(np.ones((D, D)), 1)) + 3.0 * (rng.random((n, 1)) < 0.5)
    x[rng.random((n, D)) < share] = NAN
    x[-1] = NAN
    return torch.tensor(x)


START = {
    "w": torch.tensor([0.4, 0.6], dtype=torch.float64),
    "mu": torch.tensor([[0.0, 0.2, -0.1], [2.5, 3.0, 3.5]], dtype=torch.float64),
    "S": torch.tensor([[1.2, 0.3, 0.1], [0.3, 0.9, 0.2], [0.1, 0.2, 1.1]], dtype=torch.float64),
}


def mixed() -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(3)
    z = rng.random(50) < 0.5
    x = rng.normal(np.where(z, 1.5, -1.5)[:, None], 1.0, (50, 2))
    counts, colours = rng.poisson(np.where(z, 5.0, 1.0)).astype(float), rng.integers(0, 3, 50).astype(float)
    for table in (x, counts, colours):
        table[rng.random(table.shape) < 0.25] = NAN
    return torch.tensor(x), torch.tensor(counts), torch.tensor(colours)


def row_density(x: Array, mu: Array, S: Array) -> float:
    o = ~np.isnan(x)
    return float(stats.multivariate_normal.logpdf(x[o], mu[o], S[np.ix_(o, o)])) if o.any() else 0.0
