"""M-steps of networks over many rows: Adam on minibatches of Q, accepted on all of Q.

With the posterior weights held, Q is a sum over rows, and Q_B of a part B of them (rows.py) has the gradient of Q in
the mean. One M-step is

    1. the gradient g of Q, and the spread of it between parts of the rows: with Σ the covariance of one row's gradient,
       N* = N² tr Σ / |g|² rows are as many as make noise and signal equal. Where N* exceeds the rows of a pass, these
       say no more about where to go: the M-step is that of L-BFGS on all rows (numeric.py).
    2. one pass over all rows in `STEPS` steps of Adam, at a rate that falls to 0
    3. the longest of step, step/2, ... on which Q, of all rows, does not fall; none of them: L-BFGS on all rows

So it is a generalised M-step: Q never falls, the objective of EM neither, and as EM converges (g → 0) the steps end up
with those on all rows and their limit. The order of rows is drawn from a seed that is a function of θ, so that the
M-step is a function of θ too: a fit repeats and resumes bit for bit.

Sources: Kingma & Ba (2015), Adam; Neal & Hinton (1998) for partial M-steps; the noise test of Byrd, Chin, Nocedal & Wu
(2012), "Sample size selection in optimization methods for machine learning", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_em.m_step.numeric import Block, ascend, back_tracked, detached
from pyro_em.m_step.rows import NotSliced, Rows, rows_of
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors
from pyro_em.types import Params

LARGE = 2**15  # rows from which on a pass in minibatches is cheaper than L-BFGS on all rows
STEPS, RATE = 100, 0.03
PARTS = 16  # of the rows, between which the noise is measured
HALVINGS = 5

Optimiser = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def adam(leaves: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Adam at the rate with which a pass begins."""
    return torch.optim.Adam(list(leaves), lr=RATE)


def minibatches(problem: Problem) -> tuple[Rows | None, str]:
    """The rows to be taken in parts, if they are many and can be; and what the plan says of such M-steps."""
    if max(problem.graph.plate_sizes.values(), default=0) < LARGE:
        return None, "L-BFGS steps that raise Q"
    try:
        rows = rows_of(problem)
    except NotSliced as error:
        return None, f"L-BFGS steps that raise Q, on all rows ({error})"
    batch = -(-rows.size // STEPS)
    return rows, f"Adam on {batch} rows of plate '{rows.plate}' at a time, kept if Q rises; at the end L-BFGS on all"


def climb(rows: Rows, block: Block, weights: Posteriors, *, num_steps: int, optimiser: Optimiser = adam) -> Params:
    """Parameters at which Q is no lower, those of the block moved: by minibatches, or by `num_steps` of L-BFGS.

    :param block: of Q of all rows, with these posterior weights.
    """
    start = block.free()
    generator = torch.Generator("cpu").manual_seed(seed_of(block.params))
    if noise(rows, block, start, weights, generator) < rows.size:
        step = _passed(rows, block, start, weights, generator, optimiser) - start
        if bool(step.isfinite().all()):
            moved = back_tracked(block, start, step, halvings=HALVINGS)
            if not torch.equal(moved, start):
                return detached(block, moved)
    return ascend(block, num_steps=num_steps)


def noise(rows: Rows, block: Block, u: Tensor, weights: Posteriors, generator: torch.Generator) -> float:
    """N*: rows whose mean gradient has as much noise as signal."""
    parts = _shuffled(rows.size, generator).chunk(PARTS)
    found = torch.stack([_at(rows, block, part, weights).gradient(u)[1] for part in parts])
    mean = found.mean(0)
    signal = float(mean @ mean)
    spread = float((found - mean).square().sum()) / (len(parts) - 1)
    return spread * (rows.size / PARTS) / signal if signal > 0 else torch.inf


def _passed(
    rows: Rows, block: Block, start: Tensor, weights: Posteriors, generator: torch.Generator, optimiser: Optimiser
) -> Tensor:
    """Free coordinates after one pass."""
    u = start.clone().requires_grad_(True)
    steps = optimiser([u])
    rates = [group["lr"] for group in steps.param_groups]
    parts = _shuffled(rows.size, generator).chunk(STEPS)
    for k, part in enumerate(parts):
        for group, rate in zip(steps.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - k / len(parts))
        _, gradient, _ = _at(rows, block, part, weights).gradient(u)
        u.grad = -gradient / rows.size
        steps.step()
    return u.detach()


def _at(rows: Rows, block: Block, part: Tensor, weights: Posteriors) -> Block:
    """The block with Q of some rows for an objective."""
    return block.with_objective(rows.objective(part, weights))


def _shuffled(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator, device="cpu")


def seed_of(params: Params) -> int:
    """A number that changes with any bit of the parameters."""
    total = 0
    for place, value in enumerate(params.values()):
        bits = value.detach().contiguous().view(torch.int64 if value.element_size() == 8 else torch.int32)
        total = total * 31 + int((bits.long() * (1 + place)).sum())
    return total % 2**31
