"""EM maps as recordings: θ -> E-step's totals, score, M(θ), by tapes (tape/) instead of the code that they recorded.

`Whole` is one function from parameters to everything. Where its branches have gone another way for some time, that
way is recorded too: a replay tries the ways known, the latest first. `Around` records what comes before and after
the pass over the data, which stays the engine's own and takes several starts at once.

Both give None where no recording holds; the ordinary code then answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_em.e_step.base import Expectation, Recordable, Stage, Staged, is_possible
from pyro_em.m_step.auto import MStep
from pyro_em.sufficient import Sufficient
from pyro_em.tape import Deviation, Entries, Tape
from pyro_em.types import Params

MOST_WAYS = 4  # of one function
SINGLE = 4 * torch.finfo(torch.float32).eps  # error of a log-likelihood by products in float32, per Σ|ll_n|


class Point:
    """M(θ) as a replay gave it: tensors are made if somebody asks for them."""

    __slots__ = ("_tensors", "names", "tape", "values")

    def __init__(self, names: tuple[str, ...], values: list[Tensor | Entries], tape: Tape) -> None:
        self.names, self.values, self.tape = names, values, tape  # the first output is none of them
        self._tensors: Params | None = None

    @property
    def params(self) -> Params:
        """By name."""
        if self._tensors is None:
            tensors = (self.tape.tensor(i + 1, x) for i, x in enumerate(self.values))
            self._tensors = dict(zip(self.names, tensors, strict=True))
        return self._tensors


class Request:
    """Parameters at which an E-step is wanted; `magnitude` is Σ|ll_n| of the E-step before, 0 for the first.

    `rough` asks for products in float32 (precision.py), but for the first E-step of a run. `expected` is how many more
    may follow.
    """

    __slots__ = ("at", "expected", "magnitude", "rough")

    def __init__(self, at: Params | Point, magnitude: float, rough: bool = False, expected: float = math.inf) -> None:
        self.at, self.magnitude, self.rough, self.expected = at, magnitude, rough, expected

    @property
    def params(self) -> Params:
        """By name."""
        return params_of(self.at)

    def error(self, magnitude: float) -> float:
        """What float32 cannot see of a log-likelihood with this Σ|ll_n|."""
        return SINGLE * magnitude if self.rough and self.magnitude else 0.0


@dataclass(eq=False)
class Mapped:
    """An E-step with the score there and M(θ), from one replay. The rest is computed if somebody asks."""

    log_likelihood: float
    log_prior: float
    magnitude: float
    error: float
    score: float  # not divided by N
    following: Point
    empty: frozenset[str]
    engine: Recordable | Staged
    request: Request

    @property
    def updated(self) -> Params:
        """M(θ)."""
        return self.following.params

    @cached_property
    def expectation(self) -> Expectation:
        """The ordinary E-step."""
        return self.engine.e_step(self.request.params)


Evaluated = Expectation | Mapped
Outputs = list[Tensor]  # totals and score as one tensor, then M(θ) by parameter
Found = tuple[list[Tensor | Entries], Tape, frozenset[str]]  # the same from a tape, which says how tensors are made


class Recording(Protocol):
    """`generation` is the engine's when it was made."""

    generation: int

    def record(self, request: Request) -> Mapped | None:
        """Record the way that the code goes at this request, and give what it gave there.

        What the code and the tape raise passes through.
        """
        ...

    def __call__(self, requests: Sequence[Request]) -> list[Mapped | None]: ...


class Ways:
    """Tapes of one function for each way through its guards that recurred; a replay tries the latest first.

    The function adds to the set it is given the parameters of which some entry saw no data.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Tape, frozenset[str]]] = []

    def add(self, function: Callable[[set[str], Sequence[Tensor], bool], Outputs], inputs: Sequence[Tensor]) -> Found:
        """Record the way that it goes at these inputs, and give what it gives there.

        When a tape compares its first replay with the function, this is asked to certify its results.
        """
        empty: set[str] = set()
        calls = itertools.count()
        tape = Tape(lambda *own: function(empty, own, next(calls) > 0), inputs, entries=True)
        self._known = [(tape, frozenset(empty)), *self._known[: MOST_WAYS - 1]]
        return list(tape.recorded), tape, frozenset(empty)

    def __call__(self, inputs: Sequence[Tensor | Entries | float]) -> Found | None:
        for i, (tape, empty) in enumerate(self._known):
            try:
                found = tape.run(inputs)
            except (Deviation, LinAlgError):
                continue
            if i:
                self._known.insert(0, self._known.pop(i))
            return found, tape, empty
        return None


class Whole:
    """Of an engine that is recorded as one function with the M-step."""

    def __init__(self, engine: Recordable | Staged, m_step: MStep, names: tuple[str, ...]) -> None:
        self.engine, self.m_step, self.names = engine, m_step, names
        self.generation = generation_of(engine)
        self._ways = Ways()

    def record(self, request: Request) -> Mapped | None:
        def function(empty: set[str], inputs: Sequence[Tensor], certify: bool) -> Outputs:
            params = dict(zip(self.names, inputs, strict=False))
            return after(self.m_step, params, *_e_step(self.engine, params, inputs[-1]), empty, certify)

        found = self._ways.add(function, [*values_of(request, self.names), magnitude_of(request)])
        return mapped(self.engine, self.names, request, found)

    def __call__(self, requests: Sequence[Request]) -> list[Mapped | None]:
        engine, names, ways = self.engine, self.names, self._ways
        return [mapped(engine, names, x, ways([*entries_of(x, names), x.magnitude])) for x in requests]


class Around:
    """Of an engine whose pass over the data is not recorded; `kind` is that of the stage before it."""

    def __init__(self, engine: Staged, m_step: MStep, names: tuple[str, ...]) -> None:
        self.engine, self.m_step, self.names = engine, m_step, names
        self.generation = engine.generation
        self._kind: Any = None
        self._before: Tape | None = None
        self._after = Ways()

    def record(self, request: Request) -> Mapped | None:
        values = values_of(request, self.names)
        stage = self.engine.before(request.params, magnitude_of(request))
        (sums,) = self.engine.core([stage])

        def before(*inputs: Tensor) -> Sequence[Tensor]:
            return self.engine.before(dict(zip(self.names, inputs, strict=False)), inputs[-1]).tensors

        def behind(empty: set[str], inputs: Sequence[Tensor], certify: bool) -> Outputs:
            params = dict(zip(self.names, inputs, strict=False))
            return after(self.m_step, params, *self.engine.after(params, inputs[len(self.names) :]), empty, certify)

        if self._before is None or _replay(self._before, [*values, request.magnitude]) is None:
            self._before, self._after = Tape(before, [*values, magnitude_of(request)]), Ways()
            self._kind = stage.kind
        return mapped(self.engine, self.names, request, self._after.add(behind, [*values, *sums]))

    def __call__(self, requests: Sequence[Request]) -> list[Mapped | None]:
        assert self._before is not None
        stages: list[Stage | None] = []
        for request in requests:
            made = _replay(self._before, [*entries_of(request, self.names), request.magnitude])
            stages.append(None if made is None else Stage(tuple(made), self._kind, request.rough))
        going = [i for i, stage in enumerate(stages) if stage is not None]
        sums = self.engine.core([stage for stage in stages if stage is not None]) if going else []
        found: list[Found | None] = [None for _ in requests]
        for i, own in zip(going, sums, strict=True):
            found[i] = self._after([*entries_of(requests[i], self.names), *own])
        return [mapped(self.engine, self.names, *pair) for pair in zip(requests, found, strict=True)]


def values_of(request: Request, names: tuple[str, ...]) -> list[Tensor]:
    """The parameters in order."""
    return [request.params[name] for name in names]


def entries_of(request: Request, names: tuple[str, ...]) -> Sequence[Tensor | Entries]:
    """The same as a replay takes them."""
    at = request.at
    return at.values if type(at) is Point and at.names == names else values_of(request, names)


def params_of(at: Params | Point) -> Params:
    """By name."""
    return at.params if isinstance(at, Point) else at


def magnitude_of(request: Request) -> Tensor:
    """As an engine takes it."""
    return torch.tensor(request.magnitude, dtype=torch.float64)


def generation_of(engine: Recordable | Staged) -> int:
    """Changes when what was recorded is void; engines that never lay out their data anew have none."""
    return getattr(engine, "generation", 0)


def _e_step(engine: Recordable | Staged, params: Params, magnitude: Tensor) -> tuple[Tensor, Sufficient]:
    if hasattr(engine, "unread"):
        unread = engine.unread(params)
        unread.sufficient.posterior = unread.posterior
        return unread.totals, unread.sufficient
    return engine.after(params, engine.core([engine.before(params, magnitude)])[0])


def after(
    m_step: MStep, params: Params, totals: Tensor, sufficient: Sufficient, empty: set[str], certify: bool
) -> Outputs:
    """What follows from an E-step; `empty` collects the parameters of which some entry saw no data.

    :raises NotCertified: if closed forms do not reach the maximum of Q; as far as it is asked for.
    """
    score = m_step.closed_score(params, sufficient)
    updated, unseen = m_step.closed_map(params, sufficient)
    if certify:
        m_step.certify(updated, sufficient)
    updated = m_step.expanded(updated, sufficient)
    empty.update(unseen)
    return [torch.cat([totals, score.reshape(1)]), *(updated[name] for name in params)]


def mapped(
    engine: Recordable | Staged,
    names: tuple[str, ...],
    request: Request,
    found: Found | None,
) -> Mapped | None:
    """What a replay gave, or None if the log-likelihood is not finite: the ordinary way says why."""
    if found is None:
        return None
    (totals, *values), tape, empty = found
    likelihood, prior, magnitude, *errors, score = totals if isinstance(totals, tuple) else totals.tolist()
    if not (is_possible(likelihood) and math.isfinite(prior)):
        return None
    error = sum(errors, request.error(magnitude) if request.rough else 0.0)
    following = Point(names, values, tape)
    return Mapped(likelihood, prior, magnitude, error, score, following, empty, engine, request)


def _replay(tape: Tape, inputs: Sequence[Tensor | Entries | float]) -> list[Tensor] | None:
    try:
        return tape(inputs)
    except (Deviation, LinAlgError):
        return None
