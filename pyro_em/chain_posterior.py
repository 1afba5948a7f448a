"""Posterior of the Gaussian states of a folded loop, under the names that the model gave them.

The chain is one observed site inside (model/folding.py), with states (x_t, x_{t-1}, ...); here its smoothed moments are
put back where the sample statements had them. The steps of a `pyro_em.markov` loop are one sequence, named without
the step and with time first; `x_17` is one step of it. Steps of a `pyro.markov` loop have their own names only.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.model.chained import ChainedLoop
from pyro_em.model.folding import Fold, FoldedModel, Place, folds_of
from pyro_em.model.sequences import BySequence, Sequence
from pyro_em.model.timeline import Template
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.state_posterior import StatePosterior, normal
from pyro_em.types import Model


class ChainPosterior:
    """The states of one chain; `site` is the record of the site that it became."""

    def __init__(self, model: Model, fold: Fold, site: SiteRecord) -> None:
        self.fold, self.states = fold, StatePosterior(site)
        assert isinstance(model, FoldedModel)
        self.sequences = _sequences(model, fold.places)
        self._observed = _sequences(model, fold.cells)

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latents in program order, those of a loop that is run together as one."""
        inside = {site: s.name for s in self.sequences.values() for site in (*s.heads, s.rest)}
        return tuple(dict.fromkeys(inside.get(site, site) for site in self.fold.places))

    def has(self, name: str) -> bool:
        """Whether `name` is a latent of the chain, a sequence of them, or a step of one."""
        steps = (s.step(name) for s in self.sequences.values())
        return name in self.fold.places or name in self.sequences or any(step is not None for step in steps)

    def mean(self, name: str) -> Tensor:
        """Shape of the latent's value."""
        return self._read(name, {s: self._own(p, self.states.mean) for s, p in self.fold.places.items()})

    def variance(self, name: str) -> Tensor:
        """Shape of the latent's value."""
        variance = self.states.covariance.diagonal(dim1=-2, dim2=-1)
        return self._read(name, {s: self._own(p, variance) for s, p in self.fold.places.items()})

    def marginal(self, name: str) -> dist.Distribution:
        """A normal for every element, or (latents whose event is a vector) a normal vector."""
        mean = self.mean(name)
        place = self.fold.places[self._some(name)]
        events = len(place.event)
        if events == 1 and place.layout.cells == place.event.numel():
            blocks = {s: self._block(p) for s, p in self.fold.places.items() if p.event == place.event}
            return normal(mean, self._read(name, blocks))
        found = dist.Normal(mean, self.variance(name).sqrt(), validate_args=False)
        return found.to_event(events) if events else found

    def mode(self) -> BySequence:
        """The joint mode, which is the mean."""
        return self._all(self.states.mean, 0)

    def sample(self, num: int) -> BySequence:
        """Joint draws, (num,) + the shape of each latent's value."""
        return self._all(self.states.sample(num), 1)

    def observed(self, cells: Tensor, lead: int = 0) -> BySequence:
        """A tensor (more,) + B + (T, P) of the site that the loop became, by the observed sites that the model has.

        `lead` is the number of dims (more,).
        """
        found = {name: self._own(place, cells) for name, place in self.fold.cells.items()}
        return BySequence(found, self._observed, lead)

    def _all(self, states: Tensor, lead: int) -> BySequence:
        found = {name: self._own(place, states) for name, place in self.fold.places.items()}
        return BySequence(found, self.sequences, lead)

    def _own(self, place: Place, states: Tensor) -> Tensor:
        """The part of a tensor (more,) + B + (T, K·D) that one statement has, in the shape of its value."""
        rows = states.narrow(-2, place.step, place.layout.time)
        return place.layout.back(rows.narrow(-1, place.offset, place.layout.cells))

    def _block(self, place: Place) -> Tensor:
        rows = self.states.covariance.narrow(-3, place.step, place.layout.time)
        n = place.layout.cells
        own = rows.narrow(-2, place.offset, n).narrow(-1, place.offset, n)
        return torch.stack([place.layout.back(own[..., i]) for i in range(n)], -1)

    def _some(self, name: str) -> str:
        """A statement that a name stands for."""
        if name in self.fold.places:
            return name
        return next(s.rest for s in self.sequences.values() if s.name == name or s.step(name) is not None)

    def _read(self, name: str, of: Mapping[str, Tensor]) -> Tensor:
        if name in of:
            return of[name]
        sequence = self.sequences.get(name)
        if sequence is not None:
            return sequence.joined(of)
        sequence = next(s for s in self.sequences.values() if s.step(name) is not None)
        step = sequence.step(name)
        assert step is not None
        return sequence.joined(of)[step]


def chain_posteriors(model: Model, run: Run) -> tuple[ChainPosterior, ...]:
    """Those of all chains that a model has folded."""
    return tuple(ChainPosterior(model, fold, run.sites[fold.site]) for fold in folds_of(model))


def _sequences(model: FoldedModel, places: Mapping[str, Place]) -> dict[str, Sequence]:
    """The statements of a loop that is run together, by their names without the step."""
    found: dict[str, Sequence] = {}
    for name, place in places.items():
        if not place.timed:
            continue
        loop = next(loop for loop in model.loops if name in loop.names)
        template = Template.of(name, loop)
        heads = tuple(template.name(t, loop) for t in range(loop.history))
        stem = template.stem if template.stem not in found else template.text
        found[stem] = Sequence(stem, heads, name, ChainedLoop(loop, "", frozenset(heads), {name: template}, ()))
    return found
