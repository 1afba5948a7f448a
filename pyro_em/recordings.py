"""EM maps as recordings: θ -> E-step's totals, score, M(θ), by tapes (tape/) instead of the code that they recorded.

`Whole` is one function from parameters to everything. Where its branches have gone another way for some time, that
way is recorded too: a replay tries the ways known, the latest first. `Around` records what comes before and after
the pass over the data, which stays the engine's own and takes several starts at once.

Both give None where no recording holds; the ordinary code then answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_em.e_step.base import Expectation, Recordable, Stage, Staged
from pyro_em.m_step.auto import MStep
from pyro_em.sufficient import Sufficient
from pyro_em.tape import Deviation, Tape
from pyro_em.types import Params

MOST_WAYS = 4  # of one function
SINGLE = 4 * torch.finfo(torch.float32).eps  # error of a log-likelihood by products in float32, per Σ|ll_n|


@dataclass(frozen=True)
class Request:
    """Parameters at which an E-step is wanted; `magnitude` is Σ|ll_n| of the E-step before, 0 for the first."""

    params: Params
    magnitude: float
    rough: bool = False  # products in float32 (precision.py); the first E-step of a run is not

    def error(self, magnitude: float) -> float:
        """What float32 cannot see of a log-likelihood with this Σ|ll_n|."""
        return SINGLE * magnitude if self.rough and self.magnitude else 0.0


@dataclass(frozen=True)
class Mapped:
    """An E-step with the score there and M(θ), from one replay. The rest is computed if somebody asks."""

    log_likelihood: float
    log_prior: float
    magnitude: float
    error: float
    score: float  # not divided by N
    updated: Params
    empty: frozenset[str]
    ordinary: Callable[[], Expectation]

    @cached_property
    def expectation(self) -> Expectation:
        """The ordinary E-step."""
        return self.ordinary()


Evaluated = Expectation | Mapped
Outputs = list[Tensor]  # totals and score as one tensor, then M(θ) by parameter


class Recording(Protocol):
    """`generation` is the engine's when it was made."""

    generation: int

    def record(self, request: Request) -> None:
        """Record the way that the code goes at this request; what the code and the tape raise passes through."""
        ...

    def __call__(self, requests: Sequence[Request]) -> list[Mapped | None]: ...


@dataclass(frozen=True)
class _Way:
    tape: Tape
    empty: frozenset[str]


class Whole:
    """Of an engine that is recorded as one function with the M-step."""

    def __init__(self, engine: Recordable | Staged, m_step: MStep, names: tuple[str, ...]) -> None:
        self.engine, self.m_step, self.names = engine, m_step, names
        self.generation = generation_of(engine)
        self._ways: list[_Way] = []

    def record(self, request: Request) -> None:
        empty: set[str] = set()

        def function(*inputs: Tensor) -> Outputs:
            params = dict(zip(self.names, inputs, strict=False))
            return after(self.m_step, params, *_e_step(self.engine, params, inputs[-1]), empty)

        magnitude = torch.tensor(request.magnitude, dtype=torch.float64)
        tape = Tape(function, [*(request.params[name] for name in self.names), magnitude])
        self._ways = [_Way(tape, frozenset(empty)), *self._ways[: MOST_WAYS - 1]]

    def __call__(self, requests: Sequence[Request]) -> list[Mapped | None]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Mapped | None:
        inputs: list[Tensor | float] = [*(request.params[name] for name in self.names), request.magnitude]
        for i, way in enumerate(self._ways):
            output = _replay(way.tape, inputs)
            if output is not None:
                if i:
                    self._ways.insert(0, self._ways.pop(i))
                return mapped(self.engine, self.names, request, output, way.empty)
        return None


class Around:
    """Of an engine whose pass over the data is not recorded; `kind` is that of the stage before it."""

    def __init__(self, engine: Staged, m_step: MStep, names: tuple[str, ...]) -> None:
        self.engine, self.m_step, self.names = engine, m_step, names
        self.generation = engine.generation
        self._kind: Any = None
        self._before: Tape | None = None
        self._after: Tape | None = None
        self._empty: frozenset[str] = frozenset()

    def record(self, request: Request) -> None:
        values = [request.params[name] for name in self.names]
        magnitude = torch.tensor(request.magnitude, dtype=torch.float64)
        stage = self.engine.before(request.params, magnitude)
        (sums,) = self.engine.core([stage])
        empty: set[str] = set()

        def before(*inputs: Tensor) -> Sequence[Tensor]:
            return self.engine.before(dict(zip(self.names, inputs, strict=False)), inputs[-1]).tensors

        def behind(*inputs: Tensor) -> Outputs:
            params = dict(zip(self.names, inputs, strict=False))
            return after(self.m_step, params, *self.engine.after(params, inputs[len(self.names) :]), empty)

        self._kind, self._before = stage.kind, Tape(before, [*values, magnitude])
        self._after, self._empty = Tape(behind, [*values, *sums]), frozenset(empty)

    def __call__(self, requests: Sequence[Request]) -> list[Mapped | None]:
        assert self._before is not None and self._after is not None
        values = [[request.params[name] for name in self.names] for request in requests]
        stages: list[Stage | None] = []
        for request, own in zip(requests, values, strict=True):
            made = _replay(self._before, [*own, request.magnitude])
            stages.append(None if made is None else Stage(tuple(made), self._kind, request.rough))
        going = [i for i, stage in enumerate(stages) if stage is not None]
        sums = self.engine.core([stage for stage in stages if stage is not None]) if going else []
        outputs: list[Outputs | None] = [None for _ in requests]
        for i, own_sums in zip(going, sums, strict=True):
            outputs[i] = _replay(self._after, [*values[i], *own_sums])
        return [
            None if output is None else mapped(self.engine, self.names, request, output, self._empty)
            for request, output in zip(requests, outputs, strict=True)
        ]


def generation_of(engine: Recordable | Staged) -> int:
    """Changes when what was recorded is void; engines that never lay out their data anew have none."""
    return getattr(engine, "generation", 0)


def _e_step(engine: Recordable | Staged, params: Params, magnitude: Tensor) -> tuple[Tensor, Sufficient]:
    if hasattr(engine, "unread"):
        unread = engine.unread(params)
        unread.sufficient.posterior = unread.posterior
        return unread.totals, unread.sufficient
    return engine.after(params, engine.core([engine.before(params, magnitude)])[0])


def after(m_step: MStep, params: Params, totals: Tensor, sufficient: Sufficient, empty: set[str]) -> Outputs:
    """What follows from an E-step; `empty` collects the parameters of which some entry saw no data."""
    score = m_step.closed_score(params, sufficient)
    updated, unseen = m_step.closed_update(params, sufficient)
    empty.update(unseen)
    return [torch.cat([totals, score.reshape(1)]), *(updated[name] for name in params)]


def mapped(
    engine: Recordable | Staged, names: tuple[str, ...], request: Request, output: Outputs, empty: frozenset[str]
) -> Mapped | None:
    """A replay's outputs, or None if the log-likelihood is not finite: the ordinary way says why."""
    likelihood, prior, magnitude, *error, score = output[0].tolist()
    if not (math.isfinite(likelihood) and math.isfinite(prior)):
        return None
    updated = dict(zip(names, output[1:], strict=True))
    own = sum(error, request.error(magnitude))
    return Mapped(likelihood, prior, magnitude, own, score, updated, empty, lambda: engine.e_step(request.params))


def _replay(tape: Tape, inputs: Sequence[Tensor | float]) -> list[Tensor] | None:
    try:
        return tape(inputs)
    except (Deviation, LinAlgError):
        return None
