"""A function of tensors as a list of steps: what simplify.py makes, and replay.py lays out.

Not handled: control flow. Every branch that was taken is a guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class Variable:
    """A value that follows from the inputs; equal only to itself."""

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Step:
    """`targets = call(*args, **kwargs)`; `guard` is what the call must give instead of targets.

    A target of None is an argument that was changed in place; a `view` shares the memory of its first argument.
    """

    call: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Variable | None, ...]
    single: bool
    guard: bool | int | None
    view: bool = False


@dataclass(frozen=True)
class Listing:
    """Steps in order; `outputs` are variables or constant tensors. `examples` are the recorded values of all."""

    inputs: tuple[Variable, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Variable | Tensor, ...]
    examples: Mapping[Variable, Tensor]
