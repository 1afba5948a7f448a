"""Starting values by name: responsibilities are drawn, and one M-step turns them into parameters.

So a start is in the data's own units for every family, and respects ties, fixed parts and priors.

    "model"     the initial values that the model gives its pyro.param statements
    "random"    random responsibilities for every latent (exponential weights)
    "kmeans++"  k-means with k-means++ seeding on the data of the sites that each latent explains
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import ClusterError, kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_em.charts import chart
from pyro_em.e_step.interpreted import expectation
from pyro_em.errors import DegenerateLikelihoodError, InputError
from pyro_em.evidence.discrete import evaluate
from pyro_em.m_step.auto import MStep
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.density import clean_value, log_density, packed_log_density
from pyro_em.model.packing import align
from pyro_em.model.trace import Run
from pyro_em.options import checked_init
from pyro_em.problem import Problem
from pyro_em.types import Params

SOFTEN = 0.9  # share of each row that k-means assigns to its own cluster
TRIES = 20
MARGIN = 1e-6  # of an interval: closer to its end, a start is on it
JITTER = 0.5  # of a start of a model with continuous latents, in free coordinates


def initial_params(problem: Problem, m_step: MStep, strategy: str, rng: np.random.Generator) -> Params:
    """Parameters drawn by a named strategy.

    :raises InputError: for an unknown name, or "kmeans++" where some latent has no data of its own.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"init: '{strategy}' is no strategy. Use {', '.join(map(repr, STRATEGIES))}, or a dict.")
    if strategy == "model":
        return problem.start
    potentials = STRATEGIES[strategy]
    last: DegenerateLikelihoodError | None = None
    for _ in range(TRIES):
        try:
            make = _from_potentials if problem.continuous is None else _with_continuous
            return make(problem, m_step, potentials, rng)
        except DegenerateLikelihoodError as error:
            last = error  # an unlucky draw put one component on a single point
    assert last is not None
    raise last


def initial_starts(
    problem: Problem, m: MStep, init: Mapping[str, Any] | str | None, restarts: int, seed: int | None
) -> Iterator[Params]:
    """Starting values of every restart: `init` (or the model's own) first, the others drawn from `seed`.

    A model whose parameters are sample sites has no starting values of its own; its first start is drawn too.
    """
    rng = np.random.default_rng(seed if seed is not None else np.random.randint(2**31 - 1))
    if isinstance(init, str):
        strategy = init
    elif init is not None:
        strategy = default_strategy(problem) if restarts > 1 else "model"
        yield checked_init(problem.parameters, init)
    else:
        sampled = any(record.kind == "sample" for record in problem.parameters.values())
        strategy = default_strategy(problem) if sampled or restarts > 1 else "model"  # it looks at all data
        yield initial_params(problem, m, strategy if sampled else "model", rng)
    for _ in range(restarts if isinstance(init, str) else restarts - 1):
        yield initial_params(problem, m, strategy, rng)


def default_strategy(problem: Problem) -> str:
    """k-means++ where every latent explains numeric data of its own, otherwise random."""
    with torch.no_grad():
        run = problem.run(problem.start)
    return "kmeans++" if all(_features(problem, run, site) is not None for site in _varied(problem, run)) else "random"


Potentials = Callable[[Problem, Run, np.random.Generator], dict[str, Tensor]]


def _from_potentials(problem: Problem, m_step: MStep, potentials: Potentials, rng: np.random.Generator) -> Params:
    """One M-step from the posterior under made-up log-factors instead of the data's."""
    start = problem.start
    with torch.no_grad():
        run = problem.run(start)
        factors = problem.factors(run)
    made = potentials(problem, run, rng)
    fake: dict[str, Tensor] = {}
    for name, factor in factors.items():
        neutral = torch.where(factor == -torch.inf, factor, torch.zeros_like(factor))  # keep structural zeros
        if name in made:
            dims = dims_of(factor)
            own = made[name]
            neutral = neutral + own.permute([dims_of(own).index(d) for d in dims if d in dims_of(own)]).reshape(
                [s if d in dims_of(own) else 1 for d, s in zip(dims, factor.shape, strict=True)]
            )
        fake[name] = with_dims(neutral, dims_of(factor))
    evidence = evaluate(problem.graph, fake)
    if not bool(torch.isfinite(evidence.log_likelihood)):
        evidence, _ = problem.evidence(start)
    params, _ = m_step.update(start, expectation(problem, run, evidence))
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


def _with_continuous(problem: Problem, m_step: MStep, potentials: Potentials, rng: np.random.Generator) -> Params:
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
        dims = _own_dims(problem, run, name)
        shape = [problem.graph.plate_sizes.get(d, _num_states(run, name)) for d in dims]
        draws = torch.as_tensor(rng.exponential(size=shape)).to(torch.get_default_dtype())
        made[name] = with_dims(draws.clamp(min=1e-12).log(), dims)
    return made


def _own_dims(problem: Problem, run: Run, name: str) -> str:
    keep = {*run.sites[name].plate_dims, run.sites[name].symbol}
    return "".join(d for d in problem.graph.factors[name].dims if d in keep)


def _kmeans(problem: Problem, run: Run, rng: np.random.Generator) -> dict[str, Tensor]:
    """Latents of one kind (the steps of a chain) are clustered together, so that their labels agree."""
    kinds: dict[tuple[int, int], list[str]] = {}
    rows: dict[str, Tensor] = {}
    for name in _varied(problem, run):
        features = _features(problem, run, name)
        if features is None:
            raise InputError(
                f"init='kmeans++': the latent '{name}' explains no numeric data of its own. Use init='random'."
            )
        rows[name] = features
        kinds.setdefault((_num_states(run, name), features.shape[-1]), []).append(name)
    made = {}
    for (num_states, _), names in kinds.items():
        pooled = torch.cat([rows[name] for name in names])
        spread = pooled.std(0, correction=0)
        varying = spread > 0
        pooled = (pooled[:, varying] - pooled[:, varying].mean(0)) / spread[varying]
        labels = torch.as_tensor(_cluster(pooled, num_states, rng))
        labels = _matched(labels, torch.cat([_possible(problem, run, name) for name in names]))
        for name, own in zip(names, torch.split(labels, [len(rows[n]) for n in names]), strict=True):
            made[name] = _one_hot_potential(problem, run, name, own, num_states)
    return made


def _possible(problem: Problem, run: Run, name: str) -> Tensor:
    """Which states the labels (and other structural zeros) of a latent's rows leave open, (rows, K)."""
    symbol, plates = run.sites[name].symbol, _plate_order(run, name)
    assert symbol is not None
    sizes = [problem.graph.plate_sizes[d] for d in plates]
    possible = torch.ones([*sizes, _num_states(run, name)], dtype=torch.bool)
    for other in run.sites.values():
        if other.observed and set(problem.graph.factors[other.name].dims) - set(plates) == {symbol}:
            possible = possible & (align(packed_log_density(other), "".join(plates) + symbol) > -torch.inf)
    return possible.reshape(-1, possible.shape[-1])


def _matched(clusters: Tensor, possible: Tensor) -> Tensor:
    """Clusters renumbered so that most rows of known state get its number."""
    known = possible.sum(-1) == 1
    states = possible.shape[-1]
    if not bool(known.any()):
        return clusters
    votes = torch.zeros(states, states)
    votes.index_put_((clusters[known], possible[known].long().argmax(-1)), torch.ones(()), accumulate=True)
    _, number = linear_sum_assignment(votes.cpu().numpy(), maximize=True)
    return torch.as_tensor(number)[clusters]


def _varied(problem: Problem, run: Run) -> list[str]:
    """Latents with more than one state; one state needs no start."""
    return [name for name in problem.graph.latents if _num_states(run, name) > 1]


def _one_hot_potential(problem: Problem, run: Run, name: str, labels: Tensor, num_states: int) -> Tensor:
    """Packed log-weights that give each row mostly to its cluster."""
    weights = torch.full((len(labels), num_states), (1 - SOFTEN) / max(1, num_states - 1))
    weights[torch.arange(len(labels)), labels] = SOFTEN if num_states > 1 else 1.0
    plates = _plate_order(run, name)
    symbol = run.sites[name].symbol
    assert symbol is not None
    shape = [problem.graph.plate_sizes[d] for d in plates] + [num_states]
    order = "".join(plates) + symbol
    kept = "".join(d for d, size in zip(order, shape, strict=True) if size > 1)
    own = weights.log().reshape([size for size in shape if size > 1])
    dims = _own_dims(problem, run, name)
    return with_dims(own.permute([kept.index(d) for d in dims]), dims)


def _num_states(run: Run, name: str) -> int:
    return int(run.sites[name].fn.enumerate_support(expand=False).shape[0])


def _plate_order(run: Run, name: str) -> list[str]:
    site = run.sites[name]
    return [site.symbols[plate.dim] for plate in site.plates]


def _features(problem: Problem, run: Run, name: str) -> Tensor | None:
    """Data that depend on this latent and no other, one row per element of its plates; None if there are none."""
    site = run.sites[name]
    own = _plate_order(run, name)
    columns = []
    for other in run.sites.values():
        factor = problem.graph.factors[other.name]
        if not other.observed or [d for d in factor.dims if d in problem.graph.symbol_sites] != [site.symbol]:
            continue
        if bool((log_density(other) == -torch.inf).any()):
            continue  # labels and other constraints are no measurements
        order = _plate_order(run, other.name)
        value, event = clean_value(other).double(), other.fn.event_dim
        if value.dim() - event > len(other.fn.batch_shape):
            value = other.value.double()  # its mask depends on a latent, and so on no row alone
        if other.family is not None and other.family.latent_response:
            value = other.family.location(value)
            event += other.family.location_dim - other.family.event_dim
        value = value.expand((*other.fn.batch_shape, *value.shape[value.dim() - event :]))
        at = {d: value.dim() - event + plate.dim for d, plate in zip(order, other.plates, strict=True)}
        if not set(own) <= set(order):
            continue
        rest = [i for i in range(value.dim()) if i not in {at[d] for d in own}]
        rows = math.prod(plate.size for plate in site.plates)
        columns.append(value.permute([at[d] for d in own] + rest).reshape(rows, -1))
    return torch.cat(columns, -1) if columns else None


def _cluster(rows: Tensor, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    if num_clusters >= len(rows):
        return np.arange(len(rows)) % num_clusters
    data = rows.cpu().numpy()
    for _ in range(TRIES):
        try:
            return np.asarray(kmeans2(data, num_clusters, minit="++", iter=5, missing="raise", rng=rng)[1])
        except ClusterError:
            continue  # a cluster lost its last row; draw again
    return rng.integers(num_clusters, size=len(rows))


STRATEGIES: Mapping[str, Potentials] = {"model": lambda *_: {}, "random": _random, "kmeans++": _kmeans}
