"""k-means with k-means++ seeding on the data that discrete latents explain, as log-weights of their states.

Latents of one kind (the steps of a chain) are clustered together, so that their labels agree; clusters are numbered
so that rows of known state keep theirs. What does not change from draw to draw is found once. Where there are many
rows, centres are found on a random share of them (`SAMPLE` a cluster) and every row goes to the nearest: a start is no
better for more. Not handled: latents without numeric data of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported when they are used first
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.errors import InputError
from pyro_em.model.compat import with_dims
from pyro_em.model.density import clean_value, log_density, packed_log_density
from pyro_em.model.packing import align
from pyro_em.model.trace import Run
from pyro_em.problem import Problem

SOFTEN = 0.9  # share of each row that k-means assigns to its own cluster
TRIES = 20
SAMPLE = 500  # rows for each cluster


@dataclass(frozen=True)
class _Kind:
    """Latents that are clustered together: their data (rows, features), scaled, and `possible` states (rows, K)."""

    names: tuple[str, ...]
    lengths: list[int]
    data: NDArray[np.float64]
    possible: Tensor


class Clustering:
    """Called with a generator it draws packed log-weights by latent."""

    def __init__(self, problem: Problem, run: Run) -> None:
        self.problem, self.run = problem, run
        kinds: dict[tuple[int, int], list[str]] = {}
        rows: dict[str, Tensor] = {}
        for name in varied(problem, run):
            found = features(problem, run, name)
            if found is None:
                raise InputError(
                    f"init='kmeans++': the latent '{name}' explains no numeric data of its own. Use init='random'."
                )
            rows[name] = found
            kinds.setdefault((num_states(run, name), found.shape[-1]), []).append(name)
        self._kinds = [self._kind(names, rows) for names in kinds.values()]

    def _kind(self, names: list[str], rows: dict[str, Tensor]) -> _Kind:
        pooled = torch.cat([rows[name] for name in names])
        spread = pooled.std(0, correction=0)
        varying = spread > 0
        pooled = (pooled[:, varying] - pooled[:, varying].mean(0)) / spread[varying]
        possible = torch.cat([_possible(self.problem, self.run, name) for name in names])
        return _Kind(tuple(names), [len(rows[n]) for n in names], pooled.cpu().numpy(), possible)

    def __call__(self, rng: np.random.Generator) -> dict[str, Tensor]:
        made = {}
        for kind in self._kinds:
            states = kind.possible.shape[-1]
            labels = _matched(torch.as_tensor(_cluster(kind.data, states, rng)), kind.possible)
            for name, own in zip(kind.names, torch.split(labels, kind.lengths), strict=True):
                made[name] = _one_hot_potential(self.problem, self.run, name, own, states)
        return made


def varied(problem: Problem, run: Run) -> list[str]:
    """Latents with more than one state; one state needs no start."""
    return [name for name in problem.graph.latents if num_states(run, name) > 1]


def own_dims(problem: Problem, run: Run, name: str) -> str:
    """Packed dims of a latent's log-weights: its plates and its states."""
    keep = {*run.sites[name].plate_dims, run.sites[name].symbol}
    return "".join(d for d in problem.graph.factors[name].dims if d in keep)


def num_states(run: Run, name: str) -> int:
    """K of a latent."""
    return int(run.sites[name].fn.enumerate_support(expand=False).shape[0])


def _plate_order(run: Run, name: str) -> list[str]:
    site = run.sites[name]
    return [site.symbols[plate.dim] for plate in site.plates]


def features(problem: Problem, run: Run, name: str) -> Tensor | None:
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


def _possible(problem: Problem, run: Run, name: str) -> Tensor:
    """Which states the labels (and other structural zeros) of a latent's rows leave open, (rows, K)."""
    symbol, plates = run.sites[name].symbol, _plate_order(run, name)
    assert symbol is not None
    sizes = [problem.graph.plate_sizes[d] for d in plates]
    possible = torch.ones([*sizes, num_states(run, name)], dtype=torch.bool)
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
    _, number = scipy.optimize.linear_sum_assignment(votes.cpu().numpy(), maximize=True)
    return torch.as_tensor(number)[clusters]


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
    dims = own_dims(problem, run, name)
    return with_dims(own.permute([kept.index(d) for d in dims]), dims)


def _cluster(data: NDArray[np.float64], num_clusters: int, rng: np.random.Generator) -> NDArray[np.intp]:
    if num_clusters >= len(data):
        return np.arange(len(data)) % num_clusters
    few = data if len(data) <= SAMPLE * num_clusters else rng.choice(data, SAMPLE * num_clusters, replace=False)
    for _ in range(TRIES):
        try:
            centres, labels = scipy.cluster.vq.kmeans2(few, num_clusters, minit="++", iter=5, missing="raise", rng=rng)
        except scipy.cluster.vq.ClusterError:
            continue  # a cluster lost its last row; draw again
        return np.asarray(labels if few is data else scipy.cluster.vq.vq(data, centres, check_finite=False)[0])
    return rng.integers(num_clusters, size=len(data))
