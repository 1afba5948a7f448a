"""E-steps on request, of one start or several at once; by replay where Python would take longer than the work.

The EM map of a compiled model in closed form is a fixed list of tensor operations: W(θ), sums over the data,
score and update. After `WARM` ordinary evaluations it is recorded (tape/), and from then on replayed: the same
operations on the same numbers, so that the results are the same to the last bit, with nothing between them. Every
branch that the ordinary code took is a guard of the recording. Where one is about to go the other way (a
collapsing component, an empty one), the ordinary code runs, and says what it has to say.

A tape compares its first replay with the code, and every `REFRESH`-th evaluation is an ordinary one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_em.e_step.base import Engine, Expectation, OtherLayout, Stage, Staged
from pyro_em.errors import PyroEMError
from pyro_em.m_step.auto import MStep
from pyro_em.tape import Deviation, NotRecorded, Tape
from pyro_em.types import Params

WARM = 20  # ordinary evaluations before a recording: by then they have cost about as much as the recording does
REFRESH = 100
SINGLE = 4 * torch.finfo(torch.float32).eps  # error of a log-likelihood by products in float32, per Σ|ll_n|
DEVIATIONS = 3  # replays in a row that did not hold, after which a new recording is made


@dataclass(frozen=True)
class Request:
    """Parameters at which an E-step is wanted; `magnitude` is Σ|ll_n| of the E-step before, 0 for the first."""

    params: Params
    magnitude: float
    rough: bool = False  # products in float32 (precision.py); the first E-step of a run is not


@dataclass(frozen=True)
class Mapped:
    """An E-step with the score there and M(θ), from one replay. The rest is computed if somebody asks."""

    log_likelihood: float
    log_prior: float
    magnitude: float
    score: float  # not divided by N
    updated: Params
    empty: frozenset[str]
    ordinary: Callable[[], Expectation]
    error: float = 0.0  # of products in float32

    @cached_property
    def expectation(self) -> Expectation:
        """The ordinary E-step."""
        return self.ordinary()


Evaluated = Expectation | Mapped


@dataclass
class _Tapes:
    """`whole` maps (θ, magnitude) to everything; else `before` and `after` leave the data to the engine's `core`.

    `kind` is that of the stage that `before` makes, `empty` the parameters that had entries without data.
    """

    generation: int
    names: tuple[str, ...]
    empty: frozenset[str]
    whole: Tape | None = None
    before: Tape | None = None
    after: Tape | None = None
    kind: Any = None
    deviations: int = 0


class Evaluator:
    """Made once a fit. The results of a call are in the order of its requests, an exception where one failed."""

    def __init__(self, engine: Engine, m_step: MStep, num_starts: int = 1) -> None:
        self.engine, self.m_step, self.num_starts = engine, m_step, num_starts
        self._tapes: _Tapes | None = None
        self._count, self._refused = 0, False

    def __call__(self, requests: Sequence[Request]) -> list[Evaluated | Exception]:
        staged = _as_staged(self.engine)
        if staged is None:
            return [_attempt(self.engine, request) for request in requests]
        self._count += 1
        found: list[Evaluated | Exception | None] = [None for _ in requests]
        if self._tapes is not None and self._count % REFRESH:
            try:
                found = list(self._replayed(staged, self._tapes, requests))
            except NotRecorded:  # the first replay was not what the code does: there are no more
                self._tapes, self._refused = None, True
        missing = [i for i, result in enumerate(found) if result is None]
        ordinary = self._ordinary(staged, [requests[i] for i in missing])
        for i, result in zip(missing, ordinary, strict=True):
            found[i] = result
        if self._tapes is None and self._count >= WARM and isinstance(found[0], Expectation):
            self._record(staged, requests[0], found[0])
        return [result for result in found if result is not None]

    def _ordinary(self, engine: Staged, requests: Sequence[Request]) -> list[Evaluated | Exception]:
        if len(requests) < 2 or not all(request.magnitude for request in requests):
            return [_attempt(engine, request) for request in requests]
        try:
            return _together(engine, requests)
        except Exception:  # of one of them: each alone, so that it is known whose
            return [_attempt(engine, request) for request in requests]

    def _record(self, engine: Staged, request: Request, expectation: Expectation) -> None:
        m_step = self.m_step
        double = all(x.dtype == torch.float64 for x in request.params.values())
        if self._refused or m_step.coupled or not m_step.closed or not m_step.all_closed or not double:
            return  # (how many steps Newton's method takes depends on the data)
        self._refused = True  # until it has worked
        names = tuple(request.params)
        values = [request.params[name] for name in names]
        magnitude = torch.tensor(request.magnitude, dtype=torch.float64)
        empty: set[str] = set()

        def after(params: Params, sums: Sequence[Tensor]) -> list[Tensor]:
            totals, sufficient = engine.after(params, sums)
            score = m_step.closed_score(params, sufficient)
            updated, unseen = m_step.closed_update(params, sufficient)
            empty.update(unseen)
            return [torch.cat([totals, score.reshape(1)]), *(updated[name] for name in names)]

        def whole(*inputs: Tensor) -> list[Tensor]:
            params = dict(zip(names, inputs, strict=False))
            return after(params, engine.core([engine.before(params, inputs[-1])])[0])

        tapes = _Tapes(engine.generation, names, frozenset())
        try:
            if engine.compact and self.num_starts == 1:
                tapes.whole = Tape(whole, [*values, magnitude])
            else:
                stage = engine.before(request.params, magnitude)
                sums = engine.core([stage])[0]
                tapes.kind = stage.kind
                tapes.before = Tape(
                    lambda *x: engine.before(dict(zip(names, x, strict=False)), x[-1]).tensors, [*values, magnitude]
                )
                tapes.after = Tape(
                    lambda *x: after(dict(zip(names, x, strict=False)), x[len(names) :]), [*values, *sums]
                )
        except (NotRecorded, OtherLayout, Deviation, LinAlgError, PyroEMError):
            return  # what the M-step has to say, it says when it is asked
        tapes.empty = frozenset(empty)
        self._tapes, self._refused = tapes, False

    def _replayed(self, engine: Staged, tapes: _Tapes, requests: Sequence[Request]) -> list[Mapped | None]:
        if tapes.generation != engine.generation:
            self._tapes, self._count = None, 0
            return [None for _ in requests]
        stages: list[Stage | None] = []
        outputs: list[list[Tensor] | None] = [None for _ in requests]
        inputs: list[list[Tensor | float]] = [[*(r.params[n] for n in tapes.names), r.magnitude] for r in requests]
        if tapes.whole is not None:
            outputs = [_replay(tapes.whole, own) for own in inputs]
        else:
            assert tapes.before is not None and tapes.after is not None
            for request, own in zip(requests, inputs, strict=True):
                made = _replay(tapes.before, own)
                stages.append(None if made is None else Stage(tuple(made), tapes.kind, request.rough))
            going = [i for i, stage in enumerate(stages) if stage is not None]
            sums = engine.core([stage for stage in stages if stage is not None]) if going else []
            for i, own_sums in zip(going, sums, strict=True):
                outputs[i] = _replay(tapes.after, [*inputs[i][:-1], *own_sums])
        found = [self._mapped(engine, tapes, r, x) for r, x in zip(requests, outputs, strict=True)]
        # One of many starts may go another way for good: it is evaluated by itself, the others are replayed.
        tapes.deviations = tapes.deviations + 1 if not any(found) else 0
        if tapes.deviations >= DEVIATIONS:
            self._tapes, self._count = None, 0
        return found

    @staticmethod
    def _mapped(engine: Staged, tapes: _Tapes, request: Request, output: list[Tensor] | None) -> Mapped | None:
        if output is None:
            return None
        likelihood, prior, magnitude, score = output[0].tolist()
        if not (math.isfinite(likelihood) and math.isfinite(prior)):  # the ordinary way says why
            return None
        updated = dict(zip(tapes.names, output[1:], strict=True))
        ordinary, error = partial(engine.e_step, request.params), _error(request, magnitude)
        return Mapped(likelihood, prior, magnitude, score, updated, tapes.empty, ordinary, error)


def _as_staged(engine: Engine) -> Staged | None:
    return engine if hasattr(engine, "before") else None  # type: ignore[return-value]


def _error(request: Request, magnitude: float) -> float:
    """What float32 cannot see of the log-likelihood."""
    return SINGLE * magnitude if request.rough and request.magnitude else 0.0


def _together(engine: Staged, requests: Sequence[Request]) -> list[Evaluated | Exception]:
    stages = [engine.before(r.params, torch.tensor(r.magnitude, dtype=torch.float64)) for r in requests]
    sums = engine.core([replace(stage, rough=r.rough) for stage, r in zip(stages, requests, strict=True)])
    found = [engine.expectation(r.params, own) for r, own in zip(requests, sums, strict=True)]
    return [replace(x, error=x.error + _error(r, x.magnitude)) for r, x in zip(requests, found, strict=True)]


def _attempt(engine: Engine, request: Request) -> Evaluated | Exception:
    try:
        if request.rough and request.magnitude:
            return _together(engine, [request])[0]  # type: ignore[arg-type]
        return engine.e_step(request.params)
    except Exception as error:
        return error


def _replay(tape: Tape, inputs: Sequence[Tensor | float]) -> list[Tensor] | None:
    try:
        return tape(inputs)
    except (Deviation, LinAlgError):
        return None
