"""Item response models: how able a person is, and how hard and how telling each question is.

    theta_n ~ N(0, 1),    y_nj ~ Bernoulli(logits = intercept_j + slope_j theta_n)          y (N, J)

`model` is the two-parameter logistic (Birnbaum 1968); `common_slope` has one slope for all items, `rasch` a slope of 1.
In `mixture` people are of latent classes, to each of which the items are of other difficulty (Rost 1990).
The posterior of an ability is not Gaussian, but one-dimensional: use
`fit(..., e_step={"theta": pyro_em.Quadrature(num_nodes=21)})`, as Bock & Aitkin (1981) do. Equal rows may be given
once, with their number as weights of the plate "people".

Data: section 6 of the Law School Admission Test, 1000 people and five items (Bock & Lieberman 1970), as 30 patterns
with their counts (`load`).
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


def load() -> tuple[Tensor, Tensor]:
    """Answers of each pattern (30, 5), 1 for a right one, and how many people gave it (30,)."""
    with open(DATA / "lsat6.csv", newline="") as file:
        _, *rows = csv.reader(file)
    table = torch.tensor([[float(cell) for cell in row] for row in rows], dtype=torch.float64)
    return table[:, :-1], table[:, -1]


def simulate(num_people: int = 300, num_items: int = 6, *, seed: int = 0) -> Tensor:
    """Intercepts from -1.5 to 1.5, slopes from 0.6 to 1.6. (N, J)."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(num_people, 1, generator=generator, dtype=torch.float64)
    intercept = torch.linspace(-1.5, 1.5, num_items, dtype=torch.float64)
    slope = torch.linspace(0.6, 1.6, num_items, dtype=torch.float64)
    uniform = torch.rand(num_people, num_items, generator=generator, dtype=torch.float64)
    return (uniform < torch.sigmoid(intercept + slope * theta)).double()


def simulate_mixture(num_people: int = 300, num_items: int = 6, *, seed: int = 0) -> Tensor:
    """Two classes, of which 0.6 and 0.4 are, with the items in opposite orders of difficulty. (N, J)."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(num_people, 1, generator=generator, dtype=torch.float64)
    turned = torch.where(torch.rand(num_people, 1, generator=generator) < 0.6, 1.0, -1.0)
    intercept = turned * torch.linspace(-2.0, 2.0, num_items, dtype=torch.float64)
    uniform = torch.rand(num_people, num_items, generator=generator, dtype=torch.float64)
    return (uniform < torch.sigmoid(intercept + theta)).double()


def _answers(answers: Tensor, intercept: Tensor, slope: Tensor | float) -> None:
    people, items = answers.shape
    with pyro.plate("people", people, dim=-2):
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("items", items, dim=-1):
            pyro.sample("answer", dist.Bernoulli(logits=intercept + slope * theta), obs=answers)


def _intercept(answers: Tensor) -> Tensor:
    """Log odds of a right answer, with one answer of each kind added."""
    right = (answers.double().sum(0) + 1) / (len(answers) + 2)
    return pyro.param("intercept", lambda: torch.logit(right))


def model(answers: Tensor) -> None:
    """Start: intercepts as without abilities, slopes 1."""
    slope = pyro.param(
        "slope", lambda: torch.ones(answers.shape[1], dtype=torch.float64), constraint=constraints.positive
    )
    _answers(answers, _intercept(answers), slope)


def common_slope(answers: Tensor) -> None:
    """Start as `model`."""
    slope = pyro.param("slope", lambda: torch.ones((), dtype=torch.float64), constraint=constraints.positive)
    _answers(answers, _intercept(answers), slope)


def rasch(answers: Tensor) -> None:
    """Start as `model`."""
    _answers(answers, _intercept(answers), 1.0)


def mixture(answers: Tensor, num_classes: int = 2) -> None:
    """Start: intercepts as without abilities, apart by what turns their order from class to class."""
    people, items = answers.shape
    turn = torch.linspace(1, -1, num_classes, dtype=torch.float64).unsqueeze(-1)
    right = torch.logit((answers.double().sum(0) + 1) / (people + 2))
    start = right + 0.5 * turn * torch.linspace(-1, 1, items, dtype=torch.float64)
    intercept = pyro.param("intercept", start)
    slope = pyro.param("slope", lambda: torch.ones((), dtype=torch.float64), constraint=constraints.positive)
    equal = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    weights = pyro.param("weights", equal, constraint=constraints.simplex)
    with pyro.plate("people", people, dim=-2):
        k = pyro.sample("k", dist.Categorical(weights))
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("items", items, dim=-1):
            own = intercept[k, torch.arange(items)]
            pyro.sample("answer", dist.Bernoulli(logits=own + slope * theta), obs=answers)
