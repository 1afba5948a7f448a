"""Filter and smoother over the steps of many chunks of a linear-Gaussian chain side by side, in NumPy.

Columns X = [P | Φ | m] go through a step together: the covariance of a state, how it moves with the state at the
beginning of its chunk, and means of sequences that share all covariances. With E = [C P⁻ | C Φ⁻ | C m⁻ + d - y] at
their predictions (Φ⁻ = A Φ, ...) and S = C P⁻ Cᵀ + R

    S⁻¹ E = [Kᵀ | ...],     [Φ | m] = [Φ⁻ | m⁻] - K [E_Φ | E_m],     P = (I - KC) P⁻ (I - KC)ᵀ + K R Kᵀ

    J = Σ E_Φᵀ S⁻¹ E_Φ,     η = -Σ E_Φᵀ S⁻¹ E_m     (log p(y_chunk | x) = ηᵀx - ½ xᵀJx + constant, as in chunks.py)

Backwards (Rauch, Tung and Striebel) everything but V and the mean itself is known for all steps at once: with
G = P Aᵀ P⁻⁻¹ and B = (I - GA) P (I - GA)ᵀ + G Q Gᵀ

    V_t = B_t + G_t V_{t+1} G_tᵀ,     E x_t = m_t - G_t m⁻_{t+1} + G_t E x_{t+1}

of which a whole chunk is again of that form.

Shapes: batch (B, M): M chunks of L steps, B covariances (1 where all sequences share them, then W = S columns of means;
otherwise B = S and W = 1). Arguments have dims (B|1, M|1, L|1) in front. Not handled: other devices than the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.state_space.steps import Steps, gain

Array = NDArray[np.float64]


@dataclass(frozen=True)
class StepArguments:
    """Of the steps of chunks; `at` is those of step l of every chunk, (B|1, M|1, ...)."""

    A: Array
    b: Array
    Q: Array
    C: Array
    d: Array
    R: Array
    y: Array

    @classmethod
    def of(cls, steps: Steps, shared: bool) -> StepArguments:
        def columns(x: Tensor) -> Array:
            array = x.numpy()
            return np.moveaxis(array, 0, -1)[None] if shared else array[..., None]

        s = steps
        return cls(s.A.numpy(), columns(s.b), s.Q.numpy(), s.C.numpy(), columns(s.d), s.R.numpy(), columns(s.y))

    def at(self, l: int) -> tuple[Array, ...]:
        return tuple(x[:, :, l if x.shape[2] > 1 else 0] for x in vars(self).values())


class Filter:
    """The steps of chunks, forwards; what it keeps has time first: (L, B, M, ...)."""

    def __init__(self, args: StepArguments, which: range, P: Array, m: Array, sensitive: bool = False) -> None:
        B, M, D, W = m.shape
        O = args.C.shape[-2]
        L, k = len(which), D if sensitive else 0
        X = np.concatenate([P, np.broadcast_to(np.eye(D), P.shape), m] if sensitive else [P, m], -1)
        self.J = np.zeros((B, M, k, k + W))  # J and -η
        self.predicted, self.covariances = np.empty((2, L, B, M, D, D))
        self.forecasts, self.means = np.empty((2, L, B, M, D, W))
        self.innovations = np.empty((L, B, M, O, O))
        self.errors = np.empty((2, L, B, M, O, W))  # C m⁻ + d - y, and S⁻¹ of it
        eye = np.eye(D)
        for i, l in enumerate(which):
            A, b, Q, C, d, R, y = args.at(l)
            X = A @ X
            X[..., D + k :] += b
            X[..., :D] = X[..., :D] @ A.swapaxes(-1, -2) + Q
            E = C @ X
            E[..., D + k :] += d - y
            S = E[..., :D] @ C.swapaxes(-1, -2)
            S += R
            solved = np.linalg.solve(S, E)
            K = solved[..., :D].swapaxes(-1, -2)
            self.predicted[i], self.forecasts[i] = X[..., :D], X[..., D + k :]
            self.innovations[i], self.errors[0, i], self.errors[1, i] = S, E[..., D + k :], solved[..., D + k :]
            if k:
                self.J += E[..., D : D + k].swapaxes(-1, -2) @ solved[..., D:]
            keep = eye - K @ C
            P = keep @ X[..., :D] @ keep.swapaxes(-1, -2)
            P += K @ R @ K.swapaxes(-1, -2)
            X[..., D:] -= K @ E[..., D:]
            X[..., :D] = P
            self.covariances[i], self.means[i] = P, X[..., D + k :]
        self.end = X

    def densities(self) -> Array:
        """log p(y_t | past) of cells that are there, but for its constant, (L, B, M, W)."""
        factors = np.linalg.cholesky(self.innovations)
        half = np.log(np.diagonal(factors, axis1=-2, axis2=-1)).sum(-1)
        return -0.5 * (self.errors[0] * self.errors[1]).sum(-2) - half[..., None]


@dataclass(frozen=True)
class Smoother:
    """x_t = c + G x_{t+1}, V_t = B + G V_{t+1} Gᵀ at steps in a row, (L, B, M, ...)."""

    G: Array
    B: Array
    c: Array

    @classmethod
    def of(cls, args: StepArguments, which: range, P: Array, m: Array, predicted: Array, forecasts: Array) -> Smoother:
        """From filtered (P, m) at the step before each one, and the predictions of it."""

        def over(x: Array) -> Array:
            x = np.moveaxis(x, 2, 0)
            return x if len(x) == 1 else x[which.start : which.stop]

        A, Q = over(args.A), over(args.Q)
        G = gain(*map(torch.from_numpy, (P, np.array(A), (predicted + predicted.swapaxes(-1, -2)) / 2))).numpy()
        keep = np.eye(P.shape[-1]) - G @ A
        B = keep @ P @ keep.swapaxes(-1, -2) + G @ Q @ G.swapaxes(-1, -2)
        return cls(G, B, m - G @ forecasts)

    def whole(self) -> tuple[Array, Array, Array]:
        """(G, B, c) of all steps together."""
        G, B, c = self.G[-1], self.B[-1], self.c[-1]
        D = G.shape[-1]
        X = np.concatenate([G, c], -1)
        for i in range(len(self.G) - 2, -1, -1):
            X = self.G[i] @ X
            X[..., D:] += self.c[i]
            B = self.B[i] + self.G[i] @ B @ self.G[i].swapaxes(-1, -2)
        return X[..., :D], B, X[..., D:]

    def down(self, x: Array, V: Array) -> tuple[Array, Array]:
        """Smoothed means and covariances at every step, and behind the last one (L + 1, ...)."""
        L = len(self.G)
        means, covariances = np.empty((L + 1, *x.shape)), np.empty((L + 1, *V.shape))
        means[L], covariances[L] = x, V
        for i in range(L - 1, -1, -1):
            G = self.G[i]
            np.matmul(G, means[i + 1], out=means[i])
            means[i] += self.c[i]
            np.matmul(G @ covariances[i + 1], G.swapaxes(-1, -2), out=covariances[i])
            covariances[i] += self.B[i]
        return means, covariances


def chunk_starts(act: Filter, P: Array, m: Array) -> tuple[Array, Array]:
    """Filtered covariances and means where chunks begin, (B, M, ...), from those at the beginning of the first."""
    D, M = m.shape[-2], act.J.shape[1]
    F, Phi, f = np.split(act.end, [D, 2 * D], -1)
    J, eta = act.J[..., :D], -act.J[..., D:]
    starts = [(P[:, 0], m[:, 0])]
    eye = np.eye(D)
    for k in range(M - 1):
        P, m = starts[-1]
        inner = np.linalg.solve(eye + P @ J[:, k], P)
        inner = (inner + inner.swapaxes(-1, -2)) / 2
        at = m + inner @ (eta[:, k] - J[:, k] @ m)
        own = Phi[:, k]
        starts.append((own @ inner @ own.swapaxes(-1, -2) + F[:, k], own @ at + f[:, k]))
    return np.stack([P for P, _ in starts], 1), np.stack([m for _, m in starts], 1)


def chunk_ends(whole: tuple[Array, Array, Array], x: Array, V: Array) -> tuple[Array, Array]:
    """Smoothed means and covariances at the ends of chunks, (B, M, ...), from those at the end of the last."""
    G, B, c = whole
    found = [(x, V)]
    for k in range(G.shape[1] - 1, 0, -1):
        x, V = found[-1]
        found.append((c[:, k] + G[:, k] @ x, B[:, k] + G[:, k] @ V @ G[:, k].swapaxes(-1, -2)))
    return np.stack([x for x, _ in found[::-1]], 1), np.stack([V for _, V in found[::-1]], 1)


def states_before(P: Array, m: Array, after: Filter) -> tuple[Array, Array]:
    """Filtered states before every step: those at the beginning, and those of all steps but the last."""
    return np.concatenate([P[None], after.covariances[:-1]]), np.concatenate([m[None], after.means[:-1]])
