"""Posterior of the states inside of an observed state-space site (`GaussianHMM`, `LinearHMM`).

    z_0 ~ initial,   z_t = z_{t-1} F + noise,   y_t = z_t H + noise,   t = 1..T

Smoothed given all of y, filtered given y_1..y_t, joint draws, forecasts, one-step densities. Draws go backwards
through the smoother's own recursion (Frühwirth-Schnatter 1994):

    z_t | z_{t+1}, y  ~  N(m_t + G_t (z_{t+1} - predicted_{t+1}),  P_t - G_t predicted_cov_{t+1} G_tᵀ)

Shapes: batch dims B of the site (its plates), T + 1 states (number 0 comes before the first transition; T states where
the site is a loop over time, whose first state is observed), D state dims, P observed dims. Forecasts of arguments
that differ from step to step are not offered: they are not known.
"""

from __future__ import annotations

from functools import cached_property

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.errors import InputError
from pyro_em.evidence.integrated import integrates
from pyro_em.families.chain import GaussianChainFamily
from pyro_em.families.state_space import GaussianHMMFamily
from pyro_em.model.density import clean_value
from pyro_em.model.trace import SiteRecord
from pyro_em.state_space.chunked import states
from pyro_em.state_space.joint import log_joint
from pyro_em.state_space.linear_gaussian import Smoothed, regression_on_seen, symmetric
from pyro_em.state_space.steps import gain


class StatePosterior:
    """p(z_0..z_T | y, θ) of one site. Made by `Posterior.states(site)`.

    Example::

        states = result.posterior().states("y")
        states.mean, states.covariance        # smoothed, B + (T + 1, D) and B + (T + 1, D, D)
        states.filtered().mean                # given the past and present only
        states.sample(100)                    # (100,) + B + (T + 1, D)
        states.forecast(12).mean              # of the next observations, B + (12, P)
    """

    def __init__(self, site: SiteRecord) -> None:
        if not integrates(site) or site.arguments is None:
            raise InputError(f"Site '{site.name}' is no state-space model (GaussianHMM, LinearHMM): it has no states.")
        arguments = {**site.constants, **site.arguments}
        family = site.family
        assert isinstance(family, GaussianHMMFamily | GaussianChainFamily)
        self.before = family.steps_before
        self.chain, self.batch = family.chain(arguments, clean_value(site).detach())

    @cached_property
    def _smoothed(self) -> Smoothed:
        return states(self.chain)

    def _unflat(self, x: Tensor) -> Tensor:
        return x.expand(self.batch.numel(), *x.shape[1:]).reshape((*self.batch, *x.shape[1:]))

    @property
    def mean(self) -> Tensor:
        """Smoothed means, B + (T + 1, D). They are the joint mode too."""
        return self._unflat(self._smoothed.mean)

    @property
    def covariance(self) -> Tensor:
        """Smoothed covariances, B + (T + 1, D, D)."""
        return self._unflat(self._smoothed.covariance)

    @property
    def lag_covariance(self) -> Tensor:
        """Cov(z_t, z_{t-1} | y), t = 1..T, B + (T, D, D)."""
        return self._unflat(self._smoothed.lag)

    def marginal(self) -> dist.Distribution:
        """Every state by itself, batch shape B + (T + 1,)."""
        return normal(self.mean, self.covariance)

    def filtered(self) -> dist.Distribution:
        """z_t given y_1..y_t, batch shape B + (T + 1,).

        :raises InputError: if the first steps do not determine a flat start, so that there is no such distribution.
        """
        found = self._smoothed
        open_steps = int(found.filtered_covariance.isinf().any(-1).any(-1).any(0).sum())
        if open_steps:
            raise InputError(
                f"filtered: the start is flat, and the first {open_steps} steps do not determine it: given these alone "
                "the states have no distribution. Ask for smoothed ones (marginal), or give the start a proper prior."
            )
        return normal(self._unflat(found.filtered_mean), self._unflat(found.filtered_covariance))

    def log_prob_steps(self) -> Tensor:
        """log p(y_t | y_1..y_{t-1}), B + (T,); their sum is the log-likelihood of the series."""
        return self._unflat(self._smoothed.step_log_evidence[:, self.before :])

    def log_peak(self) -> Tensor:
        """log p(y, z) at the joint mode z of the states, shape B; states that are functions of others count nothing."""
        return self._unflat(log_joint(self.chain, self._smoothed.mean))

    def entropy(self) -> Tensor:
        """Entropy of all states together in nats, shape B; -inf where a state is known for sure."""
        found = self._smoothed
        last = found.filtered_covariance[:, -1]
        _, rest = self._backward()
        return self._unflat(_half_log_det(last) + _half_log_det(rest).sum(-1))

    def sample(self, num: int) -> Tensor:
        """`num` joint draws, (num,) + B + (T + 1, D).

        :raises InputError: if `num` is not positive.
        """
        if num < 1:
            raise InputError(f"sample: num must be at least 1, not {num}.")
        found, (G, rest) = self._smoothed, self._backward()
        S, T, D = found.mean.shape
        noise = torch.randn(T, num, S, D, dtype=torch.float64)
        draws = [found.mean[:, -1] + _spread(found.covariance[:, -1], noise[-1])]
        roots = _root(rest)
        for t in range(T - 2, -1, -1):
            step = (roots[:, t] @ noise[t].unsqueeze(-1)).squeeze(-1)
            move = (G[:, t] @ (draws[-1] - found.mean[:, t + 1]).unsqueeze(-1)).squeeze(-1)
            draws.append(found.mean[:, t] + move + step)
        path = torch.stack(draws[::-1], 2)
        return path.reshape(num, *self.batch, T, D)

    def forecast(self, steps: int) -> dist.Distribution:
        """y_{T+1}..y_{T+steps} given y, each by itself: batch shape B + (steps,), event shape (P,).

        :raises InputError: if `steps` is not positive, or an argument differs from step to step.
        """
        if steps < 1:
            raise InputError(f"forecast: steps must be at least 1, not {steps}.")
        chain, found = self.chain, self._smoothed
        arguments = (chain.A, chain.b, chain.Q, chain.C, chain.d, chain.R)
        if any(x.shape[1] > 1 for x in arguments):
            raise InputError("forecast: an argument of the site differs from step to step, so its future is not known.")
        A, b, Q, C, d, R = (x[:, 0] for x in arguments)
        m, P = found.filtered_mean[:, -1], found.filtered_covariance[:, -1]
        means, covariances = [], []
        for _ in range(steps):
            m, P = (A @ m.unsqueeze(-1)).squeeze(-1) + b, symmetric(A @ P @ A.mT + Q)
            means.append((C @ m.unsqueeze(-1)).squeeze(-1) + d)
            covariances.append(symmetric(C @ P @ C.mT + R))
        return normal(self._unflat(torch.stack(means, 1)), self._unflat(torch.stack(covariances, 1)))

    def observations(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every cell of y given the cells seen, B + (T, P); a seen cell has variance 0."""
        C, fixed, extra = self._given_seen()
        found = self._smoothed
        mean = (C @ found.mean[:, self.before :].unsqueeze(-1)).squeeze(-1) + fixed
        covariance = C @ found.covariance[:, self.before :] @ C.mT + extra
        return self._unflat(mean), self._unflat(covariance.diagonal(dim1=-2, dim2=-1))

    def sample_observations(self, num: int) -> Tensor:
        """`num` joint draws of y given the cells seen, which stay as they are: (num,) + B + (T, P)."""
        C, fixed, extra = self._given_seen()
        states = self.sample(num).reshape(num, -1, *self._smoothed.mean.shape[1:])[:, :, self.before :]
        noise = torch.randn((*states.shape[:-1], extra.shape[-1]), dtype=torch.float64)
        drawn = (C @ states.unsqueeze(-1)).squeeze(-1) + fixed + (_root(extra) @ noise.unsqueeze(-1)).squeeze(-1)
        return drawn.reshape(num, *self.batch, *drawn.shape[2:])

    def _given_seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """y_t | z_t, cells seen ~ N(C z_t + fixed, extra), t = 1..T."""
        chain, T = self.chain, self.chain.num_steps
        known = torch.ones_like(chain.y[:1], dtype=torch.bool) if chain.seen is None else chain.seen
        fill, extra = regression_on_seen(chain.R, known.expand(-1, T, -1).to(chain.y.dtype))
        residual = torch.where(known, chain.y - chain.d, torch.zeros_like(chain.y))
        C = chain.C - fill @ chain.C
        fixed = chain.d + (fill @ residual.unsqueeze(-1)).squeeze(-1)
        later = (x[:, self.before :] if x.shape[1] > 1 else x for x in (C, fixed, extra))
        own, offset, spread = later
        return own, offset, spread

    def _backward(self) -> tuple[Tensor, Tensor]:
        """Gains and covariances of z_t given z_{t+1} and y, t = 0..T-1."""
        P, A, Q = self._smoothed.filtered_covariance[:, :-1], self.chain.A, self.chain.Q
        if bool(P.isinf().any()):  # a flat start: given all data it is none
            found = self._smoothed
            V, own = found.covariance[:, 1:], torch.eye(P.shape[-1], dtype=P.dtype)
            G = gain(found.lag, own, V)
            return G, symmetric(found.covariance[:, :-1] - G @ V @ G.mT)
        G = gain(P, A, symmetric(A @ P @ A.mT + Q))
        keep = torch.eye(P.shape[-1], dtype=P.dtype) - G @ A
        return G, symmetric(keep @ P @ keep.mT + G @ Q @ G.mT)


def normal(mean: Tensor, covariance: Tensor) -> dist.Distribution:
    """Normal vectors, also where a covariance is singular (a state without noise)."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        factor = _root(covariance)
    return dist.MultivariateNormal(mean, scale_tril=factor, validate_args=False)


def _root(covariance: Tensor) -> Tensor:
    """Lower triangular L with L Lᵀ = covariance, positive semidefinite."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return torch.linalg.qr(root.mT)[1].mT


def _spread(covariance: Tensor, noise: Tensor) -> Tensor:
    return (_root(covariance) @ noise.unsqueeze(-1)).squeeze(-1)


def _half_log_det(covariance: Tensor) -> Tensor:
    """Entropy of a normal vector."""
    return 0.5 * torch.linalg.slogdet(2 * torch.pi * torch.e * covariance)[1]
