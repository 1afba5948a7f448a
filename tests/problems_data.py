"""The part of the problem table with weights, labels and constraints on rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import zoo_data


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


def labelled_rows(seed: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """30 rows of three normals, their classes, and which of these are known."""
    rng = np.random.default_rng(seed)
    labels = np.arange(30) % 3
    y = rng.normal(np.array([-2.0, 0.0, 2.5])[labels], 0.9)
    return _t(y), torch.as_tensor(labels), torch.as_tensor(rng.random(30) < 0.3)


def allowed_rows() -> tuple[Tensor, Tensor]:
    """The same rows; a third of them with one class excluded, a few with only one left."""
    y, labels, known = labelled_rows()
    allowed = torch.ones(30, 3, dtype=torch.bool)
    excluded = torch.arange(30) % 3 == 1
    allowed[excluded] = ~torch.nn.functional.one_hot((labels[excluded] + 1) % 3, 3).bool()
    allowed[known] = torch.nn.functional.one_hot(labels[known], 3).bool()
    return y, allowed


def build(problem: Callable[..., Any]) -> list[Any]:
    start = {"w": _t([0.3, 0.3, 0.4]), "mu": _t([-1.0, 0.5, 2.0]), "sd": _t(1.2)}
    fractions = _t(np.random.default_rng(12).integers(0, 5, 30) / 2)
    return [
        problem("label_as_site", zoo_data.label_as_site, labelled_rows(), start, "rows", weights=fractions),
        problem("allowed_states", zoo_data.allowed_by_factor, allowed_rows(), start, "rows"),
    ]
