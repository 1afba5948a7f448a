"""Work is done where the data are: `torch.device` as a context around every public entry.

The model and the engines are the same code for all devices. What they make anew (counters, tables, one-hot rows, the
model's own `torch.ones(K)`) is made on the device of the data, because a context says where `torch.zeros` and the like
are to be. On the CPU there is no context, and nothing is paid for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_em.errors import InputError

C = TypeVar("C")
LARGER = 64  # chunks of an accelerator: its memory is fast, and what is dear are calls
WIDE = 524_280  # columns, 8 times the most blocks in a dim of a CUDA grid (see _NarrowSolves)
MOST_STATES = 64  # by which enumeration may multiply the cells of the data, to know whether columns can be so many


def device_of(*values: Any) -> torch.device:
    """The device of the tensors in values (nested in mappings and sequences), the CPU if all are there or none is.

    CPU tensors beside those of another device are allowed: lengths and sizes often are.

    :raises InputError: for tensors on two devices that are not the CPU.
    """
    found = {x.device for x in tensors_in(values) if x.device.type != "cpu"}
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise InputError(f"The data are on several devices, {names}: move them to one of them, or to the CPU.")
    return found.pop() if found else torch.device("cpu")


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Tensors in values nested in mappings and sequences, and in modules."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, torch.nn.Module):
        yield from values.parameters()
        yield from values.buffers()
    elif isinstance(values, Mapping):
        yield from tensors_in(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)


@contextlib.contextmanager
def on_device(*values: Any) -> Iterator[torch.device]:
    """Make new tensors where those in `values` are."""
    device = device_of(*values)
    with contextlib.ExitStack() as stack:
        if device.type != "cpu":
            stack.enter_context(device)
            if max(x.numel() for x in tensors_in(values)) >= WIDE // MOST_STATES:
                stack.enter_context(_NarrowSolves())
        yield device


def on_own_device(*attributes: str) -> Callable[[type[C]], type[C]]:
    """A class whose public methods and properties run where the tensors of these attributes are."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
            with on_device([getattr(self, name) for name in attributes]):
                return function(self, *args, **kwargs)

        return moved

    def decorate(cls: type[C]) -> type[C]:
        for name, member in list(vars(cls).items()):
            if name.startswith("_"):
                continue
            if isinstance(member, property) and member.fget is not None:
                setattr(cls, name, member.getter(wrap(member.fget)))
            elif callable(member):
                setattr(cls, name, wrap(member))
        return cls

    return decorate


def seeded_normal(shape: Any, generator: torch.Generator) -> Tensor:
    """Standard normal draws in float64, the same numbers whatever the device."""
    draws = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device)
    return draws.to(torch.get_default_device())


def chunk_scale(device: torch.device) -> int:
    """By how much chunks may be larger on this device than the caches of a processor allow.

    >>> chunk_scale(torch.device("cpu"))
    1
    """
    return 1 if device.type == "cpu" else LARGER


def checked_indices() -> contextlib.AbstractContextManager[Any]:
    """Within, an index out of range raises `IndexError` on any device, as it does on the CPU.

    CUDA finds such an index when it is too late to go on: a failed assertion in a kernel makes the device unusable to
    the process. So a run of a model that may fail (the user's first one, trials in shapes that the model may not
    expect) looks at the indices before they are used.
    """
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else _CheckedIndices()


_INDEX_ARGUMENT = {  # operations whose third argument indexes the dim that is their second
    torch.ops.aten.gather.default,
    torch.ops.aten.index_select.default,
    torch.ops.aten.scatter.src,
    torch.ops.aten.scatter.value,
    torch.ops.aten.scatter_add.default,
}


class _CheckedIndices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            place = 0
            for index in args[1]:  # a Boolean index takes as many dims as it has, another one
                if index is not None and index.dtype not in (torch.bool, torch.uint8):
                    _check_index(index, args[0].shape[place])
                place += 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.dim()
        elif func is torch.ops.aten.embedding.default:
            _check_index(args[1], args[0].shape[0])
        elif func in _INDEX_ARGUMENT and args[0].dim():
            _check_index(args[2], args[0].shape[args[1]])
        return func(*args, **(kwargs or {}))


def _check_index(index: Tensor, size: int) -> None:
    bad = (index >= size) | (index < -size)
    if bool(bad.any()):
        raise IndexError(f"index {int(index[bad][0])} is out of bounds for a dimension of size {size}")


class _NarrowSolves(TorchDispatchMode):
    """Triangular systems with many right hand sides are solved part by part.

    With more than 524,280 columns `torch.linalg.solve_triangular` on CUDA returns wrong numbers without an error (seen
    with PyTorch 2.11 on an H100: residuals of 10), and so does `MultivariateNormal.log_prob` of as many rows.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.linalg_solve_triangular.default:
            return func(*args, **kwargs)
        matrix, right = args
        dim = -1 if kwargs.get("left", True) else -2
        if right.shape[dim] <= WIDE:
            return func(*args, **kwargs)
        return torch.cat([func(matrix, part, **kwargs) for part in right.split(WIDE, dim)], dim)
