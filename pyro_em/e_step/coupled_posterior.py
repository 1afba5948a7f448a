"""The posterior of coupled Gaussian latents at their cells, and the evidence (coupled_sets.py).

With residuals d + T u of a cell, divided by their noise, and P the prior precision of u (1 where u is drawn, 0 where a
latent's own site stands among the cells),

    J = P + Σ TᵀT,   m = -J⁻¹ Σ Tᵀd,   log p(x) = c - ½ Σ |d + T m|² - ½ mᵀP m - ½ log|J| + (D/2) log 2π,

formed and factorised on the pattern of the design (evidence/block_cholesky.py). The M-step needs Σ E[(φ ⊗ z)(φ ⊗ z)ᵀ]
of a site's features and latents: that of its cells at m, and Σ RᵀR ⊗ Cov[z] of the cells' own blocks of J⁻¹, of which
a factor makes a few more rows.

Letters: G cells, R residuals of each; K columns, D unknowns; V₁ features; P cells of a row (its event).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.coupled_sets import Cells, CoupledSet, Drawn
from pyro_em.e_step.pooled_location import PooledSite
from pyro_em.e_step.pooled_posterior import LOG_2PI, Whitener, residual
from pyro_em.errors import NonFiniteError
from pyro_em.evidence.block_cholesky import factor

Noise = Sequence[tuple[Tensor, Whitener]]


@dataclass(frozen=True)
class _Rows:
    """d (R, G) and T (K, R, G) of a site in units of its noise; cells stand last, where sums over others are quick."""

    d: Tensor
    slopes: Tensor
    cells: Cells

    def at(self, x: Tensor) -> Tensor:
        """T x, (R, G)."""
        return (self.slopes * x[self.cells.unknowns].unsqueeze(1)).sum(0)

    def pulled(self, r: Tensor, to: Tensor) -> Tensor:
        """`to` + Σ Tᵀr, (D + 1,)."""
        own = (self.slopes * r).sum(1)
        return to.index_add(0, self.cells.unknowns.reshape(-1), own.reshape(-1))

    def hessian(self, store: Tensor) -> Tensor:
        """The store + Σ TᵀT."""
        own = (self.slopes.unsqueeze(1) * self.slopes).sum(2)
        return store.index_add(0, self.cells.targets, own.reshape(-1))


def coupled_posterior(own: CoupledSet, noise: Noise) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """For every site its rows (any, q + P) at the posterior (coupled_location.py); log p(x|θ), and its magnitude.

    :raises NonFiniteError: if the posterior precision is not positive definite.
    """
    ones = [torch.ones(cells.unknowns.shape[1], 1, dtype=torch.float64) for cells in own.cells]
    lead = [one[:, None, None] for one in ones]
    parts = [residual(site, C, one, own.size) for site, (C, _), one in zip(own.sites, noise, lead, strict=True)]
    start, basis = torch.zeros_like(own.prior), torch.eye(own.size, dtype=torch.float64)
    for family in own.drawn:
        at, factor_of = _drawn(family, own.sites, parts, noise)
        start = start.index_copy(0, family.unknowns.reshape(-1), at.reshape(-1))
        basis = basis.index_put((family.columns.unsqueeze(-1), family.columns), factor_of)
    rows, constant = _rows(own, parts, noise, start, basis)
    left = _left(own.sites, noise)
    order, store = own.order, own.order.zeros()
    store = store.index_add(0, order.diagonal, own.prior[:-1])
    linear = torch.zeros_like(own.prior)
    for site in rows:
        store, linear = site.hessian(store), site.pulled(-site.d, linear)
    factored = factor(order, store)
    if factored is None:
        name = own.sites[0].site.name
        raise NonFiniteError(
            name,
            f"Site '{name}': the posterior precision of the Gaussian latents is not positive definite. A scale has "
            "become infinite or 0, or the data are not finite.",
        )
    u = factored.solve(linear)
    residuals = [site.d + site.at(u) for site in rows]
    slope = own.prior * u
    for site, r in zip(rows, residuals, strict=True):
        slope = site.pulled(r, slope)
    step = -factored.solve(slope)  # mends the rounding of the first solve
    u = u + step
    residuals = [r + site.at(step) for site, r in zip(rows, residuals, strict=True)]
    prior = own.prior if own.weight is None else own.prior * own.weight
    energy = 0.5 * (prior * u * u).sum() + 0.5 * left
    for site, r in zip(rows, residuals, strict=True):
        energy = energy + 0.5 * (r * r if site.cells.weight is None else r * r * site.cells.weight).sum()
    num = torch.full((), float(order.num), dtype=torch.float64) if own.weight is None else own.weight.sum()
    spread, two_pi = 0.5 * factored.log_det(own.weight), 0.5 * num * LOG_2PI
    likelihood = constant - energy - spread + two_pi
    magnitude = constant.abs() + energy + spread.abs() + two_pi
    z, inverse = u, factored.inverse()
    for family in own.drawn:
        at = start[family.unknowns] + u[family.unknowns] @ basis[family.columns.unsqueeze(-1), family.columns].mT
        z = z.index_copy(0, family.unknowns.reshape(-1), at.reshape(-1))
    found = []
    for pooled, cells, one, (C, _) in zip(own.sites, own.cells, ones, noise, strict=True):
        mean, data = _at_mean(pooled, torch.cat([one, z[cells.unknowns].mT], -1), cells.weight)
        spread_of = _spread(pooled, cells, inverse, basis)
        joint = torch.cat([torch.cat([mean, mean @ C + data], -1), torch.cat([spread_of, spread_of @ C], -1)])
        found.append(torch.linalg.qr(joint, mode="r").R)
    return tuple(found), likelihood, magnitude


def _drawn(
    family: Drawn, sites: Sequence[PooledSite], parts: Sequence[tuple[Tensor, Tensor]], noise: Noise
) -> tuple[Tensor, Tensor]:
    """z₀ (n, k) and B (k, k) of a family: its own sites say d + M z = root ε."""
    d = torch.cat([parts[i][0].flatten(1) for i in family.sites], -1)
    made = torch.cat([parts[i][1][0, 0][:, family.columns] for i in family.sites])
    roots = torch.block_diag(*(noise[i][1].matrix for i in family.sites))
    both = torch.linalg.solve(made, torch.cat([roots, -d.mT], -1))
    return both[:, len(made) :].mT, both[:, : len(made)]


def _rows(
    own: CoupledSet, parts: Sequence[tuple[Tensor, Tensor]], noise: Noise, start: Tensor, basis: Tensor
) -> tuple[list[_Rows], Tensor]:
    """The sites that are not drawn, in the numbers u; and c."""
    drawn = {i for family in own.drawn for i in family.sites}
    constant = torch.full((), own.constant, dtype=torch.float64)
    rows = []
    for i, (site, cells, (_, white)) in enumerate(zip(own.sites, own.cells, noise, strict=True)):
        constant = constant - site.pooled.count * 0.5 * site.cells * LOG_2PI
        if i in drawn:
            continue
        constant = constant - site.pooled.count * white.log_det
        d, slopes = (white(x).flatten(1, 2) for x in parts[i])
        plain = _Rows(d.squeeze(-1).mT, slopes.permute(2, 1, 0), cells)
        drawn_slopes = torch.einsum("grj,jk->krg", slopes, basis).contiguous()
        rows.append(_Rows(plain.d + plain.at(start), drawn_slopes, cells))
    return rows, constant


def _left(sites: Sequence[PooledSite], noise: Noise) -> Tensor:
    """Sum of squares of the rows that no latent reaches."""
    total = torch.zeros((), dtype=torch.float64)
    for site, (C, white) in zip(sites, noise, strict=True):
        if len(site.pooled.left):
            rest = site.pooled.left[:, site.alone :] + site.pooled.left[:, : site.alone] @ C[len(C) - site.alone :]
            total = total + (white(rest.unsqueeze(-1)) ** 2).sum()
    return total


def _at_mean(site: PooledSite, zeta: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Regressors (any, q) and data (any, P) at ζ (G, K + 1), the rows left over last; as often as cells count."""
    design, data, left = site.pooled.design, site.pooled.data.squeeze(-1), site.pooled.left
    if weight is not None:
        root = weight.sqrt().reshape(-1, 1, 1)
        design, data = design * root, data * root
    shared = (design.unsqueeze(-1) * zeta[:, None, None]).flatten(2)
    regressors = torch.cat([shared, data[..., : site.alone]], -1).flatten(0, 1)
    values = data[..., site.alone :] if site.has_data else torch.zeros(*data.shape[:2], site.cells, dtype=torch.float64)
    values = values.flatten(0, 1)
    if len(left):
        alone = torch.nn.functional.pad(left[:, : site.alone], (shared.shape[-1], 0))
        regressors, values = torch.cat([regressors, alone]), torch.cat([values, left[:, site.alone :]])
    return regressors, values


def _spread(site: PooledSite, cells: Cells, inverse: Tensor, basis: Tensor) -> Tensor:
    """Rows (V₁ K, q) whose products sum to Σ RᵀR ⊗ Cov[z] of all cells."""
    size, shared = len(basis), site.shared
    summed = cells.squares @ inverse[cells.pairs].mT
    joint = summed.reshape(shared, shared, size, size).transpose(1, 2).reshape(shared * size, shared * size)
    scale = joint.diagonal().clamp(min=0).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(joint / (safe * safe.unsqueeze(-1)))
    root = values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT * scale
    found = torch.nn.functional.pad(root.unflatten(-1, (shared, size)) @ basis.mT, (1, 0)).flatten(1)
    return torch.nn.functional.pad(found, (0, site.alone))
