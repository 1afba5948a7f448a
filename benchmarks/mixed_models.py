"""A generalised linear mixed model by adaptive quadrature against a plain NumPy EM of the same rule.

Logistic regression with a random intercept, G groups of n rows: 21 nodes centred and scaled at each posterior mode
(Liu & Pierce 1994). The peer is what one would write for this one model and balanced groups: modes by Newton's method
from the last ones, all rows and nodes as one table, Newton on the coefficients until they stand still. Both make the
same updates from the same start.
"""

from __future__ import annotations

import numpy as np
import torch

import pyro_em
from benchmarks.harness import Fit, LogLikelihood
from benchmarks.paired import OURS, Entry, Paired
from benchmarks.problems import MixedLogit
from models import glmm

NEWTON = 50  # steps at most; all problems are concave


def ours(problem: MixedLogit) -> Fit:
    """`pyro_em.fit` on `glmm.grouped` with one trial in each row."""
    rule = pyro_em.Quadrature(problem.num_nodes)
    groups, rows, width = problem.x.shape
    y, x = problem.y.reshape(-1), problem.x.reshape(-1, width)
    group, total = torch.arange(groups).repeat_interleave(rows), torch.ones(len(y), dtype=torch.float64)

    def fit(updates: int) -> LogLikelihood:
        result = pyro_em.fit(
            glmm.grouped, y, total, x, group, e_step={"b": rule}, max_iter=updates, tol=0, progress=False
        )
        found = result.log_likelihood
        assert found is not None and result.num_iterations == updates
        return lambda: found

    return fit


def hand_written(problem: MixedLogit) -> Fit:
    """NumPy, without generality or checks."""
    y, x = problem.y.numpy(), problem.x.numpy()
    nodes, log_weights = np.polynomial.hermite.hermgauss(problem.num_nodes)
    log_weights = np.log(log_weights) + nodes**2
    nodes = np.sqrt(2) * nodes
    design = x.reshape(-1, x.shape[2])
    right = y.sum(1)

    def modes(eta: np.ndarray, scale: float, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(NEWTON):
            p = 1 / (1 + np.exp(-(eta + u[:, None])))
            curvature = (p * (1 - p)).sum(1) + scale**-2
            step = (right - p.sum(1) - u * scale**-2) / curvature
            if np.abs(step).max() < 1e-10:
                break
            u = u + step
        return u, curvature**-0.5

    def e_step(coef: np.ndarray, scale: float, u: np.ndarray) -> tuple[np.ndarray, ...]:
        eta = x @ coef  # (G, n)
        u, spread = modes(eta, scale, u)
        z = u[:, None] + spread[:, None] * nodes  # (G, Q)
        table = np.log1p(np.exp(eta[:, :, None] + z[:, None, :])).sum(1)
        joint = (y * eta).sum(1, keepdims=True) + right[:, None] * z - table + log_weights - 0.5 * (z / scale) ** 2
        joint += np.log(spread)[:, None] - np.log(scale) - 0.5 * np.log(2 * np.pi) + 0.5 * np.log(2)
        top = joint.max(1, keepdims=True)
        w = np.exp(joint - top)
        total = w.sum(1, keepdims=True)
        return u, z, w / total, (top + np.log(total)).ravel()

    def m_step(coef: np.ndarray, z: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, float]:
        for _ in range(NEWTON):
            p = 1 / (1 + np.exp(-((x @ coef)[:, :, None] + z[:, None, :])))
            residual = y - (p @ w[:, :, None])[:, :, 0]
            spread = ((p * (1 - p)) @ w[:, :, None])[:, :, 0]
            hessian = design.T @ (spread.reshape(-1, 1) * design)
            step = np.linalg.solve(hessian, residual.ravel() @ design)
            coef = coef + step
            if np.abs(step).max() < 1e-8:  # the next one is 1e-16
                break
        return coef, float(np.sqrt((w * z * z).sum() / len(z)))

    def fit(updates: int) -> LogLikelihood:
        coef, scale, u = np.zeros(x.shape[2]), 0.5, np.zeros(len(y))
        for _ in range(updates):
            u, z, w, _ = e_step(coef, scale, u)
            coef, scale = m_step(coef, z, w)
        return lambda: float(e_step(coef, scale, u)[3].sum())

    return fit


def mixed_logit(num_groups: int, rows: int, num_nodes: int) -> MixedLogit:
    """Simulated trials with two covariates and a constant."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_groups, rows, 3, generator=generator, dtype=torch.float64)
    x[..., 0] = 1.0
    b = torch.randn(num_groups, 1, generator=generator, dtype=torch.float64)
    p = torch.sigmoid(x @ torch.tensor([-0.5, 1.0, 0.3], dtype=torch.float64) + b)
    y = (torch.rand(num_groups, rows, generator=generator, dtype=torch.float64) < p).double()
    return MixedLogit(y, x, num_nodes)


WORKLOADS = (
    Paired(
        "glmm",
        "Logistic random intercept, 1,000 groups × 20, 21 adaptive nodes",
        lambda tiny: mixed_logit(*((20, 5, 7) if tiny else (1_000, 20, 21))),
        {OURS: Entry(ours, (20, 220)), "hand-written NumPy": Entry(hand_written, (20, 220), 1.0)},
    ),
)
