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
LEAVING = frozenset(("numpy", "tolist", "__array__", "__dlpack__"))  # ways out of torch that the dispatcher misses
DYNAMIC_SHAPE = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default)
SHAPES = frozenset((*DYNAMIC_SHAPE, aten.index.Tensor))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among arguments, and within lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) is list or type(value) is tuple:
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
    `changes` the memory (`storage`) of inputs, outputs and written ones.
    """

    __slots__ = (
        "args", "call", "changes", "guard", "inputs", "is_view", "kwargs", "makes", "outputs", "reads", "single",
        "written",
    )  # fmt: skip

    def __init__(
        self,
        call: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        places: Callable[[Iterable[Tensor]], list[int]],
        outputs: tuple[Tensor, ...] = (),
        single: bool = False,
        guard: bool | int | None = None,
    ) -> None:
        self.call, self.args, self.kwargs = call, args, kwargs
        self.single, self.guard = single, guard
        self.inputs: list[Tensor] = _tensors(args) + _tensors(kwargs.values()) if kwargs else _tensors(args)
        self.reads = places(self.inputs)
        kind = kind_of(call)
        self.is_view = kind.is_view
        self.written: list[Tensor] = []
        for position, name in kind.written:
            value = kwargs.get(name)
            if value is None and position < len(args):
                value = args[position]
            self.written += _tensors([value])
        self.changes = places(self.written) if self.written else []
        self.gave(outputs, places)

    def gave(self, outputs: tuple[Tensor, ...], places: Callable[[Iterable[Tensor]], list[int]]) -> None:
        """Note what the call gave."""
        self.outputs, self.makes = outputs, places(outputs) if outputs else []


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

    def places(self, tensors: Iterable[Tensor]) -> list[int]:
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
        result = call(*args, **kwargs)
        own = Operation(call, tuple(args), kwargs, self.places)
        depends = not self.dependent.isdisjoint(own.reads)
        if isinstance(result, Tensor):
            own.gave((result,), self.places)
            own.single = True
        elif isinstance(result, tuple | list):
            own.gave(tuple(result), self.places)
        else:
            own.guard = self._guard(call, result, depends)
        if depends:
            self._check(own)
            self.dependent.update(own.makes, own.changes)
            if not own.is_view:
                self._bytes += sum(x.numel() * x.element_size() for x in own.outputs)
            if self._bytes > self.most_bytes:
                raise NotRecorded(f"more than {self.most_bytes / 2**20:.0f} MiB of values")
        self.operations.append(own)
        if len(self.operations) > self.most:
            raise NotRecorded(f"more than {self.most} operations")
        return result

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
                self.operations[i] = Operation(own.call, then[0], then[1], self.places, then[2], own.single, own.guard)
            if made:
                break
        call(*args, **kwargs)
        self.operations.append(Operation(view, (before, *args[1:]), kwargs, self.places, (x,), True))
        return x

    @staticmethod
    def _guard(call: Any, result: Any, depends: bool) -> bool | int | None:
        if result is None or not depends:
            return None
        if not isinstance(result, bool | int):
            raise NotRecorded(f"a number was read from a tensor ({call})")
        return result

    def _check(self, operation: Operation) -> None:
        if not kind_of(operation.call).reads_shape:
            return
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
        name = getattr(call, "__name__", "")
        if name in LEAVING and isinstance(args[0], Tensor) and storage(args[0]) in self.recorder.dependent:
            raise NotRecorded(f"values left torch ({name})")
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
