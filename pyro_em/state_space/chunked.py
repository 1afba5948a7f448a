"""Smoothed states of any linear-Gaussian chain, two-level in time, in NumPy: as smoother.py, at less cost a step.

Time is cut into a head and M chunks of L steps. A pass over all chunks at once says how each acts on an unknown state
(passes.py), a short recursion then gives the filtered state where each begins; two more passes filter and smooth.

Shapes: S sequences, T steps, D state dims; batch (B, M), see passes.py. Not handled: other devices than the CPU, which
smoother.py serves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.state_space.centred import refined
from pyro_em.state_space.chunks import cut
from pyro_em.state_space.head import with_head
from pyro_em.state_space.linear_gaussian import Chain, Smoothed
from pyro_em.state_space.passes import Array, Filter, Smoother, StepArguments, chunk_ends, chunk_starts, states_before
from pyro_em.state_space.smoother import smooth
from pyro_em.state_space.start import FINE, Undetermined, raise_unless_fine, status_of
from pyro_em.state_space.steps import LOG_2PI, SingularInnovation, prepared


def states(chain: Chain) -> Smoothed:
    """As `smoother.smooth`, one operation to torch, so that an EM map around it can be recorded (tape/).

    :raises SingularInnovation: where an observed step has no density given the past.
    """
    given = [getattr(chain, field.name) for field in dataclasses.fields(chain)]
    with torch.no_grad():
        status, *parts = torch.ops.pyro_em.smoothed_states(*given)
    raise_unless_fine(int(status))
    return Smoothed(*parts)


_LIBRARY = torch.library.Library("pyro_em", "FRAGMENT")
_LIBRARY.define(
    "smoothed_states(Tensor mean, Tensor covariance, Tensor A, Tensor b, Tensor Q, Tensor C, Tensor d, Tensor R, "
    "Tensor y, Tensor? seen, Tensor? flat) -> Tensor[]"
)


def _operation(*given: Any) -> list[Tensor]:
    """A status (start.py), and what `Smoothed` holds."""
    chain = Chain(*given)
    with torch._C.DisableTorchFunction():
        try:
            try:
                on_cpu = chain.y.device.type == "cpu"
                found = refined(chain, lambda own: with_head(own, smoothed)) if on_cpu else smooth(chain)
            except np.linalg.LinAlgError:
                found = smooth(chain)
        except (SingularInnovation, Undetermined) as error:
            S, T, _ = chain.y.shape
            D = chain.A.shape[-1]
            shapes = ((S,), (S, T, D), (S, T, D, D), (S, T - 1, D, D), (S, T, D), (S, T, D, D), (S, T))
            return [torch.tensor(status_of(error)), *(chain.y.new_zeros(shape) for shape in shapes)]
        return [torch.tensor(FINE), *vars(found).values()]


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("smoothed_states", _operation, _device)


def _shared(chain: Chain) -> bool:
    """All sequences have one covariance."""
    if any(len(x) > 1 for x in (chain.covariance, chain.A, chain.Q, chain.C, chain.R)):
        return False
    return chain.seen is None or bool((chain.seen == chain.seen[:1]).all())


def smoothed(chain: Chain) -> Smoothed:
    """As `smoother.smooth`.

    :raises LinAlgError: where an observed step has no density given the past (`smoother.smooth` says which).
    """
    S, T, _ = chain.y.shape
    shared = _shared(chain)
    if shared and chain.seen is not None:
        chain = dataclasses.replace(chain, seen=chain.seen[:1])
    steps = prepared(chain)
    M, L = cut(1 if shared else S, T - 1)
    D = chain.mean.shape[-1]
    args = StepArguments.of(steps, shared)
    B, W = (1, S) if shared else (S, 1)
    head = T - M * L
    start = chain.mean.expand(S, D).numpy()
    m = np.ascontiguousarray(start.T[None, None] if shared else start[:, None, :, None])
    P = np.broadcast_to(chain.covariance.numpy()[:, None], (B, 1, D, D))
    before = StepArguments(np.eye(D)[None, None, None], np.zeros((1, 1, 1, D, 1)), np.zeros((1, 1, 1, D, D)),
                        args.C, args.d, args.R, args.y)  # fmt: skip
    first = Filter(before, range(1), P, m)
    front = Filter(args, range(1, head), first.covariances[0], first.means[0])
    at, mean = np.split((front if head > 1 else first).end, [D], -1)
    x, V = mean[:, 0], at[:, 0]
    body = back = None
    if M:
        own = StepArguments.of(steps.cut(head, M, L), shared)
        still, zero = np.zeros((B, M, D, D)), np.zeros((B, M, D, W))
        act = Filter(own, range(L), still, zero, sensitive=True)
        P, m = chunk_starts(act, at, mean)
        body = Filter(own, range(L), P, m)
        back = Smoother.of(own, range(L), *states_before(P, m, body), body.predicted, body.forecasts)
        x, V = body.means[-1][:, -1], body.covariances[-1][:, -1]
        x, V = chunk_ends(back.whole(), x, V)
        means, covariances = back.down(x, V)
        x, V = means[0][:, 0], covariances[0][:, 0]
    x, V = x[:, None], V[:, None]
    ahead_means, ahead_covariances, ahead_gains = x[None], V[None], np.empty((0, B, 1, D, D))
    if head > 1:
        ahead = Smoother.of(args, range(1, head), *states_before(first.covariances[0], first.means[0], front),
                             front.predicted, front.forecasts)  # fmt: skip
        ahead_means, ahead_covariances = ahead.down(x, V)
        ahead_gains = ahead.G

    def row(*pieces: Array) -> Array:
        """Pieces (L, B, M, ...) in a row, (B, T, ...)."""
        return np.concatenate([np.moveaxis(p, 0, 2).reshape(B, -1, *p.shape[3:]) for p in pieces], 1)

    def of_means(*pieces: Array) -> Tensor:
        found = row(*pieces)
        found = found[0].transpose(2, 0, 1) if shared else found[..., 0]
        return torch.from_numpy(np.ascontiguousarray(found))

    later: list[Filter] = [f for f in (front, body) if f is not None and len(f.means)]
    densities = row(*(f.densities()[..., None, :] for f in (first, *later)))[:, :, 0]
    density = torch.from_numpy(np.ascontiguousarray(densities[0].T if shared else densities[..., 0]))
    density = density - 0.5 * LOG_2PI * (steps.cells.squeeze(1))
    state_means, state_covariances, gains = [ahead_means], [ahead_covariances], [ahead_gains]
    if back is not None:
        state_means.append(means[1:])
        state_covariances.append(covariances[1:])
        gains.append(back.G)
    covariance = row(*state_covariances)
    covariance = (covariance + covariance.swapaxes(-1, -2)) / 2
    lag = covariance[:, 1:] @ row(*gains).swapaxes(-1, -2)
    filtered = row(first.covariances, *(f.covariances for f in later))
    return Smoothed(
        density.sum(1),
        of_means(*state_means),
        torch.from_numpy(covariance),
        torch.from_numpy(lag),
        of_means(first.means, *(f.means for f in later)),
        torch.from_numpy((filtered + filtered.swapaxes(-1, -2)) / 2),
        density,
    )
