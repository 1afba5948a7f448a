"""The algebra of pooled Gaussian latents: from pseudo-rows and noise to posterior moments and evidence (pooled.py).

With residuals d + T u of an element divided by their noise and L Lᵀ = I + TᵀT (K x K, which is Woodbury's side where K
is small), m = −L⁻ᵀ L⁻¹ Tᵀ d and log p(x) = c − ½ |d + T m|² − ½ |m|² − log|L|. Nothing here knows where pseudo-rows
come from: they stand for classes of elements (pooled_data.py), for one state of a mixture, or for single rows.

Letters: U classes, K latents of an element, c pseudo-elements of a class, P cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, bmm

from pyro_em.e_step.pooled_location import PooledSite, per_cell
from pyro_em.e_step.pooled_sets import PooledSet
from pyro_em.errors import NonFiniteError

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Whitener:
    """Noise of one site: `root` is the scale of each cell (P,), or the Cholesky factor of the covariance (P, P)."""

    root: Tensor
    log_det: Tensor

    @property
    def matrix(self) -> Tensor:
        """The root as a matrix."""
        return torch.diag(self.root) if self.root.dim() == 1 else self.root

    def __call__(self, x: Tensor) -> Tensor:
        """Residuals (U, V₁, P, any) in units of the noise."""
        if self.root.dim() == 1:
            return x / self.root.unsqueeze(-1)
        lower = self.root.expand(*x.shape[:-2], *self.root.shape)
        return torch.linalg.solve_triangular(lower, x, upper=False)


def whitener(site: PooledSite, arguments: Mapping[str, Tensor]) -> Whitener:
    """The noise of a site at its arguments."""
    if not site.vector:
        scale = per_cell(arguments["scale"], site.site) if site.scaled else torch.ones(site.cells, dtype=torch.float64)
        return Whitener(scale, scale.log().sum())
    if "scale_tril" in arguments:
        lower = arguments["scale_tril"]
    elif "covariance_matrix" in arguments:
        covariance = arguments["covariance_matrix"]
        lower, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed.any()):
            if not site.site.latent:
                raise NonFiniteError(site.site.name, f"Site '{site.site.name}': its covariance matrix is singular.")
            values, vectors = torch.linalg.eigh(covariance)  # effects without variance in some direction
            lower = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    else:
        lower = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(arguments["precision_matrix"])))
    lower = lower.reshape(lower.shape[-2:])
    return Whitener(lower, lower.diagonal().abs().log().sum())


def posterior(own: PooledSet, noise: Sequence[tuple[Tensor, Whitener]]) -> tuple[Tensor, Tensor, Tensor]:
    """ζ (U, K + 1, c + K), log p(x|θ) of the set, and the magnitude of the terms in it."""
    solved = _solve(own, noise)
    classes, mean, lower, drawn = own.classes, solved.mean, solved.lower, solved.drawn
    energy = solved.energy.sum() + solved.left
    spread = (classes.weight * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)).sum()
    two_pi, often, ones = own.kept("posterior", lambda: _constants(own))
    likelihood = solved.constant - energy - spread + two_pi
    magnitude = solved.constant.abs() + energy + spread.abs() + two_pi + _cancelled(solved, classes.weight)
    root = solved.root * often
    if drawn is not None and not drawn.standard:
        mean, root = drawn.start + bmm(drawn.basis, mean), bmm(drawn.basis, root)
    return torch.cat([ones, torch.cat([mean, root], -1)], 1), likelihood, magnitude


def _constants(own: PooledSet) -> tuple[Tensor, Tensor, Tensor]:
    """½ K log 2π of all elements, √w of every class, and the first row of ζ: 0 where the posterior spreads."""
    weight, ones = own.classes.weight, torch.nn.functional.pad(own.classes.ones.unsqueeze(1), (0, own.size))
    return 0.5 * own.size * LOG_2PI * weight.sum(), weight.sqrt()[:, None, None], ones


def log_evidence(own: PooledSet, noise: Sequence[tuple[Tensor, Whitener]]) -> tuple[Tensor, Tensor]:
    """log p(x_n|θ) of elements that are pseudo-elements themselves, of one class, and its terms' magnitude: (c,)."""
    solved = _solve(own, noise)
    spread = solved.lower.diagonal(dim1=-2, dim2=-1).log().sum()
    energy, two_pi = solved.energy.sum(0), 0.5 * own.size * LOG_2PI
    return solved.constant - energy - spread + two_pi, solved.constant.abs() + energy + spread.abs() + two_pi


def group_evidence(own: PooledSet, noise: Sequence[tuple[Tensor, Whitener]]) -> tuple[Tensor, Tensor]:
    """Of classes of one pseudo-element each, -½|d + T m|² - ½|m|² - log|L|, and its terms' magnitude: (U,)."""
    solved = _solve(own, noise)
    spread = solved.lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    energy = solved.energy.squeeze(-1)
    return -energy - spread, energy + spread.abs()


@dataclass(eq=False)  # not frozen, as all that is made once an update
class _Solved:
    """The least squares problem of a set: u at its `mean` (U, K, c), the `energy` (U, c) there.

    `data` (U, any, c) are the residuals at u = 0, `squares` (U, c) those at the mean; `precision` is L Lᵀ, `root` L⁻ᵀ.
    """

    drawn: _Drawn | None
    lower: Tensor
    mean: Tensor
    energy: Tensor
    left: Tensor
    constant: Tensor
    data: Tensor
    squares: Tensor
    precision: Tensor
    root: Tensor


@dataclass(frozen=True)
class _Drawn:
    """z = start + basis u of a set: (U, K, c) and (U, K, K). `standard`: it is known to be u."""

    basis: Tensor
    start: Tensor
    standard: bool = False

    @cached_property
    def of_numbers(self) -> _Drawn:
        """The same, of which is known that no parameter moves it."""
        one = torch.eye(self.basis.shape[-1], dtype=torch.float64)
        return replace(self, standard=torch.equal(self.basis, one.expand_as(self.basis)) and not self.start.any())


def _cancelled(solved: _Solved, weight: Tensor) -> Tensor:
    """Size of the terms whose difference the residuals are, times that of the residuals, and the same for the pivots in
    log|L|: where a noise goes to 0 that says how many digits they have."""
    pivots = solved.lower.diagonal(dim1=-2, dim2=-1)
    differences = (solved.precision.diagonal(dim1=-2, dim2=-1) / (pivots * pivots)).sum(-1)
    residuals = (solved.squares * (solved.data * solved.data).sum(1)).sqrt().sum()
    return residuals + 0.5 * (weight * differences).sum()


def _solve(own: PooledSet, noise: Sequence[tuple[Tensor, Whitener]]) -> _Solved:
    classes, size = own.classes, own.size
    latent = [i for i, site in enumerate(own.sites) if site.site.latent]
    # Every latent's own site says what it is made of, unless its rows are told apart (a row that reads two elements).
    spherical = sum(own.sites[i].shared * own.sites[i].cells for i in latent) == size
    constant = own.kept("constant", lambda: _constant(own))
    left: Tensor | None = None
    seen: list[tuple[Tensor, ...]] = []
    for i, (site, (C, white)) in enumerate(zip(own.sites, noise, strict=True)):
        if spherical and i in latent:
            continue
        constant = constant - site.pooled.count * white.log_det
        seen.append(tuple(white(x).flatten(1, 2) for x in residual(site, C, classes.leading, size)))
        if len(site.pooled.left):
            rest = site.pooled.left[:, site.alone :]
            rest = rest + site.pooled.left[:, : site.alone] @ C[len(C) - site.alone :]
            squares = (white(rest.unsqueeze(-1)) ** 2).sum()
            left = squares if left is None else left + squares
    if not seen:  # no data read these latents
        elements, columns = classes.ones.shape
        seen = [tuple(torch.zeros(elements, 0, k, dtype=torch.float64) for k in (columns, size))]
    d, T = seen[0] if len(seen) == 1 else [torch.cat(own_parts, 1) for own_parts in zip(*seen, strict=True)]
    drawn = _drawn(own, [(own.sites[i], *noise[i]) for i in latent]) if spherical else None
    if drawn is not None and not drawn.standard:
        d, T = d + bmm(T, drawn.start), bmm(T, drawn.basis)
    turned = T.mT
    precision = bmm(turned, T)
    if drawn is not None:
        precision = precision + own.one
    lower, failed = torch.linalg.cholesky_ex(precision)
    if bool(failed.any()):
        raise NonFiniteError(
            own.sites[0].site.name,
            f"Site '{own.sites[0].site.name}': the posterior precision of the Gaussian latents is not positive "
            "definite. A scale has become infinite or 0, or the data are not finite.",
        )
    root = torch.linalg.solve_triangular(lower.mT, own.one, upper=True)
    back = root.mT
    minus = bmm(root, bmm(back, bmm(turned, d)))
    at_mean = d - bmm(T, minus)
    slope = bmm(turned, at_mean) if drawn is None else bmm(turned, at_mean) - minus
    step = bmm(root, bmm(back, slope))  # mends the rounding of the first solve
    mean, at_mean = -(minus + step), at_mean - bmm(T, step)
    squares = (at_mean * at_mean).sum(1)
    energy = squares if drawn is None else squares + (mean * mean).sum(1)
    rest = own.kept("zero", lambda: torch.zeros((), dtype=torch.float64)) if left is None else 0.5 * left
    return _Solved(drawn, lower, mean, 0.5 * energy, rest, constant, d, squares, precision, root)


def _constant(own: PooledSet) -> Tensor:
    """Of log p(x), with the ½ log 2π of every cell."""
    cells = sum((site.pooled.count * (0.5 * site.cells * LOG_2PI) for site in own.sites), torch.zeros(()))
    return own.constant - cells.double()


def _drawn(own: PooledSet, latents: Sequence[tuple[PooledSite, Tensor, Whitener]]) -> _Drawn:
    """As the latents' own sites say; that of the E-step before, where it is made of the same numbers (z ~ N(0, I))."""
    made_of = [x for _, C, white in latents for x in (C, white.root)]
    known = own.known.get("drawn")
    if known is not None and all(x is y for x, y in zip(known[0], made_of, strict=True)):
        return known[1].of_numbers
    parts = [residual(site, C, own.classes.leading, own.size) for site, C, _ in latents]
    drawn, made = (torch.cat([part[k].flatten(1, 2) for part in parts], 1) for k in range(2))
    roots = torch.block_diag(*(white.matrix for *_, white in latents))
    both = torch.linalg.solve(made, torch.cat([roots.expand_as(made), -drawn], -1))
    found = _Drawn(both[..., : own.size].contiguous(), both[..., own.size :].contiguous())
    own.known["drawn"] = made_of, found
    return found


def residual(site: PooledSite, C: Tensor, ones: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """d (U, V₁, P, c) and T (U, V₁, P, K) of a site, not divided by its noise; `ones` (U, 1, 1, c)."""
    shared = C[: site.shared * (size + 1)] if site.alone else C
    if site.pooled.plain:
        both = shared.reshape(1, 1, size + 1, site.cells)
    else:
        shared = shared.reshape(site.shared, (size + 1) * site.cells)
        both = (site.pooled.design @ shared).unflatten(-1, (size + 1, site.cells))
    d = both[:, :, 0].unsqueeze(-1) * ones
    if site.alone:
        d = d + C[site.shared * (size + 1) :].mT @ site.pooled.data[:, :, : site.alone]
    if site.has_data:
        d = d + (site.pooled.data[:, :, site.alone :] if site.alone else site.pooled.data)
    return d, both[:, :, 1:].mT
