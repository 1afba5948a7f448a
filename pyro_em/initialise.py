"""Starting values by name: responsibilities are drawn, and one M-step turns them into parameters.

So a start is in the data's own units for every family, and respects ties, fixed parts and priors.

    "model"     the initial values that the model gives its pyro.param statements
    "random"    random responsibilities for every latent (exponential weights)
    "kmeans++"  k-means with k-means++ seeding on the data of the sites that each latent explains
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.charts import chart
from pyro_em.clusters import Clustering, features, num_states, own_dims, varied
from pyro_em.e_step.interpreted import expectation, unread
from pyro_em.errors import DegenerateLikelihoodError, InputError
from pyro_em.evidence.discrete import evaluate
from pyro_em.m_step.auto import MStep
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.trace import Run
from pyro_em.model.unusable import check_spaces
from pyro_em.options import checked_init
from pyro_em.problem import Problem
from pyro_em.types import Params

TRIES = 20
MARGIN = 1e-6  # of an interval: closer to its end, a start is on it
JITTER = 0.5  # of a start of a model with continuous latents, in free coordinates
STRATEGIES = ("model", "random", "kmeans++")


def initial_starts(
    problem: Problem, m: MStep, init: Mapping[str, Any] | str | None, restarts: int, seed: int | None
) -> Iterator[Params]:
    """Starting values of every restart: `init` (or the model's own) first, the others drawn from `seed`.

    A model whose parameters are sample sites has no starting values of its own; its first start is drawn too.

    :raises InputError: for an unknown strategy, "kmeans++" where some latent has no data of its own, or a start at
        which a site beside continuous latents has no density.
    """
    rng = np.random.default_rng(seed if seed is not None else np.random.randint(2**31 - 1))
    drawing = Drawing(problem, m)
    if isinstance(init, str):
        strategy = init
    elif init is not None:
        strategy = drawing.default if restarts > 1 else "model"
        given = checked_init(problem.parameters, init)
        if problem.continuous is not None:  # whose certificate would say of a scale of 0 that the model is not Gaussian
            check_spaces(problem.run(given))
        yield given
    else:
        sampled = any(record.kind == "sample" for record in problem.parameters.values())
        strategy = drawing.default if sampled or restarts > 1 else "model"  # it looks at all data
        yield drawing(strategy if sampled else "model", rng)
    for _ in range(restarts if isinstance(init, str) else restarts - 1):
        yield drawing(strategy, rng)


class Drawing:
    """Draws parameters by a named strategy. What draws have in common is found once, when the first one needs it."""

    def __init__(self, problem: Problem, m_step: MStep) -> None:
        self.problem, self.m_step = problem, m_step
        self._centers: dict[str, Tensor | None] = {}

    def __call__(self, strategy: str, rng: np.random.Generator) -> Params:
        """One draw."""
        if strategy not in STRATEGIES:
            raise InputError(f"init: '{strategy}' is no strategy. Use {', '.join(map(repr, STRATEGIES))}, or a dict.")
        if strategy == "model":
            return self.problem.start
        last: DegenerateLikelihoodError | None = None
        for _ in range(TRIES):
            try:
                if self.problem.continuous is not None:
                    return _with_continuous(self.problem, self.m_step, rng)
                made = self.clustering(rng) if strategy == "kmeans++" else _random(self.problem, self.run, rng)
                return self._from_potentials(made)
            except DegenerateLikelihoodError as error:
                last = error  # an unlucky draw put one component on a single point
        assert last is not None
        raise last

    @cached_property
    def run(self) -> Run:
        """The model at its start."""
        return self.problem.first

    @cached_property
    def default(self) -> str:
        """k-means++ where every latent explains numeric data of its own, otherwise random."""
        problem, run = self.problem, self.run
        return (
            "kmeans++" if all(features(problem, run, site) is not None for site in varied(problem, run)) else "random"
        )

    @cached_property
    def clustering(self) -> Clustering:
        """Of the latents' data."""
        return Clustering(self.problem, self.run)

    @cached_property
    def _neutral(self) -> dict[str, Tensor]:
        """Log-factors that say nothing but where structural zeros are."""
        with torch.no_grad():
            factors = self.problem.factors(self.run)
        return {
            name: with_dims(torch.where(factor == -torch.inf, factor, torch.zeros_like(factor)), dims_of(factor))
            for name, factor in factors.items()
        }

    def _from_potentials(self, made: Mapping[str, Tensor]) -> Params:
        """One M-step from the posterior under made-up log-factors instead of the data's."""
        problem, start, fake = self.problem, self.problem.start, dict(self._neutral)
        for name, own in made.items():
            dims, shape = dims_of(fake[name]), fake[name].shape
            order = [dims_of(own).index(d) for d in dims if d in dims_of(own)]
            sizes = [s if d in dims_of(own) else 1 for d, s in zip(dims, shape, strict=True)]
            fake[name] = with_dims(fake[name] + own.permute(order).reshape(sizes), dims)
        evidence = evaluate(problem.graph, fake)
        if not bool(torch.isfinite(evidence.log_likelihood)):
            evidence, _ = problem.evidence(start)
        params, _ = self.m_step.update(start, unread(problem, self.run, evidence, self._centers).read())
        return _off_bounds(problem, params)


def _off_bounds(problem: Problem, params: Params) -> Params:
    """Entries that one M-step put on an end of their interval, from which the score cannot see, as they were before."""
    moved = dict(params)
    for name, value in params.items():
        constraint = problem.parameters[name].constraint
        low, high = (getattr(constraint, bound, None) for bound in ("lower_bound", "upper_bound"))
        if low is not None and high is not None and problem.parameters[name].kind == "sample":
            margin = MARGIN * (high - low)
            ended = (value < low + margin) | (value > high - margin)
            moved[name] = torch.where(ended, problem.start[name].to(value), value)
    return moved


def _with_continuous(problem: Problem, m_step: MStep, rng: np.random.Generator) -> Params:
    """One M-step from the posterior at the model's start, its free coordinates moved unless k-means made it.

    Continuous latents have no responsibilities to draw; what tells starts apart is where their parameters stand.
    """
    start = dict(problem.start)
    for name in m_step.free:
        own = chart(problem.parameters[name].constraint, start[name])
        u = own.to_free(start[name])
        noise = torch.as_tensor(rng.normal(size=tuple(u.shape))).to(u)
        start[name] = own.from_free(u + JITTER * (1 + u.abs()) * noise).to(start[name].dtype).detach()
    evidence, run = problem.evidence(start)
    params, _ = m_step.update(start, expectation(problem, run, evidence))
    return _off_bounds(problem, params)


def _random(problem: Problem, run: Run, rng: np.random.Generator) -> dict[str, Tensor]:
    made = {}
    for name in problem.graph.latents:
        dims = own_dims(problem, run, name)
        shape = [problem.graph.plate_sizes.get(d, num_states(run, name)) for d in dims]
        draws = torch.as_tensor(rng.exponential(size=shape)).to(torch.get_default_dtype())
        made[name] = with_dims(draws.clamp(min=1e-12).log(), dims)
    return made
