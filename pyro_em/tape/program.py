"""The text of a replay, which belongs to the structure of a list of operations and serves every list that has it.

Fits of one model to other data of the same size differ in the contents of constants alone. What a text calls and reads
is therefore bound by name: `get_3` reads the memory number 3, `put_3` writes it, `set_0` takes a tensor there,
`call_7` is the call of step 7, `k2_1` the entry 1 of constant 2, `out_0` the memory of an output. What a text was
written for by its contents (masks, integers, and floats that are 0, 1 or not finite) is part of the structure.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.tape.calls import OWN, Deviation
from pyro_em.tape.layout import Layout, Written
from pyro_em.tape.listing import Variable
from pyro_em.tape.numbers import NAMES

MANY = 64  # entries of memory that is worth reading
FORMATS = {torch.float64: "d", torch.bool: "?", torch.int64: "q"}
MOST_KEPT = 256  # programs
Entries = tuple[float, ...]


@dataclass(frozen=True)
class Program:
    """`source` defines `replay(*inputs)`; `names` are those it uses, but for NAMES. `expressed` counts steps that
    are expressions, `few` says which inputs it takes as tuples of their entries."""

    source: str
    code: CodeType
    names: Sequence[str]
    expressed: int
    few: Sequence[bool]

    def bound(self, layout: Layout) -> Callable[..., list[Entries | Tensor]]:
        """The function, for a list of operations that has the structure it was written for."""
        parts = Parts(layout)
        known = {**NAMES, "Deviation": Deviation, "of_array": torch.from_numpy}
        known |= {name: parts.named(name) for name in self.names}
        exec(self.code, known)
        found: Callable[..., list[Entries | Tensor]] = known["replay"]
        return found


class Parts:
    """Memories and constants of a list of operations, by number."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.memories: dict[int, tuple[int, Tensor]] = {}  # by address: number, and a tensor that is there
        for x in layout.places.values():
            self.memories.setdefault(address(x), (len(self.memories), x))
        self._places = [x for _, x in self.memories.values()]
        constants = (x for written in layout.written for x in tensors((written.step.args, written.step.kwargs)))
        self.constants = list({id(x): x for x in constants if not isinstance(x, Variable)}.values())
        self.numbers = {id(x): i for i, x in enumerate(self.constants)}

    def named(self, name: str) -> Any:
        """What a name of a program means."""
        kind, _, rest = name.partition("_")
        if kind[0] == "k":
            return self.constants[int(kind[1:])].detach().numpy().flat[int(rest)].item()
        index, _, place = rest.partition("_")
        number = int(index)
        if kind == "call":
            return self.layout.written[number].calls[int(place)]
        if kind == "out":
            return self.layout.outputs[number].numpy()
        if kind == "set":
            return self.layout.inputs[number].copy_
        x = self._places[number]
        flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).numpy()
        if kind == "get":
            return flat.tolist
        return partial(struct.Struct(f"{len(flat)}{FORMATS[x.dtype]}").pack_into, flat.data.cast("B"), 0)

    def key(self) -> Hashable:
        """Equal for lists of the same structure."""
        layout, numbers = self.layout, {x: i for i, x in enumerate(self.layout.places)}

        def frozen(x: Any) -> Hashable:
            kind = type(x)
            if kind is Variable:
                return numbers[x]
            if kind is list or kind is tuple:
                return (kind, *map(frozen, x))
            if kind is dict:
                return tuple((name, frozen(value)) for name, value in x.items())
            if isinstance(x, Tensor):
                return (self.numbers[id(x)], x.dtype, x.shape, x.stride(), contents(x))
            return (kind, repr(x) if kind is float else x)

        def step(w: Written) -> Hashable:
            if w.look is not None:
                return (numbers[w.look.source], w.look.value)
            own = w.step
            # Numbers among the arguments of the package's own operations say which table, not what is done.
            args = tensors(own.args) if own.call in OWN else own.args
            return (id(own.call), own.guard, len(w.calls), *map(frozen, (own.targets, args, own.kwargs)))

        return (
            tuple((*geometry(x), self.memories[address(x)][0]) for x in layout.places.values()),
            tuple(map(step, layout.written)),
            tuple(numbers[x] for x in layout.listing.inputs),
            tuple(numbers[x] if isinstance(x, Variable) else None for x in layout.listing.outputs),
        )


def ordinary(x: Tensor) -> Any:
    """Which entries of a constant a text treats like any others."""
    values = x.detach().numpy()
    if x.dtype != torch.float64:
        return np.zeros(values.shape, bool)
    return np.isfinite(values) & (values != 0) & (values != 1)


def contents(x: Tensor) -> bytes | None:
    """What a text is written for."""
    if x.numel() > MANY or x.dtype not in FORMATS or x.device.type != "cpu":
        return None
    return np.where(ordinary(x), 0.5, x.detach().numpy()).tobytes()


def geometry(x: Tensor) -> tuple[Hashable, ...]:
    """Type, and where the entries are."""
    return (x.dtype, x.device.type, x.shape, x.stride(), x.storage_offset(), x.untyped_storage().nbytes())


def address(x: Tensor) -> int:
    """Of the memory that a tensor is in."""
    return x.untyped_storage().data_ptr()


def tensors(values: Any) -> list[Any]:
    """Tensors and variables among arguments."""
    found: list[Any] = []
    stack = [values]
    while stack:
        x = stack.pop()
        if isinstance(x, Variable | Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            stack += x[::-1]
        elif isinstance(x, dict):
            stack += x.values()
    return found
