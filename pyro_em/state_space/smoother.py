"""Smoothed states of any linear-Gaussian chain, with lag-one covariances, two-level in time.

The states at the boundaries of chunks are exact (chunks.py); a filter and a Rauch-Tung-Striebel smoother then run
inside of all chunks at once. The smoother is in Joseph's form too, with G = P Aᵀ P_next⁻¹:

    Cov(x | all) = (I - GA) P (I - GA)ᵀ + G (Q + V_next) Gᵀ,      Cov(x_next, x | all) = V_next Gᵀ
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.state_space.centred import refined
from pyro_em.state_space.chunks import Action, act, begin, cut
from pyro_em.state_space.head import with_head
from pyro_em.state_space.linear_gaussian import Chain, Smoothed
from pyro_em.state_space.steps import Steps, predict, prepared, rts, update

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Forward:
    """A filter over the steps of chunks: states 0..L (0: where the chunk begins), dims (S, M, ...) each."""

    means: list[Tensor]
    covariances: list[Tensor]
    predicted: list[tuple[Tensor, Tensor]]
    densities: list[Tensor]

    @classmethod
    def over(cls, steps: Steps, which: range, m: Tensor, P: Tensor, first: int) -> _Forward:
        means, covariances, predicted, densities = [m], [P], [], []
        for t in which:
            s = steps.step(t)
            predicted.append(predict(s, m, P))
            m, P, density, _, _ = update(s, *predicted[-1], first + t)
            means.append(m)
            covariances.append(P)
            densities.append(density)
        return cls(means, covariances, predicted, densities)

    def backward(self, steps: Steps, which: range, m: Tensor, P: Tensor) -> _Backward:
        """Smooth, given the smoothed states (m, P) at the ends of the chunks."""
        means, covariances, lags = [m], [P], []
        for l, t in reversed(list(enumerate(which))):
            s = steps.step(t)
            m, P, lag = rts(self.means[l], self.covariances[l], s.A, *self.predicted[l], s.Q, m, P)
            means.append(m)
            covariances.append(P)
            lags.append(lag)
        return _Backward(means[::-1], covariances[::-1], lags[::-1])


@dataclass(frozen=True)
class _Backward:
    means: list[Tensor]
    covariances: list[Tensor]
    lags: list[Tensor]


def _flat(parts: list[Tensor], S: int) -> Tensor:
    """Steps of all chunks in a row: L times (S, M, ...) to (S, M·L, ...)."""
    return torch.stack(parts, 2).flatten(1, 2).expand(S, *(-1,) * (parts[0].dim() - 1))


def smooth(chain: Chain) -> Smoothed:
    """States given all data, with lag-one covariances.

    :raises SingularInnovation: where an observed step has no density given the past.
    """
    with torch.no_grad():
        return refined(chain, lambda chain: with_head(chain, _smoothed))


def _smoothed(chain: Chain) -> Smoothed:
    S, T, _ = chain.y.shape
    steps = prepared(chain)
    M, L = cut(S, T - 1)
    head = T - M * L
    m, P, density = begin(chain, steps, S)
    front = _Forward.over(steps, range(1, head), m, P, 0)
    m, P = front.means[-1], front.covariances[-1]
    back, later = None, _Backward([], [], [])
    if M:
        chunks, which = steps.cut(head, M, L), range(L)
        action = act(chunks, S, M, L, m.shape[-1], head)
        starts, inner, ends = _across(action, m.squeeze(1), P.squeeze(1), M)
        back = _Forward.over(chunks, which, *starts, head)
        later = back.backward(chunks, which, *_back_across(action, inner, ends, back))
        m, P = later.means[0][:, :1], later.covariances[0][:, :1]
    earlier = front.backward(steps, range(1, head), m, P)
    filtered = back or _Forward([], [], [], [])

    def joined(front: list[Tensor], back: list[Tensor]) -> Tensor:
        return torch.cat([_flat(part, S) for part in (front, back) if part], 1)

    density = joined([density, *front.densities], filtered.densities)
    return Smoothed(
        density.sum(1),
        joined(earlier.means, later.means[1:]),
        joined(earlier.covariances, later.covariances[1:]),
        joined(earlier.lags, later.lags) if T > 1 else P.new_zeros(S, 0, *P.shape[-2:]),
        joined(front.means, filtered.means[1:]),
        joined(front.covariances, filtered.covariances[1:]),
        density,
    )


def _across(action: Action, m: Tensor, P: Tensor, M: int) -> tuple[Moments, list[Moments], list[Moments]]:
    """Filtered states where chunks begin, (S, M, ...); each also given its chunk; and predictions of their ends."""
    starts, inner, ends = [(m, P)], [], []
    for k in range(M):
        start, cov, m, P, _ = action.on(m, P, k)
        inner.append((start, cov))
        ends.append((m, P))
        starts.append((m, P))
    return _stacked(starts[:-1]), inner, ends


def _back_across(action: Action, inner: list[Moments], ends: list[Moments], back: _Forward) -> Moments:
    """Smoothed states at the ends of all chunks, (S, M, ...), from the last one backwards."""
    s, V = back.means[-1][:, -1], back.covariances[-1][:, -1]
    smoothed = [(s, V)]
    for k in reversed(range(1, len(inner))):
        s, V, _ = rts(*inner[k], action.Phi[:, k], *ends[k], action.F[:, k], s, V)
        smoothed.append((s, V))
    return _stacked(smoothed[::-1])


def _stacked(parts: list[Moments]) -> Moments:
    return torch.stack([p[0] for p in parts], 1), torch.stack([p[1] for p in parts], 1)
