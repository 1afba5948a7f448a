"""The posterior of one sequence of states, as it comes in: filtered, smoothed, forecast, one step at a time.

For the latent z of a `pyro_em.markov` loop, with x_t everything that is observed at step t,

    filter      p(z_t | x_0..x_t)               smooth   p(z_t | x_0..x_{T-1})
    forecast    p(z_{T-1+h} | x_0..x_{T-1})     one_step log p(x_t | x_0..x_{t-1})

Not for loops of a longer history, latents that no later step reads, nor chains that depend on a latent outside of
the loop (its posterior would change from step to step).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.errors import InputError
from pyro_em.evidence.chain import smooth
from pyro_em.evidence.forward import filtered, predicted
from pyro_em.evidence.ring import LogDensityRing
from pyro_em.evidence.timed import Potentials, potentials
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
        if len(self._component.loops) > 1 or set(self._component.factors) - {*self._loop.heads, *self._loop.rest}:
            raise InputError(f"sequence: the chain of '{self.name}' depends on latents outside of its loop.")
        self._place = carried.index(symbol)

    @cached_property
    def _potentials(self) -> Potentials:
        ring = LogDensityRing("sum", names=self.graph.symbol_sites)
        return potentials(self.graph, self._loop, self.factors, ring, self._component.symbols)

    def _states(self, joint: Tensor) -> Tensor:
        """Distributions of joint states (T, B, S) as those of this latent, (T, plates, K)."""
        own = self._potentials
        wide = joint.reshape(len(joint), *own.shape, *own.states)
        lead = 1 + len(own.shape)
        others = [lead + i for i in range(len(own.states)) if i != self._place]
        return wide.sum(others) if others else wide

    @cached_property
    def _filtered(self) -> tuple[Tensor, Tensor]:
        return filtered(self._potentials.start, self._potentials.unary, self._potentials.pair)

    def filter(self) -> Tensor:
        """p(z_t | x_0..x_t), (T, plates, K)."""
        return self._states(self._filtered[0])

    def smooth(self) -> Tensor:
        """p(z_t | all data), (T, plates, K): what `Posterior.responsibilities` gives, without tables of pairs."""
        own = self._potentials
        return self._states(smooth(torch.cat([own.start.unsqueeze(0), own.unary]), own.pair).unary)

    def one_step(self) -> Tensor:
        """log p(x_t | x_0..x_{t-1}), (T, plates); its sum over t is the chain's log-evidence."""
        return self._filtered[1].reshape(-1, *self._potentials.shape)

    def forecast(self, num_steps: int) -> Tensor:
        """p(z_{T-1+h} | all data) for h = 1..num_steps, (num_steps, plates, K).

        :raises InputError: if the transitions vary with time, as those after the data are then unknown.
        """
        own = self._potentials
        if num_steps < 1:
            raise InputError(f"forecast: num_steps must be at least 1, not {num_steps}.")
        if len(own.pair) > 1:
            raise InputError(f"forecast: the transitions of '{self.name}' vary with time; those to come are unknown.")
        return self._states(predicted(self._filtered[0][-1], own.pair[0], num_steps))
