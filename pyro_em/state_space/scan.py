"""Linear recursions x_t = F x_{t-1} + u_t of many steps, in blocks of L steps.

One product with the block-triangular matrix of F⁰..F^(L-1) solves every block from zero, the ends of the blocks obey
the same recursion with F^L (solved alike), and one more product adds what each block inherits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NEGLIGIBLE = 1e-25  # powers of F below this add nothing to any sum in float64


def scan(u: Array, F: Array, reverse: bool = False) -> Array:
    """x_t = F x_{t-1} + u_t along dim 1 of u (S, n, D), or x_t = F x_{t+1} + u_t; u is used up."""
    S, n, D = u.shape
    L = max(4, 64 // D)
    if n <= 2 * L:
        steps = range(n - 2, -1, -1) if reverse else range(1, n)
        for t in steps:
            u[:, t] += u[:, t + 1 if reverse else t - 1] @ F.T
        return u
    powers = [np.eye(D), F]
    while len(powers) <= L:
        powers.append(powers[-1] @ F)
    M = n // L
    # Steps that do not fill a block come last in the direction of the recursion.
    rest = n - M * L
    body = u[:, rest:] if reverse else u[:, : M * L]
    lags = np.subtract.outer(range(L), range(L))
    table = np.stack([*(p.T for p in powers[:L]), np.zeros((D, D))])
    blocks = table[np.where(lags >= 0, lags, L) if reverse else np.where(lags <= 0, -lags, L)]
    blocks = blocks.transpose(0, 2, 1, 3).reshape(L * D, L * D)
    solved = (body.reshape(S * M, L * D) @ blocks).reshape(S, M, L, D)
    far = powers[L]
    ends = np.ascontiguousarray(solved[:, :, 0] if reverse else solved[:, :, -1])
    if abs(far).max() > NEGLIGIBLE:
        ends = scan(ends, np.where(abs(far) > NEGLIGIBLE, far, 0.0), reverse)
    inherit = np.concatenate([powers[L - i if reverse else i + 1].T for i in range(L)], 1)
    wide = solved.reshape(S, M, L * D)
    if reverse:
        wide[:, :-1] += ends[:, 1:] @ inherit
    else:
        wide[:, 1:] += ends[:, :-1] @ inherit
    body[...] = wide.reshape(S, M * L, D)
    for t in range(rest):
        if reverse:
            u[:, rest - 1 - t] += u[:, rest - t] @ F.T
        else:
            u[:, M * L + t] += u[:, M * L + t - 1] @ F.T
    return u
