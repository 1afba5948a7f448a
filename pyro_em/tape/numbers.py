"""Single floats, Booleans and integers as Python expressions: each is a template over others, made once.

Equal expressions of equal arguments are one number. Arrays of them are NumPy's arrays of objects, so that
broadcasting, picking and stacking are NumPy's. What an expression gives is what IEEE 754 says: Python's floats
differ from it where a divisor is 0 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

Array = Any  # of numbers, dtype object


class Number:
    """`template` with `{0}`, `{1}` for its arguments. `text` is what others write for it: its name, once it has one."""

    __slots__ = ("args", "name", "order", "template", "text", "uses", "value")

    def __init__(self, template: str, args: tuple[Number, ...], order: int, name: str) -> None:
        self.template, self.args, self.order, self.name = template, args, order, name
        self.text, self.uses = "", 0
        self.value: float | None = None  # of a constant


class Numbers:
    """Makes them; `prefix` goes into the names."""

    def __init__(self) -> None:
        self.prefix = ""
        self._known: dict[Any, Number] = {}
        self._count = 0
        self._named: dict[str, int] = {}

    def make(self, template: str, *args: Number) -> Number:
        """The number of an expression."""
        key = (template, *map(id, args))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._new(template, args)
        return found

    def given(self, name: str = "") -> Number:
        """One that has a value already, under this name or one of its own."""
        found = self._new("", ())
        found.text = found.name = name or found.name
        return found

    def literal(self, value: float) -> Number:
        """A constant; 0.0 and -0.0 are two."""
        plain = value.item() if isinstance(value, np.generic) else value
        text = repr(plain) if abs(plain) < math.inf else f"{'-' * (plain < 0)}{abs(plain)}"
        key = (type(plain), text)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._new("", ())
            found.value, found.text = plain, f"({text})" if text.startswith("-") else text
        return found

    def literals(self, values: Any) -> Array:
        """An array of constants."""
        return self.over(self.literal, np.asarray(values))

    def _new(self, template: str, args: tuple[Number, ...]) -> Number:
        self._count += 1
        place = self._named[self.prefix] = self._named.get(self.prefix, -1) + 1
        return Number(template, args, self._count, f"{self.prefix}_{place}")

    @staticmethod
    def over(function: Callable[..., Any], *arrays: Any) -> Array:
        """`function` of the entries, broadcast."""
        return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), object)

    def each(self, template: str, *arrays: Array) -> Array:
        """The same expression of all entries."""
        return self.over(lambda *args: self.make(template, *args), *arrays)

    def plus(self, a: Number, b: Number) -> Number:
        """a + b, which is b + a."""
        return self.make("{0} + {1}", *((a, b) if a.order <= b.order else (b, a)))

    def times(self, a: Number, b: Number) -> Number:
        """a · b, which is a where b is the constant 1."""
        if b.value == 1.0 or a.value == 1.0:
            return a if b.value == 1.0 else b
        return self.make("{0} * {1}", *((a, b) if a.order <= b.order else (b, a)))

    def divide(self, a: Number, b: Number) -> Number:
        """a / b, also where b is 0."""
        if b.value is not None:
            return self.make("{0} / {1}", a, b) if b.value else self.make("over_zero({0}, {1})", a, b)
        return self.make("{0} / {1} if {1} else over_zero({0}, {1})", a, b)

    def choose(self, mask: Number, a: Number, b: Number) -> Number:
        """a where the mask holds, else b, which is then not computed."""
        if mask.value is not None:
            return a if mask.value else b
        return self.make("{1} if {0} else {2}", mask, a, b)

    def extreme(self, sign: str, values: Sequence[Number]) -> Number:
        """The largest (sign ">") or smallest, and not a number if one of them is none."""
        best = values[0]
        for x in values[1:]:
            best = self.make("{0} if {0} " + sign + " {1} or {0} != {0} else {1}", best, x)
        return best

    def joined(self, word: str, values: Sequence[Number]) -> Number:
        """`a and b and c`, without constants that do not matter."""
        neutral = word == "and"
        left = list(dict.fromkeys(x for x in values if x.value is None))
        if any(x.value is not None and x.value is not neutral for x in values):
            return self.literal(not neutral)
        if not left:
            return self.literal(neutral)
        return left[0] if len(left) == 1 else self.make(f" {word} ".join(f"{{{i}}}" for i in range(len(left))), *left)


def over_zero(a: float, b: float) -> float:
    """a / b for b = ±0."""
    if a == 0 or a != a:
        return math.nan
    return math.copysign(math.inf, a) * math.copysign(1.0, b)


def first_largest(*values: float) -> int:
    """As argmax has it: the first that is not a number, if there is one."""
    total = sum(values)
    if total != total:
        for i, x in enumerate(values):
            if x != x:
                return i
    return values.index(max(values))


NAMES: dict[str, Any] = {  # that expressions use
    "over_zero": over_zero, "first_largest": first_largest, "inf": math.inf, "nan": math.nan, "abs": abs,
}  # fmt: skip


def write(demanded: Iterable[Number], lines: list[str], longest: int = 120) -> None:
    """Give each of these and of what they need a text; what is used twice or is long gets a line of its own."""
    pending, stack = {}, [x for x in demanded if not x.text]
    while stack:
        x = stack.pop()
        if x.order in pending:
            continue
        pending[x.order] = x
        stack += [y for y in x.args if not y.text]
    for order in sorted(pending):
        x = pending[order]
        text = x.template.format(*[y.text for y in x.args])
        if x.uses > 1 or len(text) > longest:
            lines.append(f"{x.name} = {text}")
            x.text = x.name
        else:
            x.text = f"({text})"


def count(demanded: Iterable[Number]) -> None:
    """Add to the uses of all that these need; `demanded` is everything, once."""
    seen: set[int] = set()
    stack = list(demanded)
    for x in stack:
        x.uses += 1
    while stack:
        x = stack.pop()
        if x.order in seen:
            continue
        seen.add(x.order)
        for y, times in zip(x.args, _occurrences(x.template, len(x.args)), strict=True):
            y.uses += times
            stack.append(y)


@cache
def _occurrences(template: str, arguments: int) -> tuple[int, ...]:
    """How often each argument is written."""
    return tuple(template.count(f"{{{i}}}") for i in range(arguments))
