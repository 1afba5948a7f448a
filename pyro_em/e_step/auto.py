"""Which engine runs the E-steps: a visible ordered tuple of strategies, the first that can.

A compiled engine works from recognised arguments without running the model, so it needs every moving
parameter to have a closed form. Whatever engine ran, `verified` recomputes the final log-likelihood through
the reference and fails loudly if the two differ.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_em.all_atoms import has_few_atoms, with_all_atoms
from pyro_em.e_step.adaptive import compile_adaptive
from pyro_em.e_step.assigned import Assigned
from pyro_em.e_step.base import Engine, NotCompiled
from pyro_em.e_step.grouped import compile_grouped
from pyro_em.e_step.inside import compile_inside
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.plated import Plated, compile_plated
from pyro_em.e_step.pooled import Pooled, compile_pooled
from pyro_em.e_step.pooled_groups import compile_states
from pyro_em.e_step.predicted import compile_predicted
from pyro_em.e_step.reference import reference_likelihood
from pyro_em.e_step.scanned import Scanned, compile_scanned
from pyro_em.e_step.timed_rows import TimedRows, compile_timed_rows
from pyro_em.errors import LostPrecision, NonFiniteError, PyroEMError
from pyro_em.evidence.integrated import has_states
from pyro_em.evidence.quadrature import QuadratureRoute
from pyro_em.loop import Iterate
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.choose import opened
from pyro_em.model.resources import predicted_bytes
from pyro_em.options import HARD
from pyro_em.problem import Problem
from pyro_em.sufficient import Sufficient
from pyro_em.types import Params

Compiler = Callable[[Problem], Engine]
COMPILERS: tuple[Compiler, ...] = (
    compile_plated,
    compile_scanned,
    compile_timed_rows,
    compile_grouped,
    compile_predicted,
)
MANY_STEPS = 8  # latents of one component, from which on they are taken for a loop's
LARGE = 2**26  # bytes of reference tables above which a compiled engine is spot-checked
AGREEMENT = 1e-9  # relative difference of a compiled and the reference log-likelihood


def chosen(problem: Problem, option: Any, algorithm: str, optim: Any = None) -> tuple[Problem, MStep, Engine]:
    """M-step and engine of an algorithm; with the problem at all of its atoms, if the engine is one that needs them.

    :raises Refusal, InputError, ResourceError: as `MStep`, or if the tables of the data at these atoms are too large.
    """
    pooled = None if algorithm in HARD else _pooled(problem)
    m_step = MStep(problem, option, algorithm, optim, None if pooled is None else pooled[1])
    if algorithm in HARD:
        return problem, m_step, Assigned(problem, "max" if algorithm == "cem" else "sample")
    engine = pooled[0] if pooled is not None and _serves(pooled[0], m_step) else choose_engine(problem, m_step)
    if isinstance(engine, Interpreted) and has_few_atoms(problem):
        problem = with_all_atoms(problem)
        m_step = MStep(problem, option, algorithm, optim)
        engine = choose_engine(problem, m_step)
    if isinstance(engine, Interpreted):
        m_step, engine = _stacked(problem, option, algorithm, m_step) or (m_step, engine)
    return problem, m_step, engine


def _stacked(problem: Problem, option: Any, algorithm: str, single: MStep) -> tuple[MStep, Engine] | None:
    """Sites that differ in their numbers alone (steps of a loop) evaluated as one: the M-step then works on groups
    instead of `single` sites. None if some argument is known by running the model alone."""
    if problem.continuous is not None or problem.graph.loops or not problem.recognised or single.is_iterated:
        return None
    try:
        engine = compile_grouped(problem)
        at_start = engine.unread(problem.start)
    except (NotCompiled, NonFiniteError):
        return None
    if not bool(at_start.totals.isfinite().all()):
        return None
    at_start.sufficient.posterior = at_start.posterior
    m_step = MStep(engine.stacked(), option, algorithm, statistics=at_start.sufficient)
    if m_step.is_iterated or m_step.reads.functions:
        return None
    m_step.single = single
    return m_step, engine


def _pooled(problem: Problem) -> tuple[Pooled, Sufficient] | None:
    """The engine of Gaussian latents, which does not depend on the M-step, and its statistics at the start: these know
    the design of the parameters, which would else be read off from the model once more."""
    if problem.continuous is None or problem.graph.symbol_sites:
        return None
    try:
        engine = Pooled(problem)
        return engine, opened(engine.at_start())
    except (NotCompiled, NonFiniteError, LinAlgError):
        return None


def _serves(engine: Pooled, m_step: MStep) -> bool:
    """Whether the engine of Gaussian latents gives what these updates read."""
    if m_step.is_iterated or not m_step.reads.located:
        return False
    try:
        engine.serve(m_step.reads.functions)
    except NotCompiled:
        return False
    return True


def choose_engine(problem: Problem, m_step: MStep) -> Engine:
    """The first compiled engine that accepts the problem, else the interpreter with the reasons."""
    if problem.continuous is not None:
        names = "; ".join(f"{r.name} latents" for r in problem.continuous.routes)
        if all(isinstance(route, QuadratureRoute) for route in problem.continuous.routes):
            try:
                return compile_adaptive(problem, m_step)
            except NotCompiled as error:
                return Interpreted(problem, f"{names}; {error}")
        if m_step.is_iterated or not m_step.reads.located:
            return Interpreted(problem, f"{names}; not all parameters are updated from moments")
        try:
            if problem.graph.symbol_sites:
                return compile_states(problem, m_step.reads.functions)
            return compile_pooled(problem, m_step.reads.functions)
        except NotCompiled as error:
            return Interpreted(problem, f"{names}; {error}")
    if any(has_states(site.fn) for site in problem.capture.sites.values()):
        with contextlib.suppress(NotCompiled):
            return compile_inside(problem)
    if not m_step.separate:
        if not m_step.is_iterated:
            functions = m_step.reads.functions
            if m_step.reads.compressed:
                with contextlib.suppress(NotCompiled):
                    return compile_plated(problem, functions)
            with contextlib.suppress(NotCompiled):
                return compile_predicted(problem, functions)
            with contextlib.suppress(NotCompiled):
                return compile_timed_rows(problem, functions)
        mixed = [n for n in m_step.free if any(use.index is None for use in problem.uses[n])]
        reason = f"'{(mixed or m_step.free)[0]}' has no closed form on sufficient statistics"
        return Interpreted(problem, reason + _written_otherwise(problem, m_step))
    reasons = []
    for compiler in COMPILERS:
        try:
            return compiler(problem)
        except NotCompiled as error:
            reasons.append(str(error))
    return Interpreted(problem, "; ".join(dict.fromkeys(reasons)))


def _written_otherwise(problem: Problem, m_step: MStep) -> str:
    """How to write a loop over time so that it is compiled, where Newton steps keep this one from it."""
    longest = max((len(component.symbols) for component in problem.graph.components), default=0)
    if m_step.numeric or m_step.gradient or problem.graph.loops or longest < MANY_STEPS:
        return ""
    return "; if these latents are the steps of a loop, write it as `for t in pyro_em.markov(T)`, which is compiled"


def in_double(engine: Engine, params: Params) -> Params:
    """Compiled engines iterate in float64 whatever the model's dtype: they do not run the model."""
    return params if isinstance(engine, Interpreted) else {n: v.double() for n, v in params.items()}


def verified(problem: Problem, engine: Engine, last: Iterate) -> tuple[float, float]:
    """log p(x|θ) and log p(θ) at the last iterate (in the model's dtype), checked against the reference path.

    Where the reference would need large tables a compiled engine is checked on its first rows instead.
    :raises PyroEMError: if the engine's log-likelihood was another. Of a model in float32 that is a warning: it may be
        the model whose digits cancel.
    """
    rounded = any(v.dtype != torch.float64 for v in last.params.values())
    expectation = engine.e_step(last.params) if rounded else last.expectation
    tolerance = 1e3 * torch.finfo(torch.float32).eps if rounded else AGREEMENT
    if isinstance(engine, Plated | Scanned | TimedRows) and predicted_bytes(problem.capture) > LARGE:
        found, reference = engine.spot_check(last.params)
        _compare(found, reference, tolerance * (1 + abs(reference)), rounded)
        return expectation.log_likelihood, expectation.log_prior
    reference, magnitude = reference_likelihood(problem, last.params)
    _compare(expectation.log_likelihood, reference, tolerance * (1 + magnitude), rounded)
    return expectation.log_likelihood, expectation.log_prior


def _compare(found: float, reference: float, allowed: float, single: bool) -> None:
    if abs(reference - found) <= allowed:
        return
    if single:
        warnings.warn(
            f"At the returned parameters the model, in float32, has log-likelihood {reference:.8g}; in float64 it is "
            f"{found:.8g}, and that is reported. Give the model float64 data and starting values.",
            LostPrecision,
            stacklevel=2,
        )
    else:
        raise PyroEMError(
            f"The compiled E-step found log-likelihood {found!r}, the reference {reference!r}. This is a defect of "
            "pyro_em worth a report."
        )
