"""Matrices of blocks of steps of a time-invariant chain: what a block's data and what it inherits make of its steps.

With e_t = y_t - C a_t at the predicted means a_t, z_t = F_t⁻¹ e_t whitened, H_t = F_t⁻¹ C, and K_t, L_t, P_t of
riccati.py

    z_t = F_t⁻¹ y_t - H_t a_t,     a_{t+1} = L_t a_t + K_t y_t = A a_t + K_t F_t z_t
    r_{t-1} = H_tᵀ z_t + L_tᵀ r_t,     u_t = F_t⁻ᵀ z_t - K_tᵀ r_t,     E x_t = a_t + P_t r_{t-1}

(Koopman 1993), so that all of a block is linear in the a before it, the r behind it, and its data or its z. What it is
in them follows step by step, of all blocks at once.

Shapes: m blocks of n steps, D state dims, P cells. Matrices are (m, out, in).
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
    """Of m blocks: `ahead` (m, n·P + D, D + n·P) leads from a before a block's first step and its data to all of its z
    and to the a behind it; `back` (m, n·(2D + P), 2D + n·P) from a, r behind its last step and its z to all
    (x, r_t, u_t), `before` (m, D, D + n·P) from the last two to the r before it.

    `wide` (m,): what cancels in x is so large that products are to be taken of x, not of what it is made of.
    """

    ahead: Array
    back: Array
    before: Array
    width: int  # 2D + P
    wide: Array

    def __getitem__(self, which: slice) -> Matrices:
        """Those of some of the blocks."""
        return Matrices(self.ahead[which], self.back[which], self.before[which], self.width, self.wide[which])

    @property
    def formed(self) -> bool:
        """Whether products are to be taken of x."""
        return bool(self.wide.any())


def of_blocks(own: Gains, A: Array, C: Array, steps: Array) -> Matrices:
    """Of blocks with the gains number `steps` (m, n)."""
    (m, n), (D, P) = steps.shape, own.gains.shape[1:]
    F, K, L, V = own.whiteners[steps], own.gains[steps], own.closed[steps], own.predicted[steps]
    H = F @ C
    ahead = _ahead(np.concatenate([-H, L], 2), np.concatenate([F, K], 2))
    behind = _behind(np.concatenate([L, -K], 3).swapaxes(2, 3), np.concatenate([H, F], 3).swapaxes(2, 3))
    back = np.empty((m, n, 2 * D + P, 2 * D + n * P))
    x, r, u = back[:, :, :D], back[:, :, D : 2 * D], back[:, :, 2 * D :]
    r[..., :D] = u[..., :D] = 0
    u[..., D:], r[:, :-1, :, D:] = behind[:, :, D:], behind[:, 1:, :D]
    r[:, -1, :, D:] = np.eye(D, D + n * P)
    _inherited(A, K @ own.factors[steps], x)
    x[..., D:] += V @ behind[:, :, :D]
    sizes = V.diagonal(axis1=2, axis2=3)
    wide = (sizes > WIDE * own.predicted[-1].diagonal()).any((1, 2))
    return Matrices(ahead, back.reshape(m, n * (2 * D + P), -1), behind[:, 0, :D], 2 * D + P, wide)


def _ahead(moved: Array, enters: Array) -> Array:
    """`Matrices.ahead` from what leads from a and from y of every step, (m, n, P + D, ·), to z and to the next a."""
    (m, n, _, D), P = moved.shape, enters.shape[3]
    found = np.zeros((m, n * P + D, D + n * P))
    a: Array = np.eye(D)
    for i in range(n):
        end = D + i * P
        both = found[:, i * P : i * P + P + D]  # z, and a where z of the next step will be
        np.matmul(moved[:, i], a, out=both[..., :end])
        both[..., end : end + P] = enters[:, i]
        a = both[:, P:, : end + P].copy()
    return found


def _behind(moved: Array, enters: Array) -> Array:
    """r before every step and its u, (m, n, D + P, D + n·P), from r behind the block and all of its z.

    :param moved: what leads to them from r of every step; `enters` from its z.
    """
    (m, n, _, D), P = moved.shape, enters.shape[3]
    found = np.empty((m, n, D + P, D + n * P))
    r: Array = np.eye(D, D + n * P)
    for i in reversed(range(n)):
        np.matmul(moved[:, i], r, out=found[:, i])
        found[:, i, :, D + i * P : D + i * P + P] = enters[:, i]
        r = found[:, i, :D]
    return found


def _inherited(A: Array, enters: Array, out: Array) -> None:
    """a of every step from the one before the block, no r, and all z, to `out` (m, n, D, 2D + n·P)."""
    n, D, P = enters.shape[1:]
    out[:, 0] = np.eye(D, out.shape[-1])
    for i in range(1, n):
        np.matmul(A, out[:, i - 1], out=out[:, i])
        out[:, i, :, D * 2 + i * P - P : D * 2 + i * P] = enters[:, i - 1]
