"""Matrices of blocks of steps of a time-invariant chain: what a block's data and what it inherits make of its steps.

With e_t = y_t - C a_t at the predicted means a_t, z_t = F_t⁻¹ e_t whitened, and K_t, L_t, P_t of riccati.py

    a_{t+1} = L_t a_t + K_t y_t,     r_{t-1} = Cᵀ F_t⁻ᵀ z_t + L_tᵀ r_t,     E x_t = a_t + P_t r_{t-1}

and u_t = F_t⁻ᵀ z_t - K_tᵀ r_t (Koopman 1993). In a block of steps with the same gains these are sums over lags: with
H = F⁻¹C (so that Cᵀ F⁻ᵀ = Hᵀ), and a moved by innovations, a_{t+1} = A a_t + K F z_t,

    z_i = F⁻¹y_i - H (Lⁱ a + Σ_{j<i} L^{i-1-j} K y_j),      r_i = (Lᵀ)^{n-1-i} r + Σ_{j>i} (Lᵀ)^{j-i-1} Hᵀ z_j
    a_i = Aⁱ a + Σ_{j<i} A^{i-1-j} K F z_j

Rows of the matrices stand for what goes in, columns for what comes out.

Shapes: n steps of a block, m blocks, D state dims, P cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_em.state_space.riccati import Gains

Array = NDArray[np.float64]
WIDE = 32.0  # times the last variance of a state: P r loses that much of its digits, and squares of it twice as many


@dataclass(frozen=True)
class Matrices:
    """Of m blocks: `to_z` (m, D + n·P, n·P) and `end` (m, D + n·P, D) lead from a before a block's first step and its
    data to all of its z and to the a behind it; `back` (m, 2D + n·P, n·(2D + P)) from a, r behind its last step and its
    z to all (x, r_t, u_t), `back_end` (m, D + n·P, D) from the last two to r before it.

    `formed`: what cancels in x is so large that products are to be taken of x, not of what it is made of.
    """

    to_z: Array
    end: Array
    back: Array
    back_end: Array
    width: int  # 2D + P
    formed: bool = False


def of_steps(own: Gains, C: Array, steps: Array) -> Matrices:
    """Of blocks that are one step each, with the gains number `steps` (m,)."""
    (D, P), m = own.gains.shape[1:], len(steps)
    F, K, L, V = own.whiteners[steps], own.gains[steps], own.closed[steps], own.predicted[steps]
    H = F @ C
    to_z, end = np.empty((m, D + P, P)), np.empty((m, D + P, D))
    to_z[:, D:], end[:, :D], end[:, D:] = F.swapaxes(1, 2), L.swapaxes(1, 2), K.swapaxes(1, 2)
    np.negative(H.swapaxes(1, 2), out=to_z[:, :D])
    before = np.concatenate([L, H], 1)  # r of the step before, from (r, z)
    back = np.zeros((m, 2 * D + P, 2 * D + P))
    back[:, :D, :D] = back[:, D : 2 * D, D : 2 * D] = np.eye(D)
    back[:, D:, :D] = before @ V
    back[:, 2 * D :, 2 * D :] = F
    np.negative(K, out=back[:, D : 2 * D, 2 * D :])
    wide = bool((V[0].diagonal() > WIDE * own.predicted[-1].diagonal()).any())
    return Matrices(to_z, end, back, before, 2 * D + P, wide)


def of_block(own: Gains, A: Array, C: Array, n: int) -> Matrices:
    """Of a block of n steps with the last gains."""
    F, K, L, V = own.whiteners[-1], own.gains[-1], own.closed[-1], own.predicted[-1]
    D, P = K.shape
    width, H = 2 * D + P, F.dot(C)
    powers = _powers(L, n + 1)
    moved = powers[:n] @ K  # L^k K
    to_z = np.empty((D + n * P, n * P))
    seen = H @ powers[:n]  # H L^k
    np.negative(seen.reshape(n * P, D).T, out=to_z[:D])
    lags = np.zeros((2 * n - 1, P, P))  # of y_j at z_i, by i - j; those that are negative come last
    lags[0] = F.T
    np.negative((seen[: n - 1] @ K).swapaxes(1, 2), out=lags[1:n])
    away = np.subtract.outer(range(n), range(n))
    to_z[D:] = lags[-away].transpose(0, 2, 1, 3).reshape(n * P, n * P)
    end = np.empty((D + n * P, D))
    end[:D], end[D:] = powers[n].T, moved[::-1].swapaxes(1, 2).reshape(n * P, D)
    by_lag = np.zeros((2 * n - 1, P, width))  # of z_j at step i, by j - i; those that are negative come last
    by_lag[:n, :, :D] = seen @ V
    by_lag[1:n, :, D : 2 * D] = seen[: n - 1]
    np.negative(seen[: n - 1] @ K, out=by_lag[1:n, :, 2 * D :])
    by_lag[0, :, 2 * D :] = F
    ahead = _powers(A, n)
    by_lag[: n - 1 : -1, :, :D] = (ahead[: n - 1] @ (K.dot(own.factors[-1]))).swapaxes(1, 2)
    back = np.zeros((2 * D + n * P, n, width))
    back[:D, :, :D] = ahead.transpose(2, 0, 1)
    inherited = powers[n - 1 :: -1]  # of r at r_i
    back[D : 2 * D, :, :D] = (powers[:0:-1] @ V).swapaxes(0, 1)
    back[D : 2 * D, :, D : 2 * D] = inherited.swapaxes(0, 1)
    back[D : 2 * D, :, 2 * D :] = (inherited @ -K).swapaxes(0, 1)
    back[2 * D :] = by_lag[away].swapaxes(1, 2).reshape(n * P, n, width)
    before = np.concatenate([powers[n], seen.reshape(n * P, D)])
    return Matrices(to_z[None], end[None], back.reshape(1, -1, n * width), before[None], width)


def _powers(X: Array, n: int) -> Array:
    """X⁰, ..., X^{n-1}."""
    found = np.empty((n, *X.shape))
    found[0] = np.eye(len(X))
    for k in range(1, n):
        np.dot(found[k - 1], X, found[k])
    return found
