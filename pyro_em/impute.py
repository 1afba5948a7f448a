"""Missing values of observed sites given everything that was observed, at fitted parameters.

    E[x_m | x_o, θ] = Σ_z p(z | x_o, θ) E[x_m | z, x_o],      and the variance by the law of total variance

over the latents z. Cells are missing where a site is masked: NaN under missing="nan", `obs_mask`, `poutine.mask`.
Draws are joint: the latents first, then the cells given them. They hold the parameters fixed; for multiple
imputation draw the parameters, too (`result.covariance()`).

Shapes: those of the site's value, its plates included; sites of a `pyro_em.markov` loop are one, time first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_em.all_atoms import with_all_atoms
from pyro_em.chain_posterior import ChainPosterior
from pyro_em.distributions import IncompleteLowRankNormal, IncompleteNormal
from pyro_em.distributions.incomplete import completed
from pyro_em.errors import InputError
from pyro_em.evidence.integrated import integrates
from pyro_em.expected import Expectations, Expected
from pyro_em.model.compat import base_distribution
from pyro_em.model.labels import LABELS
from pyro_em.model.trace import SiteRecord, run_model
from pyro_em.posterior import Posterior
from pyro_em.problem import Problem
from pyro_em.state_posterior import StatePosterior
from pyro_em.store import isolated_rng
from pyro_em.types import Params


@dataclass(frozen=True)
class Imputation:
    """What the data say about the missing cells of one site.

    `missing` marks them; `mean` has the observed values and the expected missing ones; `variance` is 0 where observed.
    For a site with finitely many values `probabilities`, with one more dim, is the distribution of every cell, and
    `mean` that of the values' numbers (None and plain for all other sites).
    """

    missing: Tensor
    mean: Tensor
    variance: Tensor
    probabilities: Tensor | None = None
    _draw: Callable[[int, int | None], Tensor] = dataclasses.field(default=lambda *_: torch.empty(0), repr=False)

    @property
    def sd(self) -> Tensor:
        """Posterior standard deviation, 0 where observed."""
        return self.variance.sqrt()

    def sample(self, num: int = 1, seed: int | None = 0) -> Tensor:
        """Completed data, shape (num,) + site: missing cells drawn jointly given the observed ones."""
        if num < 1:
            raise InputError(f"sample: num must be at least 1, not {num}.")
        return self._draw(num, seed)


def impute(problem: Problem, params: Params) -> dict[str, Imputation]:
    """An `Imputation` for every site that has missing cells, by name."""
    posterior = Posterior(with_all_atoms(problem), params)
    evidence, run = posterior._e_step
    found: dict[str, Imputation] = {}
    with torch.no_grad():
        expectations = Expectations(posterior.problem, params, evidence, run)
        for name, site in run.sites.items():
            missing = _missing(site) if site.observed else None
            if missing is None or not bool(missing.any()) or 0 in missing.shape:
                continue
            known = problem.capture.sites.get(name)
            if known is not None and LABELS in known.infer:
                found[known.infer[LABELS]] = _unlabelled(known.infer[LABELS], missing, posterior)
                continue
            imputed = _imputed(name, missing, site.value, expectations.of(name, missing.dim()), posterior)
            chain = next((chain for chain in posterior.chains if chain.fold.site == name), None)
            found |= {name: imputed} if chain is None else _as_written(imputed, chain)
    return found


def _unlabelled(site: str, missing: Tensor, posterior: Posterior) -> Imputation:
    """That of a site with labels (`obs_mask`): its posterior, which is certain where a label is known."""
    fn, shares = posterior.problem.capture.sites[site].fn, posterior.responsibilities(site)
    if fn.event_dim:  # one-hot: the cells of a row
        missing = missing.unsqueeze(-1).expand(shares.shape)
        mean, second, probabilities = shares, shares, None
    else:
        states = fn.enumerate_support(expand=False).reshape(-1).to(shares)
        mean, second, probabilities = (shares * states).sum(-1), (shares * states**2).sum(-1), shares

    def draw(num: int, seed: int | None) -> Tensor:
        with isolated_rng(seed):
            return posterior.sample(num)[site].reshape(num, *missing.shape)

    variance = torch.where(missing, (second - mean * mean).clamp(min=0), 0.0)
    return Imputation(missing, mean, variance, probabilities, draw)


def _as_written(whole: Imputation, chain: ChainPosterior) -> dict[str, Imputation]:
    """That of a loop's one site by the observed sites of the model, those of a loop run together with time first."""
    missing, mean, variance = (chain.observed(x) for x in (whole.missing, whole.mean, whole.variance))

    def draw(name: str) -> Callable[[int, int | None], Tensor]:
        return lambda num, seed: chain.observed(whole._draw(num, seed), lead=1)[name]

    return {
        name: Imputation(gone, mean[name], variance[name], _draw=draw(name))
        for name, gone in missing.items()
        if bool(gone.any())
    }


def _missing(site: SiteRecord) -> Tensor:
    """Cells without an observation, in the full shape of the site over its plates."""
    elements, event = site.element_dims, site.fn.event_dim
    gone = site.value.isnan() if site.value.is_floating_point() else torch.zeros(site.value.shape, dtype=torch.bool)
    base_event = event - elements
    if site.mask is not None:
        gone = gone | ~site.mask.reshape(site.mask.shape + (1,) * event)
    if site.element_mask is not None:
        gone = gone | ~site.element_mask.reshape(site.element_mask.shape + (1,) * base_event)
    depth = max([0, *(-plate.dim for plate in site.plates)])
    sizes = {plate.dim: plate.size for plate in site.plates}
    shape = (*(sizes.get(d, 1) for d in range(-depth, 0)), *site.fn.event_shape)
    gone = gone.expand(torch.broadcast_shapes(gone.shape, shape))
    return gone.reshape(-1, *gone.shape[gone.dim() - len(shape) :]).any(0)  # masks may keep dims of latents


def _imputed(name: str, missing: Tensor, value: Tensor, expected: Expected, posterior: Posterior) -> Imputation:
    mean, probabilities = expected.first, expected.probabilities
    if probabilities is not None:
        probabilities = probabilities.expand(*missing.shape, probabilities.shape[-1])
    # Where the mean is infinite the difference would be ∞ − ∞.
    variance = torch.where(mean.isfinite(), expected.second - mean * mean, torch.inf)
    return Imputation(
        missing=missing,
        mean=torch.where(missing, mean, value.to(mean)),
        variance=torch.where(missing, variance.clamp(min=0), torch.zeros((), dtype=mean.dtype)),
        probabilities=probabilities,
        _draw=lambda num, seed: _draws(name, missing, posterior, num, seed),
    )


def _draws(name: str, missing: Tensor, posterior: Posterior, num: int, seed: int | None) -> Tensor:
    problem = posterior.problem

    def site_given(latents: Params) -> SiteRecord:
        run = run_model(
            problem.model,
            problem.args,
            problem.kwargs,
            {**posterior.params, **latents},
            max_plate_nesting=problem.capture.max_plate_nesting,
            enumerated=False,
        )
        return run.sites[name]

    with isolated_rng(seed), pyro.validation_enabled(False):
        known = set(problem.capture.sites)  # the states of a folded loop are inside of the site
        latents = {n: x for n, x in posterior.sample(num).items() if n in known} if posterior.latents else {}
        shapes = {n: problem.capture.sites[n].value.shape for n in latents}
        with torch.no_grad():
            if not latents:
                return _drawn(site_given({}), missing, num)
            each = ({n: draws[i].reshape(shapes[n]) for n, draws in latents.items()} for i in range(num))
            return torch.cat([_drawn(site_given(values), missing, 1) for values in each])


def _drawn(site: SiteRecord, missing: Tensor, num: int) -> Tensor:
    """Completed data given the latents, shape (num,) + site."""
    base = base_distribution(site.fn)
    if integrates(site):
        return torch.where(missing, StatePosterior(site).sample_observations(num), site.value)
    draw: Tensor = base.sample((num,))
    if isinstance(base, IncompleteNormal | IncompleteLowRankNormal):
        # The error of predicting a complete draw from its own observed cells is what a draw given them deviates by.
        covariance = base._unbroadcasted_covariance
        seen = torch.where(site.value.isnan(), torch.nan, draw)
        error = draw - completed(seen, base.loc, covariance).mean
        draw = completed(site.value, base.loc, covariance).mean + error
    return torch.where(missing, draw, site.value)
