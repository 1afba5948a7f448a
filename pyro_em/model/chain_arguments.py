"""The arguments of a linear-Gaussian chain, step by step, from its statements at states that stand for all.

    x_t ~ N(Σ_j A_j x_{t-j} + b_t, Q_t),    y_t ~ N(Σ_j C_j x_{t-j} + d_t, R_t)

Locations at the leaves less A x are the offsets b and d; tangents of the locations along the leaves are A and C, all of
those K + 1 steps apart at once. Several statements of a step are one vector, their noises one argument.

Shapes: B + (time, cells) as in statements.py, B with the dims of enumerated states in front; D cells of the states of
a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.families.linear_gaussian import noise_covariance
from pyro_em.model.statements import NotFolded, Statement

Arguments = dict[str, Tensor]
Moves = Mapping[str, Mapping[int, Tensor]]  # by statement and lag, B + (time, cells, D)


def steps_of(statements: Sequence[Statement]) -> list[list[Statement]]:
    """Statements by step, in order; that before the loop, if there is one, comes first."""
    found: dict[int, list[Statement]] = {}
    for own in statements:
        found.setdefault(own.step, []).append(own)
    return [found[step] for step in sorted(found)]


def aligned(statements: Sequence[Statement]) -> tuple[Sequence[Statement], int]:
    """Locations and noises with the same number of dims before time, and that number."""
    found = [(s.location.dim() - 2, s.noise.dim() - (2 if s.kind == "scale" else 3)) for s in statements]
    rank = max(max(both) for both in found)
    if all(both == (rank, rank) for both in found):
        return statements, rank

    def wide(x: Tensor, own: int) -> Tensor:
        return x.reshape((1,) * (rank - own) + tuple(x.shape))

    return [
        replace(s, location=wide(s.location, of_location), noise=wide(s.noise, of_noise))
        for s, (of_location, of_noise) in zip(statements, found, strict=True)
    ], rank


def joined(parts: Sequence[Tensor], dim: int, rank: int) -> Tensor:
    """Concatenated along `dim`, the first `rank` dims at their common size."""
    if len({part.shape[:rank] for part in parts}) > 1:
        lead = torch.broadcast_shapes(*(part.shape[:rank] for part in parts))
        parts = [part.expand(*lead, *part.shape[rank:]) for part in parts]
    return torch.cat(list(parts), dim)


def tangents(
    steps: Sequence[Sequence[Statement]], lags: int, width: int, differentiable: bool
) -> dict[str, dict[int, Tensor]]:
    """How each location moves with the states 0, ..., `lags` steps back: B + (time, cells, D) by statement and lag."""
    leaves, at, outputs, copies = [], [], [], []
    for t, step in enumerate(steps):
        offset = 0
        for own in step:
            if own.latent and not own.copy_of:
                leaves.append(own.value)
                at.append((t, offset, own.name))
            if own.copy_of:
                copies.append((own, offset))
            elif own.location.requires_grad:
                outputs.append((t, own))
            offset += own.layout.cells if own.latent else 0
    found: dict[str, dict[int, list[Tensor]]] = {own.name: {} for _, own in outputs}
    cotangents = [torch.zeros_like(own.location, requires_grad=True) for _, own in outputs]
    total = sum(((own.location * c).sum() for (_, own), c in zip(outputs, cotangents, strict=True)), torch.zeros(()))
    pulled: Sequence[Tensor | None] = [None] * len(leaves)
    if outputs:
        pulled = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)

    def pushed(places: Sequence[tuple[int, Tensor | None]]) -> Sequence[Tensor | None]:
        """How locations move with entries of leaves together, by what was pulled to each."""
        terms = [back[..., i].sum() for i, back in places if back is not None and back.requires_grad]
        if not terms:
            return [None] * len(outputs)
        return torch.autograd.grad(
            torch.stack(terms).sum(), cotangents, retain_graph=True, create_graph=differentiable, allow_unused=True
        )

    still = {own.copy_of for own, _ in copies}
    by_copy: dict[int, Sequence[Tensor | None]] = {}  # by cell: what every step reads of its own copy
    for (_, offset, name), leaf, back in zip(at, leaves, pulled, strict=True):
        if name in still:
            by_copy |= {offset + i: pushed([(i, back)]) for i in range(leaf.shape[-1])}
    for k in range(lags + 1):
        for c in range(width):
            here = [
                (c - offset, back)
                for (t, offset, name), leaf, back in zip(at, leaves, pulled, strict=True)
                if name not in still and t % (lags + 1) == k and offset <= c < offset + leaf.shape[-1]
            ]
            for (t, own), p in zip(outputs, by_copy[c] if c in by_copy else pushed(here), strict=True):
                lag = (t - k) % (lags + 1)
                if p is None or (c in by_copy and lag > 0):
                    p = torch.zeros_like(own.location, requires_grad=False)
                found[own.name].setdefault(lag, []).append(p)
    moves = {name: {lag: torch.stack(xs, -1) for lag, xs in own.items()} for name, own in found.items()}
    for own, offset in copies:
        none = (
            torch.zeros_like(own.location, requires_grad=False).unsqueeze(-1).repeat(*(1,) * own.location.dim(), width)
        )
        moves[own.name] = dict.fromkeys(range(lags + 1), none)
        moves[own.name][1] = none + torch.eye(width, dtype=none.dtype)[offset : offset + own.layout.cells]
    return moves


def step_arguments(
    steps: Sequence[Sequence[Statement]],
    t: int,
    moves: Mapping[str, dict[int, Tensor]],
    width: int,
    lags: int,
    within: bool,
) -> Arguments:
    """Arguments of one step (or of all that are run together), B + (time,) + event; named as for the later steps."""
    found: Arguments = {}
    for kind, first in (("state", 1), ("observation", 0)):
        at, own = _statements(steps, t, kind == "state")

        def matrix(lag: int, own: Sequence[Statement] = own) -> Tensor:
            parts = [moves[s.name][lag] if s.name in moves else _none(s, width) for s in own]
            return joined(parts, -2, parts[0].dim() - 3)

        by_lag = [matrix(lag) for lag in range(first, first + lags)]
        location = joined([s.location for s in own], -1, own[0].location.dim() - 2)
        for lag in range(lags + 1):
            if at >= lag:
                before = torch.cat([s.value for s in steps[at - lag] if s.latent], -1).to(location)
                if bool(before.any()):  # never where a folded model runs
                    location = location - (matrix(lag) @ before.unsqueeze(-1)).squeeze(-1)
        name, noise = joint_noise(own)
        if kind == "state" and t == 0:
            by_lag = []  # nothing stands before it
        if kind == "state" and within:
            by_lag.append(matrix(0))
        found |= {f"{kind}.loc": location, f"{kind}.{name}": noise}
        if by_lag:
            found[f"{kind}.matrix"] = joined(by_lag, -1, by_lag[0].dim() - 3)
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


def joint_noise(own: Sequence[Statement]) -> tuple[str, Tensor]:
    """The noise of several statements as one argument."""
    if len(own) == 1:
        return own[0].kind, own[0].noise
    rank = own[0].location.dim() - 2
    if all(s.kind == "scale" for s in own):
        return "scale", joined([s.noise for s in own], -1, rank)
    parts = [noise_covariance({s.kind: s.noise}) for s in own]
    lead = torch.broadcast_shapes(*(x.shape[:rank] for x in parts))
    parts = [x.expand(*lead, *x.shape[rank:]) for x in parts]
    rows = []
    for i, x in enumerate(parts):
        row = [x if i == j else x.new_zeros(*x.shape[:-1], y.shape[-1]) for j, y in enumerate(parts)]
        rows.append(torch.cat(row, -1))
    return "covariance_matrix", torch.cat(rows, -2)


def reach(statements: Sequence[Statement], moves: Moves) -> int:
    """Steps back that the state has to hold, so that states and observations read nothing else."""
    latent = {s.name: s.latent for s in statements}
    reads = [(latent[n], lag) for n, by_lag in moves.items() for lag, x in by_lag.items() if bool((x != 0).any())]
    return max((lag if latent else lag + 1 for latent, lag in reads), default=1)


def reads_own_step(statements: Sequence[Statement], moves: Moves) -> bool:
    """Whether a state reads others of its own step."""
    latent = {s.name for s in statements if s.latent}
    return any(bool((moves[n][0] != 0).any()) for n in latent & moves.keys() if 0 in moves[n])
