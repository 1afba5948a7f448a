"""Posterior of the Gaussian states of a folded loop, under the names that the model gave them.

The chain is one observed site inside (model/folding.py), with states (x_t, x_{t-1}, ...); here its smoothed moments are
put back where the sample statements had them. Where discrete latents choose the chain they are those of a mixture over
the latents' states (mixed_states.py). The steps of a `pyro_em.markov` loop are one sequence, named without
the step and with time first; `x_17` is one step of it. Steps of a `pyro.markov` loop have their own names only.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.mixed_states import MixedStates
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.folding import Fold, FoldedModel, Place, folds_of
from pyro_em.model.sequences import BySequence, Sequence
from pyro_em.model.timeline import Template
from pyro_em.state_posterior import StatePosterior, normal
from pyro_em.types import Model


class ChainPosterior:
    """The states of one chain; `states` are those of the site that it became."""

    def __init__(self, model: Model, fold: Fold, states: StatePosterior | MixedStates) -> None:
        self.fold, self.states = fold, states
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
        return self._read(name, lambda place: self._own(place, self.states.mean))

    def variance(self, name: str) -> Tensor:
        """Shape of the latent's value."""
        variance = self.states.covariance.diagonal(dim1=-2, dim2=-1)
        return self._read(name, lambda place: self._own(place, variance))

    def marginal(self, name: str) -> dist.Distribution:
        """A normal for every element, or (latents whose event is a vector) a normal vector; or a mixture of these."""
        if isinstance(self.states, MixedStates):
            return self._mixture(name, self.states)
        return self._normal(name, self.states.mean, self.states.covariance)

    def _normal(self, name: str, means: Tensor, covariances: Tensor) -> dist.Distribution:
        mean = self._read(name, lambda place: self._own(place, means))
        place = self.fold.places[self._some(name)]
        events = len(place.event)
        if events == 1 and place.layout.cells == place.event.numel():
            return normal(mean, self._read(name, lambda place: self._block(place, covariances)))
        variances = covariances.diagonal(dim1=-2, dim2=-1)
        variance = self._read(name, lambda place: self._own(place, variances))
        found = dist.Normal(mean, variance.sqrt(), validate_args=False)
        return found.to_event(events) if events else found

    def _mixture(self, name: str, states: MixedStates) -> dist.Distribution:
        each = list(zip(states.shares, *states.moments_by_state(), strict=True))
        components: list[Any] = [self._normal(name, mean, covariance) for _, mean, covariance in each]
        events = components[0].event_dim
        cells = (share.expand_as(mean[..., 0, 0])[..., None, None].expand_as(mean) for share, mean, _ in each)
        shares = [self._read(name, partial(self._own, states=x)) for x in cells]
        probs = torch.stack([x.reshape(*x.shape[: x.dim() - events], -1)[..., 0] for x in shares], -1)
        return dist.MixtureSameFamily(
            dist.Categorical(probs, validate_args=False), _stacked(components), validate_args=False
        )

    def mode(self, pick: Callable[[str], Tensor]) -> BySequence:
        """The joint mode, which is the mean; `pick(site)` gives the most probable states of what chooses it, B."""
        if isinstance(self.states, MixedStates):
            means = self.states.given.mean.unsqueeze(0)
            return self._all(self.states.drawn(means, pick(self.fold.site).unsqueeze(0)).squeeze(0), 0)
        return self._all(self.states.mean, 0)

    def sample(self, num: int, pick: Callable[[str], Tensor]) -> BySequence:
        """Joint draws, (num,) + the shape of each latent's value; `pick(site)` are those of the states, (num,) + B."""
        if isinstance(self.states, MixedStates):
            return self._all(self.states.drawn(self.states.given.sample(num), pick(self.fold.site)), 1)
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

    def _block(self, place: Place, covariances: Tensor) -> Tensor:
        rows = covariances.narrow(-3, place.step, place.layout.time)
        n = place.layout.cells
        own = rows.narrow(-2, place.offset, n).narrow(-1, place.offset, n)
        return torch.stack([place.layout.back(own[..., i]) for i in range(n)], -1)

    def _some(self, name: str) -> str:
        """A statement that a name stands for."""
        if name in self.fold.places:
            return name
        return next(s.rest for s in self.sequences.values() if s.name == name or s.step(name) is not None)

    def _read(self, name: str, part: Callable[[Place], Tensor]) -> Tensor:
        """What `part` gives of the statements that a name stands for (a loop has many: no others are asked)."""
        if name in self.fold.places:
            return part(self.fold.places[name])
        sequence = next(s for s in self.sequences.values() if s.name == name or s.step(name) is not None)
        whole = sequence.joined({site: part(self.fold.places[site]) for site in (*sequence.heads, sequence.rest)})
        step = sequence.step(name)
        return whole if step is None else whole[step]


def chain_posteriors(model: Model, states: Callable[[str], StatePosterior | MixedStates]) -> tuple[ChainPosterior, ...]:
    """Those of all chains that a model has folded; `states` gives those of a site."""
    return tuple(ChainPosterior(model, fold, states(fold.site)) for fold in folds_of(model))


def _stacked(components: abc.Sequence[Any]) -> Any:
    """Distributions of one kind as one with a last batch dim over them."""
    first = components[0]
    if isinstance(first, dist.MultivariateNormal):
        mean, factor = (
            torch.stack([getattr(c, n) for c in components], -1 - k) for n, k in (("loc", 1), ("scale_tril", 2))
        )
        return dist.MultivariateNormal(mean, scale_tril=factor, validate_args=False)
    events = first.event_dim
    mean, sd = (torch.stack([getattr(c, n) for c in components], -1 - events) for n in ("mean", "stddev"))
    found = dist.Normal(mean, sd, validate_args=False)
    return found.to_event(events) if events else found


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
