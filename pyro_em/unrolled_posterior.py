"""The posterior of one sequence of states of a `pyro.markov` loop as it comes in: filtered, smoothed, forecast.

What SequencePosterior is for the loops of `pyro_em.markov`, for loops whose steps are sites of their own. With x_t
everything that is observed at step t, the forward pass goes from step to step over the latents that later steps read,

    α_t(I_t) = Σ over latents not in I_t of α_{t-1}(I_{t-1}) Π factors of step t,      Σ α_t = p(x_0..x_t),

whatever the history, and however many chains or components there are beside the one asked for. What is observed
outside of the loop, of latents from before it, is known before its first step.

Not for latents of which some lie in plates of their own, nor for loops inside of one another.

Shapes: T steps, then the plates of the chain, then K states. Tables are packed: plates first, then latents by symbols.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em import settings
from pyro_em.errors import InputError
from pyro_em.evidence.ring import logsumexp
from pyro_em.model import compat
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.graph import Component
from pyro_em.model.packing import align
from pyro_em.problem import Problem
from pyro_em.series import series_of
from pyro_em.store import isolated_rng
from pyro_em.types import Params

BEFORE = -1  # the step of what stands outside of the loop


class UnrolledSequence:
    """Made by `Posterior.sequence(name)`; `sites` are its latents in the order of time.

    `smoothed` gives the marginal of one of them, given all data.
    """

    def __init__(
        self,
        problem: Problem,
        params: Params,
        factors: Mapping[str, Tensor],
        name: str,
        sites: Sequence[str],
        smoothed: Callable[[str], Tensor],
    ) -> None:
        self.name, self.sites, self.factors, self._smoothed = name, tuple(sites), factors, smoothed
        graph = self.graph = problem.graph
        self._component = self._own_component()
        self._symbols = [graph.latents[site] for site in sites]
        self._plates = "".join(d for d in graph.plate_names if d in self._component.root)
        self._steps = self._steps_of(_places(problem, params))

    def _own_component(self) -> Component:
        graph = self.graph
        inside = [c for c in graph.components if graph.latents[self.sites[0]] in c.symbols]
        own = {graph.latents[site] for site in self.sites}
        if not inside:
            raise InputError(f"sequence: '{self.name}' has one state, which it is in at every step.")
        if not all(own <= c.symbols for c in inside):
            raise InputError(f"sequence: the steps of '{self.name}' are independent; ask for their marginals.")
        (component,) = inside
        latents = [n for n in component.factors if graph.factors[n].enumerated]
        apart = component.nests or component.loops or component.symbols - graph.symbol_sites.keys()
        if apart or any(graph.factors[n].plates != component.root for n in latents):
            raise InputError(
                f"sequence: latents beside '{self.name}' lie in plates of their own, or are continuous; ask for the "
                "marginal of the states, given all data."
            )
        return component

    def _steps_of(self, places: Mapping[str, tuple[int, int] | None]) -> dict[str, int]:
        """Step of every factor of the component."""
        own = {site: i for i, site in enumerate(self.sites)}
        inside = {name: place for name in self._component.factors if (place := places.get(name)) is not None}
        shifts = {own[name] - place[1] for name, place in inside.items() if name in own}
        if len({loop for loop, _ in inside.values()}) != 1 or len(shifts) != 1:
            raise InputError(
                f"sequence: '{self.name}' is no latent of each step of one pyro.markov loop; ask for its marginals."
            )
        (shift,) = shifts
        steps = {name: place[1] + shift for name, place in inside.items()}
        steps |= {name: i for name, i in own.items() if name not in steps}
        at = {self.graph.factors[name].symbol: step for name, step in steps.items()}
        for name in self._component.factors:
            if name not in steps:
                read = (at[d] for d in dims_of(self.factors[name]) if d in at)
                latent = self.graph.factors[name].enumerated
                steps[name] = BEFORE if latent else max(read, default=BEFORE)
        return steps

    @cached_property
    def _last_read(self) -> dict[str, int]:
        """Last step that reads each latent."""
        found: dict[str, int] = {}
        for name, step in self._steps.items():
            for d in self._latents(self.factors[name]):
                found[d] = max(found.get(d, BEFORE), step)
        return found

    def _latents(self, x: Tensor) -> str:
        return "".join(d for d in dims_of(x) if d in self._component.symbols)

    @cached_property
    def _by_step(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name, step in self._steps.items():
            found.setdefault(step, []).append(name)
        return found

    def _at_root(self, name: str) -> Tensor:
        """A factor over the root's plates: one inside of others summed over these."""
        x, dims = self.factors[name], dims_of(self.factors[name])
        inner = self.graph.factors[name].plates - self._component.root
        gone = [i for i, d in enumerate(dims) if d in inner]
        missing = [self.graph.plate_sizes[d] for d in inner if d not in dims]
        total = x.double().sum(gone) if gone else x.double()
        for size in missing:
            total = total * size
        return with_dims(total, "".join(d for d in dims if d not in inner))

    def _product(self, tables: Sequence[Tensor]) -> Tensor:
        """Sum of log-tables, plates first (of size 1 where none has them)."""
        latents = "".join(dict.fromkeys("".join(map(self._latents, tables))))
        sizes = {d: n for x in tables for d, n in zip(dims_of(x), x.shape, strict=True)}
        cells = 1
        for d in self._plates + latents:
            cells *= sizes.get(d, 1)
        if 8 * cells > settings.max_table_bytes:
            raise InputError(
                f"sequence: a table of the latents that steps of '{self.name}' share has {8 * cells:.3g} bytes, more "
                "than pyro_em.settings.max_table_bytes."
            )
        total = reduce(torch.add, [align(x, self._plates + latents) for x in tables])
        return with_dims(total, self._plates + latents)

    def _summed(self, table: Tensor, kept: str) -> Tensor:
        """log Σ over the latents that are not in `kept`; of the others in its order."""
        own = [d for d in dims_of(table) if d not in self._plates and d not in kept]
        order = self._plates + "".join(d for d in kept if d in dims_of(table))
        x = align(table, order + "".join(own)).flatten(len(order)) if own else align(table, order).unsqueeze(-1)
        return with_dims(logsumexp(x), order)

    @cached_property
    def _forward(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """log p(x_0..x_{t-1}) for t = 0..T (T + 1, plates), filtered states of each step, and the last step's table."""
        evidences, states = [], []
        alpha = with_dims(torch.zeros((), dtype=torch.float64), "")
        for step in range(BEFORE, len(self.sites)):
            table = self._product([alpha, *map(self._at_root, self._by_step.get(step, []))])
            evidences.append(self._whole(self._summed(table, "")))
            if step > BEFORE:
                states.append(self._whole(self._summed(table, self._symbols[step])))
            alpha = self._summed(table, "".join(d for d in self._latents(table) if self._last_read[d] > step))
        return torch.stack(evidences), states, table

    def _whole(self, x: Tensor) -> Tensor:
        """With all plates in full."""
        sizes = [self.graph.plate_sizes[d] for d in self._plates]
        return x.expand([*sizes, *x.shape[len(sizes) :]])

    def smooth(self) -> Tensor:
        """p(z_t | all data), (T, plates, K)."""
        return torch.stack([self._smoothed(site) for site in self.sites])

    def filter(self) -> Tensor:
        """p(z_t | x_0..x_t), (T, plates, K)."""
        return torch.softmax(torch.stack(self._forward[1]), -1).nan_to_num(0.0)

    def one_step(self) -> Tensor:
        """log p(x_t | x_0..x_{t-1}), (T, plates); its sum over t is the chain's log-evidence (given what is observed
        outside of the loop)."""
        return self._forward[0].diff(dim=0)

    def forecast(self, num_steps: int) -> Tensor:
        """p(z_{T-1+h} | all data) for h = 1..num_steps, (num_steps, plates, K).

        :raises InputError: if the transitions vary with time, as those after the data are then unknown.
        """
        if num_steps < 1:
            raise InputError(f"forecast: num_steps must be at least 1, not {num_steps}.")
        last = len(self.sites) - 1
        move = self._move(last, last)
        assert move is not None
        dims = dims_of(move)
        others = [self._move(step, last) for step in range(last)]
        alike = [x for x in others if x is not None and set(dims_of(x)) == set(dims)]
        if not all(torch.equal(align(x, dims), align(move, dims)) for x in alike):
            raise InputError(f"forecast: the transitions of '{self.name}' vary with time; those to come are unknown.")
        if not alike:
            raise InputError(
                f"forecast: no step of '{self.name}' before the last one reads as many steps back, so that nothing "
                "tells whether its transitions are those to come. It takes two steps more than the chain looks back."
            )
        table, found = self._forward[2], []
        for _ in range(num_steps):
            older = "".join(self._shifted(d, -1) or " " for d in dims_of(table))  # " " for what no step reads any more
            kept = "".join(d for d in older if d in self._latents(move))
            table = self._product([self._summed(with_dims(table, older), kept), move])
            found.append(self._whole(self._summed(table, self._symbols[last])))
        return torch.softmax(torch.stack(found), -1).nan_to_num(0.0)

    @cached_property
    def _places(self) -> tuple[dict[str, tuple[int, int]], dict[tuple[int, int], str]]:
        """Step and number within the step of each latent's symbol, and the other way round."""
        counts: dict[int, int] = {}
        place = {}
        for name, step in self._steps.items():
            symbol = self.graph.factors[name].symbol
            if symbol is not None and step > BEFORE:
                place[symbol] = step, counts.setdefault(step, 0)
                counts[step] += 1
        return place, {own: symbol for symbol, own in place.items()}

    def _shifted(self, symbol: str, by: int) -> str | None:
        """The symbol of the same latent some steps later; plates, and latents from before the loop, stay."""
        place, symbols = self._places
        if symbol not in place:
            return symbol
        step, number = place[symbol]
        return symbols.get((step + by, number))

    def _move(self, step: int, last: int) -> Tensor | None:
        """log p of the latents of a step, given those that they read, named as if it were the last step; None where
        the last step has no such latents."""
        latents = [name for name in self._by_step[step] if self.graph.factors[name].enumerated]
        table = self._product([self._at_root(name) for name in latents])
        names = [self._shifted(d, last - step) for d in dims_of(table)]
        return None if None in names else with_dims(table, "".join(map(str, names)))


def unrolled_sequence(
    problem: Problem,
    params: Params,
    factors: Mapping[str, Tensor],
    name: str,
    smoothed: Callable[[str], Tensor],
) -> UnrolledSequence:
    """The sequence of a loop's latents of this name, without the step.

    :raises InputError: if there is none.
    """
    series = series_of(problem).get(name)
    if series is None or series.steps is None or not set(series.sites) <= set(problem.graph.latents):
        known = ", ".join(map(repr, problem.graph.latents)) or "none"
        raise InputError(
            f"'{name}' is no sequence of discrete states: such a one has sites named by the steps of a loop over time, "
            f"at least two, and is asked for without the step ('z' for f'z_{{t}}'). The discrete latents: {known}."
        )
    if series.steps != tuple(range(series.steps[0], series.steps[0] + len(series.steps))):
        raise InputError(f"sequence: some steps have no '{name}'; ask for the marginals of the others.")
    return UnrolledSequence(problem, params, factors, name, series.sites, smoothed)


class _Watch(Messenger):
    """Note in which loop each site lies, and at which step of it; None outside of any, or inside of several."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, tuple[int, int] | None] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        try:
            self.places[msg["name"]] = compat.markov_step()
        except ValueError:
            self.places[msg["name"]] = None


def _places(problem: Problem, params: Params) -> dict[str, tuple[int, int] | None]:
    """Loop and step of every site, by one run of the model."""
    watch = _Watch()

    def watched(*args: Any, **kwargs: Any) -> None:
        with watch:
            problem.model(*args, **kwargs)

    with isolated_rng(0), torch.no_grad():
        dataclasses.replace(problem, model=watched).run(params)
    return watch.places
