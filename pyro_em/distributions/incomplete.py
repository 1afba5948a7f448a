"""Normal vectors of which any cells may be missing: NaN cells of a value are integrated out.

    log p(x | μ, Σ) = log N(x_o; μ_o, Σ_oo),      o the observed cells of x

Missing cells are missing at random: the pattern itself says nothing (Rubin 1976). Shapes: batch dims of the value
and of the arguments broadcast as in every distribution; patterns.py has the algebra for rows in a list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_em.distributions.patterns import Conditional, Patterns, conditional, log_density, whitened


class _RealOrMissing(constraints.Constraint):
    """Finite cells, and NaN for missing ones."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value.isfinite() | value.isnan()).all(-1)

    def __repr__(self) -> str:
        return "real vectors, NaN where missing"


class _Incomplete:
    """What a normal vector is that may have missing cells; its covariance matrix is `_unbroadcasted_covariance`."""

    support = _RealOrMissing()

    def log_prob(self: Any, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        result = marginal_log_density(value, self.loc, self._unbroadcasted_covariance)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))


class IncompleteNormal(_Incomplete, dist.MultivariateNormal):  # type: ignore[misc]
    """`pyro.distributions.MultivariateNormal`, whose values may have missing cells, marked NaN.

    The log-density is that of the observed cells, 0 if there are none. Draws are complete.

    >>> x = torch.tensor([0.0, torch.nan])
    >>> IncompleteNormal(torch.zeros(2), torch.eye(2)).log_prob(x)
    tensor(-0.9189)

    :raises ValueError: as MultivariateNormal does, for arguments and for infinite cells.
    """

    @property
    def _unbroadcasted_covariance(self) -> Tensor:
        """Σ as it was given, without the batch dims that it does not vary along."""
        lower = self._unbroadcasted_scale_tril
        return lower @ lower.mT


class IncompleteLowRankNormal(_Incomplete, dist.LowRankMultivariateNormal):  # type: ignore[misc]
    """`pyro.distributions.LowRankMultivariateNormal`, whose values may have missing cells, marked NaN.

    In a fit its factors become a latent, and its cells sites of their own (model/unfold.py).

    >>> x = torch.tensor([0.0, torch.nan])
    >>> IncompleteLowRankNormal(torch.zeros(2), torch.zeros(2, 1), torch.ones(2)).log_prob(x)
    tensor(-0.9189)
    """

    @property
    def _unbroadcasted_covariance(self) -> Tensor:
        """W Wᵀ + D."""
        factor = self._unbroadcasted_cov_factor
        return factor @ factor.mT + torch.diag_embed(self._unbroadcasted_cov_diag)


@dataclass(frozen=True)
class RowLayout:
    """Batch dims divided into rows (dims along which the values vary) and others, in that order in the list form.

    `rank` batch dims in all; `rows` and `others` are positions, leftmost first.
    """

    rank: int
    rows: tuple[int, ...]
    others: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, value: torch.Size, *arguments: torch.Size) -> RowLayout:
        """For batch shapes of the value and of the arguments."""
        rank = max(len(value), *map(len, arguments))
        padded = (1,) * (rank - len(value)) + tuple(value)
        rows = tuple(i for i in range(rank) if padded[i] > 1)
        others = tuple(i for i in range(rank) if padded[i] == 1)
        return cls(rank, rows, others, tuple(padded[i] for i in rows))

    def pack(self, x: Tensor, event_dim: int) -> Tensor:
        """Batch + event -> (others..., N or 1) + event; 1 where x is the same for all rows."""
        lead = x.dim() - event_dim
        x = x.reshape((1,) * (self.rank - lead) + tuple(x.shape))
        event = tuple(x.shape[self.rank :])
        x = x.permute(*self.others, *self.rows, *range(self.rank, x.dim()))
        outer = tuple(x.shape[: len(self.others)])
        if math.prod(x.shape[len(self.others) : self.rank]) == 1:
            return x.reshape(*outer, 1, *event)
        return x.expand(*outer, *self.sizes, *event).reshape(*outer, math.prod(self.sizes), *event)

    def unpack(self, x: Tensor, event_dim: int) -> Tensor:
        """The inverse for something of every row."""
        lead = tuple(x.shape[: x.dim() - event_dim - 1])
        outer = (1,) * (len(self.others) - len(lead)) + lead
        event = tuple(x.shape[x.dim() - event_dim :])
        x = x.reshape((*outer, *self.sizes, *event))  # one vector alone: a tuple, since all may be empty
        order = (*self.others, *self.rows)
        return x.permute((*(order.index(i) for i in range(self.rank)), *range(self.rank, x.dim())))


def _listed(value: Tensor, loc: Tensor, covariance: Tensor) -> tuple[RowLayout, Sequence[Any]]:
    layout = RowLayout.of(value.shape[:-1], loc.shape[:-1], covariance.shape[:-2])
    x = layout.pack(value, 1).reshape(-1, value.shape[-1])
    cov = layout.pack(covariance, 2)
    patterns = Patterns.of(x.isnan(), grouped=cov.shape[-3] == 1)
    return layout, (x, layout.pack(loc, 1), cov, patterns)


def marginal_log_density(value: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
    """log N(x_o; μ_o, Σ_oo), shape of the broadcast batch.

    :param value: batch + (D,), NaN where missing.
    :param loc: batch + (D,).
    :param covariance: batch + (D, D).
    """
    layout, listed = _listed(value, loc, covariance)
    return layout.unpack(log_density(*listed), 0)


def whitened_residuals(value: Tensor, loc: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """w, batch + (D,), and c, batch, with log N(x_o; μ_o, Σ_oo) = c − ½|w|²; w is affine in loc, 0 in missing cells.

    Arguments as in `marginal_log_density`.
    """
    layout, listed = _listed(value, loc, covariance)
    white, log_norm = whitened(*listed)
    return layout.unpack(white, 1), layout.unpack(log_norm, 0)


@dataclass(frozen=True, eq=False)
class Completed:
    """A vector given its observed cells: mean batch + (D,), and the covariance of the missing cells.

    `covariance` is batch' + (G, D, D), of pattern g, where `pattern` (batch of the value) says which one a row has.
    """

    mean: Tensor
    covariance: Tensor
    pattern: Tensor


def completed(value: Tensor, loc: Tensor, covariance: Tensor) -> Completed:
    """E[x | x_o] and cov[x | x_o]; arguments as in `marginal_log_density`."""
    layout, listed = _listed(value, loc, covariance)
    found: Conditional = conditional(*listed)
    patterns: Patterns = listed[3]
    groups = found.covariance  # (others..., G, D, D)
    others = iter((1,) * (len(layout.others) - (groups.dim() - 3)) + tuple(groups.shape[:-3]))
    shape = [1 if i in layout.rows else next(others) for i in range(layout.rank)]
    return Completed(
        layout.unpack(found.mean, 1),
        groups.reshape(*shape, *groups.shape[-3:]),
        layout.unpack(patterns.index, 0),
    )
