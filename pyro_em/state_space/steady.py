"""Moments of a time-invariant chain: shared covariances (riccati.py), means by blocks of steps, only sums formed.

The residuals of the M-step are smoothed disturbances (Koopman 1993), E η_t = Q r_t and E ε_t = R u_t (blocks.py), so
that nothing cancels, and all sums are one product ZᵀZ of Z = (x, r, u).

Shapes: M blocks of L steps, S sequences, D state dims, P cells. `smoother.py` does the same step by step for any chain
and is what this file is tested against.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.state_space.blocks import KEPT, Blocks, smoothed
from pyro_em.state_space.linear_gaussian import Chain, ChainMoments, LinearMoments, chain_moments
from pyro_em.state_space.riccati import filter_gains, smoothed_sums
from pyro_em.state_space.scan import scan
from pyro_em.state_space.smoother import smooth
from pyro_em.state_space.steps import LOG_2PI, SingularInnovation

Array = NDArray[np.float64]
WIDE = 1e12  # a start so much wider than the steady covariance is left to smoother.py, whose form loses no digits


def steady_moments(chain: Chain, weight: Tensor | None = None) -> ChainMoments:
    """Moments summed over steps and sequences (weighted by `weight` (S,)), leading dims (1, 1).

    For chains of which *all* arguments are shared by steps and sequences, offsets too. One operation to torch, so that
    an EM map around it can be recorded (tape/).
    :raises SingularInnovation: where an observed step has no density given the past.
    """
    w = torch.ones(len(chain.y), dtype=torch.float64) if weight is None else weight.double()
    given = (chain.mean, chain.covariance, chain.A, chain.b, chain.Q, chain.C, chain.d, chain.R, chain.y, w)
    status, evidence, *parts = torch.ops.pyro_em.steady_moments(*given, chain.first_unseen)
    step = int(status)
    if step >= 0:
        raise SingularInnovation(step)
    sites = [LinearMoments(*parts[i : i + 6]) for i in range(0, 24, 6)]
    return ChainMoments(evidence, *sites)


_LIBRARY = torch.library.Library("pyro_em", "FRAGMENT")
_LIBRARY.define(
    "steady_moments(Tensor mean, Tensor covariance, Tensor A, Tensor b, Tensor Q, Tensor C, Tensor d, Tensor R, "
    "Tensor y, Tensor weight, bool first_unseen) -> Tensor[]"
)


def _operation(*given: Any) -> list[Tensor]:
    """Step without a density (-1 for none), log-evidence, and the moments in a row."""
    y, w, first_unseen = given[8:]
    seen = None
    if first_unseen:
        seen = torch.ones(1, y.shape[1], y.shape[2], dtype=torch.bool)
        seen[:, 0] = False
    mean, covariance, A, b, Q, C, d, R = given[:8]
    chain = Chain(mean, covariance, A, b, Q, C, d, R, y, seen)
    with torch._C.DisableTorchFunction():
        try:
            found = _moments_of(chain, w)
        except SingularInnovation as error:
            S, D, P = len(chain.y), chain.A.shape[-1], chain.C.shape[-2]
            shapes = [((V,), (V, V), (V, n), (n,), (n, n)) for V, n in ((D, 0), (D, D), (P, D), (P, D))]
            empty = [torch.zeros(1, 1, *shape) for own in shapes for shape in ((), *own)]
            return [torch.tensor(error.step), torch.zeros(S), *(x.double() for x in empty)]
    assert found.first is not None
    sites = (found.initial, found.transition, found.observation, found.first)
    return [torch.tensor(-1), found.log_evidence, *(x for own in sites for x in vars(own).values())]


_LIBRARY.impl("steady_moments", _operation, "CPU")


def _moments_of(chain: Chain, weight: Tensor) -> ChainMoments:
    mean, P0 = chain.mean[0].numpy(), chain.covariance[0].numpy()
    A, b, Q, C, d, R = (x[0, 0].numpy() for x in (chain.A, chain.b, chain.Q, chain.C, chain.d, chain.R))
    y = _array(chain.y)
    _, T, P = y.shape
    late = int(chain.first_unseen)
    own = filter_gains(P0, A, Q, C, R, T, bool(late))
    if T == 1 or abs(P0).max() > WIDE * abs(own.predicted[-1]).max():
        return _step_by_step(chain, weight)
    path = _mean_path(mean, A, b, T)
    if path is not None:
        y = y - (path @ C.T + d)
    elif d.any():
        y = y - d
    data = Blocks.of(y, len(A))
    D = len(A)
    squares, Z = smoothed(own, data, A, C)
    if path is not None:
        cut = len(data.lead)
        Z[0][..., :D] += path[:cut, None]
        Z[1][..., :D] += path[cut:].reshape(-1, 1, data.length, D)
    n = len(own)
    half_log_det = own.half_log_dets.sum() + (T - n) * own.half_log_dets[-1]
    evidence = -0.5 * squares - half_log_det - 0.5 * LOG_2PI * P * (T - late)
    w = None if bool((weight == 1).all()) else weight.numpy()
    sums, count = _sums(Z, w)
    firsts, lasts = _row(Z, 0), _row(Z, -1)
    first, last = _gram(firsts, w), _gram(lasts, w)
    V = smoothed_sums(own, A, C, Q, R, T)
    x, r, u = slice(1, 1 + D), slice(1 + D, 1 + 2 * D), slice(1 + 2 * D, None)
    start = firsts[:, :D] - mean
    initial = _gram(start, w)
    W = count
    moved = sums - last
    seen, early = sums - first, first * (1 - late)
    Vs = W * (V.total - V.first)
    return ChainMoments(
        torch.from_numpy(evidence),
        _moments(W, initial[0, 1:], initial[1:, 1:] + W * V.first, np.zeros((D, 0)), np.zeros(0), np.zeros((0, 0))),
        _moments(
            W * (T - 1),
            Q @ sums[0, r],
            Q @ sums[r, r] @ Q + W * V.noise,
            Q @ sums[r, x] + W * V.noise_states,
            moved[0, x],
            moved[x, x] + W * (V.total - V.last),
        ),
        _observed(W * (T - 1), seen, Vs, C, R, x, u),
        _observed(W * (1 - late), early, W * (1 - late) * V.first, C, R, x, u),
    )


_known: dict[str, tuple[Tensor, int, Array]] = {}


def _array(y: Tensor) -> Array:
    """The data as one array object as long as it is one tensor, unchanged: what is made of them is made once.

    (Unless they are so many that they should not be held on to.)
    """
    if y.numel() * y.element_size() > KEPT:
        return y.numpy()
    last = _known.get("y")
    if last is None or last[0] is not y or last[1] != y._version:
        last = y, y._version, y.numpy()
        _known["y"] = last
    return last[2]


def _step_by_step(chain: Chain, w: Tensor) -> ChainMoments:
    """The same by `smoother.py`."""
    found = chain_moments(chain, smooth(chain))

    def summed(own: LinearMoments, begin: int, end: int | None) -> LinearMoments:
        parts = (x[:, begin:end].expand(len(w), -1, *x.shape[2:]) for x in vars(own).values())
        return LinearMoments(*((x * w.reshape(-1, *(1,) * (x.dim() - 1))).sum((0, 1), keepdim=True) for x in parts))

    seen = found.observation
    initial, transition = summed(found.initial, 0, None), summed(found.transition, 0, None)
    return ChainMoments(found.log_evidence, initial, transition, summed(seen, 1, None), summed(seen, 0, 1))


def _observed(n: float, G: Array, V: Array, C: Array, R: Array, x: slice, u: slice) -> LinearMoments:
    square = R @ G[u, u] @ R + C @ V @ C.T
    return _moments(n, R @ G[0, u], square, R @ G[u, x] - C @ V, G[0, x], G[x, x] + V)


def _moments(n: float, r: Array, rr: Array, rs: Array, s: Array, ss: Array) -> LinearMoments:
    parts = (np.array(float(n)), r, (rr + rr.T) / 2, rs, s, ss)
    return LinearMoments(*(torch.from_numpy(np.ascontiguousarray(x)).reshape(1, 1, *x.shape) for x in parts))


def _mean_path(mean: Array, A: Array, b: Array, T: int) -> Array | None:
    """E x_t without data, (T, D); None if it is 0 all the way."""
    if not (mean.any() or b.any()):
        return None
    path = np.empty((T, len(mean)))
    path[0], path[1:] = mean, b
    return scan(path[None], A)[0]


def _row(Z: tuple[Array, Array], step: int) -> Array:
    """(S, columns) of the first or the last step."""
    lead, body = Z
    if len(body) and (step == -1 or not len(lead)):
        return body[step, :, step]
    return lead[step]


def _gram(rows: Array, w: Array | None) -> Array:
    """Σ w (1, rows)(1, rows)ᵀ."""
    both = np.concatenate([np.ones((len(rows), 1)), rows], 1)
    return (both if w is None else both * w[:, None]).T @ both


def _sums(Z: tuple[Array, Array], w: Array | None) -> tuple[Array, float]:
    """`_gram` over all steps and sequences, and the sum of the weights."""
    lead, body = Z
    S, width = body.shape[1], body.shape[-1]
    G = np.zeros((1 + width, 1 + width))
    for part in (body.reshape(-1, S, body.shape[2] * width), lead):
        if not part.size:
            continue
        flat = part.reshape(-1, width)
        heavy = flat if w is None else (part * w[:, None]).reshape(-1, width)
        G[1:, 1:] += heavy.T @ flat
        G[0, 1:] += np.ones(len(flat)) @ heavy
    count = float(S if w is None else w.sum())
    G[1:, 0] = G[0, 1:]
    return G, count
