"""Operations of torch as expressions of their entries, where that gives the same bits.

IEEE arithmetic, comparisons and selections are what they are; of sums and products of matrices the order is found
(orders.py). Roots, logarithms and factorisations have no formula: they stay calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.tape.emit import PICKS
from pyro_em.tape.listing import Step, Variable
from pyro_em.tape.numbers import Array, Number, Numbers
from pyro_em.tape.orders import PRODUCTS, Order, dims_of, order_of
from pyro_em.tape.record import aten

Formula = Callable[[Numbers, Sequence[Any]], Array]
ARITHMETIC: dict[Any, Formula] = {
    aten.add.Tensor: lambda numbers, args: numbers.over(numbers.plus, *args),
    aten.sub.Tensor: lambda numbers, args: numbers.each("{0} - {1}", *args),
    aten.mul.Tensor: lambda numbers, args: numbers.over(numbers.times, *args),
    aten.div.Tensor: lambda numbers, args: numbers.over(numbers.divide, *args),
}
COMPARISONS = {
    getattr(getattr(aten, name), kind): f"{{0}} {sign} {{1}}"
    for name, sign in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="))
    for kind in ("Tensor", "Scalar")
}
LOGIC = {aten.bitwise_and.Tensor: "and", aten.bitwise_or.Tensor: "or"}
EXTREMES = {aten.amax.default: ">", aten.max.default: ">", aten.amin.default: "<", aten.min.default: "<"}
QUANTIFIERS = {aten.any.default: "or", aten.any.dim: "or", aten.all.default: "and", aten.all.dim: "and"}
COMPARED = 8  # entries up to which the place of the largest is found by comparisons
LIGHT = frozenset((*COMPARISONS, *LOGIC, *QUANTIFIERS, aten.bitwise_not.default))  # most are not computed after all
CHEAP = frozenset((*ARITHMETIC, aten.neg.default, aten.abs.default, aten.stack.default, aten.cat.default))  # by entry


def formula(step: Step, values: Sequence[Any], result: Tensor) -> Formula | None:
    """How the result's entries follow; `values` are the arguments with tensors (that may be any) for variables.

    A formula takes the arguments with arrays of numbers for tensors.
    """
    call, kinds = step.call, [x.dtype for x in values if isinstance(x, Tensor)]
    if call in (aten.stack.default, aten.cat.default):
        kinds = [x.dtype for x in values[0]]
        join = np.stack if call is aten.stack.default else np.concatenate
        dim = values[1] if len(values) > 1 else 0
        same = all(kind == result.dtype for kind in kinds) and not step.kwargs
        return (lambda numbers, args: join(args[0], dim)) if same else None
    if call in PICKS or call is aten.clone.default or call is aten._to_copy.default:
        return _pick(step, values, result)
    if step.kwargs:
        return None
    if result.dtype == torch.float64 and all(kind in (torch.float64, torch.bool) for kind in kinds):
        return _of_floats(call, values, kinds)
    if result.dtype == torch.bool and len(set(kinds)) == 1:
        return _of_masks(call, values, kinds[0])
    if call is aten.argmax.default and kinds == [torch.float64] and len(values) > 1:
        return partial(_reduced, dims=[values[1]], keep=len(values) > 2 and values[2], combine=_first_largest)
    return None


def _of_floats(call: Any, values: Sequence[Any], kinds: Sequence[torch.dtype]) -> Formula | None:
    if call is aten.where.self:
        same = kinds[1:] == [torch.float64] * 2
        return (lambda numbers, args: numbers.over(numbers.choose, *args)) if same else None
    if torch.float64 not in kinds:
        return None
    if call in ARITHMETIC:
        return ARITHMETIC[call]
    if any(kind == torch.bool for kind in kinds):
        return None
    if call is aten.neg.default:
        return lambda numbers, args: numbers.each("-{0}", args[0])
    if call is aten.abs.default:
        return lambda numbers, args: numbers.each("abs({0})", args[0])
    if call is aten.reciprocal.default or (call is aten.pow.Tensor_Scalar and values[1] in POWERS):
        return POWERS[-1 if call is aten.reciprocal.default else values[1]]
    if call is aten.clamp.default and len(values) == 2:
        return lambda numbers, args: numbers.each("{1} if {0} < {1} else {0}", *args)
    if call in EXTREMES:
        return partial(_reduced, **dims_of(values), combine=lambda numbers, xs: numbers.extreme(EXTREMES[call], xs))
    if call is aten.sum.dim_IntList or call is aten.sum.default:
        order = order_of(call, *values)
        return None if order is None else partial(_reduced, **dims_of(values), combine=_added(order))
    if call in PRODUCTS:
        order = order_of(call, *values)
        return None if order is None else partial(_multiplied, combine=_added(order))
    return None


def _of_masks(call: Any, values: Sequence[Any], kind: torch.dtype) -> Formula | None:
    if call in COMPARISONS:
        return lambda numbers, args: numbers.each(COMPARISONS[call], *args)
    if kind != torch.bool:
        return None
    if call in LOGIC:
        word = LOGIC[call]
        return lambda numbers, args: numbers.over(lambda a, b: numbers.joined(word, [a, b]), *args)
    if call is aten.bitwise_not.default:
        return lambda numbers, args: numbers.each("not {0}", args[0])
    if call in QUANTIFIERS:
        word = QUANTIFIERS[call]
        return partial(_reduced, **dims_of(values), combine=lambda numbers, xs: numbers.joined(word, xs))
    return None


POWERS: dict[float, Formula] = {  # as torch computes them
    1: lambda numbers, args: args[0],
    2: lambda numbers, args: numbers.each("{0} * {0}", args[0]),
    -1: lambda numbers, args: numbers.over(numbers.divide, numbers.literals(1.0), args[0]),
    -2: lambda numbers, args: numbers.over(
        numbers.divide, numbers.literals(1.0), numbers.each("{0} * {0}", args[0])
    ),
}  # fmt: skip


def _pick(step: Step, values: Sequence[Any], result: Tensor) -> Formula | None:
    source, rest = values[0], step.args[1:]
    if step.call is aten._to_copy.default:
        if source.dtype == torch.bool and result.dtype == torch.float64:
            return lambda numbers, args: numbers.each("{0} + 0.0", args[0])
        return (lambda numbers, args: args[0]) if source.dtype == result.dtype else None
    if step.call is aten.clone.default:
        return lambda numbers, args: args[0]
    if any(isinstance(x, Variable) for a in rest for x in (a if type(a) is list else [a])):
        return None  # where to look is not constant
    places = step.call(torch.arange(source.numel()).reshape(source.shape), *rest, **step.kwargs).numpy()
    return lambda numbers, args: np.asarray(args[0].reshape(-1)[places], object)


def _reduced(
    numbers: Numbers, args: Sequence[Any], dims: Sequence[int] | None, keep: bool, combine: Callable[..., Number]
) -> Array:
    x = args[0]
    axes = sorted(d % x.ndim for d in dims) if dims and x.ndim else list(range(x.ndim))
    rest = [d for d in range(x.ndim) if d not in axes]
    rows = x.transpose([*rest, *axes]).reshape([x.shape[d] for d in rest] + [-1])
    found = np.empty(rows.shape[:-1], object)
    for place in np.ndindex(found.shape):
        found[place] = combine(numbers, list(rows[place]))
    return found.reshape([1 if d in axes else n for d, n in enumerate(x.shape)]) if keep else found


def _multiplied(numbers: Numbers, args: Sequence[Any], combine: Callable[..., Number]) -> Array:
    a, b = args
    columns = b if b.ndim == 1 else np.expand_dims(b.swapaxes(-1, -2), -3)
    rows = a if b.ndim == 1 else np.expand_dims(a, -2)
    return _reduced(numbers, [numbers.over(numbers.times, rows, columns)], [-1], False, combine)


def _first_largest(numbers: Numbers, xs: Sequence[Number]) -> Number:
    """By comparisons, none of which holds beside what is not a number."""
    places = range(len(xs))
    text = f"first_largest({', '.join(f'{{{i}}}' for i in places)})"
    for i in reversed(places) if 1 < len(xs) <= COMPARED else ():
        tests = " and ".join(f"{{{i}}} >= {{{j}}}" for j in places if j != i)
        text = f"{i} if {tests} else {text}"
    return numbers.make(text, *xs)


def _added(order: Order) -> Callable[[Numbers, Sequence[Number]], Number]:
    def add(numbers: Numbers, xs: Sequence[Number]) -> Number:
        return order(numbers.literal(0.0), xs, numbers.plus)

    return add
