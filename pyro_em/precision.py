"""Mixed precision: EM by products in float32 as far as they carry, then EM in float64 to the end.

In the rough part the two matrix products of an E-step (e_step/product.py) and the softmax between them are in float32;
sums over chunks, statistics, M-step and factorisations stay in float64, and the data are centred. Its error in the
log-likelihood is about eps32·Σ|ll_n|, the part of the objective that it cannot see. It ends when the score per
observation is below `ROUGH`, when nothing rises any more, or when anything goes wrong, and float64 takes over from the
last parameters. What is returned, and what is judged, is float64's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from pyro_em.e_step.base import Engine
from pyro_em.e_step.plated import Plated
from pyro_em.errors import InputError, PyroEMError
from pyro_em.loop import EMMap, Ended, History, Steps, record
from pyro_em.stop import Outcome
from pyro_em.types import Params

Run = Callable[..., Steps[Ended]]  # from parameters, with the history and iteration so far, to a score >= `least`
PRECISIONS = ("float64", "mixed")
ROUGH = 1e-6  # the score per observation that sums of float32 products still show


def check_precision(precision: str) -> None:
    """Raise `InputError` for a name that is none."""
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}.")


def worthwhile(engine: Engine) -> bool:
    """Whether the rows are so many that products are what an update costs.

    :raises InputError: for an engine whose E-step is no product.
    """
    if not isinstance(engine, Plated):
        raise InputError(
            "precision='mixed' is for E-steps that are matrix products on sufficient statistics. Those of this model "
            f"run {engine.name} ({engine.reason}): leave it out."
        )
    return not engine.compact


def rough_first(em: EMMap, run: Run) -> Run:
    """A run whose first part has rough E-steps. The first record of float64 replaces the last rough one."""

    def go_on(params: Params, history: History | None = None, iteration: int = 0, least: float = 0.0) -> Steps[Ended]:
        em.rough = True
        ended = yield from run(params, history, iteration, max(least, ROUGH))
        em.rough = False
        for values in vars(ended.history).values():
            if values:
                values.pop()
        if ended.outcome is not Outcome.interrupted or isinstance(ended.error, PyroEMError):
            return (yield from run(ended.last.params, ended.history, ended.last.iteration, least))
        last = yield from em.at(ended.last.params, ended.last.iteration)  # a callback or Ctrl-C said stop
        score = em.score(last) / em.problem.graph.num_observations
        record(ended.history, last, score, em.num_e_steps, time.perf_counter())
        return dataclasses.replace(ended, last=last)

    return go_on
