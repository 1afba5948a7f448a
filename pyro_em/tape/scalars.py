"""A replay written as one Python function, in which memory of a few entries is kept in local variables.

A call of NumPy or torch takes half a microsecond or one for three entries as for three hundred; the arithmetic of
Python's floats takes 10 ns an entry, is IEEE's too, and skips what a condition leaves out. An operation on few
entries is therefore written as expressions (formulas.py) where it has a formula. What a call reads is put into memory
before it, and what expressions need of its results is read after it:

    a0_0, a0_1, = a0
    x3_0 = a0_0 * a0_1
    put_5(x3_0, a0_0 if a0_1 > 0.0 else 0.0)
    call_6()
    x6_0, = get_8()
    return [(x6_0,), of_array(out_1.copy())]

Not handled: values that are not on the CPU, and expressions of types other than float64, bool and int64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.tape.formulas import CHEAP, LIGHT, formula
from pyro_em.tape.layout import Layout, Written
from pyro_em.tape.listing import Variable
from pyro_em.tape.numbers import Array, Number, Numbers, count, write
from pyro_em.tape.program import FORMATS, MANY, MOST_KEPT, Parts, Program, address, ordinary, tensors
from pyro_em.tape.record import READ

FEW = 25  # entries of a result, up to which expressions take less time than calls and the way to their memory
PLACES = np.arange(MANY)
BOUND = re.compile(r"(get|put|set|call|out|k\d+)_\d+(_\d+)?")  # names that have their meaning from program.py


class _Memory:
    """One storage: `cells` are its entries as numbers, if known, and `filling` the line that brings them there, if
    they are not there yet, with the numbers that it needs."""

    def __init__(self, index: int, size: int) -> None:
        self.index, self.size = index, size
        self.cells: Array | None = None
        self.filling: tuple[str, Sequence[Number]] | None = None


class _Value:
    """A variable's tensor with the memory it is in and where in it, or the constant of a number. `few`: expressions may
    read it."""

    def __init__(self, tensor: Tensor, memory: _Memory | None, constant: int | None, changes: bool) -> None:
        self.tensor, self.memory, self.constant, size = tensor, memory, constant, tensor.numel()
        in_reach = 0 < size <= MANY and tensor.dtype in FORMATS and tensor.device.type == "cpu"
        self.few = in_reach and not changes and (memory is None or memory.size <= MANY)
        if memory is not None and self.few:
            strides = [8 * step for step in tensor.stride()]
            self.places = np.ndarray(tensor.shape, np.int64, PLACES, 8 * tensor.storage_offset(), strides)
        self.numbers: Array | None = None

    @property
    def outside(self) -> bool:
        """Its entries are known and would have to be brought to memory for a call."""
        return self.memory is None or self.memory.filling is not None


class _Action:
    """A line with the texts of the numbers that it needs, or the names of those that it makes."""

    def __init__(self, template: str, needs: Sequence[Number], makes: Sequence[Number] = ()) -> None:
        self.template, self.needs, self.makes = template, needs, makes

    def line(self) -> str:
        """The line, when the numbers have their texts."""
        if self.makes:
            return self.template.format(*[x.name if x.uses else "_" for x in self.makes])
        return self.template.format(", ".join(x.text for x in self.needs))


class Scalars:
    """Writes the program of a list of operations.

    :param entries: outputs of few entries are given as tuples of them.
    """

    def __init__(self, layout: Layout, parts: Parts, entries: bool) -> None:
        self.layout, self.numbers, self.parts = layout, Numbers(), parts
        self.actions: list[_Action] = []
        self.guarded: set[Number] = set()
        sizes = {at: (i, x.untyped_storage().nbytes() // x.element_size()) for at, (i, x) in parts.memories.items()}
        self.memories = {at: _Memory(*pair) for at, pair in sizes.items()}
        in_place = [w.step.args for w in layout.written if w.look is None and None in w.step.targets]
        self.changed = {address(layout.tensor(x)) for x in tensors(in_place)}
        self.values: dict[Any, _Value] = {}  # by variable, or id of a constant
        self.few = [self._receive(argument, i) for i, argument in enumerate(layout.listing.inputs)]
        self.expressed = 0
        for i, written in enumerate(layout.written):
            self.numbers.prefix = f"x{i}"
            if self._express(written):
                self.expressed += 1
            else:
                self._call(written, i)
        self.given = [self._give(x, i, entries) for i, x in enumerate(layout.listing.outputs)]

    def program(self) -> Program:
        """What has been written."""
        count(x for action in self.actions for x in action.needs)
        lines: list[str] = []
        for action in self.actions:
            if not action.makes or any(x.uses for x in action.makes):
                write(action.needs, lines)
                lines.append(action.line())
        given = ", ".join(self.given)
        received = ", ".join(f"a{i}" for i in range(len(self.layout.inputs)))
        source = "\n    ".join([f"def replay({received}):", *lines, f"return [{given}]\n"])
        code = compile(source, "<replay>", "exec")
        inner = next(x for x in code.co_consts if isinstance(x, CodeType))
        names = [x for x in inner.co_names if BOUND.fullmatch(x)]
        return Program(source, code, names, self.expressed, tuple(self.few))

    def _value(self, x: Variable | Tensor) -> _Value:
        key = x if isinstance(x, Variable) else id(x)
        found = self.values.get(key)
        if found is None:
            tensor = self.layout.tensor(x)
            at = address(tensor)
            constant = self.parts.numbers.get(id(x))
            found = self.values[key] = _Value(tensor, self.memories.get(at), constant, at in self.changed)
        return found

    def _receive(self, x: Variable, index: int) -> bool:
        """An argument: if its entries are few they become variables, and go to memory when a call reads it. Whether."""
        value, self.numbers.prefix = self._value(x), f"a{index}"
        memory = value.memory
        assert memory is not None
        if not (value.few and value.tensor.is_contiguous()):
            self.actions.append(_Action(f"set_{index}(a{index})", ()))
            return False
        memory.cells = np.array([self.numbers.given() for _ in range(memory.size)], object)
        self.actions.append(_Action(f"{'{}, ' * memory.size}= a{index}", (), list(memory.cells)))
        memory.filling = f"put_{memory.index}({{}})", list(memory.cells)
        return True

    def _give(self, x: Variable | Tensor, index: int, entries: bool) -> str:
        """What an output is returned as."""
        value = self._value(x)
        if entries and value.few:
            self.actions.append(_Action(f"y{index} = ({{}},)", list(self._read(value).reshape(-1))))
            return f"y{index}"
        self._fill(x)
        return f"of_array(out_{index}.copy())"

    def _express(self, written: Written) -> bool:
        """Write a step as expressions, if it has a formula and is small."""
        step, look = written.step, written.look
        if look is not None or step.call is READ:
            value = self._value(step.args[0] if look is None else look.source)
            if value.few:
                bad = self._unlike(list(self._read(value).reshape(-1)), step.guard if look is None else look.value)
                if bad not in self.guarded:
                    self.guarded.add(bad)
                    self.actions.append(_Action("if {}: raise Deviation", [bad]))
            return value.few
        if not step.single or step.targets == (None,):
            return False
        result = self._value(step.targets[0])  # type: ignore[arg-type]
        memory, place = result.memory, result.tensor
        if not result.few or memory is None or place.numel() != memory.size:
            return False
        args = [self._argument(x) for x in step.args]
        flat = [x for own in args for x in (own if type(own) is list else [own]) if isinstance(x, _Value)]
        light = step.call in LIGHT or (step.call in CHEAP and all(x.outside for x in flat))
        if not all(x.few for x in flat) or (place.numel() > FEW and not light):
            return False
        found = formula(step, [_each(lambda x: x.tensor, x) for x in args], place)
        if found is None:
            return False
        number = float if any(x.tensor.dtype == torch.float64 for x in flat) else None
        entries = found(self.numbers, [_each(self._read, self._literal(x, number)) for x in args])
        memory.cells = np.empty(memory.size, object)
        memory.cells[result.places.reshape(-1)] = entries.reshape(-1)
        memory.filling = f"put_{memory.index}({{}})", list(memory.cells)
        return True

    def _argument(self, x: Any) -> Any:
        if type(x) is list:
            return [self._argument(y) for y in x]
        return self._value(x) if isinstance(x, Variable | Tensor) else x

    def _literal(self, x: Any, kind: Callable[[Any], float] | None) -> Any:
        """Constants as numbers, floats where floats are meant."""
        return self.numbers.literals(kind(x) if kind else x) if type(x) in (int, float) else x

    def _unlike(self, cells: Sequence[Number], value: float | None) -> Number:
        """What is to be False where all cells are to be `value`, or finite if that is None."""
        if value is None:  # a sum beyond the range of floats is rare enough to be taken for such a cell
            total = " + ".join(f"{{{i}}}" for i in range(len(cells)))
            return self.numbers.make(f"({total}) * 0.0 != 0.0", *cells)
        if value is True:
            return self.numbers.make("not {0}", self.numbers.joined("and", cells))
        return self.numbers.joined("or", cells if value is False else self.numbers.each(f"{{0}} != {value!r}", cells))

    def _read(self, value: _Value) -> Array:
        """The entries, read from memory if they are there."""
        if value.numbers is None:
            memory = value.memory
            if memory is None:
                value.numbers = self._constant(value)
                return value.numbers
            if memory.cells is None:
                memory.cells = np.array([self.numbers.given() for _ in range(memory.size)], object)
                template = f"{'{}, ' * memory.size}= get_{memory.index}()"
                self.actions.append(_Action(template, (), list(memory.cells)))
            value.numbers = np.asarray(memory.cells[value.places], object)
        return value.numbers

    def _constant(self, value: _Value) -> Array:
        """Entries for whose values nothing is written have names."""
        found = self.numbers.literals(value.tensor.numpy())
        for place in np.flatnonzero(ordinary(value.tensor)):
            found.flat[place] = self.numbers.given(f"k{value.constant}_{place}")
        return found

    def _call(self, written: Written, index: int) -> None:
        step, look = written.step, written.look
        for x in tensors([step.args, step.kwargs]) if look is None else [look.source]:
            self._fill(x)
        for k in range(len(written.calls)):
            self.actions.append(_Action(f"call_{index}_{k}()", ()))

    def _fill(self, x: Variable | Tensor) -> None:
        """Bring what a call or the caller reads into memory."""
        memory = self._value(x).memory
        if memory is None or memory.filling is None:
            return
        self.actions.append(_Action(*memory.filling))
        memory.filling = None


def _each(function: Callable[[_Value], Any], x: Any) -> Any:
    """`function` of a value or of each of a list of them; anything else as it is."""
    if type(x) is list:
        return [_each(function, y) for y in x]
    return function(x) if isinstance(x, _Value) else x


PROGRAMS: dict[Hashable, Program] = {}  # by structure


def known(layout: Layout, entries: bool) -> Program | None:
    """The program of this structure, if one has been written."""
    return PROGRAMS.get((Parts(layout).key(), entries)) if PROGRAMS else None


def written(layout: Layout, entries: bool) -> Program:
    """The program of this structure."""
    parts = Parts(layout)
    if len(PROGRAMS) >= MOST_KEPT:
        PROGRAMS.clear()
    found = PROGRAMS[parts.key(), entries] = Scalars(layout, parts, entries).program()
    return found
