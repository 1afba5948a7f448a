"""What the published cases share: reading their data, and fitting from seeded restarts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_em

CASES = Path(__file__).parent / "cases"
Found = dict[str, Any]  # quantities by the names which `cases/reference_fits.json` gives them
FAST: dict[str, Any] = {"restarts": 1, "init": None, "accelerate": "squarem"}


def read(name: str, *columns: str) -> Tensor:
    """Columns of a data file, (N, len(columns))."""
    table = np.genfromtxt(CASES / "data" / f"{name}.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    return torch.tensor(np.stack([np.asarray(table[c], dtype=float) for c in columns], -1))


def fit(model: Callable[..., Any], *args: Any, restarts: int = 10, **options: Any) -> Any:
    chosen: dict[str, Any] = {"init": "kmeans++", "max_iter": 20_000, "tol": 1e-8} | options
    return pyro_em.fit(model, *args, restarts=restarts, **({"seed": 0} | chosen))
