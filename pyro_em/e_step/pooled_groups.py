"""Compiled E-step for mixtures of mixed models in long format: rows read the class and the effects of their group.

In state k the rows of group g are normal with a mean affine in the group's effects. They enter through the orthogonal
factors of their design (pooled_data.py),

    |Φ C₁ + X C₂|² = |R_g C₁ + QᵀX C₂|² + |L_g C₂|²,       L_g the factor of what is left of X,

so that the group is one pseudo-element with as few pseudo-rows as its design has columns. Its evidence in every state
is a table (K, G); weighted by its posterior the pseudo-elements of all groups are what the latents' posterior and the
least squares of the M-step read (pooled_states.py). No row is read again. Source: Verbeke and Lesaffre (1996).

Letters: K states, G groups, V₁ features that meet latents, V₀ others, P cells of a row.
Not handled: a discrete latent in another plate than the effects, missing cells, noise known from row to row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.arguments import Functions
from pyro_em.e_step.pooled_data import Classes, reduced_apart
from pyro_em.e_step.pooled_data import Pooled as PooledRows
from pyro_em.e_step.pooled_posterior import LOG_2PI, Whitener, group_evidence, posterior
from pyro_em.e_step.pooled_sets import PooledSet
from pyro_em.e_step.pooled_state_rows import StateRows, state_rows
from pyro_em.e_step.pooled_states import PooledStates, State
from pyro_em.problem import Problem

Noise = list[tuple[Tensor, Whitener]]


@dataclass(frozen=True)
class GroupState(State):
    """The sites of a state by group: R_g, QᵀX and L_g of each site, and how many rows it has, (G,)."""

    reduced: tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]


class PooledGroups(PooledStates):
    """The engine; made by `compile_states`."""

    def __init__(self, problem: Problem, functions: Functions, found: StateRows) -> None:
        super().__init__(problem, functions, found)
        self.reason = (
            f"Gaussian latents: {len(found.weight)} groups in {len(self.states)} states through the orthogonal factors "
            "of their rows, formed once; no row is read again"
        )

    def _states(self, found: StateRows) -> tuple[State, ...]:
        assert found.rows is not None
        made = []
        for state, rows in zip(found.states, found.rows, strict=True):
            sites = tuple(site for site, _ in state)
            reduced = tuple(reduced_apart(own, len(found.weight)) for own in rows)
            made.append(GroupState(sites, (), torch.zeros(0), reduced))
        return tuple(made)

    def _table(self, state: State, noise: Noise) -> tuple[Tensor, Tensor]:
        assert isinstance(state, GroupState)
        one = torch.ones(len(self.found.weight), dtype=torch.float64)
        energy, size = group_evidence(self._groups(state, one, apart=True), noise)
        spherical = 0.5 * self.size * LOG_2PI
        constant = torch.zeros_like(one) + spherical
        left, total = torch.zeros_like(one), torch.zeros_like(one) + spherical
        latents = [site for site in state.sites if site.site.latent]
        known = sum(site.shared * site.cells for site in latents) == self.size
        for site, (C, white), (_, _, rest, count) in zip(state.sites, noise, state.reduced, strict=True):
            own = white.log_det * (0.0 if known and site.site.latent else 1.0) + 0.5 * site.cells * LOG_2PI
            constant, total = constant - count * own, total + count * abs(own)
            if site.has_data:
                away = rest[..., site.alone :] + rest[..., : site.alone] @ C[len(C) - site.alone :]
                left = left + 0.5 * (white(away.unsqueeze(-1)) ** 2).sum((1, 2, 3))
        return constant + energy - left, total + size + left

    def _pooled(self, state: State, noise: Noise, weight: Tensor) -> tuple[PooledSet, Tensor]:
        assert isinstance(state, GroupState)
        own = self._groups(state, weight, apart=False)
        return own, posterior(own, noise)[0]

    def _groups(self, state: GroupState, weight: Tensor, *, apart: bool) -> PooledSet:
        """Every group as a class of its own with one pseudo-element; `apart` without what is left over."""
        root, pooled = weight.sqrt(), []
        for design, top, left, count in state.reduced:
            data = (root[:, None, None] * top).unsqueeze(-1)
            rest = left.new_zeros(0, left.shape[-1])
            if not apart and left.shape[-1]:
                rest = torch.linalg.qr((root[:, None, None] * left).flatten(0, 1), mode="r").R
            total = torch.zeros((), dtype=torch.float64) if apart else (weight * count).sum()
            pooled.append(PooledRows(design, data, rest, total))
        sites = tuple(site.at(own) for site, own in zip(state.sites, pooled, strict=True))
        return PooledSet(sites, Classes(root.unsqueeze(-1), weight, tuple(pooled)), self.size, 0.0)


def compile_states(problem: Problem, functions: Functions) -> PooledStates:
    """The engine for a problem with Gaussian latents beside a discrete one, or `NotCompiled` with the reason."""
    found = state_rows(problem)
    make = PooledStates if found.rows is None else PooledGroups
    return make(problem, functions, found)
