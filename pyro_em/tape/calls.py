"""Calls whose arguments never change, as functions without arguments: Python then passes nothing at a replay.

`functools.partial` of positional arguments calls a function of C without a frame of Python; keywords cost it a
dictionary, so that torch's `out`, which has no position, is bound by a closure.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], Any]


class Deviation(Exception):
    """A guard has another value than when the function was recorded: the replay is void."""


def bound(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Call:
    """`function(*args, **kwargs)`."""
    if not kwargs:
        return partial(function, *args)
    if kwargs.keys() == {"out"} and 1 <= len(args) <= 3:
        return WITH_OUT[len(args)](function, *args, kwargs["out"])
    return partial(function, *args, **kwargs)


Writer = Callable[[Sequence[Any], Sequence[Any]], Call]
OWN: dict[Any, Writer] = {}  # by operation


def written_by(operation: Any) -> Callable[[Writer], Writer]:
    """Of an operation that the package has registered with torch: its arguments and the memory of its results, as
    arrays, as a call that does the same. Replays then go past torch's dispatcher."""

    def noted(writer: Writer) -> Writer:
        OWN[operation] = writer
        return writer

    return noted


def _one(function: Callable[..., Any], a: Any, out: Any) -> Call:
    return lambda: function(a, out=out)


def _two(function: Callable[..., Any], a: Any, b: Any, out: Any) -> Call:
    return lambda: function(a, b, out=out)


def _three(function: Callable[..., Any], a: Any, b: Any, c: Any, out: Any) -> Call:
    return lambda: function(a, b, c, out=out)


WITH_OUT: dict[int, Callable[..., Call]] = {1: _one, 2: _two, 3: _three}


def copied(call: Call, out: Tensor | tuple[Tensor, ...]) -> Call:
    """A call whose results have memory of their own: copied to where they belong."""
    if isinstance(out, tuple):

        def several() -> None:
            for place, x in zip(out, call(), strict=True):
                place.copy_(x)

        return several
    copy = out.copy_
    return lambda: copy(call())


def guard(call: Call, expected: Any) -> Call:
    """A call that raises `Deviation` if it gives something else."""

    def compare() -> None:
        if call() != expected:
            raise Deviation

    return compare


def all_are(array: np.ndarray[Any, Any], value: bool | int) -> Call:
    """A guard: every entry of the Booleans or integers is this (their bytes are, which is a quarter of the time)."""
    return guard(array.tobytes, np.full_like(array, value).tobytes())


def all_finite(array: np.ndarray[Any, Any]) -> Call:
    """A guard for contiguous floats: 0·x is 0 for finite x, else it is not a number."""
    return guard(partial(array.reshape(-1).dot, np.zeros(array.size, array.dtype)), 0.0)


def quiet() -> Callable[[Callable[..., Any], Sequence[Any]], Any]:
    """How to call a function so that NumPy says as little as torch does, and no torch function mode looks at it.

    The modes (device.py) have had their say when the calls were recorded. NumPy's state belongs to a context, which
    is kept: to enter one takes a twentieth of the time of `np.errstate`, which is what is left for NumPy before 2.
    """
    with np.errstate(all="ignore"):
        context = contextvars.copy_context()
    if context.run(np.geterr) != dict.fromkeys(("divide", "over", "under", "invalid"), "ignore"):
        return _with_errstate

    def run(function: Callable[..., Any], args: Sequence[Any]) -> Any:
        with torch._C.DisableTorchFunction():
            return context.run(function, *args)

    return run


def _with_errstate(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    with np.errstate(all="ignore"), torch._C.DisableTorchFunction():
        return function(*args)
