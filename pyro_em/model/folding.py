"""A loop over time with Gaussian states as one observed site, whose states its own density integrates out.

    x_t ~ N(Σ_j A_j x_{t-j} + b_t, Q_t),    y_t ~ N(Σ_j C_j x_{t-j} + d_t, R_t)

The model runs as written with the states at 0 (leaves); locations there are the offsets, and tangents of the locations
along the leaves the matrices, differentiable in the parameters (double vjp). The statements themselves are hidden, and
`GaussianChain` with these arguments takes their place, so that everything that serves Pyro's `GaussianHMM` serves a
loop: Kalman kernels, closed M-steps of every entry, ties, priors, posteriors.

Tangents of many steps are taken at once: a site reads states at most K steps back, so those K + 1 apart do not meet.
What a fold takes for granted is certified when it is made (fold_recognition.py).
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
from pyro_em.families.linear_gaussian import noise_covariance
from pyro_em.model import compat
from pyro_em.model.missing import INCOMPLETE
from pyro_em.model.statements import Collect, Layout, NotFolded, Statement, ValueOf
from pyro_em.model.timeline import Loop, running
from pyro_em.types import Model

Arguments = dict[str, Tensor]


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

    `heads` steps have arguments of their own; `varying` says by argument which of the dims B + (time,) it needs,
    `places` where the latents stand, `cells` where the observed statements do.
    """

    site: str
    names: frozenset[str]
    shared: frozenset[str]  # names of the plates that all statements share
    lags: int = 1
    heads: int = 1
    within: bool = True  # states read others of their own step
    varying: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    cells: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Chained:
    """The arguments of one run, its data B + (T, P), and the statements (and tangents, by lag) behind them."""

    arguments: Arguments
    value: Tensor
    width: int
    statements: tuple[Statement, ...]
    moves: Mapping[str, Mapping[int, Tensor]]


class FoldedModel:
    """The model with its chains folded; `original` is the model as written."""

    def __init__(self, original: Model, loops: Sequence[Loop], folds: Sequence[Fold]) -> None:
        self.original, self.loops, self.folds = original, tuple(loops), tuple(folds)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        for fold, chained in zip(self.folds, self.collect(args, kwargs, zeros), strict=True):
            _emit(fold, chained)

    def collect(self, args: Any, kwargs: Any, value_of: ValueOf, kind: str = "together") -> list[Chained]:
        """Run the model with its chains at given values of the states.

        :raises NotFolded: if the statements are no chain.
        """
        differentiable = torch.is_grad_enabled()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            handlers = [stack.enter_context(Collect(f.names, f.shared, value_of)) for f in self.folds]
            if self.loops:
                stack.enter_context(running(kind, self.loops))
            self.original(*args, **kwargs)
        with torch.enable_grad():
            return [chained(f, h.statements, differentiable) for f, h in zip(self.folds, handlers, strict=True)]


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
    own = {n: p for n, p in fold.places.items() if p.timed} or {n: p for n, p in fold.places.items() if p.step == 0}
    steps = f"{fold.lags} step{'s' if fold.lags > 1 else ''}"
    others = f" (and {len(fold.places) - len(own)} more of the loop)" if len(fold.places) > len(own) else ""
    return [(n, f"normal, state of a linear-Gaussian chain that looks {steps} back{others}") for n in own]


def steps_of(statements: Sequence[Statement]) -> list[list[Statement]]:
    """Statements by step, in order; that before the loop, if there is one, comes first."""
    found: dict[int, list[Statement]] = {}
    for own in statements:
        found.setdefault(own.step, []).append(own)
    return [found[step] for step in sorted(found)]


def places(statements: Sequence[Statement], *, latent: bool) -> dict[str, Place]:
    """Where the latent (or the observed) statements stand, in program order."""
    found = {}
    for t, step in enumerate(steps_of(statements)):
        offset = 0
        for own in (s for s in step if s.latent == latent):
            found[own.name] = Place(t, offset, own.timed, own.layout, own.event)
            offset += own.layout.cells
    return found


def chained(fold: Fold, statements: Sequence[Statement], differentiable: bool) -> Chained:
    """The chain of one run.

    :raises NotFolded: if steps do not look alike.
    """
    steps = steps_of(statements)
    widths = {sum(s.layout.cells for s in step if s.latent) for step in steps}
    cells = {sum(s.layout.cells for s in step if not s.latent) for step in steps} - {0}
    if len(widths) != 1 or len(cells) != 1 or 0 in widths:
        raise NotFolded("steps have different numbers of states or of observations")
    width, rank = widths.pop(), len(statements[0].layout.lead)
    moves = tangents(steps, fold.lags, width, differentiable)
    made = [step_arguments(fold, steps, t, width, moves) for t in range(len(steps))]
    if len({frozenset(own) for own in made[fold.heads :]}) > 1:
        raise NotFolded("steps have different kinds of noise")
    arguments: Arguments = {}
    for t, own in enumerate(made[: fold.heads]):
        for name, x in own.items():
            kind, _, which = name.partition(".")
            arguments[f"{kind}_{t}.{which}"] = _kept(x, fold.varying.get(f"{kind}_{t}.{which}"))
    for name in made[fold.heads] if len(made) > fold.heads else ():
        varying = fold.varying.get(name)
        still = varying is not None and not varying[rank]
        parts = [own[name] for own in made[fold.heads :]]
        arguments[name] = _kept(parts[0] if still else torch.cat(parts, rank), varying)
    if not differentiable:
        arguments = {name: x.detach() for name, x in arguments.items()}
    gaps = steps[0][0].value.new_full((*steps[0][0].layout.lead, 1, cells.pop()), torch.nan, dtype=torch.float64)
    values = [torch.cat([s.value for s in step if not s.latent] or [gaps], -1) for step in steps]
    return Chained(arguments, torch.cat(values, rank), width, tuple(statements), moves)


def _kept(x: Tensor, varying: tuple[bool, ...] | None) -> Tensor:
    """Without the dims B + (time,) along which it is constant."""
    for d, own in enumerate(varying or ()):
        x = x if own else x.narrow(d, 0, 1)
    return x


def tangents(
    steps: Sequence[Sequence[Statement]], lags: int, width: int, differentiable: bool
) -> dict[str, dict[int, Tensor]]:
    """How each location moves with the states 0, ..., `lags` steps back: B + (time, cells, D) by statement and lag."""
    leaves, at = [], []
    for t, step in enumerate(steps):
        offset = 0
        for own in step:
            if own.latent:
                leaves.append(own.value)
                at.append((t, offset))
                offset += own.layout.cells
    outputs = [(t, own) for t, step in enumerate(steps) for own in step if own.location.requires_grad]
    found: dict[str, dict[int, list[Tensor]]] = {own.name: {} for _, own in outputs}
    cotangents = [torch.zeros_like(own.location, requires_grad=True) for _, own in outputs]
    total = sum(((own.location * c).sum() for (_, own), c in zip(outputs, cotangents, strict=True)), torch.zeros(()))
    pulled: Sequence[Tensor | None] = [None] * len(leaves)
    if outputs:
        pulled = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    for k in range(lags + 1):
        for c in range(width):
            terms = []
            for (t, offset), leaf, back in zip(at, leaves, pulled, strict=True):
                here = t % (lags + 1) == k and offset <= c < offset + leaf.shape[-1]
                if here and back is not None and back.requires_grad:
                    terms.append(back[..., c - offset].sum())
            pushed: Sequence[Tensor | None] = [None] * len(outputs)
            if terms:
                pushed = torch.autograd.grad(
                    torch.stack(terms).sum(), cotangents, retain_graph=True, create_graph=differentiable,
                    allow_unused=True,
                )  # fmt: skip
            for (t, own), p in zip(outputs, pushed, strict=True):
                moved = torch.zeros_like(own.location, requires_grad=False) if p is None else p
                found[own.name].setdefault((t - k) % (lags + 1), []).append(moved)
    return {name: {lag: torch.stack(xs, -1) for lag, xs in own.items()} for name, own in found.items()}


def step_arguments(
    fold: Fold, steps: Sequence[Sequence[Statement]], t: int, width: int, moves: Mapping[str, dict[int, Tensor]]
) -> Arguments:
    """Arguments of one step (or of all that are run together), B + (time,) + event; named as for the later steps."""
    found: Arguments = {}
    for kind, first in (("state", 1), ("observation", 0)):
        at, own = _statements(steps, t, kind == "state")

        def matrix(lag: int, own: Sequence[Statement] = own) -> Tensor:
            parts = [moves[s.name][lag] if s.name in moves else _none(s, width) for s in own]
            return torch.cat(parts, -2)

        by_lag = [matrix(lag) for lag in range(first, first + fold.lags)]
        location = torch.cat([s.location for s in own], -1)
        for lag in range(fold.lags + 1):
            if at >= lag:
                before = torch.cat([s.value for s in steps[at - lag] if s.latent], -1).to(location)
                if bool(before.any()):  # never where a folded model runs
                    location = location - (matrix(lag) @ before.unsqueeze(-1)).squeeze(-1)
        name, noise = _noise(own)
        if kind == "state" and t == 0:
            by_lag = []  # nothing stands before it
        if kind == "state" and fold.within:
            by_lag.append(matrix(0))
        found |= {f"{kind}.loc": location, f"{kind}.{name}": noise}
        if by_lag:
            found[f"{kind}.matrix"] = torch.cat(by_lag, -1)
    return found


def _statements(steps: Sequence[Sequence[Statement]], t: int, latent: bool) -> tuple[int, list[Statement]]:
    """Those of step t; of a step without observations those of another one, whose arguments do as well."""
    for at in (*range(t, len(steps)), *reversed(range(t))):
        own = [s for s in steps[at] if s.latent == latent]
        if own:
            return at, own
    raise NotFolded("nothing is observed")


def _none(own: Statement, width: int) -> Tensor:
    return own.location.new_zeros(*own.location.shape, width)


def _noise(own: Sequence[Statement]) -> tuple[str, Tensor]:
    """The noise of several statements as one argument."""
    if len(own) == 1:
        return own[0].kind, own[0].noise
    if all(s.kind == "scale" for s in own):
        return "scale", torch.cat([s.noise for s in own], -1)
    parts = [noise_covariance({s.kind: s.noise}) for s in own]
    rows = []
    for i, x in enumerate(parts):
        row = [x if i == j else x.new_zeros(*x.shape[:-1], y.shape[-1]) for j, y in enumerate(parts)]
        rows.append(torch.cat(row, -1))
    return "covariance_matrix", torch.cat(rows, -2)


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
    distribution = GaussianChain(T, P, torch.Size(first.layout.lead))
    raw = {**chain.arguments, "width": chain.width, "lags": fold.lags}
    gone = chain.value.isnan()
    infer: Any = {INCOMPLETE: gone} if bool(gone.any()) else {}
    with _Put(first):
        pyro.sample(fold.site, compat.with_arguments(distribution, raw), obs=chain.value, infer=infer)
