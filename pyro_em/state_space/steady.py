"""Moments of a time-invariant chain: shared covariances (riccati.py), means by blocks of steps, only sums formed.

The residuals of the M-step are smoothed disturbances (Koopman 1993), E η_t = Q r_t and E ε_t = R u_t (blocks.py), so
that nothing cancels.

Shapes: S sequences, D state dims, P cells. `smoother.py` does the same step by step for any chain
and is what this file is tested against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its parts are imported when they are used first
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.state_space.blocks import Blocks, smoothed
from pyro_em.state_space.centred import FAR, accurate
from pyro_em.state_space.chunked import states
from pyro_em.state_space.head import Head
from pyro_em.state_space.linear_gaussian import Chain, ChainMoments, LinearMoments, chain_moments
from pyro_em.state_space.riccati import filter_gains, smoothed_sums
from pyro_em.state_space.scan import scan
from pyro_em.state_space.segments import KEPT
from pyro_em.state_space.start import FINE, WIDE, Undetermined, is_open, raise_unless_fine, status_of
from pyro_em.state_space.steps import LOG_2PI, SingularInnovation

Array = NDArray[np.float64]
# What sums of products are too coarse for is left to chunked.py, which forms the residuals themselves:
STRAY = 100.0  # times the noise, and the root of their number: rounding of data beyond would show in their evidence
NARROW = 1e-5  # noise of which a combination has so small a share of a coordinate's variance.


def steady_moments(chain: Chain, weight: Tensor | None = None) -> ChainMoments:
    """Moments summed over steps and sequences (weighted by `weight` (S,)), leading dims (1, 1).

    For chains of which *all* arguments are shared by steps and sequences, offsets too. One operation to torch, so that
    an EM map around it can be recorded (tape/).
    :raises SingularInnovation: where an observed step has no density given the past.
    :raises Undetermined: if the data say nothing of a flat direction of the start.
    """
    w = torch.ones(len(chain.y), dtype=torch.float64) if weight is None else weight.double()
    given = (chain.mean, chain.covariance, chain.A, chain.b, chain.Q, chain.C, chain.d, chain.R, chain.y, w)
    status, evidence, packed = torch.ops.pyro_em.steady_moments(*given, chain.first_unseen, chain.flat)
    raise_unless_fine(int(status))
    D, P = chain.A.shape[-1], chain.C.shape[-2]
    places, sites = _places(D, P), []
    parts = [x.reshape(shape) for x, shape in zip(packed.split([s.numel() for s in places]), places, strict=True)]
    sites = [LinearMoments(*parts[i : i + 6]) for i in range(0, 24, 6)]
    return ChainMoments(evidence, *sites)


def _places(D: int, P: int) -> list[torch.Size]:
    """Shapes of the moments of x_0, of the transitions, of the later observations and of the first one, in a row."""
    sites = (D, 0), (D, D), (P, D), (P, D)
    return [torch.Size((1, 1, *x)) for v, s in sites for x in ((), (v,), (v, v), (v, s), (s,), (s, s))]


_LIBRARY = torch.library.Library("pyro_em", "FRAGMENT")
_LIBRARY.define(
    "steady_moments(Tensor mean, Tensor covariance, Tensor A, Tensor b, Tensor Q, Tensor C, Tensor d, Tensor R, "
    "Tensor y, Tensor weight, bool first_unseen, Tensor? flat) -> Tensor[]"
)


def _operation(*given: Any) -> list[Tensor]:
    """A status (start.py), log-evidence, and the moments in one row (`_places`)."""
    y, w, first_unseen, flat = given[8:]
    seen = None
    if first_unseen:
        seen = torch.ones(1, y.shape[1], y.shape[2], dtype=torch.bool)
        seen[:, 0] = False
    mean, covariance, A, b, Q, C, d, R = given[:8]
    chain = Chain(mean, covariance, A, b, Q, C, d, R, y, seen, flat)
    with torch._C.DisableTorchFunction():
        try:
            found = _moments_of(chain, w)
        except (SingularInnovation, Undetermined) as error:
            size = sum(x.numel() for x in _places(A.shape[-1], C.shape[-2]))
            return [torch.tensor(status_of(error)), torch.zeros(len(y)).double(), torch.zeros(size).double()]
    return [torch.tensor(FINE), *(torch.from_numpy(x) for x in found)]


def _on_cpu(*given: Any) -> list[Tensor]:
    """The operation for tensors that are elsewhere: small matrices one after the other are the CPU's."""
    device = given[0].device
    return [x.to(device) for x in _operation(*(x.cpu() if isinstance(x, Tensor) else x for x in given))]


_LIBRARY.impl("steady_moments", _operation, "CPU")
_LIBRARY.impl("steady_moments", _on_cpu, "CompositeExplicitAutograd")


def _moments_of(chain: Chain, weight: Tensor) -> tuple[Array, Array]:
    """Log-evidence of every sequence, and the moments in a row."""
    Q, R = chain.Q.numpy()[0, 0], chain.R.numpy()[0, 0]
    found = None
    if not (chain.num_steps == 1 or _nearly_singular(Q) or _nearly_singular(R)):
        size = chain.covariance.numpy()[0].diagonal().max()
        may_be_open = chain.flat is not None or size > WIDE * R.diagonal().min()
        found = _after_head(chain, weight) if may_be_open and is_open(chain) else _summed(chain, weight)
    if found is None:
        return _step_by_step(chain, weight)
    return found.log_evidence, _row(*found.sites)


@dataclass(frozen=True)
class _Summed:
    """Log-evidence, the moments of the four sites, and the first smoothed state: means (S, D), if `parts` were given,
    and covariance."""

    log_evidence: Array
    sites: list[tuple[Any, ...]]
    mean: Array | None
    covariance: Array


def _after_head(chain: Chain, weight: Tensor) -> _Summed | None:
    """Of a chain whose start is open: its head step by step, the rest as any."""
    head = Head.of(chain)
    rest = head.rest(_later(chain.y, head.last))
    if rest.num_steps == 1 or is_open(rest):
        return None
    with head.counted():
        found = _summed(rest, weight, head.end()[:2])
    if found is None:
        return None
    assert found.mean is not None
    back = head.back(torch.from_numpy(found.mean), torch.from_numpy(found.covariance)[None])
    early = _summed_sites(chain_moments(chain.first_steps(head.last + 1), back), weight)
    sites = [tuple(x.numpy()[0, 0] for x in vars(own).values()) for own in early]
    both = [tuple(x + y for x, y in zip(sites[i], found.sites[i], strict=True)) for i in (1, 2)]
    log_evidence = head.log_evidence().numpy() + found.log_evidence
    return _Summed(log_evidence, [sites[0], *both, sites[3]], found.mean, found.covariance)


def _summed(chain: Chain, weight: Tensor, parts: tuple[Tensor, ...] = ()) -> _Summed | None:
    """None if data stray so far from the path of the means that digits would be lost.

    :param parts: the means of the first states as sums of two.
    """
    mean, P0, start = chain.mean.numpy()[0], chain.covariance.numpy()[0], None
    if parts:
        own_mean, base = (x.numpy() for x in parts)
        mean = base.mean(0)
        start = own_mean + (base - mean)
    A, b, Q, C, d, R = (x.numpy()[0, 0] for x in (chain.A, chain.b, chain.Q, chain.C, chain.d, chain.R))
    y = _array(chain.y)
    _, T, P = y.shape
    late = int(chain.first_unseen)
    own = filter_gains(P0, A, Q, C, R, T, bool(late))
    path = _mean_path(mean, A, b, T)
    if path is not None:
        y, path = _deviations(y, path, mean, A, b, C, d, abs(own.factors[-1].diagonal()).min())
    elif d.any():
        y = y - d
    data = Blocks.of(y, len(A))
    if data.reach > STRAY * math.sqrt(y.shape[0] * T) * abs(own.factors[-1].diagonal()).min():
        return None
    n, D = len(own), len(A)
    half_log_det = own.half_log_dets.sum() + (T - n) * own.half_log_dets[-1]
    weights: Array = weight.numpy()
    w = None if (weights == 1).all() else weights
    squares, found = smoothed(own, data, A, C, w, path, start)
    evidence = -0.5 * squares - half_log_det - 0.5 * LOG_2PI * P * (T - late)
    W, sums, initial = found.first[0, 0], found.total, found.initial
    V = smoothed_sums(own, A, C, Q, R, T)
    x, r, u = slice(1, 1 + D), slice(1 + D, 1 + 2 * D), slice(1 + 2 * D, None)
    seen, early = sums - found.first, found.first * (1 - late)
    Vs = W * (V.total - V.first)
    sites = [
        (W, initial[0, x], initial[x, x] + W * V.first, *(np.zeros(s) for s in ((D, 0), (0,), (0, 0)))),
        (
            W * (T - 1),
            Q.dot(sums[0, r]),
            Q.dot(sums[r, r]).dot(Q) + W * V.noise,
            Q.dot(sums[r, x]) + W * V.noise_states,
            sums[0, x] - found.last[0, x],
            sums[x, x] - found.last[x, x] + W * (V.total - V.last),
        ),
        _observed(W * (T - 1), seen, Vs, C, R, x, u),
        _observed(W * (1 - late), early, W * (1 - late) * V.first, C, R, x, u),
    ]
    return _Summed(evidence, sites, found.mean, V.first)


def _nearly_singular(noise: Array) -> bool:
    """Whether a coordinate (but those without noise) has next to none of its own, given those before it."""
    size = noise.diagonal()
    if not size.all():
        kept = size > 0
        noise, size = noise[np.ix_(kept, kept)], size[kept]
    factor, failed = scipy.linalg.lapack.dpotrf(noise, lower=1)
    return bool(failed) or bool((factor.diagonal() ** 2 < NARROW * size).any())


def _row(*sites: tuple[Any, ...]) -> Array:
    """Moments of the sites in one row, their squares symmetric."""
    parts = []
    for count, residual, square, *rest in sites:
        parts += [(float(count),), residual, ((square + square.T) / 2).reshape(-1), *(x.reshape(-1) for x in rest)]
    return np.concatenate(parts)


_known: dict[str, tuple[Tensor, int, Array]] = {}
_known_later: dict[str, tuple[Tensor, int, int, Tensor]] = {}


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


def _later(y: Tensor, first: int) -> Tensor:
    """The data from a step on, one tensor as long as `y` is."""
    last = _known_later.get("y")
    if last is None or last[0] is not y or last[1:3] != (y._version, first):
        last = y, y._version, first, y[:, first:].contiguous()
        _known_later["y"] = last
    return last[3]


def _step_by_step(chain: Chain, w: Tensor) -> tuple[Array, Array]:
    """The same from the states themselves (`chunked.py`)."""
    found = chain_moments(chain, states(chain))
    row = torch.cat([x.reshape(-1) for own in _summed_sites(found, w) for x in vars(own).values()])
    return found.log_evidence.numpy(), row.numpy()


def _summed_sites(found: ChainMoments, w: Tensor) -> tuple[LinearMoments, ...]:
    """Of x_0, the transitions, the later observations and the first one."""

    def summed(own: LinearMoments, begin: int, end: int | None) -> LinearMoments:
        parts = (x[:, begin:end].expand(len(w), -1, *x.shape[2:]) for x in vars(own).values())
        return LinearMoments(*((x * w.reshape(-1, *(1,) * (x.dim() - 1))).sum((0, 1), keepdim=True) for x in parts))

    seen = found.observation
    initial, transition = summed(found.initial, 0, None), summed(found.transition, 0, None)
    return initial, transition, summed(seen, 1, None), summed(seen, 0, 1)


def _observed(n: float, G: Array, V: Array, C: Array, R: Array, x: slice, u: slice) -> tuple[Any, ...]:
    CV = C.dot(V)
    square = R.dot(G[u, u]).dot(R) + CV.dot(C.T)
    return n, R.dot(G[0, u]), square, R.dot(G[u, x]) - CV, G[0, x], G[x, x] + V


def _mean_path(mean: Array, A: Array, b: Array, T: int) -> Array | None:
    """E x_t without data, (T, D); None if it is 0 all the way."""
    if not (mean.any() or b.any()):
        return None
    path = np.empty((T, len(mean)))
    path[0], path[1:] = mean, b
    return scan(path[None], A)[0]


def _deviations(
    y: Array, path: Array, mean: Array, A: Array, b: Array, C: Array, d: Array, noise: float
) -> tuple[Array, Array]:
    """y - C path - d, and the path; with all their digits where they are large numbers beside `noise`."""
    seen = path @ C.T + d
    if float(abs(seen).max()) < FAR * noise:
        return y - seen, path
    lost = np.empty_like(path)
    lost[0], lost[1:] = mean - path[0], accurate(A, path[:-1], b, -path[1:])
    scan(lost[None], A)  # the path is lost + path, exactly as its recursion says
    return accurate(-C, path, y, -d) - lost @ C.T, path + lost
