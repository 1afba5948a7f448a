"""Memory of a list of operations, and one call without arguments for every one of them.

Every value keeps its place from one replay to the next, so that views cost nothing. How an operation is best called
emit.py says; a guard of a reduction looks at the bytes of what would be reduced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.tape.calls import OWN, Call, all_are, all_finite, bound, copied, guard
from pyro_em.tape.emit import BINARY, MOST_CELLS, PICKS, WITH_OUT, exactly_copied, numpy_call
from pyro_em.tape.listing import Listing, Step, Variable
from pyro_em.tape.record import READ, aten, each
from pyro_em.tape.simplify import CHECK

DTYPES = (torch.float64, torch.float32, torch.bool, torch.int64, torch.int32)  # that NumPy treats as torch does


class Layout:
    """`inputs` and `outputs` are memory, `written` what to call in between, `size` the bytes of all values."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.places: dict[Variable, Tensor] = {}
        self.arrays: dict[int, Any] = {}  # the same memory for NumPy, by id of the tensor
        self.written: list[Written] = []
        self.size = 0
        self.inputs = [self._place(variable) for variable in listing.inputs]
        self._looks = _looks(listing)
        for step in listing.steps:
            self.calls: list[Call] = []
            self._write(step)
            if self.calls:
                self.written.append(Written(step, self._looks.get(step), tuple(self.calls)))
        self.outputs = [self.tensor(x) for x in listing.outputs]

    def shapes(self) -> list[tuple[Tensor, torch.Size]]:
        """Memory of every value, and its shape as recorded."""
        return [(place, self.listing.examples[v].shape) for v, place in self.places.items()]

    def on_cpu(self) -> bool:
        """Whether all values are there."""
        return _on_cpu([*self.places.values()])

    def _place(self, variable: Variable) -> Tensor:
        example = self.listing.examples[variable]
        place = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)
        self.places[variable] = place
        self.size += place.numel() * place.element_size()
        return place

    def tensor(self, x: Any) -> Any:
        """The memory of a variable; anything else as it is."""
        if isinstance(x, Variable):
            return self.places[x]
        return x.detach() if isinstance(x, Tensor) and x.requires_grad else x

    def _array(self, x: Any) -> Any:
        """The same memory as a NumPy array, for a tensor or variable."""
        if not isinstance(x, Variable | Tensor):
            return x
        tensor = self.tensor(x)
        found = self.arrays.get(id(tensor))
        if found is None:
            found = tensor.detach().numpy()
            if isinstance(x, Variable) or tensor is x:  # held elsewhere, so that its id stays its own
                self.arrays[id(tensor)] = found
        return found

    def _write(self, step: Step) -> None:
        if step in self._looks:
            look = self._looks[step]
            if look is not None:
                self.calls.append(look.call(self._array(look.source)))
            return
        args, kwargs = each(self.tensor, step.args), each(self.tensor, step.kwargs)
        if step.view:
            made = step.call(*args, **kwargs)
            for target, view in zip(step.targets, [made] if step.single else made, strict=True):
                if target is not None:
                    self.places[target] = view
            return
        if step.guard is not None:
            read = self._array(step.args[0]).item if step.call is READ and _on_cpu(args) else None
            self.calls.append(guard(read or bound(step.call._op, args, kwargs), step.guard))
            return
        if step.call is CHECK and _on_cpu(args):
            self.calls.append(all_are(self._array(step.args[0]), 0))
            return
        if None in step.targets or not step.targets:
            self.calls.append(bound(step.call._op, args, kwargs))
            return
        places = [self._place(target) for target in step.targets if target is not None]
        if step.call in OWN and _on_cpu(args):
            self.calls.append(OWN[step.call]([self._array(x) for x in step.args], [self._array(x) for x in places]))
            return
        if self._write_numpy(step, places):
            return
        out = places[0] if step.single else tuple(places)
        if step.call in WITH_OUT:
            self.calls.append(bound(WITH_OUT[step.call], args, {**kwargs, "out": out}))
        else:
            self.calls.append(copied(bound(step.call._op, args, kwargs), out))

    def _write_numpy(self, step: Step, places: list[Tensor]) -> bool:
        flat = [x for a in step.args for x in (a if isinstance(a, list | tuple) else [a])]
        values = [self.tensor(x) for x in flat if isinstance(x, Variable | Tensor)]
        values += places
        if not all(x.device.type == "cpu" and x.dtype in DTYPES and x.numel() <= MOST_CELLS for x in values):
            return False
        out, call = self._array(places[0]), step.call
        if call is aten.where.self:
            mask, yes, no = (self._array(x) for x in step.args)
            self.calls += [bound(np.copyto, [out, no]), bound(np.copyto, [out, yes, "same_kind", mask])]
            return True
        if call is aten.stack.default or call is aten.cat.default:
            self._write_pieces(step, places[0])
            return True
        if exactly_copied(step, values[0].dtype, places[0].dtype):
            self.calls.append(bound(np.copyto, [out, self._array(step.args[0])]))
            return True
        if call is aten.zeros.default:
            self.calls.append(bound(out.fill, [0]))
            return True
        if call is aten.diag_embed.default and len(step.args) == 1 and not step.kwargs:
            diagonal = places[0].diagonal(dim1=-2, dim2=-1).numpy()
            self.calls += [bound(out.fill, [0]), bound(np.copyto, [diagonal, self._array(step.args[0])])]
            return True
        if call in PICKS and self._write_pick(step, places[0]):
            return True
        found = numpy_call(call, step.args, step.kwargs)
        if found is None:
            return False
        function, args = found
        kind = self._array(next(x for x in step.args if isinstance(x, Variable | Tensor))).dtype
        plain = call in BINARY or call is aten.clamp.default
        if plain:  # a scalar of another type would be converted at every call
            args = [np.asarray(x, kind) if isinstance(x, int | float) and kind.kind == "f" else x for x in args]
        words = [out if x is ... else self._array(x) for x in args]
        if ... in args:
            self.calls.append(bound(function, words))
        elif function is np.maximum:  # an `out` without its name is deprecated
            self.calls.append(bound(function, words, {"out": out}))
        else:
            self.calls.append(bound(function, [*words, out]))
        return True

    def _write_pieces(self, step: Step, place: Tensor) -> None:
        """Stacked or concatenated values, each copied to its part of the result."""
        parts, dim = step.args[0], step.args[1] if len(step.args) > 1 else 0
        tensors = [self.tensor(x) for x in parts]
        if step.call is aten.stack.default:
            pieces = list(place.unbind(dim))
        else:
            pieces = list(place.split([x.shape[dim] for x in tensors], dim))
        for piece, part in zip(pieces, parts, strict=True):
            self.calls.append(bound(np.copyto, [piece.numpy(), self._array(part)]))

    def _write_pick(self, step: Step, place: Tensor) -> bool:
        """Entries at constant places: where in memory each is, the same operation on the numbers of places says."""
        source = self.tensor(step.args[0])
        given = [x for a in step.args[1:] for x in (a if isinstance(a, list) else [a])]
        if any(isinstance(x, Variable) for x in given) or not place.is_contiguous():
            return False
        memory = torch.empty(0, dtype=source.dtype).set_(source.untyped_storage())
        numbers = torch.arange(len(memory)).as_strided(source.shape, source.stride(), source.storage_offset())
        where = step.call(numbers, *step.args[1:], **step.kwargs).flatten().numpy()
        # With another mode, `take` would write to memory of its own first.
        self.calls.append(bound(memory.numpy().take, [where, None, place.view(-1).numpy(), "clip"]))
        return True


@dataclass(frozen=True)
class Look:
    """A guard: all entries of `source` are `value`, or finite if that is None."""

    source: Variable
    value: bool | None

    def call(self, array: Any) -> Call:
        """The guard, for the memory of `source`."""
        return all_finite(array) if self.value is None else all_are(array, self.value)


@dataclass(frozen=True)
class Written:
    """A step, or a look at what it and others would reduce, as calls one after another."""

    step: Step
    look: Look | None
    calls: tuple[Call, ...]


def _looks(listing: Listing) -> dict[Step, Look | None]:
    """Guards that need no reduction, and the steps that only they would need (None)."""
    made = {target: step for step in listing.steps for target in step.targets}
    if None in made:  # memory that is written in place may be another when the guard is read
        return {}
    uses: Counter[Any] = Counter(x for x in listing.outputs if isinstance(x, Variable))
    for step in listing.steps:
        each(lambda x: uses.update([x]) if isinstance(x, Variable) else None, [step.args, step.kwargs])

    def only(x: Any, call: Any) -> Step | None:
        """What made this, if it is such a call and one step needs its result."""
        step = made.get(x) if isinstance(x, Variable) and uses[x] == 1 else None
        return step if step is not None and step.call is call else None

    found: dict[Step, Look | None] = {}
    for step in listing.steps:
        if step.call is not READ or not isinstance(step.guard, bool):
            continue
        judge = only(step.args[0], aten.all.default if step.guard else aten.any.default)
        if judge is None or listing.examples[mask := judge.args[0]].device.type != "cpu":
            continue
        found[judge], found[step] = None, Look(mask, step.guard)
        same = only(mask, aten.eq.Scalar) if step.guard else None  # x - x == 0
        difference = only(same.args[0], aten.sub.Tensor) if same is not None and same.args[1] == 0 else None
        if same is None or difference is None or difference.args[0] is not difference.args[1] or difference.kwargs:
            continue
        x = listing.examples[difference.args[0]]
        if x.dtype.is_floating_point and x.is_contiguous():
            found |= {same: None, difference: None, step: Look(difference.args[0], None)}
    return found


def _on_cpu(values: Sequence[Any]) -> bool:
    return all(x.device.type == "cpu" for x in values if isinstance(x, Tensor))
