"""Several steps of a loop as one index: what the body of a `pyro_em.markov` loop sees as `t`.

    x[t] (steps, rest),   t < lengths (steps, N),   t == 0 one answer for all,   f"z_{t}" the slice "z_1:1000"

Refused: what needs the step as a Python integer, and comparisons with a number that differ between steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import Refusal
from pyro_em.model.compat import plates_around

INDEXED = "_indexed_by_steps"  # attribute of what came out of x[t]
_COMPARISONS = {
    getattr(torch.Tensor, name) for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
} | {torch.Tensor.eq, torch.Tensor.ne, torch.Tensor.lt, torch.Tensor.le, torch.Tensor.gt, torch.Tensor.ge}
_ARITHMETIC = {
    getattr(torch.Tensor, f"__{side}{name}__") for name in ("add", "sub", "mul", "truediv") for side in ("", "r")
} | {torch.Tensor.add, torch.Tensor.sub, torch.Tensor.mul, torch.Tensor.div}


class Steps(torch.Tensor):
    """Several steps as one index; arithmetic with numbers gives steps again.

    Comparing with a number gives a bool where all steps agree (`t == 0` is False for t = 1, 2, ...), and is
    refused where they differ. With a tensor of other numbers, `t < lengths` with `lengths` (N,), it gives what each
    step gives, (steps, N). In a name, f"z_{t}", it reads as a slice, "z_1:1000".
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COMPARISONS | _ARITHMETIC and len(args) == 2:
            args = _beside(*args)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and isinstance(result, Tensor):
            setattr(result, INDEXED, True)
        alone = all(isinstance(a, cls | int | float) for a in args)
        if alone and func in _COMPARISONS:
            if bool(result.all()) or not bool(result.any()):
                return bool(result.all())
            raise _uneven("compares the step with a number, with another answer at some steps than at others")
        if alone and isinstance(result, Tensor) and result.dim() == 1 and not result.is_floating_point():
            return result.as_subclass(cls)
        return result

    def __hash__(self) -> int:
        raise _uneven("uses the step as a key (carry what the next step reads in a variable instead)")

    def __format__(self, spec: str) -> str:
        first, end = (int(x.as_subclass(Tensor)) for x in (self[:1], self[-1:] + 1))
        return f"{first:{spec}}:{end:{spec}}"

    def __str__(self) -> str:
        return format(self, "")

    def __index__(self) -> int:
        raise _uneven('uses the step as a Python integer (in a name, write f"z_{t}" for "z_%d" % t)')

    def __int__(self) -> int:
        raise _uneven('uses the step as a Python integer (in a name, write f"z_{t}" for "z_%d" % t)')

    def __float__(self) -> float:
        raise _uneven("uses the step as a Python number")

    def item(self) -> Any:
        """Refused: there are several."""
        raise _uneven("uses the step as a Python number")

    def __iter__(self) -> Iterator[Any]:
        raise _uneven("loops over the step")


def _beside(one: Any, other: Any) -> tuple[Any, Any]:
    """Two operands, the steps left of the dims of what is no number for each of them."""
    if isinstance(other, Steps):
        return (one, other) if isinstance(one, Steps) else _beside(other, one)[::-1]
    if isinstance(one, Steps) and isinstance(other, Tensor) and other.dim():
        right = other.dim() - _of_steps(other, len(one))
        return one.as_subclass(Tensor).reshape(-1, *(1,) * right), other
    return one, other


def _of_steps(other: Tensor, steps: int) -> bool:
    """Whether a tensor has an entry for each step, as x[t] has, and not one for each element of a plate as large."""
    inside = sorted(plates_around().items())[1:]  # the leftmost is the plate of the steps
    return len(other) == steps and (hasattr(other, INDEXED) or all(size != steps for _, size in inside))


def _uneven(what: str) -> Refusal:
    return Refusal(
        "",
        f"the body of a pyro_em.markov loop {what}; all steps after the first are run at once.",
        "index tensors by the step, x[t], with time as their first dim, or write pyro.markov(range(T)), which runs "
        "every step by itself.",
    )
