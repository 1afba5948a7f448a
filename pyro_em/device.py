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

from pyro_em.errors import InputError

C = TypeVar("C")


def device_of(*values: Any) -> torch.device:
    """The device of the tensors in values (nested in mappings and sequences), the CPU if all are there or none is.

    CPU tensors beside those of another device are allowed: lengths and sizes often are.

    :raises InputError: for tensors on two devices that are not the CPU.
    """
    found = {x.device for x in _tensors(values) if x.device.type != "cpu"}
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise InputError(f"The data are on several devices, {names}: move them to one of them, or to the CPU.")
    return found.pop() if found else torch.device("cpu")


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, torch.nn.Module):
        yield from values.parameters()
        yield from values.buffers()
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


@contextlib.contextmanager
def on_device(*values: Any) -> Iterator[torch.device]:
    """Make new tensors where those in `values` are."""
    device = device_of(*values)
    with contextlib.nullcontext() if device.type == "cpu" else device:
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
