"""Latents from before a loop over time that all of its steps read: states that stand still.

    w ~ N(m, S),    x_t ~ N(A x_{t-1} + G w + b_t, Q_t),    y_t ~ N(C x_t + H w + d_t, R_t)

(random intercepts of sequences, an unknown mean, static coefficients) is the chain of the states (w_t, x_t) with
w_0 = w and w_t = w_{t-1} without noise. So w moves to the first step, and every later step gets a statement of its own
that repeats it; what a step reads of w it reads of its own copy. Shapes: as in statements.py.

Not handled: a latent of which only some of the steps that look further back read something; it is left where it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from pyro_em.model.statements import OUTSIDE, Statement


def still_latents(statements: Sequence[Statement], far: int) -> frozenset[str]:
    """Latents from before the loop that its last step reads, if that is more than `far` steps behind or stands for
    many (what is read a few steps back may move); and those that these read."""
    last = max((s.step for s in statements), default=OUTSIDE)
    late = [s for s in statements if s.step == last]
    if not late or not (late[0].timed or last > far):
        return frozenset()
    outside = [s for s in statements if s.latent and s.step == OUTSIDE]
    found, readers = set[str](), late
    while readers:
        found |= {s.name for s in readers if s.step == OUTSIDE}
        readers = [s for s in _read(readers, outside) if s.name not in found]
    return frozenset(found)


def _read(readers: Sequence[Statement], latents: Sequence[Statement]) -> list[Statement]:
    """The latents that some of the locations depend on."""
    locations = [s.location for s in readers if s.location.requires_grad]
    if not locations or not latents:
        return []
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        weighted = [(x * torch.rand(x.shape, generator=generator, dtype=x.dtype)).sum() for x in locations]
        leaves = [s.value for s in latents]
        slopes = torch.autograd.grad(torch.stack(weighted).sum(), leaves, retain_graph=True, allow_unused=True)
    pairs = zip(latents, slopes, strict=True)
    return [s for s, slope in pairs if slope is not None and bool((slope != 0).any())]


def repeated(statements: Sequence[Statement], names: Collection[str]) -> list[Statement]:
    """The statements with those of `names` at the first step that has others, and repeated at every later one."""
    if not names:
        return list(statements)
    still = [s for s in statements if s.name in names]
    rest = [s for s in statements if s.name not in names]
    found: list[Statement] = []
    first = min(s.step for s in rest)
    for step in sorted({s.step for s in rest}):
        own = [s for s in rest if s.step == step]
        found += [replace(s, step=first) if step == first else _copy(s, own[0]) for s in still]
        found += own
    return found


def _copy(still: Statement, beside: Statement) -> Statement:
    """Of a later step: its location is the value before, its noise 0."""
    times = beside.layout.time
    value = still.value.expand(*still.value.shape[:-2], times, -1).double()
    return replace(
        still, name=f"{still.name} at step {beside.step}", step=beside.step, timed=beside.timed, location=value,
        kind="scale", noise=torch.zeros_like(value), value=value, flat=False, copy_of=still.name,
    )  # fmt: skip
