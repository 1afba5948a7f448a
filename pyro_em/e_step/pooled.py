"""Compiled E-step for Gaussian latents of a plate: factor analysis, PPCA, mixed models, from moments formed once.

Rows enter through the pseudo-elements of their classes (pooled_data.py), whatever their number. Latents are written
z = a + B u with u ~ N(0, I) from their own sites, so that a variance of 0 is a value like any other. With residuals
r = d + T u of the observed sites of an element, divided by their noise, L Lᵀ = I + TᵀT (K x K, which is Woodbury's side
where K is small), and w elements in a class,

    m = -L⁻ᵀ L⁻¹ Tᵀ d,     log p(x) = c - ½ |d + T m|² - ½ |m|² - w log|L|,     u = m and the columns of √w L⁻ᵀ,

these *atoms* having the posterior's second moments, summed over all elements of the class. From there on everything
is least squares on a few pseudo-rows (pooled_location.py). The model is not run again.

Not handled: latents coupled across elements (crossed or nested effects), discrete latents beside them, missing cells.
Letters: U classes, K latents of an element, c pseudo-elements of a class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.base import Expectation, NotCompiled, Stage
from pyro_em.e_step.interpreted import expectation, from_totals
from pyro_em.e_step.outside import Outside
from pyro_em.e_step.pooled_location import PooledLocation, PooledSite, per_cell
from pyro_em.e_step.pooled_sets import PooledSet, pooled_sets
from pyro_em.e_step.vanishing import vanishing
from pyro_em.errors import NonFiniteError
from pyro_em.m_step.location import Location, total_moments
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors, SiteMoments
from pyro_em.sufficient import Arguments, Sufficient, raw_arguments
from pyro_em.types import Params

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class _Whitener:
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


class Pooled:
    """The engine; made by `compile_pooled`."""

    name = "pooled"
    generation = 0
    compact = True

    def __init__(self, problem: Problem) -> None:
        self.sets, self.run = pooled_sets(problem)
        self.problem = problem
        self.start: Arguments = raw_arguments(self.run.sites)
        self.place = {site.site.name: (i, site) for i, own in enumerate(self.sets) for site in own.sites}
        self._outside = Outside(problem, self.run)
        elsewhere = [use for own in problem.uses.values() for use in own if use.site not in self.place]
        for use in elsewhere:
            if not use.known:
                raise NotCompiled(f"the arguments of '{use.site}' are not recognised")
        self._predictors = {(use.site, use.slot): use.predictor for use in elsewhere if use.predictor is not None}
        self._totals = {n: self._total(own) for n, (_, own) in self.place.items() if not own.site.latent}
        classes = sum(len(own.classes.weight) for own in self.sets)
        columns = sum(own.classes.ones.numel() for own in self.sets)
        self.reason = (
            f"Gaussian latents: moments of the rows formed once, {classes} class{'es' if classes > 1 else ''} of equal "
            f"designs with {columns} pseudo-elements in all; no row is read again"
        )

    def _total(self, own: PooledSite) -> SiteMoments:
        return total_moments(self.run.sites[own.site.name], own.vector)

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params`."""
        (sums,) = self.core([self.before(params, torch.zeros((), dtype=torch.float64))])
        return self.expectation(params, sums)

    def expectation(self, params: Params, sums: Sequence[Tensor]) -> Expectation:
        """The E-step whose `core` gave `sums`."""
        totals, sufficient = self.after(params, sums)
        found = from_totals(self.problem, params, totals, sufficient)
        return Expectation(
            found.log_likelihood,
            found.log_prior,
            found.magnitude,
            sufficient,
            lambda: self._posterior(params, sufficient),
        )

    def _posterior(self, params: Params, sufficient: Sufficient) -> Posteriors:
        """Weights of the reference's atoms, for a numeric step of the M-step, which needs the model at these."""
        evidence, run = self.problem.evidence(params)
        reference = expectation(self.problem, run, evidence)
        sufficient.problem = reference.sufficient.problem
        return reference.weights

    def vanishing(self, params: Params) -> tuple[str, ...]:
        """Spreads of latents whose estimate is 0, see vanishing.py."""

        def evidence(at: Params) -> tuple[float, float]:
            try:
                ((*_, found),) = self.core([self.before(at, torch.zeros((), dtype=torch.float64))])
            except NonFiniteError:  # rows that read several elements: a variance of 0 has no basis there
                return -math.inf, 0.0
            return float(found[0]), float(found[1])

        return vanishing(self.problem, params, evidence)

    def before(self, params: Params, magnitude: Tensor) -> Stage:
        """Coefficients of all residuals, and the noise."""
        sufficient = self._arguments(params)
        tensors: list[Tensor] = []
        for own in self.sets:
            for site in own.sites:
                noise = _whitener(site, sufficient)
                tensors += [site.form.coefficients(params), noise.root, noise.log_det]
        return Stage(tuple(tensors), None)

    def core(self, stages: Sequence[Stage]) -> list[tuple[Tensor, ...]]:
        """For every start the atoms ζ of each set, log p(x|θ) and its magnitude."""
        return [self._core(stage) for stage in stages]

    def _core(self, stage: Stage) -> tuple[Tensor, ...]:
        tensors = iter(stage.tensors)
        found, totals = [], []
        for own in self.sets:
            noise = [(next(tensors), _Whitener(next(tensors), next(tensors))) for _ in own.sites]
            zeta, likelihood, magnitude = _posterior(own, noise)
            found.append(zeta)
            totals.append(torch.stack([likelihood, magnitude]))
        return (*found, torch.stack(totals).sum(0))

    def after(self, params: Params, sums: Sequence[Tensor]) -> tuple[Tensor, Sufficient]:
        """log p(x|θ), log p(θ) and its magnitude as a tensor (3,), and the statistics behind them."""
        *zetas, evidence = sums
        sufficient = self._arguments(params)
        made: dict[str, PooledLocation] = {}

        def location(name: str) -> PooledLocation:
            if name not in made:
                i, site = self.place[name]
                C = site.form.coefficients(params)
                made[name] = PooledLocation(site, C, zetas[i], sufficient, self._totals.get(name))
            return made[name]

        def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
            if name not in self.place:
                return self._outside.moments(name, arguments)
            own = location(name)
            return own.value_moments() if own.own.site.latent and not own.own.moves else own.moments()

        def opens(name: str, starts: Mapping[str, int], size: int) -> Location | None:
            return location(name).opened(starts, size) if name in self.place else None

        sufficient._moments_of, sufficient.opens = moments_of, opens
        constants, size, prior = self._outside.log_density(sufficient)
        return torch.stack([evidence[0] + constants, prior, evidence[1] + size]), sufficient

    def _arguments(self, params: Params) -> Sufficient:
        arguments = {site: dict(own) for site, own in self.start.items()}
        sufficient = Sufficient(self.problem, self.run.sites, arguments, self._never)
        for name, theta in params.items():
            sufficient.put(theta, self.problem.uses[name])
        for (site, slot), predictor in self._predictors.items():
            arguments[site][slot] = predictor.argument({n: v.detach().double() for n, v in params.items()})
        return sufficient

    def _never(self, name: str, arguments: dict[str, Tensor]) -> SiteMoments:
        raise AssertionError(f"moments of '{name}' were asked for before the E-step")


def _whitener(site: PooledSite, sufficient: Sufficient) -> _Whitener:
    arguments = sufficient.arguments[site.site.name]
    if not site.vector:
        scale = per_cell(arguments["scale"], site.site) if site.scaled else torch.ones(site.cells, dtype=torch.float64)
        return _Whitener(scale, scale.log().sum())
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
    return _Whitener(lower, lower.diagonal().abs().log().sum())


def _posterior(own: PooledSet, noise: Sequence[tuple[Tensor, _Whitener]]) -> tuple[Tensor, Tensor, Tensor]:
    """ζ (U, K + 1, c + K), log p(x|θ) of the set, and the magnitude of the terms in it."""
    classes, size = own.classes, own.size
    parts = [_residual(site, C, classes.ones, size) for site, (C, _) in zip(own.sites, noise, strict=True)]
    latent = [i for i, site in enumerate(own.sites) if site.site.latent]
    # Every latent's own site says what it is made of, unless its rows are told apart (a row that reads two elements).
    spherical = sum(own.sites[i].shared * own.sites[i].cells for i in latent) == size
    constant = torch.full((), own.constant, dtype=torch.float64)
    left = torch.zeros((), dtype=torch.float64)
    seen = [tuple(x.flatten(1, 2)[:, :0] for x in parts[0])]  # latents that no data read have no other rows
    for i, (site, (C, white)) in enumerate(zip(own.sites, noise, strict=True)):
        constant = constant - site.pooled.count * 0.5 * site.cells * LOG_2PI
        if spherical and i in latent:
            continue
        constant = constant - site.pooled.count * white.log_det
        seen.append(tuple(white(x).flatten(1, 2) for x in parts[i]))
        if len(site.pooled.left):
            rest = site.pooled.left[:, site.alone :]
            rest = rest + site.pooled.left[:, : site.alone] @ C[len(C) - site.alone :]
            left = left + (white(rest.unsqueeze(-1)) ** 2).sum()
    d, T = (torch.cat(own_parts, 1) for own_parts in zip(*seen, strict=True))
    basis: Tensor | None = None
    if spherical:
        drawn, made = (torch.cat([parts[i][k].flatten(1, 2) for i in latent], 1) for k in range(2))
        roots = torch.block_diag(*(noise[i][1].matrix for i in latent))
        basis, start = torch.linalg.solve(made, roots.expand_as(made)), -torch.linalg.solve(made, drawn)
        d, T = d + T @ start, T @ basis
    precision = T.mT @ T
    if basis is not None:
        precision = precision + torch.eye(size, dtype=torch.float64)
    lower, failed = torch.linalg.cholesky_ex(precision)
    if bool(failed.any()):
        raise NonFiniteError(
            own.sites[0].site.name,
            f"Site '{own.sites[0].site.name}': the posterior precision of the Gaussian latents is not positive "
            "definite. A scale has become infinite or 0, or the data are not finite.",
        )
    mean = -torch.cholesky_solve(T.mT @ d, lower)
    residual = d + T @ mean
    slope = T.mT @ residual if basis is None else T.mT @ residual + mean
    step = -torch.cholesky_solve(slope, lower)  # mends the rounding of the first solve
    mean, residual = mean + step, residual + T @ step
    energy = 0.5 * ((residual * residual).sum() + left)
    if basis is not None:
        energy = energy + 0.5 * (mean * mean).sum()
    spread = (classes.weight * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)).sum()
    two_pi = 0.5 * size * LOG_2PI * classes.weight.sum()
    likelihood = constant - energy - spread + two_pi
    magnitude = constant.abs() + energy + spread.abs() + two_pi
    identity = torch.eye(size, dtype=torch.float64).expand_as(lower)
    root = torch.linalg.solve_triangular(lower.mT, identity, upper=True) * classes.weight.sqrt()[:, None, None]
    if basis is not None:
        mean, root = start + basis @ mean, basis @ root
    zeta = torch.cat([torch.cat([classes.ones.unsqueeze(1), mean], 1), torch.nn.functional.pad(root, (0, 0, 1, 0))], -1)
    return zeta, likelihood, magnitude


def _residual(site: PooledSite, C: Tensor, ones: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """d (U, V₁, P, c) and T (U, V₁, P, K) of a site, not divided by its noise."""
    shared = C[: site.shared * (size + 1)].reshape(site.shared, size + 1, site.cells)
    d = torch.einsum("umv,vp,uc->umpc", site.pooled.design, shared[:, 0], ones)
    if site.alone:
        alone = C[site.shared * (size + 1) :]
        d = d + torch.einsum("umvc,vp->umpc", site.pooled.data[:, :, : site.alone], alone)
    if site.has_data:
        d = d + site.pooled.data[:, :, site.alone :]
    return d, torch.einsum("umv,vkp->umpk", site.pooled.design, shared[:, 1:])


def compile_pooled(problem: Problem) -> Pooled:
    """The engine for a problem, or `NotCompiled` with the reason."""
    return Pooled(problem)
