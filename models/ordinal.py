"""Ordered answers: a logistic variable that is cut into K categories, with what shifts it.

    P(y <= k) = sigmoid(cut_k - eta),    k = 0 ... K-2, cut increasing

    regression   eta = x·beta                              proportional odds (McCullagh 1980)       x (N, P), y (N,)
    mixed        eta = x·beta + b_{g(n)}, b_g ~ N(0, σ²)   the same with an intercept of each group
    graded       eta = slope_j theta_n, theta_n ~ N(0, 1)  graded response model (Samejima 1969)    y (N, J)

`graded` has cut points of each item. The posteriors of b and theta are not Gaussian, but one-dimensional: use
`fit(..., e_step={"b": pyro_em.Quadrature(num_nodes=21)})`, and "theta" for `graded`. Equal rows may be given once, with
their number as weights of the plate "rows" ("people").

Data: satisfaction of tenants in Copenhagen (`load`, with the number of tenants: row weights), bitterness of wine as
nine judges rate it (`load_wine`); see data/README.md.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DATA = Path(__file__).parent / "data"
LEVELS = ("low", "medium", "high")


def _read(file: str) -> list[dict[str, str]]:
    with open(DATA / file, newline="") as handle:
        return list(csv.DictReader(handle))


def _indicators(rows: list[dict[str, str]], *columns: tuple[str, str]) -> Tensor:
    return torch.tensor([[float(row[name] == value) for name, value in columns] for row in rows], dtype=torch.float64)


def load() -> tuple[Tensor, Tensor, Tensor]:
    """Indicators of influence, type and contact (72, 6), satisfaction from 0 to 2 (72,), number of tenants (72,)."""
    rows = _read("housing.csv")
    kinds = [("type", kind) for kind in ("apartment", "atrium", "terrace")]
    x = _indicators(rows, ("influence", "medium"), ("influence", "high"), *kinds, ("contact", "high"))
    tenants = torch.tensor([float(row["tenants"]) for row in rows], dtype=torch.float64)
    return x, torch.tensor([LEVELS.index(row["satisfaction"]) for row in rows]), tenants


def load_wine() -> tuple[Tensor, Tensor, Tensor]:
    """Whether the grapes were warm, and in contact with their skins (72, 2), judge (72,), rating from 0 to 4 (72,)."""
    rows = _read("wine.csv")
    x = _indicators(rows, ("temperature", "warm"), ("contact", "yes"))
    judge, rating = (torch.tensor([int(row[name]) - 1 for row in rows]) for name in ("judge", "rating"))
    return x, judge, rating


def simulate(num_people: int = 200, num_items: int = 4, num_categories: int = 4, *, seed: int = 0) -> Tensor:
    """Answers to items with slopes from 0.8 to 1.8, (N, J)."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(num_people, 1, generator=generator, dtype=torch.float64)
    slope = torch.linspace(0.8, 1.8, num_items, dtype=torch.float64)
    uniform = torch.rand(num_people, num_items, generator=generator, dtype=torch.float64)
    response = slope * theta + torch.logit(uniform, eps=1e-12)
    return torch.bucketize(response, _cuts(num_categories))


def simulate_regression(num_rows: int = 200, num_categories: int = 4, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two standard normal covariates with coefficients 1 and -½: x (N, 2), y (N,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    uniform = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    response = x @ torch.tensor([1.0, -0.5], dtype=torch.float64) + torch.logit(uniform, eps=1e-12)
    return x, torch.bucketize(response, _cuts(num_categories))


def _cuts(num_categories: int) -> Tensor:
    """Equally spaced around 0, one apart."""
    return torch.arange(num_categories - 1, dtype=torch.float64) - (num_categories - 2) / 2


def _cut(num_categories: int, *items: int) -> Tensor:
    start = _cuts(num_categories).expand(*items, -1).clone()
    return pyro.param("cut", start, constraint=constraints.ordered_vector)


def _beta(x: Tensor) -> Tensor:
    return pyro.param("beta", torch.zeros(x.shape[-1], dtype=torch.float64))


def regression(x: Tensor, y: Tensor, num_categories: int | None = None) -> None:
    """Start: coefficients 0, cut points one apart."""
    beta, cut = _beta(x), _cut(num_categories or int(y.max()) + 1)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.OrderedLogistic(x @ beta, cut), obs=y)


def mixed(x: Tensor, group: Tensor, y: Tensor, num_categories: int | None = None) -> None:
    """Start as `regression`, with a standard deviation of 1 between groups."""
    beta, cut = _beta(x), _cut(num_categories or int(y.max()) + 1)
    scale = pyro.param("scale", torch.ones((), dtype=torch.float64), constraint=constraints.positive)
    with pyro.plate("groups", int(group.max()) + 1):
        b = pyro.sample("b", dist.Normal(torch.zeros_like(scale), scale))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.OrderedLogistic(x @ beta + b[..., group], cut), obs=y)


def graded(answers: Tensor, num_categories: int | None = None) -> None:
    """Start: slopes 1, cut points one apart."""
    people, items = answers.shape
    cut = _cut(num_categories or int(answers.max()) + 1, items)
    slope = pyro.param("slope", torch.ones(items, dtype=torch.float64), constraint=constraints.positive)
    with pyro.plate("people", people, dim=-2):
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("items", items, dim=-1):
            pyro.sample("y", dist.OrderedLogistic(slope * theta, cut), obs=answers)
