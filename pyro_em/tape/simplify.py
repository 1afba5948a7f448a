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

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.tape.listing import Listing, Step, Variable
from pyro_em.tape.record import Operation, aten, each, storage

CHECK = aten._linalg_check_errors.default
# Sets by id: a call's own hash is slow.
VIEWS = frozenset(map(id, (  # besides what the schema calls a view
    aten._unsafe_view.default,  # of fresh memory that nothing else sees
    aten._reshape_alias.default,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
)))  # fmt: skip
FILLED = frozenset(map(id, (  # of their first argument they take the shape and type alone
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)))  # fmt: skip
SMALL = 4096  # entries up to which equal constants are found by their contents


class _Simplifier:
    def __init__(
        self,
        operations: Sequence[Operation],
        inputs: Sequence[Tensor],
        judged: Mapping[int, bool],
    ) -> None:
        """`judged`: by id of a recorded mask what a guard says of all of its entries."""
        self.placed = _placed(operations, inputs)
        self.variables: dict[int, Variable] = {}  # by id of the recorded tensor
        self.base: dict[Variable, tuple[Variable, Tensor]] = {}  # of a view: the variable below, and as recorded
        self.known: dict[Hashable, tuple[Variable | None, ...]] = {}
        self.steps: list[Step] = []
        self.contents: dict[Hashable, Tensor] = {}
        self.constants: dict[int, Tensor] = {}  # by id of the recorded tensor
        self.units: dict[tuple[int, float], bool] = {}  # whether a constant, by id, is 0 or 1 everywhere
        self.judged = judged
        self.masks: dict[Variable, bool] = {}  # of all entries, by the mask
        self.kept = operations  # holds every recorded tensor, so that ids and storages stay unique
        self.examples: dict[Variable, Tensor] = {}
        for x in inputs:
            self._set(x, self._new(x))

    def _new(self, example: Tensor) -> Variable:
        variable = Variable()
        self.examples[variable] = example
        return variable

    def _set(self, x: Tensor, variable: Variable) -> None:
        """The variable of a recorded tensor."""
        self.variables[id(x)] = variable
        if id(x) in self.judged:
            self.masks.setdefault(variable, self.judged[id(x)])

    def value(self, x: Any) -> Any:
        """The variable of a recorded tensor, or a tensor of the same contents, a constant."""
        if not isinstance(x, Tensor):
            return x
        known = self.variables.get(id(x))
        return self._constant(x) if known is None else known

    def _constant(self, x: Tensor) -> Tensor:
        found = self.constants.get(id(x))
        if found is None:
            found = x
            if x.numel() <= SMALL and storage(x) not in self.placed and x.device.type == "cpu":
                key = (x.dtype, x.shape, x.stride(), x.detach().contiguous().numpy().tobytes())
                found = self.contents.setdefault(key, x)
            self.constants[id(x)] = found
        return found

    def add_all(self) -> None:
        for operation in self.kept:
            self.add(operation)

    def add(self, operation: Operation) -> None:
        in_place = bool(self.placed) and not self.placed.isdisjoint((*operation.reads, *operation.makes))
        if not in_place:
            call = id(operation.call)
            if not operation.follows or call in FILLED or not any(id(x) in self.variables for x in operation.inputs):
                return
            if operation.single and self._same_as(operation):
                return
            if (operation.is_view or call in VIEWS) and operation.outputs:
                for view in operation.outputs:
                    self._view(operation.inputs[0], view, operation)
                return
        elif operation.written and operation.single:
            # The output is the changed argument.
            self._emit(operation, (None,))
            if id(operation.outputs[0]) not in self.variables:
                self._set(operation.outputs[0], self._of(operation.written[0]))
            return
        args, kwargs = each(self.value, operation.args), each(self.value, operation.kwargs)
        key = None
        if not in_place and operation.guard is None:  # equal keys, equal results
            key = (id(operation.call), _frozen(args), _frozen([*kwargs.items()]) if kwargs else None)
        found = None if key is None else self.known.get(key)
        if found is None:
            found = tuple([self._new(x) for x in operation.outputs])
            self._step(operation, args, kwargs, found)
            if key is not None:
                self.known[key] = found
        for x, variable in zip(operation.outputs, found, strict=True):
            if variable is not None:
                self._set(x, variable)

    def _same_as(self, operation: Operation) -> bool:
        """The result is one of the arguments: note it as that."""
        result, args, call = operation.outputs[0], operation.args, operation.call
        source: Tensor | None = None
        if call is aten.where.self:
            says = self._judgement(args[0])
            source = None if says is None else args[1] if says else args[2]
        elif (call is aten.mul.Tensor or call is aten.add.Tensor) and not operation.kwargs:
            unit = 1.0 if call is aten.mul.Tensor else 0.0
            for own, other in (args, args[::-1]):
                if isinstance(own, Tensor) and isinstance(other, Tensor) and self._is_all(other, unit):
                    source = own
        elif call is aten.clone.default and args[0].is_contiguous():
            source = args[0]
        if source is None or id(source) not in self.variables or _geometry(source) != _geometry(result):
            return False
        self._set(result, self.variables[id(source)])
        return True

    def _judgement(self, mask: Any) -> bool | None:
        """What all entries of a mask are, if a guard says so."""
        own = self.variables.get(id(mask))
        if own is None or not self.masks:
            return None
        return self.masks.get(self.base[own][0] if own in self.base else own)

    def _is_all(self, x: Tensor, number: float) -> bool:
        """Whether it is a constant of this number."""
        if id(x) in self.variables:
            return False
        key = (id(x), number)
        if key not in self.units:
            self.units[key] = x.numel() <= SMALL and storage(x) not in self.placed and bool((x == number).all())
        return self.units[key]

    def _of(self, x: Tensor) -> Any:
        return self.variables.get(id(x), x)

    def _emit(self, operation: Operation, targets: tuple[Variable | None, ...]) -> None:
        self._step(operation, each(self.value, operation.args), each(self.value, operation.kwargs), targets)

    def _step(
        self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], targets: tuple[Variable | None, ...]
    ) -> None:
        view = operation.is_view and None not in targets
        self.steps.append(Step(operation.call, args, kwargs, targets, operation.single, operation.guard, view))

    def _view(self, source: Tensor, view: Tensor, operation: Operation) -> None:
        own = self.variables[id(source)]
        below, recorded = self.base.get(own, (own, source))
        geometry = (tuple(view.shape), view.stride(), view.storage_offset())
        if view.dtype != recorded.dtype or view.is_conj() or view.is_neg():
            self._emit(operation, (variable := self._new(view),))
            self._set(view, variable)
            return
        if geometry == (tuple(recorded.shape), recorded.stride(), recorded.storage_offset()):
            self._set(view, below)
            return
        key = (below, geometry)
        if key not in self.known:
            variable = self._new(view)
            self.steps.append(Step(aten.as_strided.default, (below, *geometry), {}, (variable,), True, None, True))
            self.known[key] = (variable,)
            self.base[variable] = (below, recorded)
        (variable,) = self.known[key]  # type: ignore[assignment]
        self._set(view, variable)


def _frozen(x: Any) -> Hashable:
    """Of an argument whose tensors are variables and constants."""
    kind = type(x)
    if kind is Variable:
        return x
    if kind is list or kind is tuple:
        return (kind, *[_frozen(y) for y in x])
    return id(x) if isinstance(x, Tensor) else (kind, x)


def _placed(operations: Sequence[Operation], inputs: Sequence[Tensor]) -> frozenset[int]:
    """Memory that is written in place, but for constants that are made so."""
    dependent = {storage(x) for x in inputs}
    last: dict[int, int] = {}  # by storage: when it was last written
    first: dict[int, int] = {}  # when it was first read together with what follows from the inputs
    for i, operation in enumerate(operations):
        if not dependent.isdisjoint(operation.reads):
            dependent.update(operation.makes, operation.changes)
            for own in operation.reads:
                first.setdefault(own, i)
        for own in operation.changes:
            last[own] = i
    return frozenset(own for own, i in last.items() if own in dependent or first.get(own, i + 1) <= i)


def _judged(operations: Sequence[Operation]) -> dict[int, bool]:
    """Recorded masks, by id, of which a guard says that all entries are False, or that all are True."""
    made: dict[int, Operation] = {}  # by id of what any and all gave
    found: dict[int, bool] = {}
    for operation in operations:
        if operation.call is aten.any.default or operation.call is aten.all.default:
            made[id(operation.outputs[0])] = operation
        elif operation.guard is not None and operation.inputs and id(operation.inputs[0]) in made:
            judge = made[id(operation.inputs[0])]
            if operation.guard is (judge.call is aten.all.default):
                found[id(judge.inputs[0])] = operation.guard
    return found


def _judged_after(work: _Simplifier) -> dict[int, bool]:
    """With the masks that turned out to be the same as a later one of `work.judged`; none if none was used."""
    conditions = [step.args[0] for step in work.steps if step.call is aten.where.self]
    below = [work.base[x][0] if x in work.base else x for x in conditions]
    if not any(x in work.masks for x in below if isinstance(x, Variable)):
        return {}
    outputs = [x for operation in work.kept for x in operation.outputs if x.dtype == torch.bool]
    known = ((x, work.masks.get(work.variables[id(x)])) for x in outputs if id(x) in work.variables)
    return {**work.judged, **{id(x): says for x, says in known if says is not None}}


def _geometry(x: Tensor) -> Hashable:
    return (x.dtype, x.shape, x.stride(), x.storage_offset())


def simplify(operations: Sequence[Operation], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Listing:
    """The shortest list that these rules give."""
    work = _Simplifier(operations, inputs, _judged(operations))
    work.add_all()
    judged = _judged_after(work)
    if judged:
        work = _Simplifier(operations, inputs, judged)
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
        _add_variables(needed, step.args)
        if step.kwargs:
            _add_variables(needed, step.kwargs.values())
    return kept[::-1]


def _add_variables(found: set[Variable], values: Iterable[Any]) -> None:
    for x in values:
        if type(x) is Variable:
            found.add(x)
        elif type(x) is list or type(x) is tuple:
            _add_variables(found, x)
