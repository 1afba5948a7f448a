"""One component of the plated engine: its joint states, its data as features, and W for given parameters.

W (J, F) holds the natural parameters of every joint state, the first column the bias (log-masses of the latents,
normalisers of the sites). Structural zeros enter as `IMPOSSIBLE`, a finite number that no sum brings back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.e_step import direct
from pyro_em.e_step.base import IMPOSSIBLE, NotCompiled
from pyro_em.e_step.collapse import collapse
from pyro_em.e_step.features import Features
from pyro_em.e_step.layout import SiteLayout, weights_of
from pyro_em.e_step.natural import NATURAL
from pyro_em.e_step.product import Prepared, Product, rows_of_cells
from pyro_em.e_step.rows import site_layouts
from pyro_em.e_step.states import JointStates, joint_states
from pyro_em.model.graph import Component
from pyro_em.model.trace import Run
from pyro_em.problem import Problem
from pyro_em.sufficient import Arguments

FEW_ROWS = 2048  # for which differences cost little more than the product
MAX_STATES = 1024  # joint states of the latents of one row


@dataclass(frozen=True)
class Program:
    """One component; made by `compile_program`."""

    run: Run
    component: Component
    states: JointStates
    layouts: tuple[SiteLayout, ...]
    product: Product

    @cached_property
    def rough(self) -> Product:
        """The same product in float32."""
        features = self.product.features
        own = Features(features.blocks, features.num_rows, features.max_chunk, torch.float32)
        return dataclasses.replace(self.product, features=own)

    def prepared(self, arguments: Arguments, magnitude: Tensor) -> Prepared:
        """W, and the normal sites which it leaves out because rounding would show: they are evaluated directly."""
        layouts, features = self.layouts, self.product.features
        normal = tuple(i for i, x in enumerate(layouts) if direct.serves(x))
        if not normal:
            return Prepared(self._coefficients(arguments, ()))
        if features.num_rows > FEW_ROWS:
            w = self._coefficients(arguments, ())
            if not (bool(magnitude > 0) and direct.is_rough(w, features.rms, features.num_rows, magnitude)):
                return Prepared(w)
        w = self._coefficients(arguments, normal)
        parts = [direct.prepare(layouts[i], arguments[layouts[i].site.name], self.states) for i in normal]
        return Prepared(w, normal, tuple(x for part in parts for x in part))

    def _coefficients(self, arguments: Arguments, without: Sequence[int]) -> Tensor:
        """W (J, F): natural parameters of every joint state, the first column the bias; zeros for some sites."""
        states, run = self.states, self.run
        bias = torch.zeros(states.num, dtype=torch.float64)
        columns = [bias]
        for name in self.component.factors:
            site = run.sites[name]
            if site.enumerated:
                bias = bias + self._latent_log_mass(name, arguments[name])
        for place, layout in enumerate(self.layouts):
            site = layout.site
            if place in without:
                columns.append(bias.new_zeros(states.num, layout.block.num_features))
                continue
            coefficients = NATURAL[type(site.family)](arguments[site.name], layout.center)  # type: ignore[index]
            own, own_bias = weights_of(coefficients, layout, states)
            columns.append(own)
            bias = bias + own_bias
        columns[0] = bias.unsqueeze(1)
        # Where all sites are evaluated directly, the bias is all that is left.
        w = columns[0] if len(without) == len(self.layouts) else torch.cat(columns, 1)
        return w.clamp(min=IMPOSSIBLE)

    def _latent_log_mass(self, name: str, arguments: dict[str, Tensor]) -> Tensor:
        """log p(z | its parents) of one latent over all joint states, (J,)."""
        site, states = self.run.sites[name], self.states
        assert site.family is not None
        value = site.fn.enumerate_support(expand=False) if site.value is None else site.value
        log_mass = site.family.log_prob_of_all({**site.constants, **arguments}, value)
        depth = -min(states.dims)
        log_mass = log_mass.reshape((1,) * max(0, depth - log_mass.dim()) + tuple(log_mass.shape))
        target = [1] * log_mass.dim()
        for dim, size in zip(states.dims, states.sizes, strict=True):
            target[dim] = size
        return log_mass.expand(target).reshape(-1)

    def spot_check(self, prepared: Prepared, arguments: Arguments) -> tuple[float, float]:
        """Log-likelihood of the first rows (unweighted) by the product, and by the families' own log-densities."""
        log_joint = self.product.log_joint([prepared])
        end = log_joint.shape[1]
        expected = log_joint.new_zeros(self.states.num, end)
        for name in self.component.factors:
            if self.run.sites[name].enumerated:
                expected += self._latent_log_mass(name, arguments[name]).unsqueeze(1)
        for layout in self.layouts:
            expected += layout.log_density(arguments[layout.site.name], self.states, end)
        return float(log_joint.logsumexp(0).sum()), float(expected.logsumexp(0).sum())


def compile_program(
    problem: Problem, run: Run, component: Component, *, complement: bool, absolute: Collection[str] = ()
) -> Program:
    """A component's program, or `NotCompiled` with the reason.

    :param complement: leave out of Φ what is one less the sum of others (layout.py).
    :param absolute: sites whose moments only Newton's method reads.
    """
    states = joint_states(component, run, MAX_STATES)
    layouts, blocks, base, num_rows = site_layouts(component, run, problem.graph, states, complement)
    weight = _row_weight(problem, run, component, num_rows)
    blocks, weight, base, num_rows = collapse(blocks, weight, base, num_rows)
    own = tuple(
        dataclasses.replace(x, block=block, absolute=x.site.name in absolute)
        for x, block in zip(layouts, blocks, strict=True)
    )
    features = Features(blocks, num_rows, rows_of_cells(states.num, torch.get_default_device()))
    return Program(run, component, states, own, Product(features, own, weight, base))


def _row_weight(problem: Problem, run: Run, component: Component, num_rows: int) -> Tensor | None:
    """Weights of the rows; rows whose latents are barren (all data masked) count nothing."""
    graph = problem.graph
    found = []
    for name in component.factors:
        if graph.factors[name].enumerated:
            weight = graph.factors[name].weight
            found.append(None if weight is None else SiteLayout.over_root(weight, component, run, graph))
    first = found[0]
    for other in found[1:]:
        same = other is first or (other is not None and first is not None and torch.equal(other, first))
        if not same:
            raise NotCompiled("latents of one row are informed by different parts of the data")
    return None if first is None else first.double().expand(num_rows).contiguous()
