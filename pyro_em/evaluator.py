"""E-steps on request, of one start or several at once; by replay where Python would take longer than the work.

The EM map of a model in closed form is a list of tensor operations: log-densities at θ, sums over the data, score and
update. It is recorded (recordings.py) after some ordinary evaluations, and from then on replayed: the same operations
on the same numbers, so that the results are the same to the last bit, with nothing between them. Every branch that
the ordinary code took is a guard of the recording. Where one goes the other way (a collapsing component, one more
step of Newton's method), the ordinary code runs, and says what it has to say; if that goes on, the new way is recorded.

What the recording did not see (a model that counts its calls) shows where replays are compared with the code: at the
first one, and with engines that run the model at the evaluations 1, 2, 4, 8, ... times `REFRESH`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard

import torch

from pyro_em.e_step.base import Engine, Expectation, Staged
from pyro_em.m_step.auto import MStep, NotCertified
from pyro_em.recordings import Around, Evaluated, Mapped, Recording, Request, Whole, generation_of
from pyro_em.tape import NotRecorded

WARM = 3  # ordinary evaluations before a recording; caches are filled by then
PAYS = 10  # replays that make up for a recording: 9 to 13, whatever the engine; both go with the number of operations
UNSURE = 4  # times as many must be expected until the pace of a fit is known better
REFRESH = 100
FAILURES = 3  # to record, after which it is not tried again: some E-steps do more than others (an error estimate)
DEVIATIONS = 3  # calls in a row in which no replay held, after which the new way is recorded
WORTH, PATIENCE = 20, 4  # replays that a recording costs; if it got fewer, the next one waits so many times longer


class Evaluator:
    """Made once a fit. The results of a call are in the order of its requests, an exception where one failed.

    :param num_starts: that are evaluated together.
    :param num_runs: that are to be driven, one after the other or together.

    `refusal` says why nothing is recorded, if it was tried.
    """

    def __init__(self, engine: Engine, m_step: MStep, num_starts: int = 1, num_runs: int = 1) -> None:
        self.engine, self.m_step, self.num_starts, self.num_runs = engine, m_step, num_starts, num_runs
        self.refusal = ""
        self._runs_model = not _is_staged(engine)
        self._in_one = True  # what comes before and after the pass over the data, with it, as far as that is known
        self._recording: Recording | None = None
        self._count, self._deviations, self._failures, self._coupled = 0, 0, 0, False
        self._patience, self._held = WARM, 0  # calls to wait for the next recording; replays of the last one

    def __call__(self, requests: Sequence[Request]) -> list[Evaluated | Exception]:
        self._count += 1
        refreshed = self._runs_model and _refreshed_at(self._count)
        replayed: list[Mapped | None] = []
        if self._recording is not None and not (self._deviations >= DEVIATIONS and self._unlikely()):
            replayed = self._replayed(self._recording, requests)
            if replayed and not refreshed and all(replayed):  # as nearly always
                return replayed  # type: ignore[return-value]
        replayed = replayed or [None for _ in requests]
        found: list[Evaluated | Exception | None] = [None for _ in requests] if refreshed else list(replayed)
        error: Exception | None = None
        if found[0] is None and self._to_be_recorded(requests[0]):
            try:
                found[0] = self._record(requests[0])
            except Exception as raised:  # what the code has to say, it says when it is asked
                error = raised
        missing = [i for i, result in enumerate(found) if result is None]
        ordinary = self._ordinary([requests[i] for i in missing])
        for i, result in zip(missing, ordinary, strict=True):
            known = replayed[i]
            found[i] = known if known is not None and self._agree(known, result) else result
        if error is not None and isinstance(found[0], Expectation):
            self._failed(error)
        return [result for result in found if result is not None]

    def _ordinary(self, requests: Sequence[Request]) -> list[Evaluated | Exception]:
        engine = self.engine
        if not _is_staged(engine) or len(requests) < 2 or not all(request.magnitude for request in requests):
            return [_attempt(engine, request) for request in requests]
        try:
            return _together(engine, requests)
        except Exception:  # of one of them: each alone, so that it is known whose
            return [_attempt(engine, request) for request in requests]

    def _replayed(self, recording: Recording, requests: Sequence[Request]) -> list[Mapped | None]:
        void = recording.generation != generation_of(self.engine)  # type: ignore[arg-type]
        if void or self._coupled != self.m_step.coupled:
            self._recording, self._count = None, 0
            return []
        try:
            found = recording(requests)
        except (NotRecorded, NotCertified) as error:  # the first replay was not what the code does, or not the maximum
            self._failed(error)
            return []
        # One of many starts may go another way for good: it is evaluated by itself, the others are replayed.
        if any(found):
            self._deviations = 0
            self._held += 1
        else:
            self._deviations += 1
        return found

    def _unlikely(self) -> bool:
        """After several replays in a row that did not hold they are tried at 4, 8, 16, ...: one that fails late costs
        nearly what holds. Asked then only."""
        many = bool(self._deviations & (self._deviations + 1))
        self._deviations += many
        return many

    def _agree(self, replayed: Mapped, ordinary: Evaluated | Exception) -> bool:
        """Give the recording up, for good if the code has come to do something else."""
        if not isinstance(ordinary, Expectation):
            return False
        names = ("log_likelihood", "log_prior", "magnitude")
        if any(getattr(replayed, name) != getattr(ordinary, name) for name in names):
            self._recording, self.refusal = None, "a later replay differs from the code"
            return False
        if replayed.error != ordinary.error:  # estimated anew
            self._recording, self._count = None, 0
            return False
        return True

    def _to_be_recorded(self, request: Request) -> bool:
        """Whether it is time to record the way that the code goes."""
        engine, m_step = self.engine, self.m_step
        if self.refusal or not (_is_staged(engine) or hasattr(engine, "unread")):
            return False
        if (self._count if self._recording is None else self._deviations) < self._patience:
            return False
        if request.expected * self.num_runs < PAYS * (UNSURE if self._count < 2 * WARM else 1):
            return False
        if not m_step.closed or len(m_step.free) > len(m_step.closed):
            return False
        return all(x.dtype == torch.float64 for x in request.params.values())

    def _record(self, request: Request) -> Mapped | None:
        """The way that the code goes at this request, recorded, and what it gave there."""
        recording = self._recording or self._new(tuple(request.params))
        self._coupled = self.m_step.coupled
        try:
            found = recording.record(request)
        except NotCertified:  # at these parameters
            self._count, self._deviations, self._patience = 0, 0, PATIENCE * self._patience
            return None
        # Newton's method may take another number of steps at every update.
        first = self._recording is None
        self._patience = DEVIATIONS if first or self._held >= WORTH else PATIENCE * self._patience
        self._recording, self._deviations, self._held = recording, 0, 0
        return found

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._in_one = False
        self._recording, self._count, self._deviations = None, 0, 0
        if self._failures == FAILURES:
            self.refusal = str(error) or type(error).__name__

    def _new(self, names: tuple[str, ...]) -> Recording:
        engine = self.engine
        if _is_staged(engine) and not (self._in_one and engine.compact and self.num_starts == 1):
            return Around(engine, self.m_step, names)
        return Whole(engine, self.m_step, names)  # type: ignore[arg-type]


def _refreshed_at(count: int) -> bool:
    times, rest = divmod(count, REFRESH)
    return rest == 0 and times & (times - 1) == 0


def _is_staged(engine: Engine | Staged) -> TypeGuard[Staged]:
    return hasattr(engine, "before")


def _together(engine: Staged, requests: Sequence[Request]) -> list[Evaluated | Exception]:
    stages = [engine.before(r.params, torch.tensor(r.magnitude, dtype=torch.float64)) for r in requests]
    sums = engine.core([replace(stage, rough=r.rough) for stage, r in zip(stages, requests, strict=True)])
    found = [engine.expectation(r.params, own) for r, own in zip(requests, sums, strict=True)]
    return [replace(x, error=x.error + r.error(x.magnitude)) for r, x in zip(requests, found, strict=True)]


def _attempt(engine: Engine, request: Request) -> Evaluated | Exception:
    try:
        if request.rough and request.magnitude:
            return _together(engine, [request])[0]  # type: ignore[arg-type]
        return engine.e_step(request.params)
    except Exception as error:
        return error
