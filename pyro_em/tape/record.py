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
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

READ = aten._local_scalar_dense.default
LEAVING = ("numpy", "tolist", "__array__", "__dlpack__")  # ways out of torch that the dispatcher does not see
DYNAMIC_SHAPE = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among arguments, and within lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of an argument, or of each entry of a list, tuple or dict of arguments."""
    if isinstance(value, dict):
        return {name: each(function, x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([each(function, x) for x in value])
    return function(value)


class NotRecorded(Exception):
    """The function does something that a list of tensor operations cannot repeat; the text says what."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One call: `outputs` are its tensors; `guard` is the Boolean or integer that it gave instead, if it did."""

    call: Any  # torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    single: bool
    guard: bool | int | None = None

    @cached_property
    def inputs(self) -> list[Tensor]:
        return [*_tensors(self.args), *_tensors(self.kwargs.values())]

    @cached_property
    def is_view(self) -> bool:
        """The output shares the first argument's memory and is not a changed argument itself."""
        infos = [r.alias_info for r in self.call._schema.returns]
        return bool(infos) and infos[0] is not None and not infos[0].is_write

    @cached_property
    def written(self) -> list[Tensor]:
        """Arguments that the call changes in place."""
        found = []
        for position, argument in enumerate(self.call._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = self.kwargs.get(argument.name)
            if value is None and position < len(self.args):
                value = self.args[position]
            found += _tensors([value])
        return found


@dataclass
class _Recorder(TorchDispatchMode):
    operations: list[Operation] = field(default_factory=list)
    dependent: set[int] = field(default_factory=set)  # storages that hold what follows from the inputs

    most_bytes: float = math.inf
    _bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch.compile is not in play here, and to say so to it would import it: a second of start-up."""
        return False

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in call.tags:
            return self._reshaped(call, args, kwargs)
        result = call(*args, **kwargs)
        own = Operation(call, tuple(args), kwargs, (), False)
        depends = any(storage(x) in self.dependent for x in own.inputs)
        outputs: tuple[Tensor, ...]
        if isinstance(result, Tensor):
            outputs, single, guard = (result,), True, None
        elif isinstance(result, tuple | list):
            outputs, single, guard = tuple(result), False, None
        else:
            outputs, single, guard = (), False, self._guard(call, result, depends)
        if depends:
            self._check(own)
            self.dependent |= {storage(x) for x in (*outputs, *own.written)}
            if not own.is_view:
                self._bytes += sum(x.numel() * x.element_size() for x in outputs)
            if self._bytes > self.most_bytes:
                raise NotRecorded(f"more than {self.most_bytes / 2**20:.0f} MiB of values")
        if torch.Tag.nondeterministic_seeded in call.tags and kwargs.get("generator") is None:
            raise NotRecorded(f"a random draw ({call})")
        self.operations.append(Operation(call, tuple(args), kwargs, outputs, single, guard))
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
                args_then, kwargs_then, outputs = (each(as_it_was, y) for y in (own.args, own.kwargs, own.outputs))
                self.operations[i] = replace(own, args=args_then, kwargs=kwargs_then, outputs=outputs)
            if made:
                break
        call(*args, **kwargs)
        self.operations.append(Operation(view, (before, *args[1:]), kwargs, (x,), True))
        return x

    @staticmethod
    def _guard(call: Any, result: Any, depends: bool) -> bool | int | None:
        if result is None or not depends:
            return None
        if not isinstance(result, bool | int):
            raise NotRecorded(f"a number was read from a tensor ({call})")
        return result

    def _check(self, operation: Operation) -> None:
        masks = [x for x in operation.inputs[1:] if x.dtype == torch.bool and storage(x) in self.dependent]
        if operation.call in DYNAMIC_SHAPE or (operation.call is aten.index.Tensor and masks):
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
        if name in LEAVING and storage(args[0]) in self.recorder.dependent:
            raise NotRecorded(f"values left torch ({name})")
        return call(*args, **(kwargs or {}))


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
    recorder = _Recorder(dependent={storage(x) for x in inputs}, most_bytes=most_bytes)
    with torch.no_grad(), recorder, _Guarded(recorder):
        outputs = list(function(*inputs))
    if len(recorder.operations) > most:
        raise NotRecorded(f"{len(recorder.operations)} operations")
    return recorder.operations, outputs
