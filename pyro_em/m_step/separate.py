"""The closed-form update of one parameter: the argmax of the sum of the kernels of its uses (closed.py)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pyro_em import factors
from pyro_em.families.base import CHOLESKY, IDENTITY
from pyro_em.kernels import FlatKernel, WishartKernel
from pyro_em.m_step.closed import Combined, combine
from pyro_em.m_step.degenerate import Spread, check_update, spread_of
from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.slopes import free_slopes, slope_of_factor
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params


class Separate:
    """One parameter; `uses` are those that count in Q."""

    def __init__(self, problem: Problem, name: str, uses: tuple[Use, ...]) -> None:
        self.problem, self.name, self.uses = problem, name, uses
        self.names: tuple[str, ...] = (name,)
        self._known = False
        self._spread: Spread | None = None

    def combined(self, theta: Tensor, sufficient: Sufficient) -> Combined:
        """Total kernel; the one made for the score serves the update if nothing changed since.

        :param theta: current value, float64.
        :raises NotClosed: with the reason.
        """
        uses = sufficient.uses(self.name, self.uses)

        def total() -> Combined:
            needed = {u.site for u in uses if u.index is not None and u.slot != VALUE}
            moments = {site: sufficient.moments(site) for site in needed}
            return combine(uses, theta, sufficient.sites, moments, sufficient.arguments)

        return sufficient.once((self.name,), uses, total)

    def slope(self, params: Params, sufficient: Sufficient) -> Tensor:
        """∂Q/∂u, 0 in entries that are not free; any shape."""
        theta = params[self.name].detach().double()
        return free_slopes(self.problem.parameters[self.name].constraint, theta, self.combined(theta, sufficient))

    def rounding(self, params: Params, sufficient: Sufficient) -> Tensor:
        """Rounding in `slope`, if it may be larger than the certificate's bound: of a nearly singular covariance."""
        theta = params[self.name].detach().double()
        combined = self.combined(theta, sufficient)
        kernel, link = combined.kernel, combined.link
        if not isinstance(kernel, WishartKernel) or combined.exponential or link not in (IDENTITY, CHOLESKY):
            return torch.zeros((), dtype=torch.float64)
        factor = theta if link is CHOLESKY else factors.cholesky(theta)
        size = factor.shape[-1] * torch.finfo(torch.float64).eps * kernel.factor_rounding(factor)
        return slope_of_factor(factor, size).abs()

    def update(self, params: Params, sufficient: Sufficient) -> tuple[Params, set[str]]:
        """The argmax, at the nearest bound if the constraint has one."""
        theta = params[self.name].detach().double()
        combined = self.combined(theta, sufficient)
        kernel, uses = combined.kernel, sufficient.uses(self.name, self.uses)
        empty = not isinstance(kernel, FlatKernel) and not kernel.is_informed
        spread = partial(self._spread_of, sufficient)
        families = [(use.slot, sufficient.sites[use.site].family) for use in uses]
        inside = [(slot, family) for slot, family in families if family is not None and family.integrates]
        noise = any(family.is_noise(slot) for slot, family in inside)
        effects = self.problem.continuous is not None and {u.site for u in uses} <= set(self.problem.continuous.names)
        value = combined.argmax(theta)
        best = check_update(self.problem, self.name, uses, combined, value, spread, bool(inside), noise, effects)
        moved = {**params, self.name: best.to(params[self.name].dtype)}
        sufficient.put(moved[self.name], uses)
        return moved, {self.name} if empty else set()

    def _spread_of(self, sufficient: Sufficient) -> Spread | None:
        """Variance of the data behind the parameter, at the first update: no more than a scale for what is tiny."""
        if not self._known:
            found = spread_of(sufficient.uses(self.name, self.uses), sufficient)
            self._known, self._spread = True, None if found is None else Spread(found)
        return self._spread
