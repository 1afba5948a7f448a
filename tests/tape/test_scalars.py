"""Replays as arithmetic of Python (pyro_em/tape/scalars.py): the same bits as the calls, for any numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_em.tape import Deviation, Tape, replay
from pyro_em.tape.numbers import Numbers, count, first_largest, over_zero, write
from pyro_em.tape.orders import _in_fours, _in_turn, order_of

Function = Callable[..., Sequence[Tensor]]
SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e308, -1e308, 5e-324)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "OFTEN", 3)


def _written(function: Function, inputs: Sequence[Tensor]) -> Tape:
    """A tape after the replays that it takes."""
    tape = Tape(function, inputs)
    tape(inputs), tape(inputs)
    assert tape.program is not None
    return tape


def _same_bits(a: Tensor, b: Tensor) -> bool:
    found, expected = a.numpy(), b.numpy()
    if not a.dtype.is_floating_point:
        return a.dtype == b.dtype and np.array_equal(found, expected)
    signs = np.isnan(expected) | (np.signbit(found) == np.signbit(expected))
    return a.dtype == b.dtype and np.array_equal(found, expected, equal_nan=True) and bool(signs.all())


UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.neg, torch.abs, torch.reciprocal, lambda x: x**2, lambda x: x**-2, lambda x: x**1.0, lambda x: x * 1.0,
    lambda x: x.mT, lambda x: x.flip(0), lambda x: x[:, [2, 0, 1]], lambda x: x[1:2] + 0.5, lambda x: x.diagonal() - 1,
    lambda x: x.sum(0), lambda x: x.sum(-1, keepdim=True), lambda x: x.sum(), lambda x: 3 - x / 2.5,
    torch.log, torch.exp, lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: (x > 0).to(x.dtype),
)  # fmt: skip
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add, torch.sub, torch.mul, torch.div, lambda x, y: torch.where(x < y, x, 1 / y), torch.matmul,
    lambda x, y: torch.where((x == 0) | ~(y >= 1), y, x), lambda x, y: torch.where((x != y) & (x <= 0), x / y, 0.0),
    lambda x, y: torch.stack([x, y]).sum(0), lambda x, y: torch.cat([x, y], 1)[:, 2:5], lambda x, y: x @ y[:, 0] + y,
)  # fmt: skip


def _program(seed: int) -> Function:
    """A random function of two matrices: its values are broadcast to matrices again after every step."""
    draws = np.random.default_rng(seed)
    kinds = draws.integers(0, 2, 25)
    steps = [(UNARY, BINARY)[kind][draws.integers(len((UNARY, BINARY)[kind]))] for kind in kinds]
    places = draws.random((25, 2))

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        values = [x, y]
        for kind, step, place in zip(kinds, steps, places, strict=True):
            args = [values[int(p * len(values))] for p in place[: kind + 1]]
            values.append(step(*args) * torch.ones(3, 3) if kind == 0 else step(*args))
        return [*values[2:], values[-1] > 0]

    return function


@pytest.mark.parametrize("seed", range(12))
def test_random_functions_give_the_same_bits(seed: int) -> None:
    function, draws = _program(seed), np.random.default_rng(seed + 100)
    tape = _written(function, [torch.randn(3, 3), torch.randn(3, 3)])
    assert tape.program is not None
    assert tape.program.expressed > len(tape._layout.written) / 2
    for turn in range(12):
        inputs = [torch.randn(3, 3) * 10.0 ** draws.integers(-3, 4) for _ in range(2)]
        if turn % 2:
            for x in inputs:
                x[torch.from_numpy(draws.random((3, 3)) < 0.4)] = float(draws.choice(SPECIAL))
        found, by_calls = tape(inputs), tape._quiet(tape._replay, inputs)
        assert all(map(_same_bits, found, by_calls))
        assert all(map(_same_bits, found, function(*inputs)))


def extremes(x: Tensor) -> list[Tensor]:
    positive = x.clamp(min=0.25)
    return [x.amax(0), x.amin(1, keepdim=True), x.max(), x.min(), positive, positive.argmax(-1, True), x.argmax(0)]


def quantified(x: Tensor) -> list[Tensor]:
    mask = x > 0
    return [
        mask.any(),
        mask.all(),
        mask.any(0),
        mask.all(1, keepdim=True),
        torch.where(mask.all(1), x, -x),
        ~mask & mask,
    ]


@pytest.mark.parametrize("function", [extremes, quantified])
def test_selections_treat_what_is_not_a_number_as_torch_does(function: Function) -> None:
    tape, draws = _written(function, [torch.randn(3, 3)]), np.random.default_rng(0)
    for _ in range(60):
        x = torch.from_numpy(draws.choice([2.0, -1.0, 3.0, math.inf, -math.inf, math.nan], (3, 3)))
        assert all(map(_same_bits, tape([x]), function(x)))


def test_inputs_of_all_kinds() -> None:
    """What a call reads too, floats for tensors without dims, memory in another order, what is too large to be read."""

    def function(small: Tensor, number: Tensor, turned: Tensor, large: Tensor) -> list[Tensor]:
        return [small * number + 1, small.exp() + small, turned - turned[0, 0], large * number, turned.log(), small]

    shapes = [torch.rand(3), torch.tensor(0.5), torch.rand(2, 4).mT, torch.rand(40, 5)]
    tape = _written(function, shapes)
    for _ in range(3):
        inputs = [torch.rand(3), torch.rand(()), torch.rand(2, 4).mT, torch.rand(5, 40).mT]
        assert all(map(_same_bits, tape([inputs[0], inputs[1].item(), *inputs[2:]]), function(*inputs)))


def test_outputs_are_new_each_time() -> None:
    tape = _written(lambda x: [x, x * 2, x.log()], [torch.ones(3)])
    x = torch.full((3,), 2.0)
    first = tape([x])
    for y in first:
        y.zero_()
    assert torch.equal(x, torch.full((3,), 2.0))
    assert torch.equal(tape([x])[1], 2 * x)
    assert not any(y.any() for y in first)


def _centred(size: int) -> Tape:
    centre, scale, mask = torch.randn(size), torch.ones(size), torch.arange(size) > 1
    return Tape(lambda x: [torch.where(mask, (x - centre) / scale, x.log()).sum()], [torch.rand(size)])


def test_a_structure_is_written_once_for_all_constants() -> None:
    """Other data, the same text: at once, with their own constants."""
    inputs = [torch.rand(4)]
    first = _centred(4)
    for _ in range(2):
        expected = first(inputs)
    assert first.program is not None
    second, other = _centred(4), _centred(3)
    by_calls = second(inputs)
    assert second.program is first.program
    assert torch.equal(second(inputs)[0], by_calls[0])
    assert not torch.equal(by_calls[0], expected[0])
    other([torch.rand(3)])
    assert other.program is None


def branches(x: Tensor) -> list[Tensor]:
    if bool((x > 1e3).any()) or not bool((x - x == 0).all()):
        return [x]
    index = int((x[0] > x[1]).sum())
    return [x * 2 if index == 3 else x]


@pytest.mark.parametrize("bad", [1e4, math.inf, math.nan, -math.inf])
def test_guards_hold_or_the_replay_is_void(bad: float) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]])
    tape = _written(branches, [x])
    assert torch.equal(tape([x + 1])[0], 2 * (x + 1))
    x[1, 2] = bad
    with pytest.raises(Deviation):
        tape([x])
    with pytest.raises(Deviation):
        tape([torch.ones(2, 3)])


def test_a_function_that_writes_in_place_keeps_its_calls() -> None:
    def function(x: Tensor) -> list[Tensor]:
        total = torch.zeros(3)
        total.add_(x * 2)
        before = total * 1.0
        total.mul_(x)
        return [total - before, before]

    tape = _written(function, [torch.randn(3)])
    for _ in range(3):
        x = torch.randn(3)
        assert all(map(_same_bits, tape([x]), function(x)))


@pytest.mark.parametrize("shape", [(3,), (5,), (7,), (9,), (2, 5), (5, 2), (3, 3), (16, 4)])
def test_the_order_of_sums_is_found(shape: tuple[int, ...]) -> None:
    """On a processor for which it is none of those known, sums stay calls."""
    for dims in ([0], [-1]):
        order = order_of(torch.ops.aten.sum.dim_IntList, torch.empty(shape), dims)
        if order is None:
            continue
        for _ in range(20):
            x = torch.randn(shape) * torch.randn(shape).mul(5).exp()
            parts = list(np.moveaxis(x.numpy(), dims[0], 0))
            assert np.array_equal(order(0.0, parts, np.add), x.sum(dims).numpy())


def test_orders_differ() -> None:
    """So that the one that is found is not any."""
    x = [1e16, 1.0, -1e16, 1.0, 1.0, 1.0, 3.0]
    assert _in_turn(0.0, x, lambda a, b: a + b) != _in_fours(0.0, x, lambda a, b: a + b)


def test_expressions_are_made_once_and_written_where_they_are_needed() -> None:
    numbers = Numbers()
    numbers.prefix = "x"
    a, b = numbers.given(), numbers.given()
    total = numbers.make("{0} + {1}", a, b)
    assert numbers.make("{0} + {1}", a, b) is total
    assert numbers.literal(0.0) is not numbers.literal(-0.0)
    chosen = numbers.choose(numbers.make("{0} > {1}", a, b), numbers.divide(total, b), numbers.literal(-math.inf))
    assert numbers.choose(numbers.literal(True), a, b) is a
    lines: list[str] = []
    count([chosen, total])
    write([chosen], lines)
    assert lines == ["x_2 = x_0 + x_1"]
    assert chosen.text == "((x_2 / x_1 if x_1 else over_zero(x_2, x_1)) if (x_0 > x_1) else (-inf))"


@pytest.mark.parametrize("a", [0.0, -0.0, 2.0, -2.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("b", [0.0, -0.0])
def test_division_by_zero_is_that_of_ieee(a: float, b: float) -> None:
    assert _same_bits(torch.tensor(over_zero(a, b)), torch.tensor(a) / torch.tensor(b))


def test_the_first_largest() -> None:
    for values in ([1.0, 3.0, 3.0], [math.inf, -math.inf, math.nan], [-math.inf, math.inf, 2.0], [math.nan, 5.0, 6.0]):
        assert first_largest(*values) == torch.tensor(values).argmax()


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9])
def test_the_place_of_the_largest(size: int) -> None:
    """By comparisons or not: the first of several, and what is not a number before all others."""
    tape, draws = _written(lambda x: [x.argmax(-1), x.argmax(0)], [torch.randn(2, size)]), np.random.default_rng(size)
    assert tape.program is not None and "call_" not in tape.program.source
    for turn in range(80):
        kinds = [2.0, -1.0, 3.0, math.inf, -math.inf, 0.0, -0.0, math.nan][: 7 + turn % 2]
        x = torch.from_numpy(draws.choice(kinds, (2, size)))
        assert torch.equal(tape([x])[0], x.argmax(-1)) and torch.equal(tape([x])[1], x.argmax(0))


def test_what_is_at_hand_is_no_detour_through_memory() -> None:
    """Sixty numbers that are joined: more than calls take as long for, were they not all in variables."""

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.cat([(2 * x).reshape(-1), (y - 1).reshape(-1), (3 * x).reshape(-1)]).abs().max()]

    tape, draws = _written(function, [torch.randn(4, 5), torch.randn(5, 4)]), np.random.default_rng(0)
    assert tape.program is not None and "call_" not in tape.program.source
    for _ in range(20):
        inputs = [torch.from_numpy(draws.normal(size=size)) for size in ((4, 5), (5, 4))]
        inputs[0][3, 4] = float(draws.choice(SPECIAL))
        assert _same_bits(tape(inputs)[0], function(*inputs)[0])


def test_entries_go_round_without_tensors() -> None:
    """What is small comes out as its entries and goes in as such, to the last bit; what is large stays a tensor, and so
    does everything before the function is written and where tensors are asked for."""

    def function(x: Tensor, y: Tensor, scale: Tensor) -> Sequence[Tensor]:
        return [x * scale + y.sum(), y / scale, x.sum()]

    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 2, generator=draws), torch.randn(9, 9, generator=draws)
    tape, plain = Tape(function, [x, y, torch.tensor(1.5)], entries=True), _written(function, [x, y, torch.tensor(1.5)])
    tape([x, y, 1.5]), tape([tuple(x.flatten().tolist()), y, 1.5])
    small, large, total = tape.run([x, y, 1.5])
    assert isinstance(small, tuple) and len(small) == 6 and isinstance(total, tuple) and isinstance(large, Tensor)
    again = tape.run([small, large, 0.5])
    expected = function(*function(x, y, torch.tensor(1.5))[:2], torch.tensor(0.5))
    for i, (own, value) in enumerate(zip(again, expected, strict=True)):
        assert _same_bits(tape.tensor(i, own), value) and tape.tensor(i, own).shape == value.shape
    given = plain.run([small, large, 0.5])
    assert all(isinstance(own, Tensor) and _same_bits(own, x) for own, x in zip(given, expected, strict=True))
