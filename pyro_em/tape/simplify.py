"""A recorded list of operations, made short without changing a single result.

    constants   what does not follow from the inputs is computed once (it was: the recorded value is kept);
    views       a view of a view is one `as_strided` of the tensor below, and no call where nothing changes;
    repeats     the same operation on the same arguments is done once;
    units       1·x and 0 + x are x;
    guards      a replay counts only if its guards hold: after `not mask.any()`, where(mask, a, b) is b;
    dead code   what no output, guard or written memory needs is left out.

Memory that is written in place keeps all of its operations, in their order: nothing about it is shared or moved,
unless nothing from the inputs ever enters it, and nothing that does reads it before it is complete.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.tape.record import Operation, aten, each, storage

CHECK = aten._linalg_check_errors.default
ALWAYS_VIEWS = (aten._unsafe_view.default, aten._reshape_alias.default)  # of fresh memory that nothing else sees
SPLITS = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default)
FILLED = (  # of their first argument they take the shape and type alone
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
SMALL = 4096  # entries up to which equal constants are found by their contents


@dataclass(frozen=True)
class Variable:
    """A value that follows from the inputs."""

    number: int


@dataclass(frozen=True)
class Step:
    """`targets = call(*args, **kwargs)`; `guard` is what the call must give instead of targets.

    A target of None is an argument that was changed in place; a `view` shares the memory of its first argument.
    """

    call: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Variable | None, ...]
    single: bool
    guard: bool | int | None
    view: bool = False


@dataclass(frozen=True)
class Listing:
    """Steps in order; `outputs` are variables or constant tensors. `examples` are the recorded values of all."""

    inputs: tuple[Variable, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Variable | Tensor, ...]
    examples: Mapping[Variable, Tensor]


class _Simplifier:
    def __init__(
        self, operations: Sequence[Operation], inputs: Sequence[Tensor], masks: Mapping[int, bool] | None = None
    ) -> None:
        self.written = _written(operations, inputs)
        self.variables: dict[int, Variable] = {}  # by id of the recorded tensor
        self.base: dict[Variable, tuple[Variable, Tensor]] = {}  # of a view: the variable below, and as recorded
        self.known: dict[Hashable, tuple[Variable | None, ...]] = {}
        self.steps: list[Step] = []
        self.contents: dict[Hashable, Tensor] = {}
        self.constants: dict[int, Tensor] = {}  # by id of the recorded tensor
        self.masks = masks or {}
        self.kept = [*operations]  # holds every recorded tensor, so that ids and storages stay unique
        self.examples: dict[Variable, Tensor] = {}
        for x in inputs:
            self.variables[id(x)] = self._new(x)

    def _new(self, example: Tensor) -> Variable:
        variable = Variable(len(self.examples))
        self.examples[variable] = example
        return variable

    def _in_place(self, x: Tensor) -> bool:
        return bool(self.written) and storage(x) in self.written

    def value(self, x: Any) -> Any:
        """The variable of a recorded tensor, or a tensor of the same contents, a constant."""
        if not isinstance(x, Tensor):
            return x
        known = self.variables.get(id(x))
        return self._constant(x) if known is None else known

    def _constant(self, x: Tensor) -> Tensor:
        if id(x) not in self.constants:
            found = x
            if x.numel() <= SMALL and not self._in_place(x) and x.device.type == "cpu":
                key = (x.dtype, tuple(x.shape), tuple(x.stride()), x.detach().contiguous().numpy().tobytes())
                found = self.contents.setdefault(key, x)
            self.constants[id(x)] = found
        return self.constants[id(x)]

    def add_all(self) -> None:
        for operation in self.kept:
            self.add(operation)

    def add(self, operation: Operation) -> None:
        dynamic = any(id(x) in self.variables for x in operation.inputs)
        in_place = any(self._in_place(x) for x in (*operation.inputs, *operation.outputs))
        filled = operation.call in FILLED and not in_place
        if filled or (not dynamic and not in_place):
            return
        if operation.written and operation.single:
            # The output is the changed argument.
            self._emit(operation, (None,))
            self.variables.setdefault(id(operation.outputs[0]), self._of(operation.written[0]))
            return
        if not in_place and self._same_as(operation):
            return
        views = operation.is_view or operation.call in ALWAYS_VIEWS or operation.call in SPLITS
        if views and not in_place and operation.outputs:
            for view in operation.outputs:
                self._view(operation.inputs[0], view, operation)
            return
        key = None if in_place else self._key(operation)
        if key is not None and key in self.known:
            for x, variable in zip(operation.outputs, self.known[key], strict=True):
                if variable is not None:
                    self.variables[id(x)] = variable
            return
        targets = tuple(self._new(x) for x in operation.outputs)
        self._emit(operation, targets)
        for x, variable in zip(operation.outputs, targets, strict=True):
            self.variables[id(x)] = variable
        if key is not None:
            self.known[key] = targets

    def _same_as(self, operation: Operation) -> bool:
        """The result is one of the arguments: note it as that."""
        if not operation.single:
            return False
        result, args = operation.outputs[0], operation.args
        source: Tensor | None = None
        if operation.call is aten.where.self and id(args[0]) in self.masks:
            source = args[1] if self.masks[id(args[0])] else args[2]
        elif operation.call in (aten.mul.Tensor, aten.add.Tensor) and not operation.kwargs:
            unit = 1.0 if operation.call is aten.mul.Tensor else 0.0
            for own, other in (args, args[::-1]):
                constant = isinstance(other, Tensor) and id(other) not in self.variables and not self._in_place(other)
                if isinstance(own, Tensor) and constant and other.numel() <= SMALL and bool((other == unit).all()):
                    source = own
        elif operation.call is aten.clone.default and args[0].is_contiguous():
            source = args[0]
        if source is None or id(source) not in self.variables or _geometry(source) != _geometry(result):
            return False
        self.variables[id(result)] = self.variables[id(source)]
        return True

    def _of(self, x: Tensor) -> Any:
        return self.variables.get(id(x), x)

    def _emit(self, operation: Operation, targets: tuple[Variable | None, ...]) -> None:
        args, kwargs = each(self.value, operation.args), each(self.value, operation.kwargs)
        view = operation.is_view and None not in targets
        self.steps.append(Step(operation.call, args, kwargs, targets, operation.single, operation.guard, view))

    def _view(self, source: Tensor, view: Tensor, operation: Operation) -> None:
        own = self.variables[id(source)]
        below, recorded = self.base.get(own, (own, source))
        if _geometry(view) == _geometry(recorded):
            self.variables[id(view)] = below
            return
        if view.dtype != recorded.dtype or view.is_conj() or view.is_neg():
            self._emit(operation, (variable := self._new(view),))
            self.variables[id(view)] = variable
            return
        geometry = (tuple(view.shape), tuple(view.stride()), view.storage_offset())
        key = (aten.as_strided.default, below, geometry)
        if key not in self.known:
            variable = self._new(view)
            self.steps.append(Step(aten.as_strided.default, (below, *geometry), {}, (variable,), True, None, True))
            self.known[key] = (variable,)
            self.base[variable] = (below, recorded)
        (variable,) = self.known[key]  # type: ignore[assignment]
        self.variables[id(view)] = variable

    def _key(self, operation: Operation) -> Hashable:
        """Equal keys, equal results; None for what must not be merged."""
        if operation.guard is not None:
            return None
        return (operation.call, self._frozen(operation.args), self._frozen([*operation.kwargs.items()]))

    def _frozen(self, x: Any) -> Hashable:
        if isinstance(x, list | tuple):
            return (type(x), *(self._frozen(y) for y in x))
        value = self.value(x)
        return id(value) if isinstance(value, Tensor) else (type(value), value)


def _written(operations: Sequence[Operation], inputs: Sequence[Tensor]) -> set[int]:
    """Memory that is written in place, but for constants that are made so."""
    dependent = {storage(x) for x in inputs}
    last: dict[int, int] = {}  # by storage: when it was last written
    first: dict[int, int] = {}  # when it was first read together with what follows from the inputs
    for i, operation in enumerate(operations):
        if any(storage(x) in dependent for x in operation.inputs):
            dependent.update(storage(x) for x in (*operation.outputs, *operation.written))
            for x in operation.inputs:
                first.setdefault(storage(x), i)
        last.update((storage(x), i) for x in operation.written)
    return {own for own, i in last.items() if own in dependent or first.get(own, i + 1) <= i}


def _known_masks(work: _Simplifier) -> dict[int, bool]:
    """Recorded masks (by id) of which a guard says that all entries are False, or that all are True."""
    made = {target: step for step in work.steps for target in step.targets if target is not None}
    known: dict[Variable, bool] = {}
    for step in work.steps:
        judged = made.get(step.args[0]) if step.guard is not None and step.args else None
        if judged is not None and (judged.call, step.guard) in ((aten.any.default, False), (aten.all.default, True)):
            known[judged.args[0]] = bool(step.guard)
    found = {}
    for operation in work.kept:
        for x in operation.outputs:
            variable = work.variables.get(id(x))
            below = work.base[variable][0] if variable in work.base else variable
            if x.dtype == torch.bool and below in known:
                found[id(x)] = known[below]
    return found


def _geometry(x: Tensor) -> Hashable:
    return (x.dtype, tuple(x.shape), tuple(x.stride()), x.storage_offset())


def simplify(operations: Sequence[Operation], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Listing:
    """The shortest list that these rules give."""
    first = _Simplifier(operations, inputs)
    first.add_all()
    masks = _known_masks(first)
    work = _Simplifier(operations, inputs, masks) if masks else first
    if masks:
        work.add_all()
    results = [work.value(x) for x in outputs]
    first_variables = tuple(work.variables[id(x)] for x in inputs)
    return Listing(first_variables, tuple(_alive(work, results)), tuple(results), work.examples)


def _alive(work: _Simplifier, outputs: Sequence[Variable | Tensor]) -> list[Step]:
    """Steps that an output, a guard, a check or written memory needs."""
    needed = {x for x in outputs if isinstance(x, Variable)}
    kept = []
    for step in reversed(work.steps):
        wanted = any(target in needed for target in step.targets if target is not None)
        effect = step.guard is not None or step.call is CHECK or None in step.targets
        if not (wanted or effect):
            continue
        kept.append(step)
        each(lambda x: needed.add(x) if isinstance(x, Variable) else None, [step.args, step.kwargs])
    return kept[::-1]
