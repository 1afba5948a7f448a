"""A device that is not there: tensors that say they are elsewhere, and will not mix with those of the CPU.

What CUDA would refuse is refused: an operation on tensors of two devices (a CPU scalar is allowed), NumPy arrays of
tensors that are elsewhere, a factory that forgot the device. An index out of range is the end of the device. The
numbers lie in the CPU's memory, so that results must be those of the CPU to the last bit. What this cannot show:
speed, and the rounding of another device.

Memory is known to be of the device, or of the CPU (constants of the package's modules too); what PyTorch makes inside
of its own functions is neither, and mixes with both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")  # a device type of PyTorch that no library has to be there for
CPU = torch.device("cpu")
aten = torch.ops.aten
# A copy goes from one device to another, and indices may be on the CPU.
MIXED = {
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
NAMES = "tensor as_tensor zeros ones empty full arange eye linspace rand randn randint randperm empty_strided"
FACTORIES = {getattr(torch, name) for name in (*NAMES.split(), "triu_indices", "tril_indices")}
TO_NUMPY = {Tensor.numpy, Tensor.__array__}


class DeviceLost(BaseException):
    """An index out of range reached a kernel, whose assertion no program survives: not to be caught as an Exception."""


class _Memory:
    """Which memory is whose. It is kept, so that no address is used twice."""

    def __init__(self) -> None:
        self.of: dict[int, torch.device] = {}
        self.kept: list[Any] = []

    def device(self, x: Tensor) -> torch.device | None:
        if x._is_zerotensor():  # zeros of the derivatives, without memory
            return None
        return self.of.get(x.untyped_storage().data_ptr())

    def put(self, x: Tensor, device: torch.device) -> None:
        if x._is_zerotensor():
            return
        storage = x.untyped_storage()
        if storage.data_ptr():
            self.of[storage.data_ptr()] = device
            self.kept.append(storage)


class _Dispatch(TorchDispatchMode):
    """Results are where the arguments are."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = [self.memory.device(x) for x in tensors]
        arrays = {d for x, d in zip(tensors, known, strict=True) if d is not None and (x.dim() or d == DEVICE)}
        if len(arrays) > 1 and func not in MIXED:
            shapes = [(tuple(x.shape), str(d)) for x, d in zip(tensors, known, strict=True)]
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, found {shapes}")
        try:
            found = func(*args, **kwargs)
        except (IndexError, RuntimeError) as error:
            if DEVICE in known and ("out of bounds" in str(error) or "out of range in self" in str(error)):
                raise DeviceLost(f"{func}: device-side assert triggered: {error}") from None
            raise
        device = DEVICE if DEVICE in known else CPU if CPU in known else None
        if device is not None:
            for x in tree_leaves(found):
                if isinstance(x, Tensor) and self.memory.device(x) is None:
                    self.memory.put(x, device)
        return found


class _Function(TorchFunctionMode):
    """`.device`, `.to(device)`, factories and the way to NumPy."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):  # the latter reads the arguments of Module.to
            return func(*args, **kwargs)
        own = self.memory.device(args[0]) if args and isinstance(args[0], Tensor) else None
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if own == DEVICE else func(*args)
        if func in TO_NUMPY and own == DEVICE:
            raise TypeError("can't convert a device tensor to numpy. Use Tensor.cpu() first.")
        wanted = self._wanted(func, args, kwargs)
        if kwargs.get("generator") is not None and wanted == DEVICE:
            raise RuntimeError("Expected a generator of the device but found one of the CPU")
        if func == Tensor.cpu:
            func, args = Tensor.clone, args[:1]
        args = tree_map(_here, args)
        kwargs = {name: _here(x) for name, x in kwargs.items()}
        found = func(*args, **kwargs)
        if wanted is None or not isinstance(found, Tensor):
            return found
        if self.memory.device(found) not in (None, wanted):
            found = found.clone() if func == Tensor.to else found
            self.memory.of.pop(found.untyped_storage().data_ptr(), None)
        self.memory.put(found, wanted)
        return found

    def _wanted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        """The device that a call asks for."""
        for x in (*kwargs.values(), *(args[1:] if func == Tensor.to else ())):
            if isinstance(x, torch.device) or (isinstance(x, str) and x.split(":")[0] in ("cpu", DEVICE.type)):
                return torch.device(x)
            if func == Tensor.to and isinstance(x, Tensor):
                return self.memory.device(x)
        if func == Tensor.cpu:
            return CPU
        if func in (torch.tensor, torch.as_tensor) and isinstance(args[0], Tensor):
            return self.memory.device(args[0])
        if func in (Tensor.new_tensor,):
            return self.memory.device(args[0])
        return CPU if func in FACTORIES else None


def _here(x: Any) -> Any:
    return CPU if isinstance(x, torch.device) and x.type == DEVICE.type else x


@contextmanager
def emulated_device() -> Iterator[torch.device]:
    """Within, `x.to(device)` and factories with `device=` make tensors of the emulated device."""
    memory = _Memory()
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "pyro_em"]:
        for x in vars(module).values():
            if isinstance(x, Tensor):
                memory.put(x, CPU)
    with _Function(memory), _Dispatch(memory):
        yield DEVICE
