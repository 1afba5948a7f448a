"""`algorithm="svi"`: Pyro's own SVI behind the flag, with the same result as the exact algorithms.

    maximise over θ and φ   ELBO(q_φ, θ) = E_q[log p(x, z, θ̂) − log q_φ(z)]

θ are the model's parameters, φ the guide's; see guides.py for what the guide holds and which loss follows.
Point estimates θ̂ (Delta sites) bring their log-prior into the objective, as under "map-em". The result's
`elbo` leaves log p(θ̂) out again, so that it bounds log p(x|params) and the gap is KL[q ‖ p(z|x, params)].

Where nothing but point estimates is to be set, the starting values are those of the exact algorithms, so that
a swap of the flag compares like with like. Not done here: minibatches over several calls, a search for the
learning rate, a test of convergence.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pyro_em.ascent import Ascent, Run, optimiser, publish
from pyro_em.charts import free_dimension
from pyro_em.checks import at_start
from pyro_em.device import on_device
from pyro_em.errors import EMWarning, InputError, Refusal, ResourceError
from pyro_em.guides import Split, split_sites
from pyro_em.initialise import initial_starts
from pyro_em.loop import Callback
from pyro_em.m_step.auto import MStep
from pyro_em.model.compat import base_distribution
from pyro_em.model.counting import num_rows
from pyro_em.model.data import as_data
from pyro_em.model.graph import independent_plates
from pyro_em.model.plan import Plan, Row
from pyro_em.model.resources import predicted_bytes
from pyro_em.options import checked_init
from pyro_em.problem import Problem, bind
from pyro_em.progress import progress_bar
from pyro_em.result import FitResult
from pyro_em.store import isolated_rng
from pyro_em.types import Model, Params


def fit_svi(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    guide: Model | None,
    init: Mapping[str, Any] | str | None,
    restarts: int,
    seed: int | None,
    max_iter: int,
    optim: Any,
    num_particles: int,
    callbacks: Iterable[Callback],
    progress: bool | None,
    roles: Mapping[str, str] | None,
    missing: str | None = None,
) -> FitResult:
    """`max_iter` steps of SVI from each start; the start with the best final ELBO is returned.

    The reported ELBO is one evaluation where the guide has no noise (two agree to the last bit), otherwise
    the mean of `FINAL_DRAWS` (100) evaluations of `num_particles` draws each. `history["objective"][i]` is
    the noisy estimate with which step i+1 was made, the last entry the reported one; both include log p(θ̂).
    A callback sees the parameters after a step beside the estimate made before it.

    :raises NonFiniteError: if the loss is not finite; param store and modules are as before the fit.
    """
    if not isinstance(num_particles, int) or isinstance(num_particles, bool) or num_particles < 1:
        raise InputError(f"num_particles must be a positive integer, not {num_particles!r}.")
    make_optim, callbacks = optimiser(optim), tuple(callbacks)
    args, kwargs = as_data(args), as_data(kwargs)
    with on_device(args, kwargs), isolated_rng(seed):
        split = split_sites(model, args, kwargs, guide, roles)
        problem = _bind(split, args, kwargs, roles)
        m_step = None if problem is None else MStep(problem, "auto", "map-em" if split.points else "em")
        seeds = np.random.randint(2**31 - 1, size=restarts).tolist()
        starts = list(_starts(split, problem, m_step, init, restarts, seed))
        messages = () if problem is None else _warnings_at_start(problem, starts[0])
        runs: list[Run] = []
        with progress_bar(progress, "svi", max_iter) as tick:
            for start, own_seed in zip(starts, seeds, strict=True):
                with isolated_rng(own_seed):
                    ascent = Ascent(split, args, kwargs, start, make_optim(), num_particles)
                    runs.append(ascent.run(max_iter, callbacks, tick))
        best = max(runs, key=lambda run: run.objective)
        log_likelihood = log_posterior = None
        if problem is not None:
            evidence, _ = problem.evidence({n: best.params[n] for n in problem.parameters})
            log_likelihood = float(evidence.log_likelihood)
            log_posterior = log_likelihood + best.log_prior if split.points else None
            best.history.log_likelihood[-1] = log_likelihood
    publish(best)
    records = split.records if problem is None else problem.parameters
    free = (*split.capture.parameters, *split.points) if m_step is None else m_step.free
    return FitResult(
        algorithm="svi",
        params=best.params,
        log_likelihood=log_likelihood,
        log_posterior=log_posterior,
        elbo=best.objective - best.log_prior,
        exact=False,
        outcome=best.outcome,
        num_iterations=best.num_iterations,
        history=best.history.as_dict(),
        plan=_explain(split),
        warnings=messages,
        restarts=tuple((run.objective, run.outcome.name) for run in runs),
        seed=seed,
        missing=missing,
        num_observations=_num_observations(split) if problem is None else num_rows(problem.graph, problem.capture),
        num_parameters=sum(free_dimension(records[n].constraint, best.params[n]) for n in free),
        problem=problem,
        free=free,
    )


def plan_svi(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    guide: Model | None,
    roles: Mapping[str, str] | None,
) -> Plan:
    """What `fit_svi` would do. Raises as it would before its first step."""
    with isolated_rng(0):
        split = split_sites(model, args, kwargs, guide, roles)
        _bind(split, args, kwargs, roles)
        return _explain(split)


def _bind(
    split: Split, args: tuple[Any, ...], kwargs: dict[str, Any], roles: Mapping[str, str] | None
) -> Problem | None:
    """The exact problem at the point estimates; None where log p(x|params) cannot be had.

    :raises Refusal, ResourceError: if latents are summed out that cannot be (SVI would sum the same tables).
    """
    if not split.discrete_only:
        return None
    try:
        told = {**(roles or {}), **dict.fromkeys(split.points, "parameter")}
        return bind(split.model, args, kwargs, with_prior=bool(split.points), roles=told)
    except (Refusal, ResourceError):
        if split.enumerated:
            raise
        return None


def _starts(
    split: Split,
    problem: Problem | None,
    m_step: MStep | None,
    init: Mapping[str, Any] | str | None,
    restarts: int,
    seed: int | None,
) -> Iterator[Params]:
    """Those of the exact algorithms where there is nothing but parameters to set; else the values given."""
    if problem is not None and m_step is not None and split.guide is None:
        yield from initial_starts(problem, m_step, init, restarts, seed)
        return
    if isinstance(init, str):
        raise InputError(
            f"init: '{init}' needs a model whose latents are all summed out, and no guide. Use a dict of values."
        )
    yield {} if init is None else _given(split, init)
    yield from ({} for _ in range(restarts - 1))


def _given(split: Split, init: Mapping[str, Any]) -> Params:
    """The values given, checked; all others begin where the model, or the automatic guide, puts them."""
    checked = checked_init(split.records, init)
    return {name: checked[name] for name in init}


def _warnings_at_start(problem: Problem, start: Params) -> tuple[str, ...]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EMWarning)
        at_start(problem, start)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return tuple(str(warning.message) for warning in caught)


def _num_observations(split: Split) -> int:
    """Elements of the plates that all data share, as `FactorGraph.num_observations` counts them."""
    sites = [site for site in split.capture.sites.values() if site.observed]
    size = {plate.name: plate.size for site in sites for plate in site.plates}
    roots = [frozenset(plate.name for plate in site.plates) for site in sites]
    return sum(math.prod(size[name] for name in plates) for plates in independent_plates(roots))


def _explain(split: Split) -> Plan:
    e_rows, notes = [], []
    for name, role in split.roles.items():
        site = split.capture.sites[name]
        family = type(base_distribution(site.fn)).__name__
        if role.role == "data":
            e_rows.append(Row(name, "data", "observed", family))
        elif name in split.enumerated:
            e_rows.append(Row(name, "latent", "enumerate", f"{family}, {site.num_states} states"))
        elif name in split.guided:
            held = split.guide_sites[name].family if split.guide else "AutoNormal"
            e_rows.append(Row(name, "latent", "guide", f"{family}; q is {held}; {role.reason}"))
            if split.guide is None and role.override:
                notes.append(f"'{name}' is taken as latent ({role.reason}); {role.override}.")
        else:
            notes.append(f"'{name}' is a parameter ({role.reason}); its prior counts.")
    kinds = {"param": "pyro.param", "module": "module", "sample": "pyro.sample"}
    own = {*split.capture.parameters, *split.points}
    m_rows = [
        Row(name, kinds[record.kind], "gradient", "SVI step" if name in own else "SVI step, of the guide")
        for name, record in split.records.items()
        if name not in split.guided
    ]
    if not split.guided:
        notes.append("All latents are summed out given the parameters: the bound is tight (gap 0).")
    loss = type(split.loss(1)).__name__
    return Plan(
        algorithm="svi",
        exact=False,
        objective="the ELBO" + (" + log p(θ)" if split.points else ""),
        e_step=tuple(e_rows),
        m_step=tuple(m_rows),
        predicted_bytes=predicted_bytes(split.capture) if split.enumerated else 0,
        notes=(f"Guide: {split.automatic}; loss {loss}.", *notes),
    )
