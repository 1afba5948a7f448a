"""A loop over time with Gaussian states as one observed site, whose states its own density integrates out.

    x_t ~ N(Σ_j A_j x_{t-j} + b_t, Q_t),    y_t ~ N(Σ_j C_j x_{t-j} + d_t, R_t)

The model runs as written with the states at 0 (leaves); locations there are the offsets, and tangents of the locations
along the leaves the matrices, differentiable in the parameters (double vjp). The statements themselves are hidden, and
`GaussianChain` with these arguments takes their place, so that everything that serves Pyro's `GaussianHMM` serves a
loop: Kalman kernels, closed M-steps of every entry, ties, priors, posteriors.

Tangents of many steps are taken at once: a site reads states at most K steps back, so those K + 1 apart do not meet.
What a fold takes for granted is certified when it is made (fold_recognition.py).

Discrete latents outside of the loop may choose the arguments (a mixture of linear systems). Enumerated, they give the
arguments a dim each, left of the plates (B then has them in front), and the site is a factor of the graph like any
other: the Kalman log-evidence of every sequence in every state. Arguments that do not depend on them have size 1 there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.distributions.chain import GaussianChain
from pyro_em.model import compat
from pyro_em.model.chain_arguments import Arguments, aligned, joined, step_arguments, steps_of, tangents
from pyro_em.model.missing import INCOMPLETE
from pyro_em.model.statements import Collect, Layout, NotFolded, Statement, ValueOf
from pyro_em.model.still import repeated
from pyro_em.model.timeline import Loop, running
from pyro_em.types import Model


@dataclass(frozen=True)
class Place:
    """Where a statement stands in the states (or observations): its first step, and its first cell of a step."""

    step: int
    offset: int
    timed: bool
    layout: Layout
    event: torch.Size


@dataclass(frozen=True)
class Fold:
    """What is known of one chain: its statements, the name of the site that it becomes, its lags.

    `heads` steps have arguments of their own; `varying` says by argument which of the dims B + (time,) it needs (those
    of enumerated states apart), `places` where the latents stand, `cells` where the observed statements do. `chosen_by`
    names the discrete latents that arguments depend on, `still` those from before the loop that all steps read.
    """

    site: str
    names: frozenset[str]
    shared: frozenset[str]  # names of the plates that all statements share
    lags: int = 1
    heads: int = 1
    within: bool = True  # states read others of their own step
    flat: bool = False  # the first states have flat densities
    varying: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    cells: Mapping[str, Place] = field(default_factory=dict)
    chosen_by: tuple[str, ...] = ()
    still: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Chained:
    """The arguments of one run, its data B + (T, P), and the statements (and tangents, by lag) behind them.

    `rank` is the number of dims of arguments before time: those of enumerated states, and B.
    """

    arguments: Arguments
    value: Tensor
    width: int
    rank: int
    statements: tuple[Statement, ...]
    moves: Mapping[str, Mapping[int, Tensor]]

    @property
    def flat(self) -> tuple[tuple[bool, ...], ...]:
        """Which states of the first steps have a flat density, up to the last one that has some."""
        steps = [
            tuple(s.flat for s in step if s.latent for _ in range(s.layout.cells)) for step in steps_of(self.statements)
        ]
        return tuple(steps[: 1 + max((t for t, own in enumerate(steps) if any(own)), default=-1)])


class FoldedModel:
    """The model with its chains folded; `original` is the model as written, `nesting` the dims of its plates."""

    def __init__(self, original: Model, loops: Sequence[Loop], folds: Sequence[Fold], nesting: int) -> None:
        self.original, self.loops, self.folds, self.nesting = original, tuple(loops), tuple(folds), nesting

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        for fold, chained in zip(self.folds, self.collect(args, kwargs, zeros), strict=True):
            _emit(fold, chained)

    def collect(self, args: Any, kwargs: Any, value_of: ValueOf, kind: str = "together") -> list[Chained]:
        """Run the model with its chains at given values of the states.

        :raises NotFolded: if the statements are no chain.
        """
        differentiable = torch.is_grad_enabled()
        found = self.statements(args, kwargs, value_of, kind)
        with torch.enable_grad():
            return [chained(fold, own, differentiable) for fold, own in zip(self.folds, found, strict=True)]

    def statements(self, args: Any, kwargs: Any, value_of: ValueOf, kind: str = "together") -> list[list[Statement]]:
        """Those of every chain, in program order."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            collected = (Collect(f.names, f.shared, value_of, self.nesting) for f in self.folds)
            handlers = [stack.enter_context(handler) for handler in collected]
            if self.loops:
                stack.enter_context(running(kind, self.loops))
            self.original(*args, **kwargs)
        return [handler.statements for handler in handlers]


def zeros(_: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The states at which folded models run."""
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def unfolded(model: Model) -> Model:
    """The model as the user wrote it."""
    return model.original if isinstance(model, FoldedModel) else model


def folds_of(model: Model) -> tuple[Fold, ...]:
    """The chains that a model has folded."""
    return model.folds if isinstance(model, FoldedModel) else ()


def chain_rows(fold: Fold) -> list[tuple[str, str]]:
    """Names and words for the plan: every latent of a loop that is run together, the first of one that is not."""
    moving = {n: p for n, p in fold.places.items() if n not in fold.still}
    own = {n: p for n, p in moving.items() if p.timed} or {n: p for n, p in moving.items() if p.step == 0}
    steps = f"{fold.lags} step{'s' if fold.lags > 1 else ''}"
    start = ", its start flat" if fold.flat else ""
    others = f" (and {len(moving) - len(own)} more of the loop)" if len(moving) > len(own) else ""
    each = f", one for every state of {', '.join(map(repr, fold.chosen_by))}" if fold.chosen_by else ""
    moves = f"normal, state of a linear-Gaussian chain that looks {steps} back{start}{others}{each}"
    stands = "normal, state of a linear-Gaussian chain that stands still: every step reads it"
    return [*((n, moves) for n in own), *((n, stands) for n in sorted(fold.still))]


def places(statements: Sequence[Statement], *, latent: bool) -> dict[str, Place]:
    """Where the latent (or the observed) statements stand, in program order."""
    found = {}
    for t, step in enumerate(steps_of(statements)):
        offset = 0
        for own in (s for s in step if s.latent == latent):
            if not own.copy_of:
                found[own.name] = Place(t, offset, own.timed, own.layout, own.event)
            offset += own.layout.cells
    return found


def chained(fold: Fold, statements: Sequence[Statement], differentiable: bool) -> Chained:
    """The chain of one run.

    :raises NotFolded: if steps do not look alike.
    """
    statements, rank = aligned(repeated(statements, fold.still))
    steps = steps_of(statements)
    widths = {sum(s.layout.cells for s in step if s.latent) for step in steps}
    cells = {sum(s.layout.cells for s in step if not s.latent) for step in steps} - {0}
    if len(widths) != 1 or len(cells) != 1 or 0 in widths:
        raise NotFolded("steps have different numbers of states or of observations")
    width = widths.pop()
    moves = tangents(steps, fold.lags, width, differentiable)
    made = [step_arguments(steps, t, moves, width, fold.lags, fold.within) for t in range(len(steps))]
    if any(s.flat for step in steps[fold.heads :] for s in step):
        raise NotFolded("a later step than the first few is flat")
    if len({frozenset(own) for own in made[fold.heads :]}) > 1:
        raise NotFolded("steps have different kinds of noise")
    arguments: Arguments = {}
    varying = fold.varying
    if fold.chosen_by and rank <= statements[0].layout.nesting:  # drawn, not enumerated: elements of plates differ
        varying = {name: (*(True for _ in own[:-1]), own[-1]) for name, own in varying.items()}
    for t, own in enumerate(made[: fold.heads]):
        for name, x in own.items():
            kind, _, which = name.partition(".")
            arguments[f"{kind}_{t}.{which}"] = _kept(x, varying.get(f"{kind}_{t}.{which}"), rank)
    for name in made[fold.heads] if len(made) > fold.heads else ():
        needed = varying.get(name)
        still = needed is not None and not needed[-1]
        parts = [own[name] for own in made[fold.heads :]]
        arguments[name] = _kept(parts[0] if still else joined(parts, rank, rank), needed, rank)
    if not differentiable:
        arguments = {name: x.detach() for name, x in arguments.items()}
    gaps = steps[0][0].value.new_full((*steps[0][0].layout.lead, 1, cells.pop()), torch.nan, dtype=torch.float64)
    values = [torch.cat([s.value for s in step if not s.latent] or [gaps], -1) for step in steps]
    return Chained(arguments, torch.cat(values, -2), width, rank, tuple(statements), moves)


def _kept(x: Tensor, varying: tuple[bool, ...] | None, rank: int) -> Tensor:
    """Without the dims B + (time,), the last of which is dim `rank`, along which it is constant."""
    for d, own in enumerate(reversed(varying or ())):
        x = x if own else x.narrow(rank - d, 0, 1)
    return x


class _Put(Messenger):
    """Give a statement the plates and the scale that the folded ones had."""

    def __init__(self, own: Statement) -> None:
        super().__init__()
        self.own = own

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = (*self.own.frames, *msg["cond_indep_stack"])
        msg["scale"] = self.own.scale * msg["scale"]


def _emit(fold: Fold, chain: Chained) -> None:
    first = chain.statements[0]
    T, P = chain.value.shape[-2:]
    states = (x.shape[: chain.rank] for x in chain.arguments.values())
    distribution = GaussianChain(T, P, torch.broadcast_shapes(first.layout.lead, *states))
    raw = {**chain.arguments, "width": chain.width, "lags": fold.lags, "flat": chain.flat}
    gone = chain.value.isnan()
    infer: Any = {INCOMPLETE: gone} if bool(gone.any()) else {}
    with _Put(first):
        pyro.sample(fold.site, compat.with_arguments(distribution, raw), obs=chain.value, infer=infer)
