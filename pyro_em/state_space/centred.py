"""A chain as deviations from a path near its states, so that the distance of the states from 0 costs no digits.

    x_t = p_t + x'_t:     m' = m - p_0,   b'_t = b_t + A_t p_{t-1} - p_t,   y'_t = y_t - d_t - C_t p_t,   d' = 0

is the same chain whatever the path p is. Its offsets are differences of numbers as large as the states, so they are
formed as if in twice the precision (Ogita, Rump and Oishi 2005); all that follows works with numbers of the size of the
noises. The path is that of the smoothed states, found by a first run of the same filter.

Shapes: as `Chain`; a path is (S, T, D).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_em.state_space.linear_gaussian import Chain, Smoothed

FAR = 64.0  # times its noise: data further away lose digits that a log-evidence would show
_SPLIT = 2.0**27 + 1  # halves a float64 into two numbers whose products are exact (Veltkamp 1968)


def refined(chain: Chain, smooth: Callable[[Chain], Smoothed]) -> Smoothed:
    """`smooth` of a chain; where data are far, of its deviations from a constant, then from what that finds."""
    if not is_far(chain):
        return smooth(chain)
    closer, path = around_a_constant(chain)
    found = smooth(closer)
    if is_far(closer) and chain.num_steps > 1:
        path = path + found.mean
        found = smooth(centred(chain, path))
    means = {"mean": found.mean + path, "filtered_mean": found.filtered_mean + path}
    return dataclasses.replace(found, **means)


def is_far(chain: Chain) -> bool:
    """Whether observations are so far from their offsets that rounding of them is more than that of their noise."""
    with torch.no_grad():
        away = (chain.y - chain.d).abs()
        if chain.seen is not None:
            away = away * chain.seen
        noise = chain.R.diagonal(dim1=-2, dim2=-1).min()
        moves = (chain.C @ chain.Q[:, -1:] @ chain.C.mT).diagonal(dim1=-2, dim2=-1).min()
        return bool(away.max() > FAR * (noise + moves).clamp(min=0).sqrt())


def centred(chain: Chain, path: Tensor) -> Chain:
    """The chain of deviations from `path` (S|1, T|1, D); differentiable in its arguments, of which the path is none."""
    path = path.detach()
    still = path.shape[1] == 1
    before, after = (path, path) if still else (path[:, :-1], path[:, 1:])
    b = _offset(chain.A, before, chain.b, -after)
    y = _offset(-chain.C, path, chain.y, -chain.d)
    none = chain.d.new_zeros(1, 1, chain.d.shape[-1])
    return dataclasses.replace(chain, mean=chain.mean - path[:, 0], b=b, y=y, d=none)


def _offset(matrix: Tensor, vector: Tensor, *terms: Tensor) -> Tensor:
    """Σ terms + matrix vector with all its digits, and the gradient of the plain sum."""
    plain = (matrix @ vector.unsqueeze(-1)).squeeze(-1)
    for term in terms:
        plain = plain + term
    with torch.no_grad():
        lost = accurate(matrix, vector, *terms) - plain
    return plain + lost


def accurate(matrix: Any, vector: Any, *terms: Any) -> Any:
    """Σ terms + matrix vector over the last dims, as if in twice the precision; of tensors or of arrays."""
    total, error = terms[0], 0.0
    for term in terms[1:]:
        total, lost = _sum(total, term)
        error = error + lost
    for k in range(matrix.shape[-1]):
        product, lost = _product(matrix[..., k], vector[..., k, None])
        total, more = _sum(total, product)
        error = error + (lost + more)
    return total + error


def _sum(a: Any, b: Any) -> tuple[Any, Any]:
    """a + b, and what its rounding lost (Knuth)."""
    total = a + b
    own = total - a
    return total, (a - (total - own)) + (b - own)


def _product(a: Any, b: Any) -> tuple[Any, Any]:
    """a b, and what its rounding lost (Dekker 1971)."""
    product = a * b
    a1, b1 = a * _SPLIT, b * _SPLIT
    a1, b1 = a1 - (a1 - a), b1 - (b1 - b)
    a2, b2 = a - a1, b - b1
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def around_a_constant(chain: Chain) -> tuple[Chain, Tensor]:
    """Deviations from the constant (S, 1, D) that the mean of the data speaks for, and that constant."""
    if chain.C.shape[1] > 1 or chain.d.shape[1] > 1:
        return chain, chain.mean.new_zeros(1, 1, chain.mean.shape[-1])
    with torch.no_grad():
        seen = torch.ones_like(chain.y) if chain.seen is None else chain.seen.expand(chain.y.shape).to(chain.y.dtype)
        mean = (chain.y * seen).sum(1) / seen.sum(1).clamp(min=1) - chain.d[:, 0]
        inverse = torch.linalg.pinv(chain.C[:, 0])
        at = (inverse @ mean.unsqueeze(-1)).squeeze(-1) * (seen.sum(1) > 0).all(-1, keepdim=True)
    at = at.unsqueeze(1)
    return centred(chain, at), at
