"""A fit for ArviZ: one `xarray.DataTree`, handed over as InferenceData to ArviZ 0.x and as it is to 1.x.

    posterior             draws of the parameters, dims (chain = 1, draw, ...): the normal approximation
                          u ~ N(û, Σ) in free coordinates, Σ the inverse observed information, mapped back
    log_likelihood        log p(x_n|θ) of every data element at these draws, latents summed out (for `az.loo`)
    posterior_predictive  data drawn at these draws (only if `predictive` asks for them)
    latent_posterior      responsibilities p(z_n = k|x, θ̂), dims (plates, <site>_state); of continuous latents mean and
                          standard deviation, dim `moment` first
    latent_draws          joint draws of all latents given the data and θ̂ (only if `latent_draws` asks for them)
    estimates             θ̂, standard errors and 95 % intervals, dim `statistic`
    em_trace              the history, dim `iteration` (it is no chain, so it is not in `sample_stats`)
    observed_data         the data

Plates give their names to the dims of sample sites; other dims are called <name>_dim_0, <name>_dim_1, ... The sites of
a loop's steps are one variable, whose first dim besides draws is time (series.py), in every group: `az.plot_ppc` pairs
observed and predicted data by name.
Attributes of the tree: the facts of the fit (see summary.py), and why a group is missing.

The draws describe one mode. Under "em" they are what the likelihood alone says; under "map-em" they are
Laplace's approximation of the posterior. Entries held fixed or on a boundary do not move. Restarts are not
chains and do not appear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray
from torch import Tensor

from pyro_em.device import seeded_normal
from pyro_em.dims import RESERVED, SAMPLE, Dims, SeriesByName, dataset, numpy, plate_dims, series_dims, times
from pyro_em.errors import InputError, NonFiniteError, Refusal
from pyro_em.information import Information
from pyro_em.pointwise import pointwise_draws
from pyro_em.posterior import Posterior
from pyro_em.predict import predictive as predictive_draws
from pyro_em.problem import Problem
from pyro_em.series import series_of
from pyro_em.store import isolated_rng
from pyro_em.summary import STATISTICS, Estimate, available_information, estimates, facts
from pyro_em.types import Params

if TYPE_CHECKING:
    from pyro_em.result import FitResult

NORMAL = "normal approximation in free coordinates around the estimate, from the observed information"
MAX_HESSIAN = 2000  # free parameters up to which the observed information is computed
POINT = "one draw, the estimate itself: it says nothing about uncertainty"


def to_inference_data(
    result: FitResult,
    num_draws: int = 1000,
    seed: int = 0,
    predictive: int = 0,
    num_log_likelihood_draws: int | None = None,
    latent_draws: int = 0,
) -> Any:
    """The fit as ArviZ wants it: InferenceData on ArviZ 0.x, `xarray.DataTree` on 1.x.

    :param num_draws: draws of the parameters.
    :param seed: of all draws; the global random state is left alone.
    :param predictive: number of data sets to predict, one a draw of the parameters (0: none).
    :param num_log_likelihood_draws: draws at which the log-likelihood is computed: all by default, 0 for none.
        Each costs one evaluation of the model, in batches where the model can be batched.
    :param latent_draws: number of joint draws of the latents at the estimate (0: none): large for long series.
    :raises InputError: for numbers of draws that cannot be used.

    Example::

        data = result.to_inference_data()
        az.summary(data)
        az.loo(data)
    """
    tree = to_datatree(result, num_draws, seed, predictive, num_log_likelihood_draws, latent_draws)
    import arviz  # slow, and on Python 3.11 announces its own future

    return arviz.from_datatree(tree) if _major(arviz.__version__) < 1 else tree


def _major(version: str) -> int:
    return int(version.split(".")[0])


def to_datatree(
    result: FitResult,
    num_draws: int = 1000,
    seed: int = 0,
    predictive: int = 0,
    num_log_likelihood_draws: int | None = None,
    latent_draws: int = 0,
) -> xarray.DataTree:
    """The tree of `to_inference_data`, which needs no ArviZ: `.to_netcdf(path)` writes it."""
    limit = num_draws if num_log_likelihood_draws is None else num_log_likelihood_draws
    if num_draws < 2 or min(predictive, limit, latent_draws) < 0:
        raise InputError(
            f"to_inference_data: num_draws must be at least 2 (is {num_draws}), predictive, "
            f"num_log_likelihood_draws and latent_draws at least 0 (are {predictive}, {limit} and {latent_draws})."
        )
    information, notes = available_information(result, MAX_HESSIAN)
    problem = result.problem
    attributes: dict[str, Any] = {**facts(result), "notes": "\n".join(notes)}
    draws = None if information is None else _draw(information, num_draws, seed)
    each = [result.params]
    if information is not None and draws is not None:
        each = [{**result.params, **information.constrained(u)} for u in draws]
    posterior = {n: torch.stack([params[n] for params in each]) for n in result.params}
    variables = {n: _parameter_dims(problem, n, v.shape[1:], posterior) for n, v in posterior.items()}
    groups = {
        "posterior": dataset(
            {n: ((*SAMPLE, *variables[n]), numpy(v)[None]) for n, v in posterior.items()},
            {"approximation": POINT if draws is None else NORMAL},
        ),
        "estimates": _estimates(estimates(result, information), variables),
        "em_trace": dataset({n: (("iteration",), np.asarray(v)) for n, v in result.history.items()}),
    }
    if problem is None:
        attributes["missing_groups"] = "no model: data, latents and log-likelihood are left out"
    else:
        series = series_of(problem)
        groups["observed_data"] = _observed(series)
        latents = result.posterior()
        if latents.latents:
            groups["latent_posterior"] = _latents(latents, series)
            if latent_draws:
                groups["latent_draws"] = _latent_draws(latents, series, latent_draws, seed)
        if information is not None and draws is not None and limit and problem.graph.data_plates:
            try:
                values = pointwise_draws(problem, result.params, information, draws[:limit])
                groups["log_likelihood"] = _log_likelihood(problem, series, values)
            except (NonFiniteError, Refusal) as error:  # far from an estimate near the boundary of its space
                attributes["missing_groups"] = f"log_likelihood: at a draw of the parameters it is not finite. {error}"
        else:
            attributes["missing_groups"] = "log_likelihood: " + _why_no_log_likelihood(problem, draws is None)
        if predictive:
            groups["posterior_predictive"] = _predictive(problem, series, each, predictive, seed)
    root = dataset({}, {name: value for name, value in attributes.items() if value != ""})
    return xarray.DataTree.from_dict({"/": root, **groups})


def _why_no_log_likelihood(problem: Problem, no_draws: bool) -> str:
    if not problem.graph.data_plates:
        return "the model has no plate over which its likelihood is a sum of independent terms"
    return POINT if no_draws else "not asked for"


def _draw(information: Information, num: int, seed: int) -> Tensor:
    """Free coordinates, (num, P), from N(estimate, covariance); a singular covariance is welcome."""
    generator = torch.Generator().manual_seed(seed)
    noise = seeded_normal((num, len(information.estimate)), generator)
    variances, axes = torch.linalg.eigh(information.covariance)
    return information.estimate + (noise * variances.clamp(min=0).sqrt()) @ axes.mT


def _estimates(found: Mapping[str, Estimate], dims: Mapping[str, Dims]) -> xarray.Dataset:
    table = {}
    for name, row in found.items():
        values = np.stack([row.value, row.standard_error, row.lower, row.upper])
        table[name] = (("statistic", *dims[name]), values, {"triangular": int(row.triangular)})
    return dataset(table, coords={"statistic": list(STATISTICS)})


def _observed(series: SeriesByName) -> xarray.Dataset:
    shown = {name: own for name, own in series.items() if own.observed}
    table = {n: (series_dims(own, series, own.value.shape), numpy(own.value)) for n, own in shown.items()}
    return dataset(table, coords=times(table, series))


def _latents(posterior: Posterior, series: SeriesByName) -> xarray.Dataset:
    table, coords = {}, {}
    for name, sites in _latents_by_series(posterior, series).items():
        if posterior.is_continuous(sites[0]):
            sd = _stacked([posterior.variance(site).clamp(min=0).sqrt() for site in sites], 0)
            moments = torch.stack([_stacked([posterior.mean(site) for site in sites], 0), sd])
            table[name] = (("moment", *_latent_dims(posterior, series, name, moments.shape[1:])), numpy(moments))
            coords["moment"] = np.array(["mean", "sd"])
            continue
        probs = _stacked([posterior.responsibilities(site) for site in sites], 0)
        state = f"{name}_state"
        table[name] = ((*_latent_dims(posterior, series, name, probs.shape[:-1]), state), numpy(probs))
        coords[state] = _states(posterior, sites[0])
    return dataset(table, {"given": "the estimate"}, {**coords, **times(table, series)})


def _latent_draws(posterior: Posterior, series: SeriesByName, num: int, seed: int) -> xarray.Dataset:
    """All draws at once: one pass over the data, however many."""
    with isolated_rng(seed), torch.no_grad():
        drawn = posterior.sample(num)
    table = {}
    for name, sites in _latents_by_series(posterior, series).items():
        values = _stacked([drawn[site] for site in sites], 1)
        table[name] = ((*SAMPLE, *_latent_dims(posterior, series, name, values.shape[1:])), numpy(values)[None])
    return dataset(table, {"given": "the estimate"}, times(table, series))


def _latents_by_series(posterior: Posterior, series: SeriesByName) -> dict[str, tuple[str, ...]]:
    """Names of variables, and the posterior's names of the latents in each: a step of a loop may be one of its own."""
    alike = {site: name for name, own in series.items() if own.steps is not None for site in own.sites}
    found: dict[str, tuple[str, ...]] = {}
    for latent in posterior.latents:
        name = alike.get(latent, latent)
        found[name] = (*found.get(name, ()), latent)
    for name, sites in [*found.items()]:
        if sites != (name,) and (sites != series[name].sites or not _of_one_kind(posterior, sites)):
            del found[name]
            found.update({site: (site,) for site in sites})
    return found


def _of_one_kind(posterior: Posterior, sites: Dims) -> bool:
    continuous = {posterior.is_continuous(site) for site in sites}
    return continuous == {True} or (
        continuous == {False} and len({tuple(_states(posterior, site).tolist()) for site in sites}) == 1
    )


def _states(posterior: Posterior, latent: str) -> np.ndarray:
    """Values of a discrete latent, or the numbers of those that are vectors."""
    fn = posterior.problem.capture.sites[posterior.site(latent)].fn
    values = fn.enumerate_support(expand=False)
    return numpy(values.reshape(len(values))) if not fn.event_shape else np.arange(len(values))


def _stacked(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts, dim)


def _latent_dims(posterior: Posterior, series: SeriesByName, name: str, shape: tuple[int, ...]) -> Dims:
    """Of a latent's value: plates where it has a site of its own, which what a distribution hides may not have."""
    if name in series and not series[name].observed:
        return series_dims(series[name], series, shape)
    known = posterior.problem.capture.sites
    site = name if posterior.is_continuous(name) else posterior.site(name)
    if site not in known:
        return tuple(f"{name}_dim_{i}" for i in range(len(shape)))
    return plate_dims(name, known[site].plates, shape, known[site].fn.event_dim, posterior.latents)


def _log_likelihood(problem: Problem, series: SeriesByName, values: Tensor) -> xarray.Dataset:
    observed = [name for name, own in series.items() if own.observed]
    name = observed[0] if len(observed) == 1 else "log_likelihood"
    plates = {p.name: p.dim for site in problem.capture.sites.values() for p in site.plates}
    names = [problem.graph.plate_names[symbol] for symbol in problem.graph.data_plates]
    names.sort(key=lambda plate: plates[plate])
    dims = [f"{name}_dim_{i}" if plate in RESERVED else plate for i, plate in enumerate(names)]
    return dataset({name: ((*SAMPLE, *dims), numpy(values)[None])}, {"latents": "summed out"})


def _predictive(problem: Problem, series: SeriesByName, params: list[Params], num: int, seed: int) -> xarray.Dataset:
    """One data set a draw of the parameters, each with a seed of its own; where there is one draw only, all at that."""
    seeds = torch.randint(2**31 - 1, (num,), generator=torch.Generator().manual_seed(seed)).tolist()
    each = [predictive_draws(problem, params[i % len(params)], 1, own) for i, own in enumerate(seeds)]
    table = {}
    for name, own in series.items():
        if not own.observed:
            continue
        values = torch.cat([own.joined(draw, lead=1) for draw in each])
        table[name] = ((*SAMPLE, *series_dims(own, series, values.shape[1:])), numpy(values)[None])
    return dataset(table, coords=times(table, series))


def _parameter_dims(problem: Problem | None, name: str, shape: tuple[int, ...], names: Iterable[str]) -> Dims:
    site = None if problem is None else problem.capture.sites.get(name)
    if site is None:
        return tuple(f"{name}_dim_{i}" for i in range(len(shape)))
    return plate_dims(name, site.plates, shape, site.fn.event_dim, names)
