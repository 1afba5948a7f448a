"""Linear-Gaussian chains: what they are, and the moments that an M-step needs of them.

    x_0 ~ N(m, P),   x_t = A_t x_{t-1} + b_t + N(0, Q_t),   y_t = C_t x_t + d_t + N(0, R_t)

Shapes: S sequences, T steps, D state dims, P observed dims; a dim of size 1 is shared along it. Steps
without (some) observed cells are declared by `seen`. The states are found by `smoother.py` (any chain) or
`steady.py` (time-invariant ones).

The moments are of residuals at the chain's own arguments, so that an M-step works with differences that go
to zero as EM converges and offsets of the data do not cancel digits: for v = M s + o + N(0, Σ)

    count n,  E Σ r,  E Σ r rᵀ,  E Σ r sᵀ,  E Σ s,  E Σ s sᵀ       with r = v - M s - o

Not handled: several chains that meet in one observation with states of their own are one chain with a
joined state; a nonlinear step is refused long before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """Arguments and data of S chains of T steps, float64."""

    mean: Tensor  # (S|1, D) of x_0
    covariance: Tensor  # (S|1, D, D) of x_0
    A: Tensor  # (S|1, T-1|1, D, D); A[:, t - 1] leads to x_t
    b: Tensor  # (S|1, T-1|1, D)
    Q: Tensor  # (S|1, T-1|1, D, D)
    C: Tensor  # (S|1, T|1, P, D)
    d: Tensor  # (S|1, T|1, P)
    R: Tensor  # (S|1, T|1, P, P)
    y: Tensor  # (S, T, P), finite; cells that are not seen are not read
    seen: Tensor | None = None  # (S|1, T, P) bool; None where every cell is
    flat: Tensor | None = None  # (1, H, D, F): x_0, ..., x_{H-1} have flat parts too, F directions in all (start.py)

    @property
    def num_steps(self) -> int:
        return self.y.shape[1]

    @property
    def time_invariant(self) -> bool:
        """Matrices and noises are shared by all steps and sequences (offsets may differ), nothing is missing.

        The first step may be unobserved: that is how Pyro's GaussianHMM begins.
        """
        shared = all(x.shape[:2] == (1, 1) for x in (self.A, self.Q, self.C, self.R)) and len(self.covariance) == 1
        return shared and (self.seen is None or self.first_unseen)

    @property
    def wholly_shared(self) -> bool:
        """Time-invariant, and all sequences share the offsets and the first mean too."""
        every = (self.A, self.b, self.Q, self.C, self.d, self.R)
        return self.time_invariant and all(x.shape[:2] == (1, 1) for x in every) and len(self.mean) == 1

    @property
    def first_unseen(self) -> bool:
        """Nothing is missing but the whole first step of every sequence."""
        seen = self.seen
        return seen is not None and not bool(seen[:, 0].any()) and bool(seen[:, 1:].all())

    def first_steps(self, n: int) -> Chain:
        """The chain of the steps 0..n-1."""
        moves = {name: getattr(self, name)[:, : n - 1] for name in "AbQ" if getattr(self, name).shape[1] > 1}
        later = {name: getattr(self, name)[:, :n] for name in "CdR" if getattr(self, name).shape[1] > 1}
        seen = None if self.seen is None else self.seen.expand(len(self.seen), self.num_steps, -1)[:, :n]
        return dataclasses.replace(self, y=self.y[:, :n], seen=seen, **moves, **later)


@dataclass(frozen=True)
class Smoothed:
    """Posterior of the states; `lag[:, t - 1]` is Cov(x_t, x_{t-1}). Filtered: given y_0..y_t only."""

    log_evidence: Tensor  # (S,)
    mean: Tensor  # (S, T, D)
    covariance: Tensor  # (S|1, T, D, D)
    lag: Tensor  # (S|1, T-1, D, D)
    filtered_mean: Tensor  # (S, T, D)
    filtered_covariance: Tensor  # (S|1, T, D, D)
    step_log_evidence: Tensor  # (S, T): log p(y_t | y_0..y_{t-1})


@dataclass(frozen=True)
class LinearMoments:
    """Moments of v = M s + o + noise, leading dims S and time (1 where summed); see the module docstring."""

    count: Tensor  # (S', T') or, where cells of one vector v are missing, (S', T', V)
    residual: Tensor  # (S', T', V)
    residual_squares: Tensor  # (S', T', V, V)
    residual_parents: Tensor  # (S', T', V, D)
    parents: Tensor  # (S', T', D)
    parents_squares: Tensor  # (S', T', D, D)


@dataclass(frozen=True)
class ChainMoments:
    """Log-evidence of every sequence, and the moments of the three kinds of site of a chain.

    Where they are summed over steps `first` is the observation of the first one, which `observation` then leaves out.
    """

    log_evidence: Tensor  # (S,)
    initial: LinearMoments
    transition: LinearMoments
    observation: LinearMoments
    first: LinearMoments | None = None


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ over the last dims."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def symmetric(x: Tensor) -> Tensor:
    """The symmetric part of the last two dims."""
    return (x + x.mT) / 2


def initial_moments(chain: Chain, mean: Tensor, covariance: Tensor) -> LinearMoments:
    """Of x_0, which has no parents: `mean` (S, D), `covariance` (S|1, D, D)."""
    S, D = mean.shape
    r = mean - chain.mean
    square = outer(r, r) + covariance
    none = mean.new_zeros(S, 1, D, 0)
    return LinearMoments(
        mean.new_ones(S, 1), r.unsqueeze(1), square.unsqueeze(1), none, none[:, :, 0], mean.new_zeros(S, 1, 0, 0)
    )


def chain_moments(chain: Chain, found: Smoothed) -> ChainMoments:
    """Moments at every sequence and step (nothing summed): the caller reduces them to its cells.

    A step of which no cell is seen has count 0 at the observation site. Where a step is seen in part, the
    rest of the vector is a latent too, given the state and the cells seen. States behind the last step that is seen
    are latents that no data read: they leave the moments, so that a padded series counts as the shorter one.
    """
    S, T, _ = found.mean.shape
    m, V = found.mean, found.covariance
    initial = initial_moments(chain, m[:, 0], V[:, 0])
    before, after = m[:, :-1], m[:, 1:]
    r = after - (chain.A @ before.unsqueeze(-1)).squeeze(-1) - chain.b
    cross = found.lag - chain.A @ V[:, :-1]
    square = V[:, 1:] - found.lag @ chain.A.mT - chain.A @ cross.mT
    transition = LinearMoments(
        m.new_ones(S, T - 1),
        r,
        outer(r, r) + symmetric(square),
        outer(r, before) + cross,
        before,
        outer(before, before) + V[:, :-1],
    )
    if chain.seen is not None:
        read = chain.seen.expand(len(chain.seen), T, -1).any(-1).flip(1).cumsum(1).flip(1) > 0  # now or later
        initial, transition = _where(read[:, :1], initial), _where(read[:, 1:], transition)
    return ChainMoments(found.log_evidence, initial, transition, _observed(chain, m, V))


def _where(keep: Tensor, own: LinearMoments) -> LinearMoments:
    """Moments of the sequences and steps that are kept, (S|1, T'), and zeros."""
    return LinearMoments(*(x * keep.reshape(*keep.shape, *(1,) * (x.dim() - 2)) for x in vars(own).values()))


def _observed(chain: Chain, m: Tensor, V: Tensor) -> LinearMoments:
    """y - C x - d; cells not seen are N(R_mo R_oo⁻¹ r_o, R_mm - R_mo R_oo⁻¹ R_om) given the seen residuals r_o."""
    S, T, _ = m.shape
    r = chain.y - (chain.C @ m.unsqueeze(-1)).squeeze(-1) - chain.d
    C, extra = chain.C, None
    count = m.new_ones(S, T)
    if chain.seen is not None:
        seen = chain.seen.expand(len(chain.seen), T, -1).to(m.dtype)
        any_seen = (seen > 0).any(-1).to(m.dtype)
        fill, extra = regression_on_seen(chain.R, seen)
        keep = any_seen[..., None, None]
        C, extra = fill @ C * keep, extra * keep
        r = torch.where(chain.seen, r, torch.zeros_like(r))
        r = (fill @ r.unsqueeze(-1)).squeeze(-1) * any_seen.unsqueeze(-1)
        count = any_seen.expand(S, T)
        m = m * any_seen.unsqueeze(-1)
        V = V * keep
    square = outer(r, r) + C @ V @ C.mT
    if extra is not None:
        square = square + extra
    return LinearMoments(count, r, symmetric(square), outer(r, m) - C @ V, m, outer(m, m) + V)


def regression_on_seen(R: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(fill, extra): E[residual | seen cells] = fill · (residual with zeros for the rest), with covariance extra."""
    P = R.shape[-1]
    eye = torch.eye(P, dtype=R.dtype)
    both = outer(seen, seen)
    masked = R * both + torch.diag_embed(1 - seen)
    gain = torch.linalg.solve(masked, (R * outer(1 - seen, seen)).mT).mT  # R_mo R_oo⁻¹
    fill = eye * seen.unsqueeze(-1) + gain
    missing = eye - eye * seen.unsqueeze(-1)
    return fill, symmetric(missing @ (R - gain @ R) @ missing)
