"""What it means to integrate a set of continuous latents out, whatever the way.

A *set* S of continuous latents is one that log-factors connect. A route integrates it out exactly, for every
state c of the discrete latents that its factors read and every element n of the plates that they share:

    log Z[c, n] = log ∫ exp Σ_{f in S} ℓ_f(z, c, n) dz,

an ordinary factor for the discrete latents that remain, and gives weighted *atoms*: a few values of the
latents whose weighted sums equal the posterior expectations of every statistic that the log-factors consist
of (mean and covariance of a Gaussian; E[z], E[log z] of a Gamma). The M-step then sees an enumerated latent
with known posterior weights, and E_q[log p(x, z|θ)] is exact for every θ.

Letters: S atoms; their dim is one more leftmost plate dim of the model (model/atoms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.model.atoms import AtomRuns
from pyro_em.model.trace import Run
from pyro_em.types import Params

Values = Mapping[str, Tensor]
RunAt = Callable[[Values], Run]
"""The model's run at values of the latents in their own shapes, differentiable in them and in the parameters."""


@dataclass(frozen=True)
class LatentSet:
    """Continuous latents connected by factors; `symbol` names the dim of their atoms in packed factors.

    `shapes` are the (batch, event) shapes of the latents' values as the model draws them.
    """

    names: tuple[str, ...]
    factors: tuple[str, ...]
    symbol: str
    shapes: Mapping[str, tuple[torch.Size, torch.Size]]


class SetPosterior(Protocol):
    """q(z | c) of one set, for every state c of the discrete latents (leading dims C, in `order`)."""

    def mean(self, site: str) -> Tensor:
        """Shape C + plates + event."""
        ...

    def variance(self, site: str) -> Tensor:
        """Shape C + plates + event."""
        ...

    def marginal(self, site: str) -> dist.Distribution:
        """Batch shape C + plates."""
        ...

    def mode(self) -> dict[str, Tensor]:
        """Where the joint density is highest, shape C + plates + event."""
        ...

    def sample(self, num: int) -> dict[str, Tensor]:
        """Joint draws, shape (num,) + C + plates + event."""
        ...


@dataclass(frozen=True)
class Atoms:
    """A few values of the latents, with the atoms' dim. `weights`, packed over the set's symbol and more, sum to one;
    `by_factor` has them at the rows of factors that index the latents, where they differ from element to element."""

    values: dict[str, Tensor]
    weights: Tensor
    by_factor: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Eliminated:
    """A set integrated out at some parameters.

    `log_evidence` is packed over discrete latents and plates, differentiable in the parameters. `error` bounds that of
    a numerical route, summed over elements; `magnitude`, packed like the evidence, is the size of terms that cancel in
    it (None: there are none). The `atoms`, and `log_peak`, which is log q at the mode and packed like the evidence, are
    made if somebody asks: a log-likelihood needs none.
    """

    log_evidence: Tensor
    posterior: SetPosterior
    made: Callable[[], Atoms]
    peak: Callable[[], Tensor]
    error: float = 0.0
    magnitude: Tensor | None = None

    @cached_property
    def atoms(self) -> Atoms:
        """See above."""
        return self.made()

    @cached_property
    def log_peak(self) -> Tensor:
        """See above."""
        return self.peak()


def atoms_of(parts: Iterable[Eliminated]) -> dict[str, Tensor]:
    """Atoms of the latents of several sets, by latent."""
    return {name: value for part in parts for name, value in part.atoms.values.items()}


class Route(Protocol):
    """One way to integrate a set out. `name`, `reason` and `cost` appear in the plan."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str: ...

    @property
    def cost(self) -> str: ...

    @property
    def plates(self) -> frozenset[str]:
        """Symbols of the plates over which the evidence is a sum of terms."""
        ...

    def eliminate(self, run_at: RunAt, *, differentiable: bool = False) -> Eliminated:
        """Integrate out; certifies what was recognised at the values at hand.

        :raises Refusal: if the certificate fails.
        """
        ...


class NotMine(Exception):
    """A route does not serve this kind of latent at all; the text is the reason."""


@dataclass(frozen=True)
class Candidate:
    """What routes look at: two runs at different parameters and values, with gradients to the latents' `leaves`.

    `others` are for each of them the values and the run at others, at the same parameters. `run_at` runs the model anew
    at either parameters; `dim` is the atoms' dim (all plates stand right of it); `symbols` names the enumeration dims
    left of it; `maps` are the elements of discrete latents in other plates that rows read (model/row_maps.py). The
    `atoms`, if given, are of the shape that those of every E-step have.
    """

    latents: LatentSet
    first: Run
    second: Run
    leaves: tuple[Values, Values]
    others: tuple[tuple[Values, Run], tuple[Values, Run]]
    run_at: tuple[RunAt, RunAt]
    dim: int
    symbols: Mapping[int, str]
    maps: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    atoms: Values | None = None


@dataclass(frozen=True)
class Continuous:
    """The continuous latents of a problem: their sets, the route of each, and the atoms that a run hands out.

    With `sketch` these are of the shape of all atoms, but some are not those of the posterior at the start.
    """

    sets: tuple[LatentSet, ...]
    routes: tuple[Route, ...]
    runs: AtomRuns
    values: Values = field(repr=False)
    at_one: Run = field(repr=False)  # at the start, every latent at one value
    sketch: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for latents in self.sets for name in latents.names)

    def set_of(self, site: str) -> int | None:
        """Number of the set that a latent belongs to."""
        return next((i for i, latents in enumerate(self.sets) if site in latents.names), None)

    def eliminate(self, params: Params, *, differentiable: bool = False) -> tuple[Eliminated, ...]:
        """Every set integrated out at `params`."""
        run_at = partial(self.runs.one, params)
        # Each route gives values for its own latents; those of the other sets do not matter to it.
        rest = self.runs.atom(self.values, 0)
        return tuple(
            route.eliminate(lambda own: run_at({**rest, **own}), differentiable=differentiable) for route in self.routes
        )
