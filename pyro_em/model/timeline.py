"""A loop over time that is run once for all of its steps: `for t in pyro_em.markov(T)`.

A chain of order h looks h steps back, so its body means the same at every step t >= h up to the numbers it
reads. It is run for t = 0, ..., h-1 as usual, and once more with t = (h, ..., T-1) as one index tensor, inside
of a plate over these steps that lies left of all other plates. What the body carries over from step h-1 then
plays the part of "the step before": an enumerated latent has one value per state, the same at all times.

    factors with the plate's dim,  ℓ_t(z_{t-1}, z_t),   from one run; evidence/timed.py chains them.

Under plain Pyro, and wherever this package runs a model forwards, it is `pyro.markov(range(T))`. Time is the
first dim of what `t` indexes: `x[t]` for x of shape (T, plates..., event...). Not handled: loops inside of one
another (write the inner one with `pyro.markov`), bodies that treat some steps differently than others, which
`certify_loops` (certify.py) finds and refuses.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger

from pyro_em.errors import InputError, Refusal
from pyro_em.model.step_index import Steps
from pyro_em.model.time_dim import time_in_place

SHORTEST = 1  # steps in the plate below which the loop is simply run


@dataclass
class Loop:
    """One `markov` statement of a model, in the order of the run.

    `depth` is the number of plate dims right of time; `names` are its sites, and `head_steps` the step of each that
    is run by itself, filled in as it is run.
    """

    ordinal: int
    steps: int
    history: int
    depth: int = 0
    names: list[str] = field(default_factory=list)
    head_steps: dict[str, int] = field(default_factory=dict)

    @property
    def plate(self) -> str:
        """Name of the plate over the steps that are run at once."""
        return f"markov_{self.ordinal}"

    @property
    def together(self) -> bool:
        """Whether steps are run at once; a loop of few steps is simply run."""
        return self.steps - self.history >= SHORTEST


@dataclass(frozen=True)
class Template:
    """A site of a loop's body: `text` with {} for the step gives its name at each."""

    text: str
    first: int  # the number that the name has at the first step run together
    width: int = 0  # of numbers with zeros before them, f"z_{t:03d}"

    @staticmethod
    def of(name: str, loop: Loop) -> Template:
        """The template of a site of the steps that are run together."""
        spans = _spans(name, loop)
        if len(spans) != 1:
            raise Refusal(
                name,
                "sites of a pyro_em.markov loop need the step in their name, once.",
                'write pyro.sample(f"name_{t}", ...) with t the step that the loop gives.',
            )
        first = spans[0].split(":")[0]
        return Template(name.replace(spans[0], "{}"), int(first), len(first) if first.startswith("0") else 0)

    @property
    def stem(self) -> str:
        """The name of the whole sequence: without the step, and without an underscore that led to it."""
        return re.sub(r"[_\W]*\{\}", "", self.text) or self.text

    def name(self, step: int, loop: Loop) -> str:
        """Name of the site at one step, 0 <= step < steps."""
        return self.text.format(self.number(step, loop))

    def number(self, step: int, loop: Loop) -> str:
        """What stands for the step in that name."""
        return f"{self.first + step - loop.history:0{self.width}d}"


def _spans(name: str, loop: Loop) -> list[str]:
    """Where a name has the steps that are run together, "1:1000" or another numbering of as many."""
    found = re.findall(r"\d+:\d+", name)
    return [s for s in found if int(s.split(":")[1]) - int(s.split(":")[0]) == loop.steps - loop.history]


class _Mode:
    """How the loops of one run are to be run: "shallow" (few steps), "together", or at `chosen` steps."""

    def __init__(self, kind: str, loops: Sequence[Loop] = ()) -> None:
        self.kind, self.planned = kind, tuple(loops)
        self.seen: list[Loop] = []
        self.open: Loop | None = None
        self.step = 0  # of the open loop, while steps are run one by one


_active: list[_Mode] = []


def is_active() -> bool:
    """Whether the package is looking at a model, so that loops are run as planned."""
    return bool(_active)


def open_loop() -> Loop | None:
    """The loop whose steps are being run together, None outside of such."""
    loop = _active[-1].open if _active and _active[-1].kind == "together" else None
    return loop if loop is not None and loop.together else None


def not_together(loops: Sequence[Loop], error: Exception) -> Refusal:
    """What failed with all steps at once, and did not with each by itself."""
    said = str(error).split("Trace Shapes:")[0].strip().rstrip(".")
    return Refusal(
        loops[0].plate,
        f"with all steps at once the body of the pyro_em.markov loop fails, each step by itself does not: {said}.",
        "time is the first dim of x[t]; where that meets plates or vectors (w[z] of a table, times a covariate x[t]) "
        "give x a dim of size 1 for each that it does not vary in, (T, 1); or write pyro.markov(range(T)), which runs "
        "every step by itself.",
    )


def read_outside(site: str, latent: str) -> Refusal:
    """A site outside of a loop reads a latent from inside of it, which would be that of one particular step."""
    return Refusal(
        site,
        f"it reads '{latent}' from outside of the pyro_em.markov loop over it.",
        "put the site into the loop, or write the loop with pyro.markov(range(T)).",
    )


class Unplanned(Exception):
    """A loop was met in a run that did not expect one."""


def markov(steps: int | range, history: int = 1) -> Iterator[Any]:
    """Loop over the steps of a Markov chain; a drop-in for `pyro.markov(range(T))` that needs no T-long trace.

    The body sees t = 0, 1, ..., T-1. What it carries from step to step (the state `z`) makes the chain, exactly
    as in `pyro.markov`. Index everything that varies with time by `t` on its **first** dim, put the step into
    site names, f"z_{t}", and tell the first step apart by `t == 0` or by the carried variable being None. `fit` and
    `plan` then run the body for the first `history` steps and once for all others together, so that a million
    steps cost no more tracing than two. Everywhere else (plain Pyro, prior draws) each step is run by itself.

    In `posterior(...)` the sites of a loop are one sequence, named without the step: `z` for f"z_{t}", of shape
    (T,) + plates; `z_17` still names one step.

    :param steps: the number of steps T, or range(T).
    :param history: how many steps back the body looks (the order of the chain).
    :raises InputError: if there is no step.

    Example::

        >>> def chain(x):  # x: (T,)
        ...     A = pyro.param("A", torch.full((2, 2), 0.5), constraint=constraints.simplex)
        ...     mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        ...     z = 0
        ...     for t in pyro_em.markov(len(x)):
        ...         z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        ...         pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])
        >>> result = pyro_em.fit(chain, torch.tensor([-1.9, -2.2, 1.8, 2.1, 1.9, -2.0]))
        >>> result.posterior().mode()["z"]
        tensor([0, 0, 1, 1, 1, 0])
    """
    if isinstance(steps, range):
        if steps != range(len(steps)):
            raise InputError(f"markov: {steps} does not count 0, 1, 2, ...; give the number of steps.")
        steps = len(steps)
    if steps < 1 or history < 1:
        raise InputError(f"markov: a loop of {steps} steps with history {history}; both are at least 1.")
    if not _active or _active[-1].kind == "alone":
        return iter(pyro.markov(range(steps), history=history))
    return _planned(_active[-1], steps, history)


def _planned(mode: _Mode, steps: int, history: int) -> Iterator[Any]:
    if mode.kind == "unplanned":
        raise Unplanned
    if mode.open is not None:
        raise Refusal(
            mode.open.plate,
            "a pyro_em.markov loop runs inside of another one.",
            "write the inner loop with pyro.markov(range(n)).",
        )
    ordinal = len(mode.seen)
    loop = Loop(ordinal, steps, history)
    mode.seen.append(loop)
    if mode.kind != "shallow":
        if ordinal >= len(mode.planned) or (mode.planned[ordinal].steps, mode.planned[ordinal].history) != (
            steps,
            history,
        ):
            raise Refusal(
                loop.plate,
                "the loops of the model changed between two runs.",
                "make the number of steps depend on the data only.",
            )
        loop.depth = mode.planned[ordinal].depth
    mode.open = loop
    try:
        yield from _steps(mode, loop)
    finally:
        mode.open = None


def _steps(mode: _Mode, loop: Loop) -> Iterator[Any]:
    T, h = loop.steps, loop.history
    if not loop.together or mode.kind == "shallow":
        yield from pyro.markov(range(min(T, h + 1) if loop.together else T), history=h)
    elif mode.kind == "chosen":
        yield from pyro.markov(chosen_steps(loop), history=h)
    else:
        rest: Any = torch.arange(h, T).as_subclass(Steps)
        for t in pyro.markov([*range(h), rest], history=h):
            if t is rest:
                dim = -1 - loop.depth
                with pyro.plate(loop.plate, T - h, dim=dim), time_in_place(T - h, dim):
                    yield t
            else:
                mode.step = t
                yield t


def chosen_steps(loop: Loop) -> list[int]:
    """The steps at which a loop is certified: all that reach back over the first ones, the next, and the last."""
    steps = list(range(min(loop.steps, 2 * loop.history + 1)))
    return steps if steps[-1] == loop.steps - 1 else [*steps, loop.steps - 1]


class _Names(Messenger):
    """Note the sites of every loop, and how deep their plates nest."""

    def __init__(self, mode: _Mode) -> None:
        super().__init__()
        self.mode = mode

    def _pyro_param(self, msg: Any) -> None:
        loop = self.mode.open if self.mode.kind == "together" else None
        if loop is not None and _spans(msg["name"], loop):
            raise Refusal(
                msg["name"],
                "a parameter of its own at every step of a pyro_em.markov loop, whose later steps are run at once.",
                "make one parameter with time as its first dim before the loop and index it, m[t], or write "
                "pyro.markov(range(T)), which runs every step by itself.",
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        loop = self.mode.open
        if loop is None or pyro.poutine.util.site_is_subsample(msg):
            return
        loop.names.append(msg["name"])
        if not any(f.name == loop.plate for f in msg["cond_indep_stack"]):
            loop.head_steps[msg["name"]] = self.mode.step
        if self.mode.kind == "shallow":
            dims = [-f.dim for f in msg["cond_indep_stack"] if f.vectorized]
            loop.depth = max([loop.depth, *dims])


@contextlib.contextmanager
def running(kind: str, loops: Sequence[Loop] = ()) -> Iterator[list[Loop]]:
    """Within this context `markov` loops are run as told; gives the loops that were met.

    :param kind: "unplanned" (raise `Unplanned` at the first), "alone" (step by step), "shallow" (the first steps only),
        "together", or "chosen" (at `chosen_steps`); the last two for the `loops` that a shallow run has found.
    """
    mode = _Mode(kind, loops)
    _active.append(mode)
    try:
        with _Names(mode):
            yield mode.seen
    finally:
        _active.remove(mode)
