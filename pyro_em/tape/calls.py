"""Calls whose arguments never change, as functions without arguments: Python then passes nothing at a replay.

Closures by number of arguments: they take the time of a written line, and none to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

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


def guard(call: Call, expected: bool | int) -> Call:
    """A call that raises `Deviation` if it gives something else."""

    def compare() -> None:
        if call() != expected:
            raise Deviation

    return compare
