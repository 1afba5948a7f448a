"""Mixtures of regressions against a hand-written EM in NumPy: data, starts, contenders, workloads.

`hand_written` is what a careful programmer would write: one matrix product for all predictors, a stable softmax, and
for every component weighted least squares by its normal equations, or Newton steps on the weighted Poisson likelihood
until the score is below 1e-10 per row, from the current coefficients. Letters: rows N, components K, covariates P.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import pyro_em
from benchmarks.harness import Fit, LogLikelihood
from benchmarks.paired import OURS, Entry, Paired
from benchmarks.problems import Regressions
from models import regression_mixture

TOLERANCE = 1e-10


def regressions(rows: int, components: int, covariates: int, *, poisson: bool = False) -> Regressions:
    """Equally likely groups; coefficients N(0, 1), for counts N(0, 0.3²); the start is the truth plus noise."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    size = 0.3 if poisson else 1.0
    intercept, slope = normal(components) * size + poisson, normal(components, covariates) * size
    x, z = normal(rows, covariates), torch.randint(components, (rows,), generator=g)
    eta = intercept[z] + (x * slope[z]).sum(-1)
    y = torch.poisson(eta.exp(), generator=g) if poisson else eta + 0.5 * normal(rows)
    start = {
        "weights": torch.full((components,), 1 / components, dtype=torch.float64),
        "intercept": intercept + 0.1 * normal(components),
        "slope": slope + 0.1 * normal(components, covariates),
    }
    if not poisson:
        start["scale"] = torch.ones(components, dtype=torch.float64)
    return Regressions(y, x, poisson, start)


def ours(problem: Regressions) -> Fit:
    """`pyro_em.fit` on `regression_mixture.linear` or `.poisson`."""
    model: Callable[..., None] = regression_mixture.poisson if problem.poisson else regression_mixture.linear

    def fit(updates: int) -> LogLikelihood:
        result = pyro_em.fit(
            model, problem.y, problem.x, problem.num_components, init=problem.start, max_iter=updates, tol=0,
            progress=False,
        )  # fmt: skip
        assert result.num_iterations == updates
        found = result.log_likelihood
        assert found is not None
        return lambda: found

    return fit


def hand_written(problem: Regressions) -> Fit:
    """EM in NumPy for this one model."""
    y, poisson = problem.y.numpy(), problem.poisson
    design = np.column_stack([np.ones(len(y)), problem.x.numpy()])
    base = np.array([torch.lgamma(problem.y + 1).numpy()]) if poisson else 0.5 * np.log(2 * np.pi)

    def log_joint(weights: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
        eta = b @ design.T  # (K, N)
        if poisson:
            return np.log(weights)[:, None] + y * eta - np.exp(eta) - base
        z = (y - eta) / scale[:, None]
        return np.log(weights / scale)[:, None] - 0.5 * z * z - base

    def responsibilities(joint: np.ndarray) -> tuple[np.ndarray, float]:
        peak = joint.max(0)
        r = np.exp(joint - peak)
        total = r.sum(0)
        r /= total
        return r, float((np.log(total) + peak).sum())

    def least_squares(r: np.ndarray) -> tuple[np.ndarray, float]:
        weighted = design * r[:, None]
        b = np.linalg.solve(weighted.T @ design, weighted.T @ y)
        residual = y - design @ b
        return b, float(np.sqrt(r @ residual**2 / r.sum()))

    def newton(r: np.ndarray, b: np.ndarray) -> np.ndarray:
        for _ in range(50):
            mean = np.exp(design @ b)
            score = design.T @ (r * (y - mean))
            if np.abs(score).max() <= TOLERANCE * len(y):
                break
            b = b + np.linalg.solve((design * (r * mean)[:, None]).T @ design, score)
        return b

    def fit(updates: int) -> LogLikelihood:
        start = {name: value.numpy() for name, value in problem.start.items()}
        weights, scale = start["weights"], start.get("scale", np.ones(problem.num_components))
        b = np.column_stack([start["intercept"], start["slope"]])
        for _ in range(updates):
            r, _ = responsibilities(log_joint(weights, b, scale))
            weights = r.mean(1)
            if poisson:
                b = np.stack([newton(own, old) for own, old in zip(r, b, strict=True)])
            else:
                found = [least_squares(own) for own in r]
                b, scale = np.stack([f[0] for f in found]), np.array([f[1] for f in found])
        return lambda: responsibilities(log_joint(weights, b, scale))[1]

    return fit


def _workload(name: str, title: str, poisson: bool, updates: int) -> Paired:
    return Paired(
        name,
        f"{title}, N=200,000 P=10 K=5",
        lambda tiny: regressions(*((200, 2, 2) if tiny else (200_000, 5, 10)), poisson=poisson),
        # Beyond all attempts to record our EM map (pyro_em/evaluator.py), and where Newton takes equally many steps.
        {OURS: Entry(ours, (20, 20 + updates)), "hand-written NumPy": Entry(hand_written, (20, 20 + updates), 1.0)},
    )


WORKLOADS = (
    _workload("regressions", "Mixture of linear regressions", False, 20),
    _workload("poisson-regressions", "Mixture of Poisson regressions", True, 10),
)
