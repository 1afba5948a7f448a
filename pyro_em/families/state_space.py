"""Linear-Gaussian state-space models as one observed site: Pyro's `GaussianHMM` and `LinearHMM`.

    z_0 ~ initial,   z_t = z_{t-1} F + transition noise,   y_t = z_t H + observation noise,   t = 1..T

(row vectors, and the initial state comes before the first transition, as in Pyro). The states are latents
inside of the distribution: `log_prob` integrates them out by a Kalman filter, `posterior_moments` gives the
moments of three linear-Gaussian sites (initial, transition, observation), and the kernels are theirs. Arguments
of the nested distributions are named "transition_dist.scale" and so on (compat.py).

Arguments may have batch dims and, last of them, a time dim. Not handled: `LinearHMM` with noises other than
Normal or MultivariateNormal, or with transformed observations (a family is then not found, and `log_prob`
of Pyro itself raises).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.base import CHOLESKY, Arguments
from pyro_em.families.batches import ChainFamily, Made
from pyro_em.families.linear_gaussian import NOISE, noise_covariance, pack
from pyro_em.families.linear_sites import MATRIX
from pyro_em.shapes import broadcast_shapes
from pyro_em.state_space import kalman
from pyro_em.state_space.chunked import states
from pyro_em.state_space.linear_gaussian import Chain, ChainMoments, LinearMoments, chain_moments
from pyro_em.state_space.steady import steady_moments
from pyro_em.state_space.steps import SingularInnovation

SITES = {"initial_dist": None, "transition_dist": "transition_matrix", "observation_dist": "observation_matrix"}
_SITE_OF_MATRIX = {matrix: site for site, matrix in SITES.items() if matrix}
_NOISES = {f"{site}.{noise}": 1 if noise == "scale" else 2 for site in SITES for noise in NOISE}


class GaussianHMMFamily(ChainFamily):
    """Linear-Gaussian state-space model with everything Gaussian."""

    distribution = dist.GaussianHMM
    event_dim = 2
    steps_before = 1
    arguments: ClassVar = {
        "transition_matrix": 2,
        "observation_matrix": 2,
        **{f"{site}.loc": 1 for site in SITES},
        **_NOISES,
    }
    links: ClassVar = {f"{site}.scale_tril": CHOLESKY for site in SITES}
    closed = frozenset(arguments)
    diagonal = frozenset(name for name, dims in _NOISES.items() if dims == 2)
    by_entries = frozenset({"transition_matrix", "observation_matrix"})
    transposed = True
    first_state = "initial_dist"

    def accepts(self, raw: Mapping[str, Any]) -> bool:
        return all(_is_gaussian(raw[name]) and f"{name}.loc" in raw for name in SITES)

    def chain(self, args: Arguments, value: Tensor) -> tuple[Chain, torch.Size]:
        """The chain of T + 1 states, S = batch in a row."""
        return chain_of(args, value)

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        chain, batch = chain_of(args, value)
        with _counting_from_the_first_observation():
            return kalman.log_evidence(chain).reshape(batch).to(value.dtype)

    def posterior_moments(self, args: Arguments, value: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with _counting_from_the_first_observation():
            return super().posterior_moments(args, value, weight)

    def posterior(self, args: Arguments, value: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        with _counting_from_the_first_observation():
            return super().posterior(args, value)

    def lead(self, name: str, argument: Tensor) -> torch.Size:
        return lead_of(name, argument)

    def belongs(self, argument: str) -> tuple[str, str]:
        site, _, part = argument.partition(".")
        return (_SITE_OF_MATRIX[argument], MATRIX) if argument in _SITE_OF_MATRIX else (site, part)

    def sites(self, args: Arguments) -> list[str]:
        return list(SITES)

    def affine(self, site: str, args: Arguments) -> tuple[Tensor, Tensor]:
        offset, matrix = args[f"{site}.loc"].double(), SITES[site]
        return (offset.new_zeros(*offset.shape, 0) if matrix is None else args[matrix].double().mT), offset

    def part(self, args: Arguments, value: Tensor) -> _Part:
        return _Part(*chain_of(args, value))

    def packed(self, args: Arguments, made: Made) -> tuple[Tensor, ...]:
        parts: list[Tensor] = []
        for name in SITES:
            moments = made[name]
            if name == "initial_dist":
                moments = LinearMoments(*(_without_time(x, i) for i, x in enumerate(vars(moments).values())))
            parts += pack(moments, *self.affine(name, args))
        return tuple(parts)


@dataclass(frozen=True)
class _Part:
    """Chains of T + 1 states, S = `batch` in a row."""

    chain: Chain
    batch: torch.Size

    def evidence(self) -> Tensor:
        """log p(y) of every sequence."""
        shared = self.chain.wholly_shared
        return steady_moments(self.chain).log_evidence if shared else self._all_steps.log_evidence

    def moments(self, w: Tensor) -> tuple[Tensor, dict[str, LinearMoments]]:
        """The same, and weighted moments of the three sites."""
        chain, batch = self.chain, self.batch
        if chain.wholly_shared:
            found = steady_moments(chain, w)
            own = (found.initial, found.transition, found.observation)
            return found.log_evidence, dict(zip(SITES, own, strict=True))
        found = self._all_steps
        late = found.observation  # the state before the first transition is not observed
        seen = LinearMoments(*(x[:, 1:] for x in vars(late).values()))
        own = (
            reduced(found.initial, w, len(chain.mean) * len(chain.covariance) > 1, False, batch),
            reduced(found.transition, w, *varies(chain.A, chain.b, chain.Q), batch),
            reduced(seen, w, *varies(chain.C, chain.d, chain.R), batch),
        )
        return found.log_evidence, dict(zip(SITES, own, strict=True))

    @cached_property
    def _all_steps(self) -> ChainMoments:
        return chain_moments(self.chain, states(self.chain))


class LinearHMMFamily(GaussianHMMFamily):
    """`LinearHMM` whose noises are all Gaussian: the same model, which Pyro itself can only reparametrise."""

    distribution = dist.LinearHMM


@contextlib.contextmanager
def _counting_from_the_first_observation() -> Iterator[None]:
    """Step 0 of a chain is the state before the first transition; to the user it is that of the first observation."""
    try:
        yield
    except SingularInnovation as error:
        raise SingularInnovation(error.step - 1) from error


def _is_gaussian(distribution: Any) -> bool:
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution):
        distribution = distribution.base_dist
    return type(distribution) in (dist.Normal, dist.MultivariateNormal)


def lead_of(name: str, argument: Tensor) -> torch.Size:
    """Batch dims of an argument: without its event's, and without time."""
    lead = argument.shape[: argument.dim() - GaussianHMMFamily.arguments[name]]
    return lead if name.startswith("initial_dist") else lead[:-1]


def chain_of(args: Arguments, value: Tensor) -> tuple[Chain, torch.Size]:
    """The chain of T + 1 states, S = batch in a row; nothing is observed of its first step, nor where data are NaN."""
    raw = {n: a.double() for n, a in args.items() if n in GaussianHMMFamily.arguments and isinstance(a, Tensor)}
    batch = broadcast_shapes(value.shape[:-2], *(lead_of(n, a) for n, a in raw.items()))
    T = value.shape[-2]

    def flat(name: str, x: Tensor) -> Tensor:
        """Batch dims in one (1 if there are none), time dim kept (1 if there is none)."""
        event = x.shape[x.dim() - GaussianHMMFamily.arguments[name] :]
        before = x.shape[: x.dim() - len(event)]
        shape = before if name.startswith("initial_dist") else before[:-1]
        time = () if name.startswith("initial_dist") else (before[-1:] or (1,))
        if shape.numel() == 1:
            return x.reshape(1, *time, *event)
        return x.reshape(*shape, *time, *event).expand(*batch, *time, *event).reshape(-1, *time, *event)

    flattened = {name: flat(name, x) for name, x in raw.items()}

    def covariance(name: str) -> Tensor:
        return noise_covariance({n: flattened[f"{name}.{n}"] for n in NOISE if f"{name}.{n}" in flattened})

    def late(x: Tensor) -> Tensor:
        """Arguments of y_1..y_T with one more in front for the step that is not observed."""
        return x if x.shape[1] == 1 else torch.cat([x[:, :1], x], 1)

    y = value.double().expand(*batch, *value.shape[-2:]).reshape(-1, T, value.shape[-1])
    # Whoever allows NaN in the data (missing="nan") means cells that are missing.
    known = ~y.isnan() if bool(y.isnan().any()) else torch.ones(1, 1, 1, dtype=torch.bool)
    known = known.expand(-1, *y.shape[1:])
    seen = torch.cat([torch.zeros_like(known[:, :1]), known], 1)
    return Chain(
        flattened["initial_dist.loc"],
        covariance("initial_dist"),
        flattened["transition_matrix"].mT,
        flattened["transition_dist.loc"],
        covariance("transition_dist"),
        late(flattened["observation_matrix"].mT),
        late(flattened["observation_dist.loc"]),
        late(covariance("observation_dist")),
        torch.cat([torch.zeros_like(y[:, :1]), y.nan_to_num(0.0)], 1),
        seen,
    ), batch


def varies(*arguments: Tensor) -> tuple[bool, bool]:
    """Whether any of them differs between sequences, and between steps."""
    return any(len(x) > 1 for x in arguments), any(x.shape[1] > 1 for x in arguments)


def reduced(own: LinearMoments, w: Tensor, by_sequence: bool, by_step: bool, batch: torch.Size) -> LinearMoments:
    """Weighted moments, summed over sequences and steps unless the site's arguments differ along them."""

    def of(x: Tensor) -> Tensor:
        x = x * w.reshape(-1, *(1,) * (x.dim() - 1))
        x = x if by_step else x.sum(1, keepdim=True)
        return x.reshape(*batch, *x.shape[1:]) if by_sequence else x.sum(0, keepdim=True)

    return LinearMoments(*(of(x.expand(len(w), *x.shape[1:])) for x in vars(own).values()))


def _without_time(x: Tensor, which: int) -> Tensor:
    """Moments of the initial state without their time dim, which stands before the event dims."""
    events = (0, 1, 2, 2, 1, 2)[which]
    return x.squeeze(-1 - events)
