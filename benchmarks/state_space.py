"""Linear dynamical systems against dynamax and against an EM around statsmodels' compiled smoother.

The model is the plain loop of a textbook; every contender starts from the same matrices and updates all four, the
distribution of the first state stays what it is. dynamax's own E-step and M-step are compiled once (jit, float64, one
thread), before anything is timed. Letters: S sequences, T steps, D states, P observed.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from benchmarks.harness import Fit, LogLikelihood
from benchmarks.paired import OURS, Entry, Paired
from benchmarks.problems import LinearSystems


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


def loop(y: Tensor, num_states: int) -> None:
    """Every matrix free, the first state N(0, I); y (T, S, P)."""
    D, P = num_states, y.shape[-1]
    A, C = pyro.param("A", torch.eye(D)), pyro.param("C", torch.ones(P, D))
    Q = pyro.param("Q", torch.eye(D), constraint=constraints.positive_definite)
    R = pyro.param("R", torch.eye(P), constraint=constraints.positive_definite)
    normal, x = dist.MultivariateNormal, None
    with pyro.plate("sequences", y.shape[1]):
        for t in pyro_em.markov(len(y)):
            x = pyro.sample(f"x_{t}", normal(torch.zeros(D), torch.eye(D)) if x is None else normal(x @ A.T, Q))
            pyro.sample(f"y_{t}", normal(x @ C.T, R), obs=y[t])


def ours(problem: LinearSystems) -> Fit:
    """`pyro_em.fit` on `loop`."""
    start = problem.start
    init = {"A": start["F"].mT.clone(), "C": start["H"].mT.clone(), "Q": start["Q"], "R": start["R"]}
    y = problem.data.transpose(0, 1).contiguous()

    def fit(updates: int) -> LogLikelihood:
        result = pyro_em.fit(loop, y, problem.num_states, init=init, max_iter=updates, tol=0, progress=False)
        assert result.num_iterations == updates
        found = result.log_likelihood
        assert found is not None
        return lambda: found

    return fit


def dynamax_system(problem: LinearSystems) -> Fit:
    """`dynamax.linear_gaussian_ssm.LinearGaussianSSM`."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    S, T, P = problem.data.shape
    D = problem.num_states
    peer = LinearGaussianSSM(D, P, has_dynamics_bias=False, has_emissions_bias=False)
    start = {name: jnp.array(value.numpy()) for name, value in problem.start.items()}
    begin, props = peer.initialize(
        initial_mean=jnp.zeros(D), initial_covariance=jnp.eye(D), dynamics_weights=start["F"].T,
        dynamics_covariance=start["Q"], emission_weights=start["H"].T, emission_covariance=start["R"],
    )  # fmt: skip
    y, inputs = jnp.array(problem.data.numpy()), jnp.zeros((S, T, 0))

    @jax.jit
    def step(params: Any) -> Any:
        statistics, evidence = jax.vmap(lambda e, u: peer.e_step(params, e, u))(y, inputs)
        updated, _ = peer.m_step(params, props, statistics, None)
        return updated._replace(initial=params.initial), evidence.sum()

    def fit(updates: int) -> LogLikelihood:
        params = begin
        for _ in range(updates):
            params, _ = step(params)
        jax.block_until_ready(params)
        return lambda: float(step(params)[1])

    return fit


def smoothed_by_statsmodels(problem: LinearSystems) -> Fit:
    """EM whose E-step is one `KalmanSmoother.smooth()` a sequence."""
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    data = problem.data.numpy()
    S, T, P = data.shape
    D = problem.num_states
    smoothers = []
    for series in data:
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
            before, after, states, cross = (np.zeros((D, D)) for _ in range(4))
            with_data, squares = np.zeros((D, P)), np.zeros((P, P))
            for found, y in zip(smooth(F, H, Q, R), data, strict=True):
                x, V = found.smoothed_state, found.smoothed_state_cov
                before += x[:, :-1] @ x[:, :-1].T + V[:, :, :-1].sum(2)
                after += x[:, 1:] @ x[:, 1:].T + V[:, :, 1:].sum(2)
                states += x @ x.T + V.sum(2)
                cross += x[:, :-1] @ x[:, 1:].T + found.smoothed_state_autocov[:, :, :-1].sum(2).T
                with_data += x @ y
                squares += y.T @ y
            F = np.linalg.solve(before, cross)
            Q = (after - cross.T @ F - F.T @ cross + F.T @ before @ F) / (S * (T - 1))
            H = np.linalg.solve(states, with_data)
            R = (squares - with_data.T @ H - H.T @ with_data + H.T @ states @ H) / (S * T)
            Q, R = (Q + Q.T) / 2, (R + R.T) / 2
        return lambda: float(sum(found.llf for found in smooth(F, H, Q, R)))

    return fit


def _workload(name: str, sequences: int, steps: int, target: float, counts: tuple[int, int]) -> Paired:
    """`counts` are dynamax's: a window of half a second, as ours is, or noise is all that is seen."""
    return Paired(
        name,
        f"Linear dynamical system, {sequences} x T={steps:,}, 4 states, 4 observed",
        lambda tiny: systems(*((2, 30, 2) if tiny else (sequences, steps, 4))),
        {
            OURS: Entry(ours, (40, 540)),
            "dynamax": Entry(dynamax_system, counts, target),
            "statsmodels' smoother": Entry(smoothed_by_statsmodels, (1, 4), 5.0),
        },
    )


WORKLOADS = (_workload("C2", 1, 10_000, 10.0, (5, 35)), _workload("C3", 200, 100, 1.0, (40, 540)))
