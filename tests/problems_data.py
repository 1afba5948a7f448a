"""The part of the problem table with weights, labels, constraints on rows, and responses seen only in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import zoo_data, zoo_structured


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


def censored_rows() -> tuple[Tensor, float, Tensor]:
    """50 rows of two normals, clamped at -1.5 from below and at a limit of their own from above."""
    rng = np.random.default_rng(13)
    y = rng.normal(np.repeat([-1.0, 3.0], 25), np.repeat([0.6, 0.8], 25))
    upper = rng.uniform(2.5, 6.0, 50)
    return _t(np.clip(y, -1.5, upper)), -1.5, _t(upper)


def interval_rows() -> Tensor:
    """40 durations: every third known exactly, others to the unit, some only from below."""
    rng = np.random.default_rng(14)
    y = rng.exponential(np.repeat([0.4, 3.0], 20))
    low, high = np.floor(y), np.floor(y) + 1
    exact = np.arange(40) % 3 == 0
    high[y > 4] = np.inf
    return _t(np.stack([np.where(exact, y, low), np.where(exact, y, high)], -1))


def truncated_counts() -> Tensor:
    """60 positive counts."""
    rng = np.random.default_rng(15)
    counts = rng.poisson(np.repeat([1.0, 6.0], 60))
    return _t(counts[counts > 0][:60])


def durations() -> tuple[Tensor, Tensor]:
    """40 durations and their limits, infinite where the end was seen."""
    rng = np.random.default_rng(16)
    y, limit = 2.0 * rng.weibull(1.5, 40), rng.exponential(3.0, 40)
    return _t(np.minimum(y, limit)), _t(np.where(y <= limit, np.inf, limit))


def two_groups(seed: int, sizes: tuple[int, ...], centres: Any, scales: Any) -> Tensor:
    rng = np.random.default_rng(seed)
    rows = [rng.normal(c, s, (n, *np.shape(c))) for n, c, s in zip(sizes, centres, scales, strict=True)]
    return _t(np.concatenate(rows))


def chains(seed: int, sequences: int, steps: int) -> np.ndarray[Any, Any]:
    """State paths (N, T) of a sticky two-state chain."""
    rng = np.random.default_rng(seed)
    stay = rng.random((sequences, steps)) < 0.75
    start = rng.integers(0, 2, (sequences, 1))
    return np.asarray((start + np.cumsum(~stay, 1)) % 2)


PARTLY = "a partly seen response is completed (test_coarse.py has this Q)"


def covariates(rows: int) -> np.ndarray[Any, Any]:
    """A constant and one covariate."""
    return np.c_[np.ones(rows), np.random.default_rng(17).normal(size=rows)]


def tobit_rows() -> tuple[Tensor, Tensor, Tensor]:
    """48 rows of two lines, clamped at 0 and at 4 or 6."""
    rng, X = np.random.default_rng(18), covariates(48)
    kind, upper = np.arange(48) % 2, np.where(np.arange(48) % 3, 4.0, 6.0)
    y = (X * np.array([[1.0, 1.5], [3.0, -1.0]])[kind]).sum(-1) + 0.5 * rng.normal(size=48)
    return _t(X), _t(np.clip(y, 0, upper)), _t(upper)


def lifetimes() -> tuple[Tensor, Tensor, Tensor]:
    """60 durations of two kinds, a third of them cut off."""
    rng, X = np.random.default_rng(19), covariates(60)
    kind = np.arange(60) % 2
    y = np.exp((X * np.array([[0.0, 0.5], [2.0, -0.3]])[kind]).sum(-1)) * rng.weibull(np.array([1.2, 3.0])[kind])
    limit = rng.exponential(8.0, 60)
    return _t(X), _t(np.minimum(y, limit)), _t(np.where(y <= limit, np.inf, limit))


def gated_counts() -> Tensor:
    """Counts of 40 sequences of 4 steps."""
    return _t(np.random.default_rng(5).poisson(np.exp(0.5 + 1.3 * chains(6, 40, 4))))


def build(problem: Callable[..., Any]) -> list[Any]:
    start = {"w": _t([0.3, 0.3, 0.4]), "mu": _t([-1.0, 0.5, 2.0]), "sd": _t(1.2)}
    fractions = _t(np.random.default_rng(12).integers(0, 5, 30) / 2)
    two = {"w": _t([0.4, 0.6])}
    normals = {**two, "mu": _t([-0.5, 1.5]), "sd": _t([1.0, 0.9])}
    z = zoo_data
    return [
        problem("label_as_site", zoo_data.label_as_site, labelled_rows(), start, "rows", weights=fractions),
        problem("allowed_states", zoo_data.allowed_by_factor, allowed_rows(), start, "rows"),
        problem("censored_mixture", z.censored_mixture, censored_rows(), normals, "rows", completes=PARTLY),
        problem(
            "interval_mixture",
            z.interval_mixture,
            (interval_rows(),),
            {**two, "rate": _t([2.0, 0.5])},
            "rows",
            completes=PARTLY,
        ),
        problem(
            "zero_truncated_mixture",
            z.zero_truncated_mixture,
            (truncated_counts(),),
            {**two, "rate": _t([1.5, 5.0])},
            "rows",
            completes=PARTLY,
        ),
        problem(
            "censored_regressions",
            z.censored_regressions,
            tobit_rows(),
            {**two, "b": _t([[0.5, 1.0], [2.5, -0.5]]), "sd": _t([0.8, 1.0])},
            "rows",
            completes=PARTLY,
        ),
        problem(
            "weibull_lifetimes",
            z.weibull_lifetimes,
            lifetimes(),
            {**two, "b": _t([[0.2, 0.1], [1.5, 0.0]]), "shape": _t([1.0, 2.0])},
            "rows",
            closed=False,
        ),
        problem(
            "gated_counts",
            zoo_structured.gated_counts,
            (gated_counts(), _t([0.3, -1.0, 1.2, -0.4])),
            {"a": _t([0.5, 1.8]), "b": _t(0.1), "stay": _t([-1.0, 1.0]), "slope": _t([0.2, -0.3])},
            "sequences",
            closed=False,
        ),
    ]
