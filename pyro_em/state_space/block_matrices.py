"""Matrices of blocks of L steps of a time-invariant chain: what a block's data and what it inherits make of its steps.

With e_t = y_t - C a_t at the predicted means a_t, z_t = F_t⁻¹ e_t whitened, and K_t, L_t, P_t of riccati.py

    a_{t+1} = L_t a_t + K_t y_t,     r_{t-1} = Cᵀ F_t⁻ᵀ z_t + L_tᵀ r_t,     E x_t = a_t + P_t r_{t-1}

and u_t = F_t⁻ᵀ z_t - K_tᵀ r_t (Koopman 1993). Rows stand for what goes in, columns for what comes out.

Shapes: m blocks of L steps with matrices of their own, D state dims, P cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyro_em.state_space.riccati import Gains

Array = NDArray[np.float64]


def forward(own: Gains, C: Array, steps: Array) -> tuple[Array, Array]:
    """Matrices (m, D + L·P, ·) from a block's first a and its data to all z, and to the next block's a."""
    (m, L), (D, P) = steps.shape, own.gains.shape[1:]
    whiteners, gains, closed = (x[steps].swapaxes(2, 3) for x in (own.whiteners, own.gains, own.closed))
    seen = C.T @ whiteners
    X = np.zeros((m, D + L * P, D))
    X[:, :D] = np.eye(D)
    to_z = np.zeros((m, D + L * P, L, P))
    for i in range(L):
        cells = slice(D + i * P, D + (i + 1) * P)
        np.negative(X @ seen[:, i], out=to_z[:, :, i])
        to_z[:, cells, i] = whiteners[:, i]
        X = X @ closed[:, i]
        X[:, cells] = gains[:, i]
    return to_z.reshape(m, D + L * P, L * P), X


def backward(own: Gains, A: Array, C: Array, steps: Array) -> tuple[Array, Array]:
    """From a block's first a, r behind it and its z to all (x, r_t, u_t), (m, 2D + L·P, ·); from the last two to r
    before it, (m, D + L·P, D)."""
    (m, L), (D, P) = steps.shape, own.gains.shape[1:]
    rows = 2 * D + L * P
    whiteners, closed, predicted = own.whiteners[steps], own.closed[steps], own.predicted[steps]
    gains, seen = -own.gains[steps], whiteners @ C
    moves = (own.gains @ own.factors)[steps].swapaxes(2, 3)  # of a in innovations: a ← A a + K F z
    X, a = np.zeros((m, rows, D)), np.zeros((m, rows, D))
    X[:, D : 2 * D] = a[:, :D] = np.eye(D)
    out = np.zeros((m, rows, L, 2 * D + P))
    for i in range(L - 1, -1, -1):
        cells = slice(2 * D + i * P, 2 * D + (i + 1) * P)
        out[:, :, i, D : 2 * D] = X
        np.matmul(X, gains[:, i], out=out[:, :, i, 2 * D :])
        out[:, cells, i, 2 * D :] += whiteners[:, i]
        X = X @ closed[:, i]
        X[:, cells] += seen[:, i]
        np.matmul(X, predicted[:, i], out=out[:, :, i, :D])
    for i in range(L):
        cells = slice(2 * D + i * P, 2 * D + (i + 1) * P)
        out[:, :, i, :D] += a
        a = a @ A.T
        a[:, cells] = moves[:, i]
    return out.reshape(m, rows, L * (2 * D + P)), X[:, D:]
