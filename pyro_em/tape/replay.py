"""A function recorded once and replayed: its operations in a row, over memory that is laid out once (layout.py).

Nothing is allocated at a replay but the outputs, which are copies. A tape is not for two threads at once.
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
from pyro_em.tape.layout import Layout
from pyro_em.tape.record import NotRecorded, record
from pyro_em.tape.simplify import simplify

MOST = 10_000  # operations
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

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        """Record the function at `inputs`; `recorded` is what it gives there.

        :raises NotRecorded: where it cannot be replayed (record.py).
        """
        self._function: Callable[..., Sequence[Tensor]] | None = None
        with _no_collection():
            self._make(function, [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs])
        self._function = function  # until it has been compared once more

    def _make(self, function: Callable[..., Sequence[Tensor]], inputs: list[Tensor]) -> None:
        """What the recording consists of is gone when this returns, before anyone looks for cycles in it."""
        operations, outputs = record(function, inputs, MOST, _most_bytes())
        self.recorded = values = [x.clone() for x in outputs]
        self.listing = simplify(operations, inputs, outputs)
        layout = Layout(self.listing)
        if layout.size > _most_bytes():
            raise NotRecorded(f"{layout.size / 2**20:.0f} MiB of values")
        self._inputs, self._calls, self._outputs = layout.inputs, layout.calls, layout.outputs
        self._compare(self(inputs), values)
        if any(place.shape != shape for place, shape in layout.shapes()):
            raise NotRecorded("an operation gives another shape where its memory is given")
        self.listing = dataclasses.replace(self.listing, examples={})  # as large as the memory of the tape

    def _compare(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        if not all(_same(a, b) for a, b in zip(found, expected, strict=True)):
            raise NotRecorded("a replay differs from the function")

    def __call__(self, inputs: Sequence[Tensor | float]) -> list[Tensor]:
        """Outputs of the function at `inputs` (without gradients), tensors with memory of their own.

        :raises Deviation: if a guard does not hold. At the first call also `NotRecorded`, and what the function raises.
        """
        for place, x in zip(self._inputs, inputs, strict=True):
            if isinstance(x, float):
                place.fill_(x)
            else:
                place.copy_(x)
        # NumPy is to say as little as torch does; no call is for torch functions (device.py) to look at once more.
        with np.errstate(all="ignore"), torch._C.DisableTorchFunction():
            for call in self._calls:
                call()
        outputs = [x.clone(memory_format=torch.contiguous_format) for x in self._outputs]
        if self._function is not None:
            function, self._function = self._function, None
            with torch.no_grad():
                self._compare(outputs, function(*(place.clone() for place in self._inputs)))
        return outputs


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


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _most_bytes() -> int:
    """Of all values together, where tensors are made now."""
    return MOST_BYTES * chunk_scale(torch.get_default_device())
