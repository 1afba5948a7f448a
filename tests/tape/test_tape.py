"""Recorded functions (pyro_em/tape): a replay gives the same bits, or says that it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pyro_em.tape import Deviation, NotRecorded, Tape
from pyro_em.tape.replay import MOST

Function = Callable[..., Sequence[Tensor]]


def views(x: Tensor) -> list[Tensor]:
    wide = x.unsqueeze(0).expand(2, 4, 3)
    return [wide.reshape(8, 3).sum(0), x.mT, x[1:, :2].flatten() - x[0, 0], torch.stack(x.unbind(1)[:2]).mT]


def in_place(x: Tensor) -> list[Tensor]:
    total = torch.zeros(3)
    total.add_(x.sum(0))
    own = (x * x).sqrt()
    own[1] = 7.0
    own.mul_(2.0).clamp_(max=9.0)
    square = torch.diag_embed(own)
    square[0] += 1.0
    return [total, own, own.detach()[0] + total, square]


def constants_in_place(x: Tensor) -> list[Tensor]:
    """A table that is filled before it is read is a constant, one that goes on changing is not."""
    table = torch.zeros(3, 3).scatter_(1, torch.tensor([[1], [0], [2]]), 1.0)
    moving = torch.ones(3)
    early = x * moving
    moving.mul_(3.0)
    return [x @ table, early, x * moving, x**2]


def algebra(x: Tensor) -> list[Tensor]:
    square = x.mT @ x + torch.eye(3)
    factor = torch.linalg.cholesky(square)
    other = torch.linalg.cholesky(x.mT @ x + torch.eye(3))  # the same again, with another constant of the same value
    return [factor, other.diagonal().log().sum(), torch.cholesky_inverse(factor), torch.softmax(x, 0).amax(0)]


def gradients(x: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        leaf = (x * 2).detach().requires_grad_(True)
        value = (torch.softmax(leaf, 0) * leaf.exp()).logsumexp(1).sum() + (leaf @ leaf.mT).tanh().sum()
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        (curvature,) = torch.autograd.grad((slope * slope).sum(), leaf)
    return [value, slope, curvature]


def reshaped(x: Tensor) -> list[Tensor]:
    """A product with a vector squeezes its result in place."""
    row = x.sum(0) @ (x.mT @ x)
    own = (x * 3).unsqueeze_(0)
    return [row + 1, own.transpose_(1, 2).squeeze_(0) * row.unsqueeze(-1), x @ x[0]]


def roots(x: Tensor) -> list[Tensor]:
    """torch's vectorised roots are not those of IEEE."""
    wide = x.abs().reshape(-1, 1) * torch.linspace(0.1, 7, 300)
    return [wide.sqrt(), wide[0, 0].sqrt()]


def seeded(x: Tensor) -> list[Tensor]:
    return [x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))]


def branches(x: Tensor) -> list[Tensor]:
    far = x > 1e3
    near = torch.where(far, torch.zeros_like(x), x)
    if bool(far.any()):
        return [near]
    return [near * 1.0 + 0.0, x.clamp(min=0.0), torch.where(x > 0, x.log(), 0.0 * x)]


def picks(x: Tensor) -> list[Tensor]:
    """Entries at constant places, of memory in another order too."""
    flipped = (x * 2).mT.flip(0)
    index = torch.tensor([[0, 2, 1], [3, 1, 0]])
    indexed = [x[index[1]], flipped[:, index[0]], x[index[1], index[0]] - 1]
    return [
        x.index_select(1, index[0]) + 1, flipped, flipped.mT.gather(0, index), (x > 0).to(torch.float64), x**1.0,
        *indexed,
    ]  # fmt: skip


def places(x: Tensor) -> list[Tensor]:
    """Of places that depend on the data, and of a mask that does not, the shape is known: so are both of a mask."""
    order, kept, positive = x[:, 0].argsort(), torch.tensor([True, False, True, True]), x > 0
    return [x[order], x[kept] + 1, positive[order].double(), positive[kept].double()]


@pytest.mark.parametrize(
    "function",
    [picks, places, views, in_place, constants_in_place, algebra, branches, gradients, reshaped, roots, seeded],
)
def test_a_replay_gives_the_same_bits(function: Function) -> None:
    tape = Tape(function, [torch.randn(4, 3)])
    for _ in range(5):
        x = torch.randn(4, 3)
        for found, expected in zip(tape([x]), function(x), strict=True):
            assert torch.equal(found.nan_to_num(1.5), expected.nan_to_num(1.5))


def test_inputs_are_not_changed_and_outputs_are_not_shared() -> None:
    tape = Tape(lambda x: [x, x * 2], [torch.ones(3)])
    x = torch.randn(3)
    kept, (same, twice) = x.clone(), tape([x])
    same.zero_(), twice.zero_()
    tape([torch.zeros(3)])
    assert torch.equal(x, kept)
    assert torch.equal(tape([x])[1], 2 * kept)


def test_a_guard_that_fails_voids_the_replay() -> None:
    tape = Tape(branches, [torch.ones(4, 3)])
    with pytest.raises(Deviation):
        tape([torch.full((4, 3), 1e4)])
    assert torch.equal(tape([torch.ones(4, 3)])[0], torch.ones(4, 3))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_values_that_have_to_be_finite_are_looked_at_in_one_call(bad: float) -> None:
    def finite(x: Tensor) -> list[Tensor]:
        return [x * 2 if bool((x - x == 0).all()) else x]

    tape, x = Tape(finite, [torch.ones(4, 3)]), torch.ones(4, 3)
    assert len(tape._calls) == 2
    tape([torch.full((4, 3), 1e308)])
    x[2, 1] = bad
    with pytest.raises(Deviation):
        tape([x])


def test_a_factorisation_that_fails_voids_the_replay() -> None:
    tape = Tape(lambda x: [torch.linalg.cholesky(x)], [torch.eye(3)])
    with pytest.raises((Deviation, torch.linalg.LinAlgError)):
        tape([-torch.eye(3)])


def test_what_was_done_twice_is_done_once_and_what_a_guard_implies_not_at_all() -> None:
    calls = [step.call for step in Tape(algebra, [torch.randn(4, 3)]).listing.steps]
    assert calls.count(torch.ops.aten.linalg_cholesky_ex.default) == 1
    calls = [step.call for step in Tape(branches, [torch.ones(4, 3)]).listing.steps]
    assert calls.count(torch.ops.aten.where.self) == 1  # the one whose mask no guard knows


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: [x * float(x.sum())], "a number was read"),
        (lambda x: [x + torch.randn(3)], "a random draw"),
        (lambda x: [x + sum(x.tolist())], "values left torch"),
        (lambda x: [torch.as_tensor(x.numpy() + 1)], "values left torch"),
        (lambda x: [x[x > 0]], "a shape that depends on the data"),
        (lambda x: [(x > 0).nonzero()], "a shape that depends on the data"),
        (lambda x: [sum((x * i for i in range(MOST)), x)], "operations"),
    ],
)
def test_what_cannot_be_replayed_is_refused(function: Function, why: str) -> None:
    with pytest.raises(NotRecorded, match=why):
        Tape(function, [torch.randn(3)])


def test_what_is_not_seen_is_found_by_comparison() -> None:
    """State of Python goes past torch: it stays what it was, and a second call shows it."""
    calls: list[Tensor] = []
    tape = Tape(lambda x: calls.append(x) or [x * len(calls)], [torch.tensor([2.0])])  # type: ignore[func-returns-value]
    with pytest.raises(NotRecorded, match="a replay differs"):
        tape([torch.tensor([3.0])])
