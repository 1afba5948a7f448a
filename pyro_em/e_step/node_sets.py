"""One set of latents that quadrature integrates, without running the model: modes, nodes, weights and evidence.

    f_g(z) = log N(z; μ, P⁻¹) + Σ_n a_n η_n - m_n A(η_n),     η_n = Σ_k B_nk ζ_k,   ζ = (1, z)

is evaluated from the predictors' coefficients B (node_rows.py) at all rows and nodes of a group at once
(node_cumulants.py). The rule, its search for modes and its answers are those of evidence/quadrature.py.

Discrete latents that the set reads make an element of every joint state of theirs and element (node_probe.py).

Letters: G elements, K columns, Q nodes; R places of rows. Latents are (K, Q, G), with one node at the search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.node_placed import Placed, Tables, cumulated, first_of, in_groups, over_rows, second_of
from pyro_em.e_step.node_rows import NodeRows
from pyro_em.e_step.node_steps import newton, root
from pyro_em.evidence.quadrature import CLOSE, MAX_ITER, QuadratureRoute, no_mode
from pyro_em.evidence.rule import Quadrature
from pyro_em.families.multivariate_normal import MultivariateNormalFamily
from pyro_em.families.normal import NormalFamily
from pyro_em.families.numerics import half_log_det, precision_matrix
from pyro_em.model.compat import pack
from pyro_em.model.trace import SiteRecord
from pyro_em.softmax import softmax, softmax_

LOG_2PI = math.log(2 * math.pi)
Predictors = Mapping[str, Placed]


@dataclass(frozen=True)
class Prior:
    """log N(z; μ, P⁻¹) = norm - ½ (z - μ)ᵀ P (z - μ): μ (K, 1 or G), P (K, K, 1 or G), norm (1 or G,)."""

    loc: Tensor
    precision: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Nodes:
    """z (K, Q, G), their weights (Q, G), log Z (G,); `tables` by site, kept for the M-step where they are small.

    `shares` (G,) are the posterior weights of discrete states that the weights hold; None where they sum to 1.
    """

    z: Tensor
    weights: Tensor
    log_z: Tensor
    mode: Tensor
    spread: Tensor
    tables: Mapping[str, Tables]
    shares: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NodeSet:
    """Latents `names` of a route, their own `latents` sites and the `rows` that read them.

    `states` are the dims of the discrete latents that it reads.
    """

    route: QuadratureRoute
    latents: tuple[SiteRecord, ...]
    rows: tuple[NodeRows, ...]
    states: torch.Size
    _products: dict[Quadrature, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def concave(self) -> bool:
        """log-densities are concave in η, so that every element has one mode wherever the search starts."""
        return all(rows.cumulant.concave for rows in self.rows)

    @property
    def cells(self) -> int:
        """Rows times nodes."""
        nodes = self.route.rule.num_nodes**self.route.layout.num_columns
        return nodes * max((len(rows.panels.rows) for rows in self.rows), default=0)

    @property
    def size(self) -> int:
        """G."""
        return self.states.numel() * torch.Size(self.route.layout.sizes).numel()

    def laid(self, x: Tensor) -> Tensor:
        """What belongs to the nodes (Q, G) or elements (1, G), in the layout: states + (Q, plates)."""
        own = x.reshape(len(x), *self.states, *self.route.layout.sizes[1:])
        return own.movedim(0, len(self.states))

    def packed(self, x: Tensor) -> Tensor:
        """What belongs to the elements (G,), packed."""
        return self.route.packed(self.laid(x.unsqueeze(0)))

    def packed_weights(self, nodes: Nodes) -> Tensor:
        """Weights of the nodes, packed."""
        route = self.route
        m = len(route.layout.sizes)
        return pack(self.laid(nodes.weights), {**route.symbols, -m: route.latents.symbol})

    def prior(self, arguments: Mapping[str, Mapping[str, Tensor]]) -> Prior:
        """The latents' own distribution."""
        parts = [self._own(site, arguments[site.name]) for site in self.latents]
        if len(parts) == 1:
            return parts[0]
        size = max(x.shape[-1] for own in parts for x in (own.loc, own.precision, own.norm))
        num, begin = sum(len(own.loc) for own in parts), 0
        precision = torch.zeros(num, num, size, dtype=torch.float64)
        for own in parts:
            end = begin + len(own.loc)
            precision[begin:end, begin:end] = own.precision
            begin = end
        loc = torch.cat([own.loc.expand(-1, size) for own in parts])
        return Prior(loc, precision, sum((own.norm for own in parts[1:]), parts[0].norm))

    def _own(self, site: SiteRecord, arguments: Mapping[str, Tensor]) -> Prior:
        event = site.fn.event_shape
        k = max(1, event.numel())

        def by_element(x: Tensor, entries: torch.Size) -> Tensor:
            """(entries, 1 or G)."""
            lead = x.shape[: max(0, x.dim() - len(entries))]
            if lead.numel() == 1:
                return (
                    x.reshape(x.shape[x.dim() - len(entries) :] if len(entries) else ()).expand(entries).reshape(-1, 1)
                )
            return x.expand(*self.states, *self.route.layout.sizes, *entries).reshape(self.size, -1).mT

        loc = by_element(arguments["loc"], event)
        if isinstance(site.family, MultivariateNormalFamily):
            precision = by_element(precision_matrix(dict(arguments)), torch.Size((k, k))).reshape(k, k, -1)
            half = by_element(half_log_det(dict(arguments)), torch.Size(())).squeeze(0)
        else:
            scale = by_element(arguments["scale"], event)
            precision, half = (scale**-2).unsqueeze(0), scale.log().sum(0)
            if k > 1:
                precision = torch.diag_embed(precision.squeeze(0).mT).movedim(0, -1)
        return Prior(loc, precision, -(half + 0.5 * k * LOG_2PI))

    def solved(self, at: Predictors, prior: Prior, start: Tensor | None = None) -> Nodes:
        """Modes, nodes and weights at the predictors' coefficients; the search starts at `start` (K, G) or 0.

        :raises NonFiniteError: if a posterior has no mode.
        """
        mode, spread = self._modes(at, prior, start)
        z, joint, tables = self.integrated(self.route.rule, mode, spread, at, prior)
        if any(rows.cumulant.memory is not None for rows in self.rows):  # not to be recorded
            weights, log_z = joint, softmax_(joint)
        else:
            weights, log_z = softmax(joint)
        return Nodes(z, weights[: len(joint)], log_z.squeeze(0), mode, spread, tables)

    def integrated(
        self, rule: Quadrature, mode: Tensor, spread: Tensor, at: Predictors, prior: Prior
    ) -> tuple[Tensor, Tensor, dict[str, Tables]]:
        """z (K, Q, G), the logarithms of the terms of Z (Q, G), and tables at the nodes."""
        if rule not in self._products:
            self._products[rule] = rule.product(len(mode))
        x, v = self._products[rule]
        if len(mode) == 1:
            z = (mode + spread[0] * x)[None]
            volume = spread[0, 0].log()
        else:
            z = mode[:, None] + torch.einsum("klg,ql->kqg", spread, x)
            volume = torch.linalg.slogdet(spread.movedim(-1, 0))[1]
        f, tables = self._density(z, at, prior)
        return z, f.add_(v.unsqueeze(-1)).add_(volume), tables

    def _density(self, z: Tensor, at: Predictors, prior: Prior) -> tuple[Tensor, dict[str, Tables]]:
        """f (Q, G), and the tables behind it."""
        away = z - prior.loc.unsqueeze(1)
        if len(z) == 1:
            f = (prior.precision[0] * away[0]).mul(away[0]).mul_(-0.5) + prior.norm
        else:
            f = prior.norm - 0.5 * torch.einsum(
                "kqg,klg,lqg->qg", away, prior.precision.expand(-1, -1, z.shape[2]), away
            )
        tables = {}
        for site in self.rows:
            placed = at[site.name]
            tables[site.name] = own = placed.tables(z)
            level, slopes = placed.line
            f = f.add_(level).sub_(cumulated(site, own))
            for along, slope in zip(z, slopes, strict=True):
                f.addcmul_(slope, along)
        return f, tables

    def _modes(self, at: Predictors, prior: Prior, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Modes (K, G) and L (K, K, G), by Newton's method as evidence/quadrature.py has it."""
        num = self.route.layout.num_columns
        z = torch.zeros(num, self.size, dtype=torch.float64) if start is None else start
        f, g, h = self._derivatives(z, at, prior)
        for _ in range(MAX_ITER):
            step, decrement = newton(g, h)
            if not bool(decrement.isfinite().all()):
                break
            if bool(decrement.max() <= CLOSE):
                spread = root(h)
                if spread is None:
                    break
                return z, spread
            z, f, g, h = self._climbed(z, step, f, at, prior)
        raise no_mode(self.route.latents.names[0])

    def _climbed(
        self, z: Tensor, step: Tensor, f: Tensor, at: Predictors, prior: Prior
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A Newton step, halved for the elements where f would fall."""
        slack = f - 1e-12 * (1 + f.abs())
        length: Tensor | None = None
        for _ in range(40):
            moved = z + step if length is None else z + length * step
            found, g, h = self._derivatives(moved, at, prior)
            worse = ~(found >= slack)
            if not bool(worse.any()):
                break
            length = torch.ones_like(f) if length is None else length
            length = torch.where(worse, length / 2, length)
        return moved, found, g, h

    def _derivatives(self, z: Tensor, at: Predictors, prior: Prior) -> tuple[Tensor, Tensor, Tensor]:
        """f (G,), its gradient (K, G) and minus its Hessian (K, K, G) at one z (K, G) of each element."""
        away = z - prior.loc
        pulled = prior.precision[0] * away if len(z) == 1 else (prior.precision * away).sum(1)
        f, tables = self._density(z.unsqueeze(1), at, prior)
        gradient, hessian = -pulled, prior.precision
        one = torch.ones(1, self.size, dtype=torch.float64)
        for site in self.rows:
            own = at[site.name].b
            if site.alike:
                first, second = in_groups(site, tables[site.name])
                k = torch.stack(own[1:])
                gradient = gradient + k * (site.events - first)
                hessian = hessian + k.unsqueeze(1) * k * second
            else:
                first = first_of(site, tables[site.name], one)
                second = second_of(site, tables[site.name], one, first)
                slope, by = site.cumulant.linear - first, own[1:]
                gradient = gradient + torch.cat([over_rows(site, x * slope) for x in by])
                products = [torch.cat([over_rows(site, x * y * second) for y in by]) for x in by]
                hessian = hessian + torch.stack(products)
        return f.squeeze(0), gradient, hessian


def node_set(
    route: QuadratureRoute, latents: Sequence[SiteRecord], rows: Sequence[NodeRows], states: torch.Size
) -> NodeSet:
    """:raises NotCompiled: if a latent is not normal."""
    for site in latents:
        multivariate = isinstance(site.family, MultivariateNormalFamily) and not site.element_dims
        if not (multivariate or type(site.family) is NormalFamily) or site.arguments is None:
            raise NotCompiled(f"the latent '{site.name}' is not normal")
    return NodeSet(route, tuple(latents), tuple(rows), states)
