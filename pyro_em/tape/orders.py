"""The order in which torch adds few numbers: sums and products of matrices to the last bit.

Floating-point sums depend on it, and it depends on shape, strides, processor and library. It is therefore found: the
first of the orders known with which random values, zeros of both signs, infinities and what is not a number give what
torch gives, bit for bit. Where it is none of them the call stays torch's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.tape.record import aten

PRODUCTS = (aten.mv.default, aten.mm.default, aten.bmm.default)
TRIALS = 24

Order = Callable[[Any, Sequence[Any], Callable[[Any, Any], Any]], Any]  # of 0, what to add and how


def dims_of(values: Sequence[Any]) -> dict[str, Any]:
    """Dims of a reduction and whether they are kept, from its arguments."""
    dims = values[1] if len(values) > 1 else None
    return {"dims": [dims] if isinstance(dims, int) else dims, "keep": len(values) > 2 and values[2]}


def _in_turn(zero: Any, xs: Sequence[Any], add: Callable[[Any, Any], Any]) -> Any:
    total = xs[0]
    for x in xs[1:]:
        total = add(total, x)
    return total


def _in_fours(zero: Any, xs: Sequence[Any], add: Callable[[Any, Any], Any]) -> Any:
    """Each fourth together, what is left over with the first."""
    if len(xs) < 4:
        return _in_turn(zero, xs, add)
    whole = len(xs) // 4 * 4
    parts = [_in_turn(zero, xs[k:whole:4], add) for k in range(4)]
    return _in_turn(zero, [_in_turn(zero, [parts[0], *xs[whole:]], add), *parts[1:]], add)


def _in_lanes(zero: Any, xs: Sequence[Any], add: Callable[[Any, Any], Any], lanes: int) -> Any:
    """What is left over first, then lane after lane."""
    whole = len(xs) // lanes * lanes
    return _in_turn(
        zero, [*xs[whole:], *(_in_fours(zero, xs[k:whole:lanes], add) for k in range(min(lanes, whole)))], add
    )


def _from_zero(zero: Any, xs: Sequence[Any], add: Callable[[Any, Any], Any], within: Callable[..., Any]) -> Any:
    """0 + x is x but for -0.0, so that it does not matter when 0 is added."""
    return add(within(zero, xs, add), zero)


WITHIN: tuple[Order, ...] = (_in_turn, _in_fours, *(partial(_in_lanes, lanes=n) for n in (4, 8, 2)))
ORDERS = tuple(order for within in WITHIN for order in (within, partial(_from_zero, within=within)))


def order_of(call: Any, *args: Any) -> Order | None:
    """The order in which torch adds in this call, or None if it is none of those known."""
    return _found(
        call, *[_geometry(x) if isinstance(x, Tensor) else tuple(x) if isinstance(x, list) else x for x in args]
    )


@cache
def _found(call: Any, *args: Any) -> Order | None:
    draws = np.random.default_rng(0)
    trials = [
        [_trial(x, draws, i, first=x is args[0]) if type(x) is Geometry else _listed(x) for x in args]
        for i in range(TRIALS)
    ]
    expected = np.stack([call(*trial).numpy() for trial in trials])
    arrays = [np.stack([x.numpy() for x in own]) for own in zip(*trials, strict=True) if isinstance(own[0], Tensor)]
    with np.errstate(all="ignore"):
        if call in PRODUCTS:
            a, b = arrays
            terms = a * b[:, None] if b.ndim == 2 else a[..., :, None, :] * b.swapaxes(-1, -2)[..., None, :, :]
            axes, keep = [terms.ndim - 1], False
        else:
            terms, own = arrays[0], dims_of([None, *map(_listed, args[1:])])
            axes = [1 + d % (terms.ndim - 1) for d in own["dims"] or range(terms.ndim - 1)]
            keep = own["keep"]
        rest = [d for d in range(terms.ndim) if d not in axes]
        rows = terms.transpose([*rest, *sorted(axes)]).reshape([terms.shape[d] for d in rest] + [-1])
        parts = [rows[..., k] for k in range(rows.shape[-1])]
        shape = expected.shape if keep else rows.shape[:-1]
        for order in ORDERS:
            if _same_bits(order(0.0, parts, operator.add).reshape(shape), expected):
                return order
    return None


class Geometry(tuple[tuple[int, ...], tuple[int, ...]]):
    """Shape and stride."""


def _geometry(x: Tensor) -> Geometry:
    return Geometry((tuple(x.shape), x.stride()))


def _listed(x: Any) -> Any:
    return list(x) if type(x) is tuple else x


def _trial(geometry: Geometry, draws: np.random.Generator, turn: int, first: bool) -> Tensor:
    """Random values of many sizes; in the last turns infinities, zeros of both signs, and -0.0 (times 1) alone."""
    shape, stride = geometry
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    values = draws.normal(size=size) * np.exp(4 * draws.normal(size=size))
    special = {
        1: (-0.0 if first else 1.0,),
        2: (0.0, -0.0),
        3: (1.0, np.inf, -1.0),
        4: (1.0, np.nan, np.inf, -np.inf, 2.0, 3.0),
    }
    if TRIALS - turn in special:
        values = draws.choice(special[TRIALS - turn], size)
    return torch.from_numpy(values).as_strided(shape, stride)


def _same_bits(a: Any, b: Any) -> bool:
    return bool((((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))).all())
