"""The posterior of one sequence of states, as it comes in: filtered, smoothed, forecast, one step at a time.

For the latent z of a `pyro_em.markov` loop, with x_t everything that is observed at step t,

    filter      p(z_t | x_0..x_t)               smooth   p(z_t | x_0..x_{T-1})
    forecast    p(z_{T-1+h} | x_0..x_{T-1})     one_step log p(x_t | x_0..x_{t-1})

A latent c outside of the loop that the chain depends on (a mixture of chains) has a posterior of its own at each step,

    p(c | x_0..x_t) ∝ p(c) Π_{s <= t} p(x_s | x_0..x_{s-1}, c),

with which the chains given c are weighted; what is observed outside of the loop is known before its first step.
Not for loops of a longer history, latents that no later step reads, nor chains of several plate elements that share c.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.errors import InputError
from pyro_em.evidence.chain import smooth
from pyro_em.evidence.forward import filtered, predicted
from pyro_em.evidence.ring import LogDensityRing, logsumexp
from pyro_em.evidence.timed import Potentials, outer_evidence, potentials
from pyro_em.model.graph import FactorGraph
from pyro_em.model.sequences import Sequence


class SequencePosterior:
    """Made by `Posterior.sequence(name)`. Shapes: T steps, then the plates of the chains, then K states."""

    def __init__(self, graph: FactorGraph, factors: Mapping[str, Tensor], sequence: Sequence) -> None:
        self.graph, self.factors, self.name = graph, factors, sequence.name
        symbol = graph.latents[sequence.rest]
        found = [(c, loop) for c in graph.components if symbol in c.symbols for loop in c.loops]
        if not found or found[0][1].loop.history != 1:
            raise InputError(f"sequence: the loop over '{self.name}' is no chain, or one that looks back further.")
        self._component, self._loop = found[0]
        carried = [c.current for c in self._loop.carried]
        if symbol not in carried:
            raise InputError(f"sequence: no later step reads '{self.name}'; ask for its marginal.")
        outside = set(self._component.factors) - {*self._loop.heads, *self._loop.rest}
        wider = outside and {graph.factors[name].plates for name in outside} != {self._potentials.plates}
        if len(self._component.loops) > 1 or wider:
            raise InputError(
                f"sequence: the chains of '{self.name}' share latents outside of their loop, whose posterior takes the "
                "data of all of them; ask for the marginal of the states, given all data."
            )
        self._outside, self._place = outside, carried.index(symbol)

    @cached_property
    def _potentials(self) -> Potentials:
        ring = LogDensityRing("sum", names=self.graph.symbol_sites)
        return potentials(self.graph, self._loop, self.factors, ring, self._component.symbols)

    @property
    def _sizes(self) -> tuple[tuple[int, ...], int]:
        """Of the plates, and the number of states of latents outside of the loop."""
        own = self._potentials
        plates = sum(d in own.plates for d in own.batch)
        return own.shape[:plates], math.prod(own.shape[plates:])

    def _states(self, joint: Tensor, weight: Tensor) -> Tensor:
        """Distributions of joint states (T, B, S) as those of this latent, (T, plates, K).

        :param weight: p(c | data so far), (T or 1, P, C) for P elements of the plates.
        """
        own, (plates, outer) = self._potentials, self._sizes
        mixed = (joint.reshape(len(joint), -1, outer, joint.shape[-1]) * weight.unsqueeze(-1)).sum(2)
        wide = mixed.reshape(len(joint), *plates, *own.states)
        lead = 1 + len(plates)
        others = [lead + i for i in range(len(own.states)) if i != self._place]
        return wide.sum(others) if others else wide

    @cached_property
    def _filtered(self) -> tuple[Tensor, Tensor]:
        return filtered(self._potentials.start, self._potentials.unary, self._potentials.pair)

    @cached_property
    def _evidences(self) -> Tensor:
        """log p(x_0..x_{t-1}, c) for t = 0..T, (T + 1, P, C)."""
        own, (plates, outer) = self._potentials, self._sizes
        before = outer_evidence(self.graph, self.factors, self._outside, own, self._component.symbols)
        steps = self._filtered[1].reshape(-1, math.prod(plates), outer)
        return torch.cat([before.reshape(1, -1, outer).expand(1, math.prod(plates), outer), steps]).cumsum(0)

    @cached_property
    def _weights(self) -> Tensor:
        """p(c | x_0..x_t) for t = 0..T-1, (T, P, C)."""
        return torch.softmax(self._evidences[1:], -1)

    def filter(self) -> Tensor:
        """p(z_t | x_0..x_t), (T, plates, K)."""
        return self._states(self._filtered[0], self._weights)

    def smooth(self) -> Tensor:
        """p(z_t | all data), (T, plates, K): what `Posterior.responsibilities` gives, without tables of pairs."""
        own = self._potentials
        found = smooth(torch.cat([own.start.unsqueeze(0), own.unary]), own.pair).unary
        return self._states(found, self._weights[-1:])

    def one_step(self) -> Tensor:
        """log p(x_t | x_0..x_{t-1}), (T, plates); its sum over t is the chain's log-evidence (given what is observed
        outside of the loop)."""
        return logsumexp(self._evidences).diff(dim=0).reshape(-1, *self._sizes[0])

    def forecast(self, num_steps: int) -> Tensor:
        """p(z_{T-1+h} | all data) for h = 1..num_steps, (num_steps, plates, K).

        :raises InputError: if the transitions vary with time, as those after the data are then unknown.
        """
        own = self._potentials
        if num_steps < 1:
            raise InputError(f"forecast: num_steps must be at least 1, not {num_steps}.")
        if len(own.pair) > 1:
            raise InputError(f"forecast: the transitions of '{self.name}' vary with time; those to come are unknown.")
        return self._states(predicted(self._filtered[0][-1], own.pair[0], num_steps), self._weights[-1:])
