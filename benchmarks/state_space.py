"""Linear dynamical systems against an EM around statsmodels' compiled smoother: data, start, contenders, workloads.

The peer smooths every sequence by statsmodels (Cython, steady covariances detected) and does the four M-steps in
NumPy. Both count Pyro's state before the first transition, which to the peer is a first step without data. Letters:
S sequences, T steps, D states, P observed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import pyro_em
from benchmarks.harness import Fit, LogLikelihood
from benchmarks.paired import OURS, Entry, Paired
from benchmarks.problems import LinearSystems
from models import state_space


def systems(sequences: int, steps: int, size: int) -> LinearSystems:
    """A stable random system seen through noise; the start is away from the truth."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    eye = torch.eye(size, dtype=torch.float64)
    F, H = 0.95 * torch.linalg.qr(normal(size, size))[0], normal(size, size)
    z, seen = normal(sequences, size), []
    for _ in range(steps):
        z = z @ F + 0.5 * normal(sequences, size)
        seen.append(z @ H + 0.7 * normal(sequences, size))
    start = {"F": 0.9 * F, "H": H + 0.2 * normal(size, size), "Q": 0.5 * eye, "R": 0.8 * eye}
    return LinearSystems(torch.stack(seen, 1), start)


def ours(problem: LinearSystems) -> Fit:
    """`pyro_em.fit` on `state_space.lds`."""

    def fit(updates: int) -> LogLikelihood:
        result = pyro_em.fit(
            state_space.lds, problem.data, problem.num_states, init=problem.start, max_iter=updates, tol=0,
            progress=False,
        )  # fmt: skip
        assert result.num_iterations == updates
        found = result.log_likelihood
        assert found is not None
        return lambda: found

    return fit


def smoothed_by_statsmodels(problem: LinearSystems) -> Fit:
    """EM whose E-step is one `KalmanSmoother.smooth()` a sequence."""
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    data = problem.data.numpy()
    S, T, P = data.shape
    D = problem.num_states
    gap = np.full((S, 1, P), np.nan)
    smoothers = []
    for series in np.concatenate([gap, data], 1):
        own = KalmanSmoother(P, D)
        own.bind(np.asfortranarray(series.T))
        own["selection"] = np.eye(D)
        own.initialize_known(np.zeros(D), np.eye(D))
        smoothers.append(own)

    def smooth(F: np.ndarray, H: np.ndarray, Q: np.ndarray, R: np.ndarray) -> list:
        for own in smoothers:
            own["transition"], own["design"], own["state_cov"], own["obs_cov"] = F.T, H.T, Q, R
        return [own.smooth() for own in smoothers]

    def fit(updates: int) -> LogLikelihood:
        F, H, Q, R = (problem.start[name].numpy() for name in ("F", "H", "Q", "R"))
        for _ in range(updates):
            before, after, cross = (np.zeros((D, D)) for _ in range(3))
            with_data, squares = np.zeros((D, P)), np.zeros((P, P))
            for found, y in zip(smooth(F, H, Q, R), data, strict=True):
                x, V = found.smoothed_state, found.smoothed_state_cov
                before += x[:, :-1] @ x[:, :-1].T + V[:, :, :-1].sum(2)
                after += x[:, 1:] @ x[:, 1:].T + V[:, :, 1:].sum(2)
                cross += x[:, :-1] @ x[:, 1:].T + found.smoothed_state_autocov[:, :, :-1].sum(2).T
                with_data += x[:, 1:] @ y
                squares += y.T @ y
            n = S * T
            F = np.linalg.solve(before, cross)
            Q = (after - cross.T @ F - F.T @ cross + F.T @ before @ F) / n
            H = np.linalg.solve(after, with_data)
            R = (squares - with_data.T @ H - H.T @ with_data + H.T @ after @ H) / n
            Q, R = (Q + Q.T) / 2, (R + R.T) / 2
        return lambda: float(sum(found.llf for found in smooth(F, H, Q, R)))

    return fit


def _workload(name: str, sequences: int, steps: int, target: float) -> Paired:
    return Paired(
        name,
        f"Linear dynamical system, {sequences} x T={steps:,}, 4 states, 4 observed",
        lambda tiny: systems(*((2, 30, 2) if tiny else (sequences, steps, 4))),
        {OURS: Entry(ours, (3, 33)), "statsmodels' smoother": Entry(smoothed_by_statsmodels, (1, 4), target)},
    )


WORKLOADS = (_workload("C2", 1, 10_000, 5.0), _workload("C3", 200, 100, 5.0))
