"""Posterior of states whose system a discrete latent chooses: a mixture over the latter's states.

    p(z | y) = Σ_c q(c) p(z | c, y),    E z = Σ_c q(c) m_c,    Cov z = Σ_c q(c) (V_c + (m_c - E z)(m_c - E z)ᵀ)

with q the posterior weights of the discrete latents' joint states c, and p(z | c, y) Gaussian (state_posterior.py).
Filtered, c is weighted by q(c) without what the later data say of it,

    p(c | y_1..y_t) ∝ q(c) / p(y | c) · p(y_1..y_t | c)

(other sites that read c, and other sequences, count in full). Shapes: as in state_posterior.py, C joint states.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.errors import InputError
from pyro_em.model.trace import SiteRecord
from pyro_em.state_posterior import StatePosterior, normal
from pyro_em.state_space.linear_gaussian import outer, symmetric

Pick = Callable[[int], Tensor]


class MixedStates:
    """p(z_0..z_T | y, θ) of one site, the discrete latents summed out. Made by `Posterior.states(site)`.

    `given` is the posterior given each of their states, `shares` (C,) + B their posterior weights.

    :param weights: of the states, in the layout of the site's batch.
    :param pick: joint draws of the states, as numbers (num,) + B.
    """

    def __init__(self, site: SiteRecord, weights: Tensor, pick: Pick) -> None:
        self.given = StatePosterior(site)
        whole = self.given.batch
        depth = max([0, *(-plate.dim for plate in site.plates)])
        self.batch = whole[len(whole) - depth :]
        self.shares = self._by_state(weights.double().expand(whole), 0)
        self._pick = pick

    def _by_state(self, x: Tensor, lead: int) -> Tensor:
        """(lead,) + states + B + rest as (lead,) + (C,) + B + rest."""
        n = len(self.given.batch) - len(self.batch)
        return x.flatten(lead, lead + n - 1) if n else x.unsqueeze(lead)

    def _weighted(self, x: Tensor) -> Tensor:
        """Σ_c q(c) x_c, x of shape states + B + rest."""
        own = self._by_state(x, 0)
        return (self.shares.reshape(self.shares.shape + (1,) * (own.dim() - self.shares.dim())) * own).sum(0)

    def _moments(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the mixture."""
        found = self._weighted(mean)
        error = self._by_state(mean, 0) - found
        return found, symmetric(self._weighted(covariance) + self._weighted(self._whole(outer(error, error))))

    def _whole(self, x: Tensor) -> Tensor:
        """The inverse of `_by_state`."""
        return x.reshape(*self.given.batch, *x.shape[1 + len(self.batch) :])

    @property
    def mean(self) -> Tensor:
        """Smoothed means, B + (T + 1, D)."""
        return self._weighted(self.given.mean)

    @property
    def covariance(self) -> Tensor:
        """Smoothed covariances, B + (T + 1, D, D)."""
        return self._moments(self.given.mean, self.given.covariance)[1]

    @property
    def lag_covariance(self) -> Tensor:
        """Cov(z_t, z_{t-1} | y), t = 1..T, B + (T, D, D)."""
        error = self._by_state(self.given.mean, 0) - self.mean
        between = self._whole(outer(error[..., 1:, :], error[..., :-1, :]))
        return self._weighted(self.given.lag_covariance) + self._weighted(between)

    def moments_by_state(self) -> tuple[Tensor, Tensor]:
        """Smoothed means and covariances given each state, (C,) + B + (T + 1, D) and ... + (D, D)."""
        return self._by_state(self.given.mean, 0), self._by_state(self.given.covariance, 0)

    def marginal(self) -> dist.Distribution:
        """Every state by itself, a mixture of normal vectors with batch shape B + (T + 1,)."""
        return self._mixture(self.shares.unsqueeze(-1), self.given.mean, self.given.covariance)

    def _mixture(self, shares: Tensor, mean: Tensor, covariance: Tensor) -> dist.Distribution:
        """:param shares: (C,) + B + (T'|1,)."""
        mean, covariance = (self._by_state(x, 0).movedim(0, -1 - n) for x, n in ((mean, 1), (covariance, 2)))
        probs = shares.expand(*shares.shape[:-1], mean.shape[-3]).movedim(0, -1)
        return dist.MixtureSameFamily(
            dist.Categorical(probs, validate_args=False), normal(mean, covariance), validate_args=False
        )

    def _log_shares(self) -> tuple[Tensor, Tensor]:
        """log p(c | y_1..y_t) for t = 0..T, and log p(y_t | c, y_1..y_{t-1}), (C,) + B + (T + 1 and T,)."""
        steps = self._by_state(self.given.log_prob_steps(), 0)
        so_far = torch.nn.functional.pad(steps.cumsum(-1), (1, 0))
        return (self.shares.log().unsqueeze(-1) + so_far - so_far[..., -1:]).log_softmax(0), steps

    def filtered(self) -> dist.Distribution:
        """z_t given y_1..y_t, batch shape B + (T + 1,)."""
        own = self.given.filtered()
        assert isinstance(own, dist.MultivariateNormal)
        return self._mixture(self._log_shares()[0].exp()[..., 1 - self.given.before :], own.mean, own.covariance_matrix)

    def filtered_shares(self) -> Tensor:
        """p(c | y_1..y_t), t = 1..T, shape B + (T, C)."""
        return self._log_shares()[0].exp()[..., 1:].movedim(0, -1)

    def log_prob_steps(self) -> Tensor:
        """log p(y_t | y_1..y_{t-1}), B + (T,)."""
        before, steps = self._log_shares()
        return (before[..., :-1] + steps).logsumexp(0)

    def entropy(self) -> Tensor:
        """:raises InputError: the entropy of a mixture has no closed form."""
        raise InputError(
            "states: the entropy of a mixture over the states of a discrete latent has no closed form; "
            "posterior.entropy() is that of the discrete latents and the states together, .given.entropy() that of the "
            "states given each."
        )

    def sample(self, num: int) -> Tensor:
        """`num` joint draws, (num,) + B + (T + 1, D)."""
        return self.drawn(self.given.sample(num), self._pick(num))

    def sample_observations(self, num: int) -> Tensor:
        """`num` joint draws of y given the cells seen, (num,) + B + (T, P)."""
        return self.drawn(self.given.sample_observations(num), self._pick(num))

    def drawn(self, draws: Tensor, picked: Tensor) -> Tensor:
        """Of (num,) + states + B + rest those of the picked states (num,) + B."""
        own = self._by_state(draws, 1)
        index = picked.reshape(len(picked), 1, *picked.shape[1:], *(1,) * (own.dim() - 1 - picked.dim()))
        return own.gather(1, index.expand(len(own), 1, *own.shape[2:])).squeeze(1)

    def forecast(self, steps: int) -> dist.Distribution:
        """y_{T+1}..y_{T+steps} given y, each by itself: a mixture with batch shape B + (steps,).

        :raises InputError: as `StatePosterior.forecast`.
        """
        own = self.given.forecast(steps)
        assert isinstance(own, dist.MultivariateNormal)
        return self._mixture(self.shares.unsqueeze(-1), own.mean, own.covariance_matrix)

    def observations(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every cell of y given the cells seen, B + (T, P)."""
        mean, variance = self.given.observations()
        found = self._weighted(mean)
        return found, self._weighted(variance + self._whole((self._by_state(mean, 0) - found) ** 2))
