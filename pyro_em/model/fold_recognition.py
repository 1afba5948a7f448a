"""Finds the chains of Gaussian states among the latents of a model, and certifies what their fold takes for granted.

A chain is a set of continuous latents that sites connect, at least one of them in a `pyro.markov` or `pyro_em.markov`
loop. It is folded (folding.py) if all of its sites are normal and a site reads states of its own step and of at most
`HEADS` steps back. Certified, at two parameter points, with random states against states at 0:

    locations are affine in the states, noises do not depend on them         the arguments are the same
    elements of the shared plates do not meet, sites read no further back    the same, with states that all differ
    steps that are run together are what they are one by one                 `pyro_em.markov`: at a few single steps

all of it in every state of the discrete latents that choose the system     these are enumerated

An argument that is the same along a dim at both points is taken to be so at all. What is no such chain is left as it
is, for the routes of evidence/routes.py (whose refusals name the site), which treat the loop as one dense system; so is
a chain that reads discrete latents of a loop (a system that switches) or of a plate that it is not in as a whole.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor

from pyro_em.device import seeded_normal
from pyro_em.errors import Refusal
from pyro_em.families.chain import HEADS
from pyro_em.model.alone import StepByStep, is_for_single_steps
from pyro_em.model.capture import Capture, ParameterRecord, capture
from pyro_em.model.certify_loops import REMEDY
from pyro_em.model.chain_arguments import reach, reads_own_step, steps_of
from pyro_em.model.flat import check_flat, flat_values
from pyro_em.model.folding import Chained, Fold, FoldedModel, places, zeros
from pyro_em.model.recognise import second_point
from pyro_em.model.roles import RoleOf, assign_roles
from pyro_em.model.statements import NotFolded, Statement, ValueOf
from pyro_em.model.still import still_latents
from pyro_em.model.timeline import Loop, Template, chosen_steps
from pyro_em.model.trace import quiet_store, run_model
from pyro_em.types import Model, Params

T = TypeVar("T")
AGREE, AGREE_SINGLE = 1e-9, 1e-5  # relative; of models in float64, and of others


def looked_at(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    roles: Mapping[str, str] | None,
    deltas: Collection[str],
    rules: Mapping[str, bool],
) -> tuple[Model, Capture, dict[str, RoleOf]]:
    """The model with its chains folded (as it is if it has none), a first look at it, and the roles of its sites.

    :param rules: latents that are to be integrated numerically, and whether by nodes of their own for every element.
    """
    seen = capture(model, args, kwargs)
    assigned = assign_roles(seen, roles, deltas, rules)
    exact = {n for n, role in assigned.items() if role.role == "latent" and n not in rules}
    folds = _folds(model, args, kwargs, seen, assigned, {n for n in exact if not seen.sites[n].discrete})
    gone = frozenset().union(*(fold.names for fold in folds))
    if is_for_single_steps(seen, assigned, gone):
        return looked_at(StepByStep(model), args, kwargs, roles, deltas, rules)
    check_flat(seen, exact - gone)
    if not folds:
        return model, seen, assigned
    folded = FoldedModel(model, seen.loops, folds, seen.max_plate_nesting)
    seen = dataclasses.replace(capture(folded, args, kwargs), max_plate_nesting=seen.max_plate_nesting)
    return folded, seen, assign_roles(seen, {n: r for n, r in (roles or {}).items() if n not in gone}, deltas, rules)


def _folds(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seen: Capture,
    assigned: Mapping[str, RoleOf],
    latent: Collection[str],
) -> list[Fold]:
    if not (sets := _sets(seen, latent)):
        return []
    records = list(seen.parameters.values())
    for name, role in assigned.items():
        if role.role == "parameter":
            site = seen.sites[name]
            records.append(ParameterRecord(name, site.value.detach().clone(), site.fn.support, "sample"))
    generator = torch.Generator().manual_seed(0)
    elsewhere = {r.name: second_point(r, generator) for r in records}
    params: tuple[Params, Params] = ({r.name: r.value for r in records}, elsewhere)
    taken = set(seen.sites)
    folds = []
    for names in sets:
        fold = Fold(_site_name(seen, names, taken), names, _shared(seen, names), chosen_by=_discrete(seen, names))
        try:
            folds.append(_recognised(_Runs(model, args, kwargs, seen, fold), params))
        except NotFolded:
            continue
        taken.add(fold.site)
    return folds


def _sets(seen: Capture, latent: Collection[str]) -> list[frozenset[str]]:
    """Latents that sites connect, and these sites; those in a loop that no discrete latent of a loop chooses."""
    groups: list[tuple[set[str], set[str]]] = []
    for name, site in seen.sites.items():
        read = (set(site.upstream) | {name}) & set(latent)
        if not read:
            continue
        members, rest = {name}, []
        for group in groups:
            if group[0] & read:
                read, members = read | group[0], members | group[1]
            else:
                rest.append(group)
        groups = [*rest, (read, members)]
    return [
        frozenset(members)
        for read, members in groups
        if any(seen.sites[n].markov for n in read)
        and any(seen.sites[n].observed for n in members)
        and not any(_switches(seen, n, members) for n in _discrete(seen, members))
    ]


def _discrete(seen: Capture, members: Collection[str]) -> tuple[str, ...]:
    """Discrete latents that some of the sites read, in program order."""
    read = frozenset().union(*(seen.sites[n].upstream for n in members))
    return tuple(n for n, site in seen.sites.items() if n in read and site.enumerable and not site.observed)


def _switches(seen: Capture, name: str, members: Collection[str]) -> bool:
    """Whether a discrete latent is another one at other steps, or for parts of the chain."""
    plates = {plate.name for plate in seen.sites[name].plates}
    return seen.sites[name].markov or not plates <= _shared(seen, members)


def _shared(seen: Capture, names: Collection[str]) -> frozenset[str]:
    times = {loop.plate for loop in seen.loops}
    plates = [{p.name for p in seen.sites[n].plates} for n in names]
    return frozenset(set.intersection(*plates) - times)


def _site_name(seen: Capture, names: Collection[str], taken: Collection[str]) -> str:
    """The name of the observed sequence without the step."""
    observed = [n for n in seen.sites if n in names and seen.sites[n].observed]
    name = observed[-1]
    loop = next((loop for loop in seen.loops if name in loop.names and ":" in name), None)
    stem = (Template.of(name, loop).stem if loop is not None else re.sub(r"[_\W]*\d+$", "", name)) or name
    others = set(taken) - set(names)
    while stem in others:
        stem += "_chain"
    return stem


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Runs of the model that look at one chain."""

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seen: Capture
    fold: Fold

    @property
    def agree(self) -> float:
        sites = (site for name, site in self.seen.sites.items() if name in self.fold.names)
        return AGREE if all(site.value.dtype == torch.float64 for site in sites) else AGREE_SINGLE

    def at(self, params: Params, value_of: ValueOf, kind: str = "together") -> Chained:
        return self._run(params, lambda model, args, kwargs: model.collect(args, kwargs, value_of, kind)[0])

    def still(self, params: Params) -> frozenset[str]:
        """Latents from before the loop that all of its steps read."""
        look = lambda model, args, kwargs: still_latents(model.statements(args, kwargs, zeros)[0], HEADS)  # noqa: E731
        return self._run(params, look)

    def _run(self, params: Params, look: Callable[[FoldedModel, Any, Any], T]) -> T:
        folded = FoldedModel(self.model, self.seen.loops, (self.fold,), self.seen.max_plate_nesting)
        found: list[T] = []

        def probe(*args: Any, **kwargs: Any) -> None:
            found.append(look(folded, args, kwargs))

        given = {**flat_values(self.seen, self.fold.names), **params}
        with quiet_store(), pyro.validation_enabled(False), torch.no_grad():
            run_model(
                probe, self.args, self.kwargs, given, max_plate_nesting=self.seen.max_plate_nesting,
                enumerated=bool(self.fold.chosen_by),
            )  # fmt: skip
        return found[0]

    def with_fold(self, **changes: Any) -> _Runs:
        return dataclasses.replace(self, fold=dataclasses.replace(self.fold, **changes))


def _random(seed: int) -> ValueOf:
    generator = torch.Generator().manual_seed(seed)

    def value_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return seeded_normal(shape, generator).to(dtype).requires_grad_(True)

    return value_of


def _recognised(runs: _Runs, params: tuple[Params, Params]) -> Fold:
    """The fold with all that is known of it.

    :raises NotFolded: if it is no chain.
    """
    runs = runs.with_fold(still=runs.still(params[0]) | runs.still(params[1]))
    first = [runs.with_fold(lags=HEADS, heads=HEADS).at(p, zeros) for p in params]
    lags = max(1, *(reach(own.statements, own.moves) for own in first))
    within = any(reads_own_step(own.statements, own.moves) for own in first)
    together = any(own.timed for own in first[0].statements)
    num = len(steps_of(first[0].statements))
    heads = num - 1 if together else min(max(lags, *(len(own.flat) for own in first)), num)
    if heads > HEADS:
        raise NotFolded("it looks too far back")
    if together:
        _same_cells(runs.seen.loops, first[0].statements, runs.fold.still)
    runs = runs.with_fold(lags=lags, heads=heads, within=within)
    still = [runs.at(p, zeros) for p in params]
    for p, own, seed in zip(params, still, (1, 2), strict=True):
        if not _equal(own.arguments, runs.at(p, _random(seed)).arguments, runs.agree):
            raise NotFolded("a location is not affine in the states, or a noise depends on them")
    if together:
        _certify_steps(runs, params[0], still[0])
    rank = still[0].rank
    dims = range(rank - len(still[0].statements[0].layout.lead), rank + 1)
    varying = {
        name: tuple(any(_differs(own.arguments[name], d) for own in still) for d in dims) for name in still[0].arguments
    }
    states, cells = (places(still[0].statements, latent=own) for own in (True, False))
    return dataclasses.replace(runs.fold, varying=varying, places=states, cells=cells, flat=bool(still[0].flat))


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor], agree: float) -> bool:
    return one.keys() == other.keys() and all(_close(x, other[n], agree) for n, x in one.items())


def _close(x: Tensor, y: Tensor, agree: float) -> bool:
    tolerance = agree * (1 + float(torch.nan_to_num(x).abs().max())) if x.numel() else 0.0
    return x.shape == y.shape and torch.allclose(x, y, rtol=agree, atol=tolerance, equal_nan=True)


def _differs(x: Tensor, dim: int) -> bool:
    return x.shape[dim] > 1 and not torch.equal(x.narrow(dim, 0, 1).expand_as(x), x)


def _moving(step: Sequence[Statement]) -> list[Statement]:
    """Latents of a step that are no copies."""
    return [s for s in step if s.latent and not s.copy_of]


def _same_cells(loops: Sequence[Loop], statements: Sequence[Statement], still: Collection[str]) -> None:
    """Steps run together stand for the step before themselves: the statements of the last head must be the same."""
    steps = steps_of(statements)
    loop = next(loop for loop in loops if _moving(steps[-1])[0].name in loop.names)
    later = [(Template.of(s.name, loop).text, s.layout.cells) for s in _moving(steps[-1])]
    step = loop.history - 1
    expected = [(text.format(Template.of(s.name, loop).first - 1), n)
                for (text, n), s in zip(later, _moving(steps[-1]), strict=True)]  # fmt: skip
    if [(s.name, s.layout.cells) for s in _moving(steps[-2]) if s.name not in still] != expected:
        raise NotFolded(f"step {step} has other states than the later ones")


def _certify_steps(runs: _Runs, params: Params, together: Chained) -> None:
    """The steps run together are, one by one, what they are at a few single steps.

    :raises Refusal: naming a site, if they are not.
    """
    loop = next(loop for loop in runs.seen.loops if together.statements[-1].name in loop.names)
    heads = runs.fold.heads
    later = [Template.of(s.name, loop) for s in together.statements if s.timed and not s.copy_of]
    single = {template.name(step, loop) for template in later for step in chosen_steps(loop)}
    alone = runs.with_fold(names=runs.fold.names | single).at(params, _random(3), "chosen")
    rank = together.rank
    outside = heads - loop.history
    for place, step in enumerate(chosen_steps(loop)):
        if place < loop.history:
            continue
        for name in [n for n in together.arguments if not re.search(r"_\d+\.", n)]:
            own, other = together.arguments[name], alone.arguments.get(name)
            row = own.narrow(rank, (step - loop.history) if own.shape[rank] > 1 else 0, 1)
            later_row = min(place - loop.history, other.shape[rank] - 1) if other is not None else 0
            if other is None or not _close(row, other.narrow(rank, later_row, 1), runs.agree):
                raise _another(together, step, f"'{name}'")
        if not _close(together.value[..., step + outside, :], alone.value[..., place + outside, :], runs.agree):
            raise _another(together, step, "observation")


def _another(together: Chained, step: int, what: str) -> Refusal:
    reason = f"at step {step} alone its {what} is another than in the run of all steps together."
    return Refusal(together.statements[-1].name, reason, REMEDY)
