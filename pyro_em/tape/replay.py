"""A simplified list of operations as calls over memory that is laid out once.

Every value keeps its place from one replay to the next, so that views cost nothing and nothing is allocated but the
outputs, which are copies. A tape is therefore not for two threads at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.device import chunk_scale
from pyro_em.tape.calls import Call, bound, copied, guard
from pyro_em.tape.emit import BINARY, MOST_CELLS, WITH_OUT, numpy_call
from pyro_em.tape.listing import Listing, Step, Variable
from pyro_em.tape.record import READ, NotRecorded, aten, each, record
from pyro_em.tape.simplify import CHECK, simplify

MOST = 10_000  # operations
DTYPES = (torch.float64, torch.float32, torch.bool, torch.int64, torch.int32)  # that NumPy treats as torch does
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
        """Record the function at `inputs`.

        :raises NotRecorded: where it cannot be replayed (record.py).
        """
        self._function: Callable[..., Sequence[Tensor]] | None = None
        with _no_collection():
            self._make(function, [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs])
        self._function = function  # until it has been compared once more

    def _make(self, function: Callable[..., Sequence[Tensor]], inputs: list[Tensor]) -> None:
        """What the recording consists of is gone when this returns, before anyone looks for cycles in it."""
        operations, outputs = record(function, inputs, MOST, _most_bytes())
        values = [x.clone() for x in outputs]
        self.listing = simplify(operations, inputs, outputs)
        writer = _Writer(self.listing)
        self._inputs, self._calls, self._outputs = writer.function()
        self._compare(self(inputs), values)
        if any(place.shape != shape for place, shape in writer.shapes()):
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


class _Writer:
    """Lays out the memory, and makes one call without arguments of every step."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.places: dict[Variable, Tensor] = {}
        self.arrays: dict[int, Any] = {}  # the same memory for NumPy, by id of the tensor
        self.calls: list[Call] = []
        self.size = 0

    def function(self) -> tuple[list[Tensor], list[Call], list[Tensor]]:
        """Memory of the inputs, what to call, memory of the outputs."""
        for variable in self.listing.inputs:
            self._place(variable)
        for step in self.listing.steps:
            self._write(step)
        if self.size > _most_bytes():
            raise NotRecorded(f"{self.size / 2**20:.0f} MiB of values")
        outputs = [self._tensor(x) for x in self.listing.outputs]
        return [self.places[v] for v in self.listing.inputs], self.calls, outputs

    def shapes(self) -> list[tuple[Tensor, torch.Size]]:
        """Memory of every value, and its shape as recorded."""
        return [(place, self.listing.examples[v].shape) for v, place in self.places.items()]

    def _place(self, variable: Variable) -> Tensor:
        example = self.listing.examples[variable]
        place = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)
        self.places[variable] = place
        self.size += place.numel() * place.element_size()
        return place

    def _tensor(self, x: Any) -> Any:
        if isinstance(x, Variable):
            return self.places[x]
        return x.detach() if isinstance(x, Tensor) and x.requires_grad else x

    def _array(self, x: Any) -> Any:
        """The same memory as a NumPy array, for a tensor or variable."""
        if not isinstance(x, Variable | Tensor):
            return x
        tensor = self._tensor(x)
        found = self.arrays.get(id(tensor))
        if found is None:
            found = tensor.detach().numpy()
            if isinstance(x, Variable) or tensor is x:  # held elsewhere, so that its id stays its own
                self.arrays[id(tensor)] = found
        return found

    def _write(self, step: Step) -> None:
        args, kwargs = each(self._tensor, step.args), each(self._tensor, step.kwargs)
        if step.view:
            made = step.call(*args, **kwargs)
            for target, view in zip(step.targets, [made] if step.single else made, strict=True):
                if target is not None:
                    self.places[target] = view
            return
        if step.guard is not None:
            read = self._array(step.args[0]).item if step.call is READ and _on_cpu(args) else None
            self.calls.append(guard(read or bound(step.call._op, args, kwargs), step.guard))
            return
        if step.call is CHECK and _on_cpu(args):
            self.calls.append(guard(self._array(step.args[0]).any, False))
            return
        if None in step.targets or not step.targets:
            self.calls.append(bound(step.call._op, args, kwargs))
            return
        places = [self._place(target) for target in step.targets if target is not None]
        if self._write_numpy(step, places):
            return
        out = places[0] if step.single else tuple(places)
        if step.call in WITH_OUT:
            self.calls.append(bound(WITH_OUT[step.call], args, {**kwargs, "out": out}))
        else:
            self.calls.append(copied(bound(step.call._op, args, kwargs), out))

    def _write_numpy(self, step: Step, places: list[Tensor]) -> bool:
        flat = [x for a in step.args for x in (a if isinstance(a, list | tuple) else [a])]
        values = [self._tensor(x) for x in flat if isinstance(x, Variable | Tensor)]
        values += places
        if not all(x.device.type == "cpu" and x.dtype in DTYPES and x.numel() <= MOST_CELLS for x in values):
            return False
        out, call = self._array(places[0]), step.call
        if call is aten.where.self:
            mask, yes, no = (self._array(x) for x in step.args)
            self.calls += [bound(np.copyto, [out, no]), bound(np.copyto, [out, yes], {"where": mask})]
            return True
        if call is aten.stack.default or call is aten.cat.default:
            self._write_pieces(step, places[0])
            return True
        if call is aten.clone.default:
            self.calls.append(bound(np.copyto, [out, self._array(step.args[0])]))
            return True
        found = numpy_call(call, step.args, step.kwargs)
        if found is None:
            return False
        function, args = found
        kind = self._array(next(x for x in step.args if isinstance(x, Variable | Tensor))).dtype
        plain = call in BINARY or call is aten.clamp.default
        if plain:  # a scalar of another type would be converted at every call
            args = [np.asarray(x, kind) if isinstance(x, int | float) and kind.kind == "f" else x for x in args]
        words = [out if x is ... else self._array(x) for x in args]
        self.calls.append(bound(function, words, {} if ... in args else {"out": out}))
        return True

    def _write_pieces(self, step: Step, place: Tensor) -> None:
        """Stacked or concatenated values, each copied to its part of the result."""
        parts, dim = step.args[0], step.args[1] if len(step.args) > 1 else 0
        tensors = [self._tensor(x) for x in parts]
        if step.call is aten.stack.default:
            pieces = list(place.unbind(dim))
        else:
            pieces = list(place.split([x.shape[dim] for x in tensors], dim))
        for piece, part in zip(pieces, parts, strict=True):
            self.calls.append(bound(np.copyto, [piece.numpy(), self._array(part)]))


def _on_cpu(values: Sequence[Any]) -> bool:
    return all(x.device.type == "cpu" for x in values if isinstance(x, Tensor))


def _most_bytes() -> int:
    """Of all values together, where tensors are made now."""
    return MOST_BYTES * chunk_scale(torch.get_default_device())
