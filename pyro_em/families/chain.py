"""Linear-Gaussian chains that a loop over time makes: the family of `distributions.chain.GaussianChain`.

    x_0 ~ N(o, Q),   x_t = M s_{t-1} + b + N(0, Q),   y_t = C s_t + d + N(0, R),   s_t = (x_t, x_{t-1}, ..., x_{t-K+1})

Unlike Pyro's `GaussianHMM` (state_space.py) the first state is that of the first observation, and the first few steps
(*heads*, at most `HEADS`) may have arguments of their own, as the body of a loop may treat them. Arguments are named by
what they belong to: "state_0.loc", "observation_0.scale", ... for the heads, "state.matrix", "observation.loc", ...
for all later steps. Missing cells of y are NaN. Where states read one another within a step, x = B x + M s + b + noise
with B strictly lower triangular, B is the last D columns of the state's matrix: the density of x is that of the
residual, so that the M-step is the same with x among the parents. The constant "flat" says which cells of the first
steps have a flat density instead (the diffuse start): o, b and the noise are 0 there, and the M-step leaves them out.

Shapes: batch dims B of the plates (1 where an argument is the same along one), then a time dim (1 for heads, and where
the later steps share an argument), then event dims: D new cells of the state a step, K·D of the whole state, P cells
observed.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_em.distributions.chain import GaussianChain
from pyro_em.families.base import CHOLESKY, Arguments
from pyro_em.families.batches import ChainFamily, Made
from pyro_em.families.linear_gaussian import NOISE, noise_covariance, pack
from pyro_em.families.state_space import reduced, varies
from pyro_em.families.within_step import flat_directions, given_own_step, solved
from pyro_em.shapes import broadcast_shapes
from pyro_em.state_space import kalman
from pyro_em.state_space.chunked import states
from pyro_em.state_space.linear_gaussian import Chain, ChainMoments, LinearMoments, chain_moments
from pyro_em.state_space.steady import steady_moments

HEADS = 4
GROUPS = tuple(f"{kind}{head}" for kind in ("state", "observation") for head in (*(f"_{i}" for i in range(HEADS)), ""))
_EVENTS = {"matrix": 2, "loc": 1, **{noise: 1 if noise == "scale" else 2 for noise in NOISE}}
MATRICES = frozenset(f"{group}.matrix" for group in GROUPS)


class GaussianChainFamily(ChainFamily):
    """See the module docstring."""

    distribution = GaussianChain
    event_dim = 2
    arguments: ClassVar = {f"{group}.{name}": events for group in GROUPS for name, events in _EVENTS.items()}
    links: ClassVar = {f"{group}.scale_tril": CHOLESKY for group in GROUPS}
    closed = frozenset(arguments)
    diagonal = frozenset(f"{group}.{noise}" for group in GROUPS for noise in NOISE if _EVENTS[noise] == 2)
    by_entries = MATRICES
    transposed = False
    first_state = "state_0"

    def chain(self, args: Arguments, value: Tensor) -> tuple[Chain, torch.Size]:
        """The chain of states s_t, S = batch in a row."""
        own = _Parts(args, value)
        return own.chain, own.batch

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        chain, batch = self.chain(args, value)
        return kalman.log_evidence(chain).reshape(batch).to(value.dtype)

    def lead(self, name: str, argument: Tensor) -> torch.Size:
        return argument.shape[: argument.dim() - self.arguments[name] - 1]

    def belongs(self, argument: str) -> tuple[str, str]:
        site, _, part = argument.partition(".")
        return site, part

    def sites(self, args: Arguments) -> list[str]:
        return [group for group in GROUPS if f"{group}.loc" in args]

    def affine(self, site: str, args: Arguments) -> tuple[Tensor, Tensor]:
        offset = args[f"{site}.loc"].double()
        matrix = args.get(f"{site}.matrix")
        return (offset.new_zeros(*offset.shape, 0) if matrix is None else matrix.double()), offset

    def part(self, args: Arguments, value: Tensor) -> _Parts:
        return _Parts(args, value)

    def packed(self, args: Arguments, made: Made) -> tuple[Tensor, ...]:
        width, within, parts = int(args["width"]), "state_0.matrix" in args, list[Tensor]()
        for group in self.sites(args):
            moments = made[group]
            if group.startswith("state"):
                moments = _first_cells(moments, width)
                if within:
                    moments = given_own_step(moments, *solved(args, group, width), width)
            parts += pack(moments, *self.affine(group, args))
        return tuple(parts)


class _Parts:
    """Arguments with their batch dims in one (1 if none differs), and how many steps each group has."""

    def __init__(self, args: Arguments, value: Tensor) -> None:
        raw = {n: x.double() for n, x in args.items() if n in GaussianChainFamily.arguments}
        lead = {n: x.shape[: x.dim() - GaussianChainFamily.arguments[n] - 1] for n, x in raw.items()}
        self.batch = broadcast_shapes(value.shape[:-2], *lead.values())
        self.value, self.steps = value, value.shape[-2]
        self.width, self.lags = int(args["width"]), int(args["lags"])
        self.flat = {n: self._flat(x, lead[n]) for n, x in raw.items()}
        self.heads = sum(f"state_{i}.loc" in raw for i in range(HEADS))
        self.within = "state_0.matrix" in raw
        self.flat_cells = args.get("flat", ())

    def _flat(self, x: Tensor, lead: torch.Size) -> Tensor:
        rest = x.shape[len(lead) :]
        if lead.numel() == 1:
            return x.reshape(1, *rest)
        return x.expand(*self.batch, *rest).reshape(-1, *rest)

    def matrix(self, group: str) -> Tensor:
        if self.within and group.startswith("state"):
            return solved(self.flat, group, self.width)[1]
        return self.flat[f"{group}.matrix"]

    def offset(self, group: str) -> Tensor:
        if self.within and group.startswith("state"):
            return solved(self.flat, group, self.width)[2]
        return self.flat[f"{group}.loc"]

    def noise(self, group: str) -> Tensor:
        own = noise_covariance({n: self.flat[f"{group}.{n}"] for n in NOISE if f"{group}.{n}" in self.flat})
        if self.within and group.startswith("state"):
            inverse = torch.linalg.inv(solved(self.flat, group, self.width)[0])
            own = inverse @ own @ inverse.mT
        return own

    def over_time(self, kind: str, read: Any, first: int) -> Tensor:
        """An argument at the steps from `first` on: dim 1 has size 1 if it is the same at all of them."""
        late = read(kind) if f"{kind}.loc" in self.flat else None
        early = [read(f"{kind}_{i}") for i in range(first, self.heads)]
        same = late is not None and late.shape[1] == 1 and not any(x.requires_grad for x in (late, *early))
        if late is not None and same and all(x.shape == late.shape and torch.equal(x, late) for x in early):
            return late
        parts = early
        if late is not None:
            n = self.steps - self.heads
            parts = [*early, late.expand(len(late), n, *late.shape[2:])]
        S = max((len(x) for x in parts), default=1)
        if not parts:  # a single step has no transition: what stands here is not read
            return read(f"{kind}_0")
        return torch.cat([x.expand(S, *x.shape[1:]) for x in parts], 1)

    def evidence(self) -> Tensor:
        """log p(y) of every sequence."""
        return steady_moments(self.chain).log_evidence if self._steady else self._all_steps.log_evidence

    def moments(self, w: Tensor) -> tuple[Tensor, dict[str, LinearMoments]]:
        """The same, and weighted moments of every group of steps."""
        if not self._steady:
            found = self._all_steps
            return found.log_evidence, self.split(found.initial, found.transition, found.observation, w)
        found = steady_moments(self.chain, w)
        assert found.first is not None
        observed = {"observation_0": found.first, "observation": found.observation}
        return found.log_evidence, {"state_0": found.initial, "state": found.transition, **observed}

    @property
    def _steady(self) -> bool:
        return self.heads == 1 and self.chain.wholly_shared

    @cached_property
    def _all_steps(self) -> ChainMoments:
        return chain_moments(self.chain, states(self.chain))

    @cached_property
    def chain(self) -> Chain:
        """The chain of states s_t."""
        D, K = self.width, self.lags
        b = self.over_time("state", self.offset, 1)
        Q = self.over_time("state", self.noise, 1)
        A = self.over_time("state", self.matrix, 1) if self.steps > 1 else b.new_zeros(1, 1, D, K * D)
        mean, covariance = self.offset("state_0")[:, 0], self.noise("state_0")[:, 0]
        if K > 1:
            extra = (K - 1) * D
            shift = torch.eye(extra, K * D, dtype=A.dtype).expand(*A.shape[:2], extra, K * D)
            A = torch.cat([A, shift], -2)
            mean, b = (torch.nn.functional.pad(x, (0, extra)) for x in (mean, b))
            covariance, Q = (torch.nn.functional.pad(x, (0, extra, 0, extra)) for x in (covariance, Q))
        y = self.value.double().expand(*self.batch, *self.value.shape[-2:]).reshape(-1, *self.value.shape[-2:])
        gone = y.isnan()
        return Chain(
            mean,
            covariance,
            A,
            b,
            Q,
            self.over_time("observation", self.matrix, 0),
            self.over_time("observation", self.offset, 0),
            self.over_time("observation", self.noise, 0),
            y.nan_to_num(0.0),
            ~gone if bool(gone.any()) else None,
            self._flat_directions(A.shape[-1]) if self.flat_cells else None,
        )

    def _flat_directions(self, size: int) -> Tensor:
        """Along which directions the states of the first steps, (S|1, H, `size`, F), have a flat density."""
        steps = [
            solved(self.flat, f"state_{i}", self.width)[0] if self.within else None for i in range(len(self.flat_cells))
        ]
        return flat_directions(self.flat_cells, steps, size)

    def split(
        self, initial: LinearMoments, transition: LinearMoments, observation: LinearMoments, w: Tensor
    ) -> dict[str, LinearMoments]:
        """Weighted moments of every group of steps, summed over sequences and steps unless its arguments differ."""
        found = {}
        for kind, moments, first in (("state", transition, 1), ("observation", observation, 0)):
            for i in range(first, self.heads):
                found[f"{kind}_{i}"] = self._of(f"{kind}_{i}", moments, i - first, i - first + 1, w)
            if f"{kind}.loc" in self.flat:
                found[kind] = self._of(kind, moments, self.heads - first, self.steps - first, w)
        found["state_0"] = self._of("state_0", initial, 0, 1, w)
        return found

    def _of(self, group: str, moments: LinearMoments, begin: int, end: int, w: Tensor) -> LinearMoments:
        own = [x for n, x in self.flat.items() if n.startswith(f"{group}.")]
        part = LinearMoments(*(x[:, begin:end] for x in vars(moments).values()))
        return reduced(part, w, *varies(*own), self.batch)


def _first_cells(own: LinearMoments, width: int) -> LinearMoments:
    """Without the rows of the state that only repeat earlier ones."""
    if own.residual.shape[-1] == width:
        return own
    return LinearMoments(
        own.count,
        own.residual[..., :width],
        own.residual_squares[..., :width, :width],
        own.residual_parents[..., :width, :],
        own.parents,
        own.parents_squares,
    )
