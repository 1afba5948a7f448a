"""What a function of tensors does, as a list of operations: `record` runs it once and writes down every call.

Only what depends on the inputs matters later; everything else is a constant. A value that leaves the tensors
decides what the program does next: a Boolean (`if bool(bad.any())`) is noted as a *guard*, to be compared at
every replay, and so is an integer (the status of a factorisation, an index); any other number that is read, a random
draw, or a shape that depends on the data is refused.
Gradients are recorded as what they are, the operations of a backward pass.

Random draws from a generator of the function's own are constants, if it is seeded alike at every call. That, and
state of Python that the function reads, is not seen here. Callers compare replays with the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

READ = aten._local_scalar_dense.default
# Ways out of torch that the dispatcher misses.
LEAVING = frozenset((Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__))
DYNAMIC_SHAPE = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default)
SHAPES = frozenset((*DYNAMIC_SHAPE, aten.index.Tensor))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among arguments, and within lists of them."""
    found = []
    for value in values:
        kind = type(value)
        if kind is Tensor or isinstance(value, Tensor):
            found.append(value)
        elif kind is list or kind is tuple:
            found += _tensors(value)
    return found


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of an argument, or of each entry of a list, tuple or dict of arguments."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([each(function, x) for x in value])
    if kind is dict:
        return {name: each(function, x) for name, x in value.items()}
    return function(value)


class NotRecorded(Exception):
    """The function does something that a list of tensor operations cannot repeat; the text says what."""


@dataclass(frozen=True, eq=False)
class Kind:
    """What the schema of a call says.

    `is_view`: the output shares the first argument's memory and is not a changed argument itself. `written`: position
    and name of each argument that the call changes in place.
    """

    is_view: bool
    written: tuple[tuple[int, str], ...]
    draws: bool
    reshapes: bool
    reads_shape: bool  # what it gives may have a shape that depends on the data
    call: Any  # held, so that its id stays its own


_KINDS: dict[int, Kind] = {}  # by id of the call, whose hash is slow


def kind_of(call: Any) -> Kind:
    """The kind of a call (torch._ops.OpOverload)."""
    found = _KINDS.get(id(call))
    if found is None:
        infos = [r.alias_info for r in call._schema.returns]
        view = bool(infos) and infos[0] is not None and not infos[0].is_write
        aliases = [(i, x.name, x.alias_info) for i, x in enumerate(call._schema.arguments)]
        written = tuple((i, name) for i, name, alias in aliases if alias is not None and alias.is_write)
        draws, reshapes = (tag in call.tags for tag in (torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view))
        found = _KINDS[id(call)] = Kind(view, written, draws, reshapes, call in SHAPES, call)
    return found


class Operation:
    """One call: `outputs` are its tensors; `guard` is the Boolean or integer that it gave instead, if it did.

    `inputs` are the tensors among its arguments, `written` those that it changes in place; `reads`, `makes` and
    `changes` the memory (`storage`) of inputs, outputs and written ones. It `follows` if what it reads depends on the
    inputs of the recording.
    """

    __slots__ = (
        "args", "call", "changes", "follows", "guard", "inputs", "is_view", "kwargs", "makes", "outputs", "reads",
        "single", "written",
    )  # fmt: skip

    def __init__(
        self,
        call: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        places: Callable[[Sequence[Tensor]], list[int]],
        outputs: tuple[Tensor, ...] = (),
        single: bool = False,
        guard: bool | int | None = None,
    ) -> None:
        self.call, self.args, self.kwargs = call, args, kwargs
        self.single, self.guard, self.follows = single, guard, False
        self.inputs: list[Tensor] = _tensors(args)
        if kwargs:
            self.inputs += _tensors(kwargs.values())
        self.reads = places(self.inputs) if self.inputs else []
        kind = kind_of(call)
        self.is_view = kind.is_view
        self.outputs = outputs
        self.makes = places(outputs) if outputs else []
        self.written: Sequence[Tensor] = ()
        self.changes: Sequence[int] = ()
        if kind.written:
            values = [kwargs.get(name, args[i] if i < len(args) else None) for i, name in kind.written]
            self.written = _tensors(values)
            self.changes = places(self.written)


@dataclass
class _Recorder(TorchDispatchMode):
    operations: list[Operation] = field(default_factory=list)
    dependent: set[int] = field(default_factory=set)  # storages that hold what follows from the inputs
    most: int = 0
    most_bytes: float = math.inf
    _bytes: int = 0
    _storages: dict[int, int] = field(default_factory=dict)  # by id of tensors, which the operations hold

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch.compile is not in play here, and to say so to it would import it: a second of start-up."""
        return False

    def places(self, tensors: Sequence[Tensor]) -> list[int]:
        """Their storages."""
        known, found = self._storages, []
        for x in tensors:
            own = known.get(id(x))
            if own is None:
                own = known[id(x)] = storage(x)
            found.append(own)
        return found

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(call)
        if kind.reshapes:
            return self._reshaped(call, args, kwargs)
        if kind.draws and kwargs.get("generator") is None:
            raise NotRecorded(f"a random draw ({call})")
        result = call._op(*args, **kwargs)
        single = type(result) is Tensor or isinstance(result, Tensor)
        outputs = (result,) if single else tuple(result) if isinstance(result, tuple | list) else ()
        own = Operation(call, args, kwargs, self.places, outputs, single)
        self.operations.append(own)
        if not self.dependent.isdisjoint(own.reads):
            self._follows(own, kind, result)
        if len(self.operations) > self.most:
            raise NotRecorded(f"more than {self.most} operations")
        return result

    def _follows(self, own: Operation, kind: Kind, result: Any) -> None:
        """What it gives depends on the inputs."""
        own.follows = True
        self.dependent.update(own.makes, own.changes)
        if isinstance(result, bool | int):
            own.guard = result
        elif not isinstance(result, Tensor | tuple | list | None):
            raise NotRecorded(f"a number was read from a tensor ({own.call})")
        if kind.reads_shape:
            self._check(own)
        if not kind.is_view:
            for x in own.outputs:
                self._bytes += x.nbytes
            if self._bytes > self.most_bytes:
                raise NotRecorded(f"more than {self.most_bytes / 2**20:.0f} MiB of values")

    def _reshaped(self, call: Any, args: Any, kwargs: Any) -> Any:
        """A tensor that is given another shape in place: from here on it is a view of what it was before."""
        view = _out_of_place(call)
        x, before = args[0], args[0].detach()

        def as_it_was(value: Any) -> Any:
            return before if value is x else value

        for i in range(len(self.operations) - 1, -1, -1):
            own = self.operations[i]
            made = any(y is x for y in own.outputs)
            if made or any(y is x for y in own.inputs):
                then = [each(as_it_was, y) for y in (own.args, own.kwargs, own.outputs)]
                again = Operation(own.call, then[0], then[1], self.places, then[2], own.single, own.guard)
                again.follows, self.operations[i] = own.follows, again
            if made:
                break
        call(*args, **kwargs)
        own = Operation(view, (before, *args[1:]), kwargs, self.places, (x,), True)
        own.follows = not self.dependent.isdisjoint(own.reads)
        self.operations.append(own)
        return x

    def _check(self, operation: Operation) -> None:
        others = zip(operation.inputs[1:], operation.reads[1:], strict=True)
        masks = [x for x, own in others if x.dtype == torch.bool and own in self.dependent]
        if operation.call is not aten.index.Tensor or masks:
            raise NotRecorded(f"a shape that depends on the data ({operation.call})")


def _out_of_place(call: Any) -> Any:
    """`squeeze` for `squeeze_`, with the same arguments."""
    kinds = [str(argument.type) for argument in call._schema.arguments]
    packet = getattr(aten, call._overloadpacket.__name__.rstrip("_"), None)
    for overload in () if packet is None else packet.overloads():
        found = getattr(packet, overload)
        if [str(argument.type) for argument in found._schema.arguments] == kinds:
            return found
    raise NotRecorded(f"memory of another size ({call})")


class _Guarded(TorchFunctionMode):
    """Refuses to let values that follow from the inputs leave torch."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if call in LEAVING and storage(args[0]) in self.recorder.dependent:
            raise NotRecorded(f"values left torch ({call.__name__})")
        return call(*args, **kwargs) if kwargs else call(*args)


def storage(x: Tensor) -> int:
    """A number for the memory that a tensor lives in, valid while the tensor does."""
    return x.untyped_storage()._cdata


def record(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], most: int, most_bytes: float
) -> tuple[list[Operation], list[Tensor]]:
    """Operations of `function(*inputs)`, in order, and its outputs.

    :param most: operations above which recording is not worth it.
    :param most_bytes: of all values together; they are kept until the recording is done.
    :raises NotRecorded: see the module docstring. What the function itself raises passes through.
    """
    recorder = _Recorder(dependent={storage(x) for x in inputs}, most=most, most_bytes=most_bytes)
    with torch.no_grad(), recorder, _Guarded(recorder):
        outputs = list(function(*inputs))
    return recorder.operations, outputs
