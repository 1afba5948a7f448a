"""The posterior of one sequence of states, as it comes in: filtered, smoothed, forecast, one step at a time.

For the latent z of a `pyro_em.markov` loop of any history, with x_t everything that is observed at step t,

    filter      p(z_t | x_0..x_t)               smooth   p(z_t | x_0..x_{T-1})
    forecast    p(z_{T-1+h} | x_0..x_{T-1})     one_step log p(x_t | x_0..x_{t-1})

A latent c outside of the loop that the chains depend on (a mixture of chains) has a posterior of its own at each step,

    p(c | x_0..x_t) ∝ p(c) Π_{s <= t} p(x_s | x_0..x_{s-1}, c),

with which the chains given c are weighted; what is observed outside of the loop is known before its first step. Where
several chains share c, x_t is what is observed at step t in all of them, and the product runs over them, too.

The chain's states are joint ones of its last h steps (evidence/timed.py), the first of them those of step h-1; the
steps before are read from the factors of the first steps themselves.
Not for latents that no later step reads, nor where latents outside of the loop lie in several plates.
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
from pyro_em.evidence.timed import Potentials, head_potential, outer_evidence, potentials
from pyro_em.model.graph import FactorGraph
from pyro_em.model.sequences import Sequence


class SequencePosterior:
    """Made by `Posterior.sequence(name)`. Shapes: T steps, then the plates of the chains, then K states.

    B chains are P elements of the plates for each of the C states of latents outside of the loop; S joint states.
    """

    def __init__(self, graph: FactorGraph, factors: Mapping[str, Tensor], sequence: Sequence) -> None:
        self.graph, self.factors, self.name = graph, factors, sequence.name
        symbol = graph.latents[sequence.rest]
        found = [(c, loop) for c in graph.components if symbol in c.symbols for loop in c.loops]
        places = [i for _, loop in found for i, c in enumerate(loop.carried) if c.current == symbol]
        if not found and not any(symbol in c.symbols for c in graph.components):
            raise InputError(f"sequence: '{self.name}' has one state, which it is in at every step.")
        if not places:
            raise InputError(f"sequence: no later step reads '{self.name}'; ask for its marginal.")
        self._component, self._loop = found[0]
        self._place = places[0]  # of lag 1
        self._early = [graph.latents[head] for head in sequence.heads[:-1]]  # symbols of steps 0..h-2
        self._outside = set(self._component.factors) - {*self._loop.heads, *self._loop.rest}
        sharing = {graph.factors[name].plates for name in self._outside if name in graph.latents}
        if len(self._component.loops) > 1 or len(sharing) > 1 or not all(p <= self._potentials.plates for p in sharing):
            raise InputError(
                f"sequence: the chains of '{self.name}' share latents outside of their loop with other loops, or in "
                "several plates; ask for the marginal of the states, given all data."
            )
        (self._shared,) = sharing or {self._potentials.plates}

    @cached_property
    def _potentials(self) -> Potentials:
        return self._chains(self.factors)

    def _chains(self, factors: Mapping[str, Tensor]) -> Potentials:
        ring = LogDensityRing("sum", names=self.graph.symbol_sites)
        return potentials(self.graph, self._loop, factors, ring, self._component.symbols)

    @property
    def _sizes(self) -> tuple[tuple[int, ...], int]:
        """Of the plates, and the number of states of latents outside of the loop."""
        own = self._potentials
        plates = sum(d in own.plates for d in own.batch)
        return own.shape[:plates], math.prod(own.shape[plates:])

    @property
    def _apart(self) -> list[bool]:
        """Which of the plates have a latent of their own outside of the loop (all, if there is none)."""
        own = self._potentials
        return [d in self._shared for d in own.batch if d in own.plates]

    def _early_potential(self, step: int) -> Tensor:
        """log p(z_t, x_0..x_t | c) of one of the steps before the chain's first joint state, (B, K)."""
        symbol = self._early[step]
        return head_potential(self.graph, self._loop, self.factors, step, symbol, self._potentials)

    def _mixed(self, states: Tensor, weight: Tensor) -> Tensor:
        """States (T, B, K) averaged over those outside of the loop, (T, plates, K).

        :param weight: p(c | data so far), (T or 1, plates, C).
        """
        plates, outer = self._sizes
        return (states.reshape(len(states), *plates, outer, -1) * weight.unsqueeze(-1)).sum(-2)

    def _own(self, joint: Tensor, place: int) -> Tensor:
        """Distributions of joint states (T, B, S) as those of one carried latent, (T, B, K)."""
        wide = joint.reshape(*joint.shape[:2], *self._potentials.states)
        others = [2 + i for i in range(wide.dim() - 2) if i != place]
        return wide.sum(others) if others else wide

    @cached_property
    def _filtered(self) -> tuple[Tensor, Tensor]:
        return filtered(self._potentials.start, self._potentials.unary, self._potentials.pair)

    @cached_property
    def _evidences(self) -> Tensor:
        """log p(x_0..x_{t-1}, c) for t = 0..T, (T + 1, plates, C); plates that share c are dims of size 1."""
        own, (plates, outer), apart = self._potentials, self._sizes, self._apart
        early = [logsumexp(self._early_potential(t)).unsqueeze(0) for t in range(len(self._early))]
        steps = torch.cat([*early, self._filtered[1].cumsum(0)]).reshape(-1, *plates, outer)
        together = [1 + i for i, alone in enumerate(apart) if not alone]
        steps = steps.sum(together, keepdim=True) if together else steps
        dims = {d: n for d, n in zip(own.batch, own.shape, strict=True) if d in self._shared or d not in own.plates}
        inner = set(self._component.symbols) - set(own.batch)
        before = outer_evidence(self.graph, self.factors, self._outside, dims, inner)
        before = before.reshape(*(n if alone else 1 for n, alone in zip(plates, apart, strict=True)), outer)
        return torch.cat([before.unsqueeze(0), before + steps])

    @cached_property
    def _weights(self) -> Tensor:
        """p(c | x_0..x_t) for t = 0..T-1, (T, plates, C)."""
        return torch.softmax(self._evidences[1:], -1)

    def filter(self) -> Tensor:
        """p(z_t | x_0..x_t), (T, plates, K)."""
        early = [
            torch.softmax(self._early_potential(t), -1).nan_to_num(0.0).unsqueeze(0) for t in range(len(self._early))
        ]
        return self._mixed(torch.cat([*early, self._own(self._filtered[0], self._place)]), self._weights)

    def smooth(self) -> Tensor:
        """p(z_t | all data), (T, plates, K): what `Posterior.responsibilities` gives, without tables of pairs."""
        own = self._potentials
        found = smooth(torch.cat([own.start.unsqueeze(0), own.unary]), own.pair).unary
        early = [self._early_smoothed(t, found[0]).unsqueeze(0) for t in range(len(self._early))]
        return self._mixed(torch.cat([*early, self._own(found, self._place)]), self._weights[-1:])

    def _early_smoothed(self, step: int, first: Tensor) -> Tensor:
        """p(z_t | all data, c) of a step before the first joint state, (B, K), whose posterior is `first` (B, S)."""
        symbol, back = self._early[step], [c.previous for c in self._loop.carried]
        if symbol in back:
            return self._own(first.unsqueeze(0), back.index(symbol)).squeeze(0)
        kept, history = "".join(back) + symbol, self._loop.loop.history
        joint = head_potential(self.graph, self._loop, self.factors, history - 1, kept, self._potentials)
        given = torch.softmax(joint.reshape(*first.shape, -1), -1).nan_to_num(0.0)
        return (first.unsqueeze(-1) * given).sum(1)

    def one_step(self) -> Tensor:
        """log p(x_t | x_0..x_{t-1}), (T, plates); its sum over t is the chain's log-evidence (given what is observed
        outside of the loop). Chains that share a latent outside of the loop have one density: their plates are left
        out."""
        sizes = [n for n, alone in zip(self._sizes[0], self._apart, strict=True) if alone]
        return logsumexp(self._evidences).diff(dim=0).reshape(-1, *sizes)

    def forecast(self, num_steps: int) -> Tensor:
        """p(z_{T-1+h} | all data) for h = 1..num_steps, (num_steps, plates, K).

        :raises InputError: if the transitions vary with time, as those after the data are then unknown.
        """
        if num_steps < 1:
            raise InputError(f"forecast: num_steps must be at least 1, not {num_steps}.")
        moves = self._chains({name: x for name, x in self.factors.items() if name in self.graph.latents}).pair
        if len(moves) > 1:
            raise InputError(f"forecast: the transitions of '{self.name}' vary with time; those to come are unknown.")
        ahead = predicted(self._filtered[0][-1], moves[0], num_steps)
        return self._mixed(self._own(ahead, self._place), self._weights[-1:])
