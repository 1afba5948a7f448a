"""`fit` and `plan`: one model, its inference swapped by a flag."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

from torch import Tensor

from pyro_em import checks
from pyro_em.accelerate import choose_accelerator
from pyro_em.anneal import Temperature, annealed, check_temperature, stochastic, temperatures
from pyro_em.binding import Bound, bound_for
from pyro_em.device import on_device
from pyro_em.e_step.auto import chosen, in_double, verified
from pyro_em.e_step.base import Engine, Expectation
from pyro_em.e_step.expansion import expansion_of
from pyro_em.e_step.vanishing import WithSpreads
from pyro_em.errors import EMWarning
from pyro_em.evaluator import Evaluator
from pyro_em.explain import explain
from pyro_em.initialise import initial_starts
from pyro_em.integration import adaptive_routes, numerical_error
from pyro_em.loop import Callback, EMMap, Ended, History, Steps, drive, run_from
from pyro_em.m_step.auto import MStep
from pyro_em.model.missing import complete_cases
from pyro_em.model.plan import Plan
from pyro_em.options import HARD, check_algorithm, check_given, check_restarts, checked_rules, refuse_with
from pyro_em.precision import check_precision, rough_first, worthwhile
from pyro_em.problem import Problem
from pyro_em.progress import progress_bar
from pyro_em.result import FitResult, count_parameters
from pyro_em.stop import Outcome, StoppingRule
from pyro_em.store import isolated_rng, write_params
from pyro_em.types import Model, Params


def fit(
    model: Model,
    *args: Any,
    algorithm: str = "em",
    guide: Model | None = None,
    roles: Mapping[str, str] | None = None,
    init: Mapping[str, Any] | str | None = None,
    restarts: int = 1,
    seed: int | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    accelerate: str | None = None,
    temperature: Temperature | None = None,
    e_step: Any = "auto",
    m_step: Any = "auto",
    missing: str | None = None,
    precision: str = "float64",
    weights: Mapping[str, Tensor] | None = None,
    optim: Any = None,
    num_particles: int = 1,
    callbacks: Iterable[Callback] = (),
    progress: bool | None = None,
    **kwargs: Any,
) -> FitResult:
    """Fit a Pyro model by EM (Dempster, Laird and Rubin 1977), MAP-EM, generalised EM or SVI.

    `args` and `kwargs` go to the model and guide, as in `SVI.step`; options below shadow arguments of the same name.
    Tensors among them of half precision are promoted to torch's default dtype, and no gradients are followed into them.
    The fitted values are written to Pyro's param store. On an error or Ctrl-C the caller's store and random state are
    as before. Calls from several threads take turns; inside of a model that is running a call is refused.

    :param model: any Pyro model. Discrete latents are enumerated without being marked.
    :param algorithm: "em" (exact posterior, M-step in closed form where there is one), "map-em" (the same,
        plus log-priors of the parameter sites), "gem" (gradient M-step), "svi" (Pyro's own SVI), "cem"
        (classification EM: the most probable states take the place of the posterior, as in k-means; climbs
        log p(x,z|θ) at these, and `elbo` is its value), "sem" (stochastic EM: a posterior draw of the states takes its
        place; `max_iter` updates are made whatever `tol`, and the average of the last half is returned). Under
        "cem" and "sem" `log_likelihood` is the exact one of the returned parameters, and priors do not count.
    :param guide: Pyro guide. Under the exact algorithms its Delta sites are point estimates.
    :param roles: `{"site": "parameter" | "latent"}`, overriding what `plan` shows.
    :param init: starting values by name (constrained), or "model", "random", "kmeans++". The `params` of a result, of
        another process too (`load`), go on from there, as far as the algorithm has no memory of its own.
    :param restarts: number of starts; the best is returned, all are in `result.restarts`. The first is `init` (or the
        model's own values), the others are drawn. Where the engine can, all go through the data together.
    :param seed: makes the fit reproducible bit for bit.
    :param max_iter: most parameter updates; with `tol=0` exactly that many are performed. An accelerated
        update is one accepted extrapolation, which costs several EM maps (`history["num_e_steps"]`).
    :param tol: converged when max|∂ objective/∂u| / N <= tol (u: free coordinates, N: data elements).
    :param accelerate: None, "squarem" or "anderson": extrapolate the EM map (of factor models: that of PX-EM). The
        objective still never falls, as an update that lowers it is replaced by a plain one. Worth it where EM creeps.
    :param temperature: deterministic annealing for "em", "map-em" and "gem": E-steps with q ∝ p(z|x)^(1/T) until the
        schedule ends, then ordinary EM. A first temperature T0 (T = 1 + (T0 - 1)·0.9^k until it is within 0.01 of
        1), a sequence of temperatures, or a function of the iteration, which ends the schedule by returning 1.
    :param e_step: "auto" (exact, or refused), or `{"site": pyro_em.Quadrature(num_nodes=21)}` for continuous latents of
        few dimensions whose posterior is not Gaussian: integrated by adaptive quadrature, with an error estimate.
    :param missing: "nan": NaN cells of observed sites are missing at random and integrated out exactly: single
        cells of univariate sites (also inside of `.to_event`), any cells of MultivariateNormal vectors, whole events
        of all other families (some cells of these are refused). A row without data adds 0 to the log-likelihood and
        does not count in the M-step. None: NaN is an error, and missing data are declared by `pyro.poutine.mask`
        around their site or by Pyro's `obs_mask`. `result.impute()` gives the missing values' posterior.
    :param precision: "float64", or "mixed": E-steps over many rows by products in float32 as far as they carry, then in
        float64, which alone decides on convergence and gives the result.
    :param m_step: "auto", "closed", "gradient", or a dict of these (or "fixed") by parameter.
    :param weights: `{"plate": (N,) tensor}`: multiply the log-evidence of the plate's elements.
    :param optim: for "svi" a Pyro or torch optimiser; for "gem" a function from parameters to a torch optimiser.
    :param num_particles: Monte Carlo samples per step under "svi".
    :param callbacks: called with a `Step` after each E-step; returning True stops the fit.
    :param progress: a progress bar; by default if the terminal can show one.
    :raises InputError: for data, starts or options that cannot be used.
    :raises Refusal: for structure that is not exactly tractable, naming site, reason and remedy.
    :raises DegenerateLikelihoodError: if every start collapses; `.result` holds the last finite iterate.
    :raises NonFiniteError: for a log-density that is NaN or infinite; ResourceError: for tables that would not fit;
        MonotonicityError: for an exact step that lowers the objective.

    Example::

        >>> import pyro, pyro_em, torch
        >>> import pyro.distributions as dist
        >>> from torch.distributions import constraints
        >>> def model(x):
        ...     w = pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)
        ...     loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        ...     sd = pyro.param("sd", torch.ones(2), constraint=constraints.positive)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(w))
        ...         pyro.sample("x", dist.Normal(loc[z], sd[z]), obs=x)
        >>> x = torch.tensor([-2.1, -1.9, -2.4, 0.9, 1.2, 1.4])
        >>> result = pyro_em.fit(model, x, algorithm="em")
        >>> result.params["loc"]
        tensor([-2.1333,  1.1667])
        >>> print(result.outcome)
        Converged: the score per observation is below tol.
    """
    check_algorithm(algorithm)
    check_given(model, weights, seed, callbacks)
    check_restarts(restarts)
    rules = checked_rules(e_step)
    model = complete_cases(model, missing)
    accelerator = choose_accelerator(accelerate)
    check_precision(precision)
    check_temperature(temperature)
    mixed = precision if precision == "mixed" else None
    if algorithm in HARD:
        refuse_with(algorithm, accelerate=accelerate, temperature=temperature, precision=mixed)
    StoppingRule(max_iter, tol)  # checks them
    if algorithm == "svi":
        from pyro_em.svi import fit_svi

        other = None if m_step == "auto" else m_step
        given = {"weights": weights, "m_step": other, "accelerate": accelerate, "temperature": temperature}
        refuse_with(algorithm, **given, e_step=rules or None, precision=mixed)
        return fit_svi(
            model, args, kwargs, guide=guide, init=init, restarts=restarts, seed=seed, max_iter=max_iter,
            optim=optim, num_particles=num_particles, callbacks=callbacks, progress=progress, roles=roles,
            missing=missing,
        )  # fmt: skip
    with on_device(args, kwargs), isolated_rng(seed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EMWarning)
        bound = bound_for(model, args, kwargs, algorithm, guide, roles, weights, rules, temperature is not None)
        numerical_error(bound.problem, bound.problem.start)
        checks.unobserved_cells(bound.problem)
        unseen = checks.unseen_categories(bound.problem)
        problem, m, engine = chosen(bound.problem, m_step, algorithm, optim)
        checks.collinear(m.collinear)
        m.expansion = expansion_of(engine, m) if accelerator and temperature is None else None
        rough = mixed is not None and worthwhile(engine)
        starts = list(initial_starts(problem, m, init, restarts, seed))
        if len(starts) == 1:  # one of several may be a saddle; the others are drawn
            checks.at_start(problem, starts[0])
        together = len(starts) > 1 and hasattr(engine, "core")
        evaluator = Evaluator(engine, m, len(starts) if together else 1, len(starts))
        with progress_bar(progress, algorithm, max_iter) as tick:
            shown = (*callbacks, *tick)

            def begin(i: int, start: Params) -> Steps[Ended]:
                em = EMMap(problem, m)
                if algorithm == "sem":
                    return stochastic(em, start, max_iter, shown, i)

                def run(
                    params: Params, history: History | None = None, iteration: int = 0, least: float = 0.0
                ) -> Steps[Ended]:
                    rule, params = StoppingRule(max_iter, max(tol, least)), in_double(engine, params)
                    return run_from(em, params, rule, shown, accelerator, i, history, iteration)

                go_on = rough_first(em, run) if rough else run
                if temperature is None:
                    return go_on(start)
                return annealed(em, start, temperatures(temperature), max_iter, shown, i, go_on)

            going = [begin(i, start) for i, start in enumerate(starts)]
            runs = drive(evaluator, going, together)
        errors = [r.error for r in runs if r.error is not None and r.outcome is not Outcome.degenerate]
        alive = [r for r in runs if r.outcome is not Outcome.degenerate]
        best = max(alive or runs, key=lambda r: r.last.objective)
        checks.after_fit(problem, best)
        near = problem.continuous is not None or best.outcome in (Outcome.converged, Outcome.stalled)
        if isinstance(engine, WithSpreads) and alive and near and not problem.with_prior:
            checks.at_zero(engine.vanishing(best.last.params))
        if alive and not errors and m.reads.by_newton:
            last = best.last.expectation
            checks.separated(m.diverging(best.last.params, last if isinstance(last, Expectation) else last.expectation))
            checks.at_edges(m.at_edge(best.last.params), best.outcome is Outcome.stalled, unseen)
        result = _result(bound, problem, engine, m, best, runs, algorithm, seed, missing, temperature is not None)
        result.warnings = tuple(str(w.message) for w in caught)  # with those of the check of the returned parameters
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if errors or not alive:
        error = errors[0] if errors else best.error
        assert error is not None
        error.result = result  # type: ignore[attr-defined]
        raise error
    write_params(problem.parameters, result.params, problem.modules())
    return result


def plan(
    model: Model,
    *args: Any,
    algorithm: str = "em",
    guide: Model | None = None,
    roles: Mapping[str, str] | None = None,
    e_step: Any = "auto",
    m_step: Any = "auto",
    missing: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    temperature: Temperature | None = None,
    **kwargs: Any,
) -> Plan:
    """What `fit` would do with the same arguments, without doing it. Print it.

    Options of `fit` that say how far or from where to climb (`init`, `max_iter`, ...) change nothing here.

    :raises Refusal, InputError, ResourceError: as `fit` would.

    Example, with the model of `fit`::

        >>> plan = pyro_em.plan(model, x)
        >>> plan.exact, plan.route("z"), plan.route("loc")
        (True, 'enumerate', 'closed')
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in signature(fit).parameters}
    check_algorithm(algorithm)
    check_given(model, weights)
    rules = checked_rules(e_step)
    model = complete_cases(model, missing)
    check_temperature(temperature)
    if algorithm == "svi":
        from pyro_em.svi import plan_svi

        return plan_svi(model, args, kwargs, guide=guide, roles=roles)
    with on_device(args, kwargs), isolated_rng(0):
        bound = bound_for(model, args, kwargs, algorithm, guide, roles, weights, rules, temperature is not None)
        notes = (*bound.notes, *numerical_error(bound.problem, bound.problem.start).notes)
        return explain(*chosen(bound.problem, m_step, algorithm), algorithm, temperature is not None, notes)


def _result(
    bound: Bound,
    problem: Problem,
    engine: Engine,
    m: MStep,
    best: Ended,
    runs: list[Ended],
    algorithm: str,
    seed: int | None,
    missing: str | None,
    annealed: bool,
) -> FitResult:
    params = {n: v.detach().to(problem.parameters[n].value.dtype).clone() for n, v in best.last.params.items()}
    known = best.last.expectation
    log_likelihood, log_prior = known.log_likelihood, known.log_prior
    compared = best.error is None  # an error says more than a comparison where digits are gone
    if compared:
        for route in adaptive_routes(problem):
            route.due = True
        log_likelihood, log_prior = verified(problem, engine, dataclasses.replace(best.last, at=params))
    integrated = numerical_error(problem, params, compared)
    return FitResult(
        algorithm=algorithm,
        params=params,
        log_likelihood=log_likelihood,
        log_posterior=log_likelihood + log_prior if problem.with_prior else None,
        elbo=best.last.objective if algorithm == "cem" else log_likelihood,
        exact=algorithm not in HARD,
        outcome=best.outcome,
        num_iterations=best.last.iteration,
        history=best.history.as_dict(),
        plan=explain(problem, m, engine, algorithm, annealed, (*bound.notes, *integrated.notes)),
        restarts=tuple((run.last.objective, run.outcome.name) for run in runs),
        seed=seed,
        missing=missing,
        rules=dict(problem.rules),
        num_observations=bound.num_observations,
        num_parameters=count_parameters(problem, m.free, params),
        integration_error=integrated.size,
        problem=bound.result_problem,
        constraints={name: record.constraint for name, record in problem.parameters.items()},
        free=m.free,
    )
