"""How one step is written as Python, when every value has memory of its own that stays where it is.

Small arithmetic goes to NumPy, whose calls take a third of the time of torch's: only operations that both round in
the same way (IEEE arithmetic, comparisons, selections), so that results are the same to the last bit. Roots (which
torch's vectorised ones do not round correctly), logarithms, sums, products of matrices and factorisations stay
torch's, which write into the memory that is given where they can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pyro_em.tape.listing import Step
from pyro_em.tape.record import aten

BINARY: dict[Any, Any] = {
    aten.add.Tensor: np.add,
    aten.sub.Tensor: np.subtract,
    aten.mul.Tensor: np.multiply,
    aten.div.Tensor: np.true_divide,
    aten.bitwise_and.Tensor: np.bitwise_and,
    aten.bitwise_or.Tensor: np.bitwise_or,
    **{getattr(aten, n).Tensor: getattr(np, m) for n, m in (
        ("eq", "equal"), ("ne", "not_equal"), ("lt", "less"), ("le", "less_equal"), ("gt", "greater"),
        ("ge", "greater_equal"),
    )},
    **{getattr(aten, n).Scalar: getattr(np, m) for n, m in (
        ("eq", "equal"), ("ne", "not_equal"), ("lt", "less"), ("le", "less_equal"), ("gt", "greater"),
        ("ge", "greater_equal"),
    )},
}  # fmt: skip
UNARY: dict[Any, Any] = {
    aten.neg.default: np.negative,
    aten.abs.default: np.absolute,
    aten.reciprocal.default: np.reciprocal,
    aten.bitwise_not.default: np.invert,
}
REDUCTIONS: dict[Any, Any] = {
    aten.amax.default: np.maximum.reduce,
    aten.amin.default: np.minimum.reduce,
    aten.max.default: np.maximum.reduce,
    aten.min.default: np.minimum.reduce,
    aten.any.default: np.logical_or.reduce,
    aten.any.dim: np.logical_or.reduce,
    aten.all.default: np.logical_and.reduce,
    aten.all.dim: np.logical_and.reduce,
}
WITH_OUT: dict[Any, Callable[..., Any]] = {
    aten.log.default: torch.log,
    aten.exp.default: torch.exp,
    aten.sqrt.default: torch.sqrt,
    aten.sum.dim_IntList: torch.sum,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.mv.default: torch.mv,
    aten.index_select.default: torch.index_select,
    aten.gather.default: torch.gather,
    aten.argmax.default: torch.argmax,
    aten._softmax.default: torch._softmax,
    aten.stack.default: torch.stack,
    aten.cat.default: torch.cat,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.hypot.default: torch.hypot,
    aten.log1p.default: torch.log1p,
    aten.expm1.default: torch.expm1,
    aten.lgamma.default: torch.lgamma,
    aten.digamma.default: torch.digamma,
    aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid,
    aten.logsumexp.default: torch.logsumexp,
    aten.linalg_cholesky_ex.default: torch.linalg.cholesky_ex,
    aten.cholesky_inverse.default: torch.cholesky_inverse,
    aten.cholesky_solve.default: torch.cholesky_solve,
    aten.linalg_solve_triangular.default: torch.linalg.solve_triangular,
}
PICKS = frozenset((  # entries of the first argument at places that the others, constants, say
    aten.index_select.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.flip.default,
))  # fmt: skip
POWERS: dict[float, tuple[Any, int]] = {  # as torch computes them: a function of x so many times
    1: (np.positive, 1),
    2: (np.multiply, 2),
    -1: (np.reciprocal, 1),
}
MOST_CELLS = 4096  # above, torch's vectorised loops win


def numpy_call(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]] | None:
    """A NumPy function and its arguments before `out`, or None if torch has to do it."""
    if call in BINARY and not kwargs:
        return BINARY[call], list(args)
    if call in UNARY:
        return UNARY[call], list(args)
    if call is aten.pow.Tensor_Scalar and args[1] in POWERS:
        function, times = POWERS[args[1]]
        return function, [args[0]] * times
    if call is aten.clamp.default and len(args) == 2:
        return np.maximum, list(args)
    if call in REDUCTIONS and not kwargs and len(args) <= 3:
        source, *rest = args
        axis = None if not rest or rest[0] == [] else tuple(rest[0]) if isinstance(rest[0], list) else rest[0]
        return REDUCTIONS[call], [source, axis, None, *([] if len(rest) < 2 else [...]), *rest[1:]]
    return None


def exactly_copied(step: Step, before: torch.dtype, after: torch.dtype) -> bool:
    """Whether the result is the first argument, of another layout or of a type that holds as much."""
    if step.call is aten._to_copy.default:
        return before == after or (after == torch.float64 and before in (torch.bool, torch.int32, torch.float32))
    return step.call is aten.clone.default
