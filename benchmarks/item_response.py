"""Item response models by quadrature against a plain NumPy EM of the same rule (Bock & Aitkin 1981).

N people, J items, Q equally spaced nodes that all share. The peer is what one would write for this one model: the
posterior of every person on the nodes by one matrix product, expected counts by another, Newton on each item's two
parameters until they stand still. Both make the same updates from the same start.
"""

from __future__ import annotations

import numpy as np
import torch

import pyro_em
from benchmarks.harness import Fit, LogLikelihood
from benchmarks.paired import OURS, Entry, Paired
from benchmarks.problems import ItemResponse
from models import irt
from pyro_em.evidence.grids import REACH

NEWTON = 30  # steps at most; each item's problem is concave in two parameters


def ours(problem: ItemResponse) -> Fit:
    """`pyro_em.fit` on `irt.model` with a fixed grid."""
    rule = pyro_em.Quadrature(problem.num_nodes, adaptive=False)

    def fit(updates: int) -> LogLikelihood:
        result = pyro_em.fit(irt.model, problem.data, e_step={"theta": rule}, max_iter=updates, tol=0, progress=False)
        found = result.log_likelihood
        assert found is not None and result.num_iterations == updates
        return lambda: found

    return fit


def hand_written(problem: ItemResponse) -> Fit:
    """NumPy, without generality or checks."""
    y = problem.data.numpy()
    x = np.linspace(-REACH, REACH, problem.num_nodes)
    log_prior = -0.5 * x * x - 0.5 * np.log(2 * np.pi) + np.log(x[1] - x[0])

    def posterior(d: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        eta = d + a * x[:, None]  # (Q, J)
        log_joint = y @ eta.T + (log_prior - np.logaddexp(0, eta).sum(1))
        top = log_joint.max(1, keepdims=True)
        weights = np.exp(log_joint - top)
        total = weights.sum(1, keepdims=True)
        return weights / total, (top + np.log(total)).ravel()

    def items(d: np.ndarray, a: np.ndarray, count: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Newton on Σ_q right_qj η_qj - count_q log(1 + exp η_qj), all items at once."""
        for _ in range(NEWTON):
            p = 1 / (1 + np.exp(-(d + a * x[:, None])))
            residual, spread = right - count[:, None] * p, count[:, None] * p * (1 - p)
            g0, g1 = residual.sum(0), x @ residual
            h00, h01, h11 = spread.sum(0), x @ spread, (x * x) @ spread
            det = h00 * h11 - h01 * h01
            step_d, step_a = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
            d, a = d + step_d, a + step_a
            if max(np.abs(step_d).max(), np.abs(step_a).max()) < 1e-12:
                break
        return d, a

    def fit(updates: int) -> LogLikelihood:
        d, a = torch.logit((problem.data.sum(0) + 1) / (len(y) + 2)).numpy(), np.ones(y.shape[1])
        for _ in range(updates):
            r, _ = posterior(d, a)
            d, a = items(d, a, r.sum(0), r.T @ y)
        return lambda: float(posterior(d, a)[1].sum())

    return fit


def item_response(num_people: int, num_items: int, num_nodes: int) -> ItemResponse:
    """Simulated answers."""
    return ItemResponse(irt.simulate(num_people, num_items), num_nodes)


WORKLOADS = (
    Paired(
        "irt",
        "Item response, N=10,000 J=20, 61 shared nodes",
        lambda tiny: item_response(*((100, 4, 61) if tiny else (10_000, 20, 61))),
        # Beyond our recordings of the EM map, several as Newton takes fewer steps later on; the peer's does so, too. Of
        # forty updates, a tenth of a second, what else the machine did was a third.
        {OURS: Entry(ours, (160, 400)), "hand-written NumPy": Entry(hand_written, (160, 400))},
    ),
)
