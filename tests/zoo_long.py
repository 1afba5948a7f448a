"""Models in long format: rows that read the discrete latent of their group by an index, groups of unequal lengths.

Shapes: G groups, N rows in all, K classes, R raters of two answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from tests.classics import positive, simplex, uniform, unit


def _classes(G: int, K: int) -> Tensor:
    w = pyro.param("w", uniform(K), constraint=simplex)
    with pyro.plate("groups", G):
        return pyro.sample("z", dist.Categorical(w))


def growth_classes(group: Tensor, t: Tensor, y: Tensor, G: int, K: int = 2) -> None:
    """A line for each class of persons, who are seen at times of their own (a growth mixture)."""
    z = _classes(G, K)
    a, b = pyro.param("a", torch.zeros(K)), pyro.param("b", torch.zeros(K))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[z[group]] + b[z[group]] * t, sd), obs=y)


def slope_classes(group: Tensor, t: Tensor, y: Tensor, G: int, K: int = 2) -> None:
    """The same with a common intercept: rows at time 0 read no class."""
    z = _classes(G, K)
    a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.zeros(K))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + (b[z] * 1.0)[..., group] * t, sd), obs=y)


def raters_in_rows(item: Tensor, rater: Tensor, y: Tensor, G: int, R: int = 2, K: int = 2) -> None:
    """Dawid and Skene (1979): each row a judgement of an item by a rater."""
    z = _classes(G, K)
    P = pyro.param("P", uniform(2).expand(K, R, 2).clone(), constraint=simplex)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Categorical(Vindex(P)[Vindex(z)[..., item], rater]), obs=y)


def counts_in_rows(group: Tensor, seen: Tensor, y: Tensor, G: int, K: int = 2) -> None:
    """Poisson counts, some of them masked."""
    z = _classes(G, K)
    rate = pyro.param("rate", torch.ones(K), constraint=positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate[z.gather(0, group)]).mask(seen), obs=y)


def levels_in_rows(group: Tensor, y: Tensor, G: int, K: int = 2) -> None:
    """A level and a spread for each class of groups."""
    z = _classes(G, K)
    loc = pyro.param("loc", torch.zeros(K))
    sd = pyro.param("sd", torch.ones(K), constraint=positive)
    with pyro.plate("rows", len(y)):
        k = torch.index_select(z, 0, group)
        pyro.sample("y", dist.Normal(loc[k], sd[k]), obs=y)


def answers_in_rows(group: Tensor, x: Tensor, y: Tensor, G: int, K: int = 2) -> None:
    """Logistic regressions with an intercept for each class."""
    z = _classes(G, K)
    a, b = pyro.param("a", torch.zeros(K)), pyro.param("b", torch.tensor(0.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a[z[group]] + b * x), obs=y)


def vectors_in_rows(group: Tensor, y: Tensor, size: Tensor, G: int, K: int = 2) -> None:
    """Vectors in the rows, and a number of each group, all with the group's class."""
    w = pyro.param("w", uniform(K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K, 2))
    S = pyro.param("S", torch.eye(2).expand(K, 2, 2).clone(), constraint=constraints.positive_definite)
    p = pyro.param("p", torch.full((K,), 0.5), constraint=unit)
    with pyro.plate("groups", G):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("size", dist.Bernoulli(p[z]), obs=size)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(mu[z[group]], covariance_matrix=S[z[group]]), obs=y)


def levels_map(group: Tensor, y: Tensor, G: int, K: int = 2) -> None:
    """The levels with priors."""
    w = pyro.sample("w", dist.Dirichlet(torch.full((K,), 2.0)))
    with pyro.plate("classes", K):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("groups", G):
        z = pyro.sample("z", dist.Categorical(w))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc[z[group]], sd), obs=y)


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


def problems(problem: Callable[..., Any]) -> list[Any]:
    """Five groups with 2 to 6 rows in no order; the classes of the groups are well apart, so that a maximum exists."""
    rng = np.random.default_rng(7)
    numbers = rng.permutation(np.repeat(np.arange(5), [4, 2, 6, 5, 5]))
    group, classes, G = torch.as_tensor(numbers), np.array([0, 1, 0, 1, 1])[numbers], 5
    N = len(numbers)
    t = rng.integers(0, 3, N)
    rows = {"rows": group}
    w = _t([0.4, 0.6])
    lines = _t(np.array([-1.0, 1.5])[classes] + np.array([0.5, -0.3])[classes] * t + 0.6 * rng.normal(size=N))
    rater = torch.as_tensor(rng.integers(0, 2, N))
    judged = torch.as_tensor((classes + (np.arange(N) % 4 == 3)) % 2)  # every fourth one is wrong
    P = _t([[[0.7, 0.3], [0.8, 0.2]], [[0.3, 0.7], [0.25, 0.75]]])
    counts = _t(rng.poisson(np.array([2.0, 8.0])[classes]))
    seen = torch.as_tensor(rng.random(N) < 0.8)
    x = _t(rng.normal(size=N))
    yes = _t((classes + (np.arange(N) % 3 == 2)) % 2)
    plane = _t(np.array([[-1.0, 0.5], [1.0, -0.5]])[classes] + 0.8 * rng.normal(size=(N, 2)))
    spread = torch.stack([torch.eye(2), 1.4 * torch.eye(2)])
    growth = {"w": w, "a": _t([-0.5, 0.8]), "b": _t([0.1, 0.0]), "sd": _t(1.0)}
    levels = {"w": w, "loc": _t([-0.5, 0.8]), "sd": _t([0.8, 1.1])}
    repeats = _t([2, 1, 1, 3, 0])
    return [
        problem("growth_classes", growth_classes, (group, _t(t), lines, G), growth, "groups", rows=rows),
        problem("raters_in_rows", raters_in_rows, (group, rater, judged, G), {"w": w, "P": P}, "groups", rows=rows),
        problem("counts_in_rows", counts_in_rows, (group, seen, counts, G), {"w": w, "rate": _t([2.5, 6.0])}, "groups",
                rows=rows),
        problem("levels_weighted", levels_in_rows, (group, lines, G), levels, "groups", rows=rows, weights=repeats),
        problem("answers_in_rows", answers_in_rows, (group, x, yes, G), {"w": w, "a": _t([-0.6, 0.9]), "b": _t(0.1)},
                "groups", rows=rows, closed=False),
        problem("vectors_in_rows", vectors_in_rows, (group, plane, _t([0, 1, 1, 0, 1]), G),
                {"w": w, "mu": _t([[-0.8, 0.1], [0.7, -0.2]]), "S": spread, "p": _t([0.4, 0.6])}, "groups", rows=rows),
        problem("levels_map", levels_map, (group, lines, G), {**levels, "sd": _t(1.0)}, "groups", rows=rows,
                priors=True),
    ]  # fmt: skip
