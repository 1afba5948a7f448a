"""Predictive draws: the model run forwards at given parameters, latents and data drawn anew.

`pyro.infer.Predictive` silently ignores values for `pyro.param` sites; here they are substituted.
"""

from __future__ import annotations

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_em.errors import InputError
from pyro_em.model.flat import is_flat
from pyro_em.model.folding import folds_of, unfolded
from pyro_em.model.trace import run_model
from pyro_em.problem import Problem
from pyro_em.store import isolated_rng
from pyro_em.types import Params


def predictive(problem: Problem, params: Params, num_samples: int, seed: int | None) -> Params:
    """Draws of every non-parameter site and `pyro.deterministic` value, shape (num_samples,) + the site's shape.

    The data given to the model fix the sizes of its plates; their values are not used.
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
    model = poutine.uncondition(unfolded(problem.model))
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
