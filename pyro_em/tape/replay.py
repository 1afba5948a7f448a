"""A function recorded once and replayed: its operations in a row, over memory that is laid out once (layout.py).

Nothing is allocated at a replay but the outputs, which are copies. A tape is not for two threads at once. One that is
replayed often goes on as a function of its own, in which what is small is arithmetic of Python (scalars.py). What comes
out of that and goes into the next one need be no tensor in between: `entries` are the numbers themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_em.device import chunk_scale
from pyro_em.tape.calls import Deviation, quiet
from pyro_em.tape.layout import Layout
from pyro_em.tape.program import Entries, Program
from pyro_em.tape.record import NotRecorded, record
from pyro_em.tape.scalars import known, written
from pyro_em.tape.simplify import simplify

MOST = 10_000  # operations
OFTEN = 300  # replays after which a tape is written as a function: as many again make up for what that takes
LONGEST = 2_000  # calls of which a function is written
MOST_BYTES = 2**26  # of all values together, on the CPU; where they are more, Python is the smaller part


class Tape:
    """What a function of tensors does, replayed.

    `function` maps tensors to a sequence of tensors, always with the same shapes. A replay gives exactly what the
    function gives, or raises `Deviation` (or the error of a failed factorisation). The first replay is compared with
    the function: what the recording did not see (record.py) shows at other inputs.

    >>> tape = Tape(lambda x: [(x * 2).sum() + x.sum()], [torch.ones(3)])
    >>> tape([torch.full((3,), 2.0)])
    [tensor(18.)]
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], entries: bool = False
    ) -> None:
        """Record the function at `inputs`; `recorded` is what it gives there.

        :param entries: what `run` gives is seldom needed as tensors.

        :raises NotRecorded: where it cannot be replayed (record.py).
        """
        self._function: Callable[..., Sequence[Tensor]] | None = None
        self.program: Program | None = None  # of the function that goes on
        self._written: Callable[..., list[Entries | Tensor]] | None = None
        self._entries = entries
        self._few: Sequence[bool] = ()  # inputs that the function takes as entries
        self._quiet, self._count = quiet(), 0
        with _no_collection():
            self._make(function, [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs])
        self._function = function  # until it has been compared once more

    def _make(self, function: Callable[..., Sequence[Tensor]], inputs: list[Tensor]) -> None:
        """What the recording consists of is gone when this returns, before anyone looks for cycles in it."""
        operations, outputs = record(function, inputs, MOST, _most_bytes())
        self.recorded = values = [x.clone() for x in outputs]
        listing = simplify(operations, inputs, outputs)
        self._layout = layout = Layout(listing)
        if layout.size > _most_bytes():
            raise NotRecorded(f"{layout.size / 2**20:.0f} MiB of values")
        self._calls = [call for own in layout.written for call in own.calls]
        self._compare(self(inputs), values)
        if any(place.shape != shape for place, shape in layout.shapes()):
            raise NotRecorded("an operation gives another shape where its memory is given")
        # What the recording has seen is as large as the memory of the tape.
        self.listing = layout.listing = dataclasses.replace(listing, examples={})

    def _compare(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        if not all(_same(a, b) for a, b in zip(found, expected, strict=True)):
            raise NotRecorded("a replay differs from the function")

    def __call__(self, inputs: Sequence[Tensor | Entries | float]) -> list[Tensor]:
        """Outputs of the function at `inputs` (without gradients), tensors with memory of their own.

        :param inputs: as they were recorded; floats may stand for tensors without dims.
        :raises Deviation: if a guard does not hold. At the first call also `NotRecorded`, and what the function raises.
        """
        return [self.tensor(i, x) for i, x in enumerate(self.run(inputs))]

    def run(self, inputs: Sequence[Tensor | Entries | float]) -> list[Tensor | Entries]:
        """The same, where an output of few entries may be the tuple of them, as an input may."""
        if self._written is not None:
            return self._quiet(self._written, self._received(inputs))
        outputs = self._quiet(self._replay, inputs)
        self._count += 1
        if self._function is not None:
            function, self._function = self._function, None
            with torch.no_grad():
                self._compare(outputs, function(*(place.clone() for place in self._layout.inputs)))
            self._write(known, outputs)
        elif self._count == OFTEN:
            self._write(written, outputs)
        return outputs

    def tensor(self, i: int, x: Tensor | Entries) -> Tensor:
        """An output of `run`, the i-th, as a tensor."""
        return _tensor(x, self._layout.outputs[i]) if type(x) is tuple else x  # type: ignore[return-value]

    def _received(self, inputs: Sequence[Tensor | Entries | float]) -> list[Tensor | Entries]:
        if all(self._few):
            return [x if type(x) is tuple else _entries(x) for x in inputs]
        given = zip(self._few, inputs, self._layout.inputs, strict=True)
        return [_entries(x) if few else _tensor(x, place) if type(x) is tuple else x for few, x, place in given]  # type: ignore[misc]

    def _replay(self, *inputs: Tensor | Entries | float) -> list[Tensor]:
        for place, x in zip(self._layout.inputs, inputs, strict=True):
            if isinstance(x, float):
                place.fill_(x)
            else:
                place.copy_(_tensor(x, place) if isinstance(x, tuple) else x)
        for call in self._calls:
            call()
        return [x.clone(memory_format=torch.contiguous_format) for x in self._layout.outputs]

    def _write(self, program: Callable[[Layout, bool], Program | None], expected: Sequence[Tensor]) -> None:
        """Go on with a function that takes less time, if there is one and it gives the same here."""
        if len(self._calls) > LONGEST or not self._layout.on_cpu():
            return
        with _no_collection():
            found = self._quiet(program, [self._layout, self._entries])
        if found is None:
            return
        function, self._few = found.bound(self._layout), found.few
        try:
            given = self._quiet(function, self._received([place.clone() for place in self._layout.inputs]))
        except Deviation:
            return
        if all(_same(self.tensor(i, x), y) for i, (x, y) in enumerate(zip(given, expected, strict=True))):
            self.program, self._written = found, function


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A recording is many objects that live for a moment: no search for cycles among them, which takes longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _entries(x: Tensor | Entries | float) -> Entries:
    if type(x) is tuple:
        return x
    if isinstance(x, Tensor):
        return tuple(x.tolist() if x.ndim == 1 else x.reshape(-1).tolist())
    return (x,)  # type: ignore[return-value]


def _tensor(x: Entries, like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(x, like.detach().numpy().dtype).reshape(like.shape))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _most_bytes() -> int:
    """Of all values together, where tensors are made now."""
    return MOST_BYTES * chunk_scale(torch.get_default_device())
