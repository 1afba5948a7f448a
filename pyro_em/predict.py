"""Predictive draws: the model run forwards at given parameters, latents and data drawn anew.

`pyro.infer.Predictive` silently ignores values for `pyro.param` sites; here they are substituted.
"""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.hmm import HiddenMarkovModel
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.errors import InputError
from pyro_em.model.flat import is_flat
from pyro_em.model.folding import folds_of, unfolded
from pyro_em.model.trace import run_model
from pyro_em.problem import Problem
from pyro_em.store import isolated_rng
from pyro_em.types import Params


class _AsLong(Messenger):
    """Series drawn from one site (`DiscreteHMM`, `GaussianHMM`, ...) are as long as those observed.

    Given no `duration`, such a distribution has a density of series of any length and cannot be drawn from.
    """

    def _pyro_sample(self, msg: Any) -> None:
        fn, seen = msg["fn"], msg["infer"].get("obs")
        if isinstance(seen, Tensor) and getattr(fn, "duration", 0) is None:
            msg["fn"] = _of_length(fn, seen.shape[seen.dim() - fn.event_dim])


def _of_length(fn: Any, steps: int) -> Any:
    if isinstance(fn, dist.IndependentHMM):
        return dist.IndependentHMM(_of_length(fn.base_dist, steps))
    made = copy.copy(fn)
    HiddenMarkovModel.__init__(made, steps, fn.batch_shape, fn.event_shape, validate_args=False)
    return made


def predictive(problem: Problem, params: Params, num_samples: int, seed: int | None) -> Params:
    """Draws of every non-parameter site and `pyro.deterministic` value, shape (num_samples,) + the site's shape.

    The data given to the model fix the sizes of its plates and the lengths of its series; their values are not used,
    but where the model reads them itself, as an autoregression reads x[t - 1].
    :raises InputError: if `num_samples` is not positive, or a latent's prior is flat.
    """
    if num_samples < 1:
        raise InputError(f"predictive: num_samples must be at least 1, not {num_samples}.")
    latents = () if problem.continuous is None else problem.continuous.names
    flat = [f"prior of '{name}'" for name in latents if is_flat(problem.capture.sites[name].fn)]
    flat += [f"start of the chain of '{next(iter(fold.places))}'" for fold in folds_of(problem.model) if fold.flat]
    if flat:
        raise InputError(
            f"predictive: nothing can be drawn from the flat (improper) {flat[0]}. Its posterior can: "
            "result.posterior().sample(num)."
        )
    draws: dict[str, list[Tensor]] = {}
    model = _AsLong()(poutine.uncondition(unfolded(problem.model)))
    with isolated_rng(seed), torch.no_grad(), pyro.validation_enabled(False):
        for _ in range(num_samples):
            run = run_model(
                model,
                problem.args,
                problem.kwargs,
                params,
                max_plate_nesting=problem.capture.max_plate_nesting,
                enumerated=False,
            )
            drawn = {name: site.value for name, site in run.sites.items() if name not in params}
            for name, value in {**drawn, **run.notes}.items():
                draws.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in draws.items()}
