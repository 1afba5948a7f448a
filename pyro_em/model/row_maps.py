"""Which element of a discrete latent each row of a site reads, found by changing states.

The index code of an integer is pushed through the model bit by bit: with the elements whose number has bit b in
another state than all others, the arguments of row n change if and only if the element that it reads has that bit.
ceil(log2 G) runs tell it for all rows, whatever the model's code does with the latent; at random assignments every row
must then be what it is where all elements are in the state of the one that it reads.

Rows that no state changes (a slope whose covariate is 0) read any element; among the index tensors that the model
applied to the latent one that agrees with all others says which, so that terms of log p(x) go to their own group.

Refused: rows that read several elements (a stochastic block model), which no sum over single elements says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_em.errors import Refusal
from pyro_em.model.below_zero import check_below_zero
from pyro_em.model.capture import Capture
from pyro_em.model.density import log_density
from pyro_em.model.indexed import Indexed, IndexedLatent, indexed_latents, states_of
from pyro_em.model.trace import Run, SiteRecord, quiet_store, run_model
from pyro_em.types import Model

Maps = dict[str, dict[str, Tensor]]
"""By site and latent: the (flattened) element that each row reads, over the dims of the site's plates."""

MOST_OTHERS = 8  # states of other latents at which rows are looked at
RunAt = Callable[[Mapping[str, Tensor]], Run]


class _Indices(TorchFunctionMode):
    """Collects integer tensors among the arguments of calls, by number of entries."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, list[Tensor]] = {}
        self._seen: set[int] = set()

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in _flat(args):
            if x.dtype == torch.long and id(x) not in self._seen:
                self._seen.add(id(x))
                self.found.setdefault(x.numel(), []).append(x)
        return call(*args, **(kwargs or {}))


def _flat(args: Any) -> Iterator[Tensor]:
    for x in args:
        if type(x) is Tensor:
            yield x
        elif isinstance(x, tuple | list):
            yield from _flat(x)


@contextmanager
def _indices() -> Iterator[_Indices]:
    with _Indices() as found:
        yield found


def bind_indexed(
    seen: Capture,
    latents: Collection[str],
    continuous: Collection[str],
    at: tuple[Model, tuple[Any, ...], dict[str, Any], Mapping[str, Tensor]],
) -> tuple[Capture, Indexed | None, Maps]:
    """The discrete latents that are read by an index from outside of their plates, and which element each row reads.

    :param latents: names of sites that are not parameters; `continuous` those of the continuous latents.
    :param at: the model, its arguments, and values of parameters and continuous latents, random ones.
    :returns: also the capture, with room for the states of these latents left of its plates.
    """
    discrete = [n for n in latents if seen.sites[n].enumerable and not seen.sites[n].observed]
    indexed = indexed_latents(seen, discrete, continuous, -1 - seen.max_plate_nesting)
    if indexed is None:
        return seen, None, {}
    model, args, kwargs, given = at
    nesting = seen.max_plate_nesting + len(indexed.latents)
    wider = dataclasses.replace(seen, max_plate_nesting=nesting, stacked=frozenset(indexed.names))

    def run(values: Mapping[str, Tensor]) -> Run:
        with torch.no_grad(), quiet_store(), pyro.validation_enabled(False):
            depth = wider.max_plate_nesting
            return run_model(model, args, kwargs, {**given, **values}, max_plate_nesting=depth, enumerated=False)

    below = seen.below_zero & set(indexed.names)
    if below:
        check_below_zero(below, run, {}, {n: _chequered(*states_of(seen.sites[n])) for n in discrete})
    return wider, indexed, row_maps(seen, indexed, discrete, run)


def _chequered(states: Tensor, batch: torch.Size) -> Tensor:
    """Values of a discrete latent, others for the first element along each plate than for the rest."""
    number = torch.zeros(batch, dtype=torch.long)
    for dim, size in enumerate(batch):
        number = number + (torch.arange(size) == 0).long().reshape([-1 if d == dim else 1 for d in range(len(batch))])
    return states[number % min(2, len(states))]


def row_maps(capture: Capture, indexed: Indexed, discrete: Sequence[str], run: RunAt) -> Maps:
    """The element of each indexed latent that the rows of its readers read.

    :param discrete: all discrete latents of the model.
    :param run: the model at given values of all of them.
    :raises Refusal: if a row reads several elements.
    """
    values = {name: states_of(capture.sites[name]) for name in discrete}

    def at(numbers: Mapping[str, Tensor]) -> Run:
        return run({n: values[n][0][k.expand(values[n][1])] for n, k in numbers.items()})

    found: Maps = {}
    for latent in indexed.latents:
        others = {name: len(states) for name, (states, _) in values.items() if name != latent.name}
        for name, element in _of_one(latent, others, at).items():
            found.setdefault(name, {})[latent.name] = element
    return found


def _of_one(latent: IndexedLatent, others: Mapping[str, int], run: RunAt) -> dict[str, Tensor]:
    count, states = latent.batch.numel(), len(latent.states)
    code = torch.arange(count).reshape(latent.batch)
    found: dict[str, Tensor] = {}
    rounds = min(MOST_OTHERS, max(others.values(), default=1))
    for s in range(rounds):
        rest = {name: torch.tensor(s % size) for name, size in others.items()}

        def at(state: Tensor, rest: Mapping[str, Tensor] = rest) -> Run:
            return run({**rest, latent.name: state})

        with _indices() as met:
            base = at(torch.tensor(0))
        plain = [base, *(at(torch.tensor(k)) for k in range(1, states))]
        readers = [n for n in base.sites if n in latent.readers and not _inside(base.sites[latent.name], base.sites[n])]
        for name in readers:
            found.setdefault(name, torch.full(_sizes(base.sites[name]), -1))
        for k in range(1, states):
            moved = {n: _changed(base.sites[n], plain[k].sites[n]) & (found[n] < 0) for n in readers}
            if not any(bool(x.any()) for x in moved.values()):
                continue
            numbers = {n: torch.zeros_like(found[n]) for n in readers}
            for bit in range(math.ceil(math.log2(count)) if count > 1 else 0):
                other = at((code >> bit & 1) * k)
                for n in readers:
                    numbers[n] += _changed(base.sites[n], other.sites[n]).long() << bit
            for n in readers:
                found[n] = torch.where(moved[n], numbers[n], found[n])
        for n in readers:
            if bool((found[n] >= count).any()):
                raise _coupled(n, latent)
        for n in readers:
            found[n] = _completed(found[n], met.found.get(found[n].numel(), []), latent.batch)
        _check(latent, {n: found[n] for n in readers}, plain, at)
    return found


def _completed(element: Tensor, candidates: Sequence[Tensor], batch: torch.Size) -> Tensor:
    """Elements of rows that no state moves, by indices (one for each plate of the latent) that the model applies and
    that agree with all other rows."""
    open_ones = element < 0
    if not bool(open_ones.any()) or bool(open_ones.all()):
        return element
    total, stride = torch.zeros_like(element), 1
    for size in reversed(batch):
        own = element // stride % size
        shaped = (c.reshape(element.shape) for c in candidates if bool(((c >= 0) & (c < size)).all()))
        index = next((c for c in shaped if bool(((c == own) | open_ones).all())), None)
        if size > 1 and index is None:
            return element
        total, stride = total + (0 if index is None else index * stride), stride * size
    return total


def _check(latent: IndexedLatent, elements: Mapping[str, Tensor], plain: Sequence[Run], at: Callable[..., Run]) -> None:
    """Rows are at random assignments what they are where all elements are in the state of the one that they read."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        drawn = torch.randint(len(plain), tuple(latent.batch), generator=generator, device="cpu")
        drawn = drawn.to(torch.get_default_device())
        run = at(drawn)
        for name, element in elements.items():
            own = drawn.reshape(-1)[element.clamp(min=0)]
            for k, other in enumerate(plain):
                if bool((_changed(run.sites[name], other.sites[name], exactly=False) & (own == k)).any()):
                    raise _coupled(name, latent)


def _coupled(site: str, latent: IndexedLatent) -> Refusal:
    count, states = latent.batch.numel(), len(latent.states)
    return Refusal(
        site,
        f"a row of it reads several elements of the discrete latent '{latent.name}', whose {count} elements are then "
        f"not independent given the data: an exact sum has {states}^{count} states.",
        "let a row read one element only (a latent of its own for each role). Latents that the data couple in pairs (a "
        "stochastic block model) have no posterior that is summed exactly: use algorithm='svi' with a guide for them.",
    )


def _inside(own: SiteRecord, other: SiteRecord) -> bool:
    return {p.name for p in own.plates} <= {p.name for p in other.plates}


def _sizes(site: SiteRecord) -> tuple[int, ...]:
    sizes = {p.dim: p.size for p in site.plates}
    return tuple(sizes.get(d, 1) for d in range(min([0, *sizes]), 0))


def _changed(a: SiteRecord, b: SiteRecord, *, exactly: bool = True) -> Tensor:
    """Rows at which some argument differs, over the dims of the site's plates; else by more than rounding."""
    shape = _sizes(a)
    changed = torch.zeros(shape, dtype=torch.bool)
    pairs = [(log_density(a, masked=False), log_density(b, masked=False), 0)]
    if a.family is not None and a.arguments is not None and b.arguments is not None:
        trailing = {n: a.family.arguments[n] + a.element_dims for n in a.arguments}
        pairs = [(v, b.arguments[n], trailing[n]) for n, v in a.arguments.items()]
    for x, y, event in pairs:
        x, y = torch.broadcast_tensors(x.detach(), y.detach())
        same = (x == y) | (x.isnan() & y.isnan())
        if not exactly and x.is_floating_point():
            same = same | ((x - y).abs() <= 1e-6 * (1 + x.abs()))
        differs = ~same
        if event:
            differs = differs.flatten(x.dim() - event).any(-1)
        changed = changed | differs
    return changed.expand(shape)
