"""Linear mixed models: regressions whose coefficients vary between groups of rows (long format).

    y_n = x_n·β + z_n·b_{g(n)} + ε_n,    b_g ~ N(0, D),    ε_n ~ N(0, σ²)

    model           random intercepts                                   lme4: y ~ 1 + (1 | group)
    slopes          correlated random intercepts and slopes             y ~ x + (x | group)
    crossed         two grouping factors, any combination of groups     y ~ 1 + (1 | first) + (1 | second)
    crossed_slopes  the same, with slopes of the first factor           y ~ x + (x | first) + (1 | second)
    nested          groups within groups: `outer` (J,) is that of each  y ~ 1 + (1 | outer / inner)

Rows read their group's effect by its number (`b[group]`), as everywhere in Pyro. Given the parameters all effects
are jointly normal: independent between groups, except that crossed and nested factors couple them.

Data: yield of dyestuff batches (`load`), reaction times of sleep-deprived subjects (`load_sleepstudy`), diameters of
the penicillin assay (`load_penicillin`), strength of pastes in casks of batches (`load_pastes`), pitch of voices
(`load_politeness`); see data/README.md.
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
positive = constraints.positive


def _read(file: str, response: str, *groups: str) -> tuple[Tensor, list[Tensor], list[dict[str, str]]]:
    with open(DATA / file, newline="") as handle:
        rows = list(csv.DictReader(handle))
    y = torch.tensor([float(row[response]) for row in rows], dtype=torch.float64)
    codes = []
    for column in groups:
        names = sorted({row[column] for row in rows})
        codes.append(torch.tensor([names.index(row[column]) for row in rows]))
    return y, codes, rows


def load() -> tuple[Tensor, Tensor]:
    """Yield (g) of 5 samples from each of 6 batches: batch (30,), yield (30,)."""
    y, (batch,), _ = _read("dyestuff.csv", "Yield", "Batch")
    return batch, y


def load_sleepstudy() -> tuple[Tensor, Tensor, Tensor]:
    """Days of sleep deprivation (180,), subject (180,), reaction time in ms (180,)."""
    y, (subject,), rows = _read("sleepstudy.csv", "Reaction", "Subject")
    return torch.tensor([float(row["Days"]) for row in rows], dtype=torch.float64), subject, y


def load_penicillin() -> tuple[Tensor, Tensor, Tensor]:
    """Plate (144,), sample (144,), diameter of the inhibition zone in mm (144,)."""
    y, (plate, sample), _ = _read("penicillin.csv", "diameter", "plate", "sample")
    return plate, sample, y


def load_pastes() -> tuple[Tensor, Tensor, Tensor]:
    """Batch of each cask (30,), cask of each assay (60,), strength of the paste (60,)."""
    y, (batch,), rows = _read("pastes.csv", "strength", "batch")
    casks = sorted({(row["batch"], row["cask"]) for row in rows})
    cask = torch.tensor([casks.index((row["batch"], row["cask"])) for row in rows])
    return batch[torch.stack([(cask == j).nonzero()[0, 0] for j in range(len(casks))])], cask, y


def load_politeness() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether the speaker was to be polite (83,), scenario (83,), subject (83,), pitch of the voice in Hz (83,)."""
    y, (scenario, subject), rows = _read("politeness.csv", "frequency", "scenario", "subject")
    polite = torch.tensor([float(row["attitude"] == "pol") for row in rows], dtype=torch.float64)
    return polite, scenario, subject, y


def simulate(num_groups: int = 20, num_rows: int = 200, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Groups of random size with standard normal intercepts around 1, noise ½: group (N,), y (N,)."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(num_groups, (num_rows,), generator=generator)
    group[:num_groups] = torch.arange(num_groups)
    effect = torch.randn(num_groups, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return group, 1.0 + effect[group] + 0.5 * noise


def simulate_slopes(num_groups: int = 20, num_rows: int = 200, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """As `simulate`, with slopes around ½ of standard deviation 0.3: x (N,), group (N,), y (N,)."""
    generator = torch.Generator().manual_seed(seed + 1)
    group, y = simulate(num_groups, num_rows, seed=seed)
    x = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    slope = 0.5 + 0.3 * torch.randn(num_groups, generator=generator, dtype=torch.float64)
    return x, group, y + slope[group] * x


def simulate_crossed(num_first: int = 12, num_second: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One row for every pair of groups: first (N,), second (N,), y (N,)."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.cartesian_prod(torch.arange(num_first), torch.arange(num_second)).unbind(-1)
    a = torch.randn(num_first, generator=generator, dtype=torch.float64)
    c = 2.0 * torch.randn(num_second, generator=generator, dtype=torch.float64)
    return first, second, a[first] + c[second] + 0.5 * torch.randn(len(first), generator=generator, dtype=torch.float64)


def simulate_crossed_slopes(
    num_first: int = 12, num_second: int = 5, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `simulate_crossed`, with slopes around ½ of standard deviation 0.4: x, first, second, y, (N,) each."""
    generator = torch.Generator().manual_seed(seed + 1)
    first, second, y = simulate_crossed(num_first, num_second, seed=seed)
    x = torch.randn(len(y), generator=generator, dtype=torch.float64)
    slope = 0.5 + 0.4 * torch.randn(num_first, generator=generator, dtype=torch.float64)
    return x, first, second, y + slope[first] * x


def simulate_nested(
    num_outer: int = 8, num_inner: int = 4, num_rows: int = 160, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Outer group of each inner group (J,), inner group of each row (N,), y (N,)."""
    generator = torch.Generator().manual_seed(seed)
    outer = torch.arange(num_outer).repeat_interleave(num_inner)
    inner = torch.arange(num_rows) % len(outer)
    a = torch.randn(num_outer, generator=generator, dtype=torch.float64)
    c = 0.7 * torch.randn(len(outer), generator=generator, dtype=torch.float64)
    noise = 0.5 * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return outer, inner, 1.0 + a[outer[inner]] + c[inner] + noise


def _start(y: Tensor) -> Tensor:
    """A scale for each part of the variance: half of the data's standard deviation."""
    return y.std(correction=0) / 2


def model(group: Tensor, y: Tensor) -> None:
    """Random intercepts."""
    mean = pyro.param("mean", lambda: y.mean())
    between = pyro.param("between", lambda: _start(y), constraint=positive)
    within = pyro.param("within", lambda: _start(y), constraint=positive)
    with pyro.plate("groups", int(group.max()) + 1):
        b = pyro.sample("b", dist.Normal(torch.zeros_like(between), between))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean + b[group], within), obs=y)


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients, and the covariance of random ones; start: the regression that ignores the groups."""
    design = torch.stack([torch.ones_like(x), x], -1)
    beta = pyro.param("beta", lambda: torch.linalg.lstsq(design, y).solution.round(decimals=6))
    D = pyro.param(
        "D",
        lambda: torch.diag(_start(y) ** 2 / torch.stack([torch.ones_like(x), x]).square().mean(-1)),
        constraint=constraints.positive_definite,
    )
    return beta, D


def slopes(x: Tensor, group: Tensor, y: Tensor) -> None:
    """Random intercepts and slopes with any covariance D."""
    beta, D = _line(x, y)
    within = pyro.param("within", lambda: _start(y), constraint=positive)
    with pyro.plate("groups", int(group.max()) + 1):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2).to(y), D))
    with pyro.plate("rows", len(y)):
        own = beta + b[group]
        pyro.sample("y", dist.Normal(own[..., 0] + own[..., 1] * x, within), obs=y)


def crossed(first: Tensor, second: Tensor, y: Tensor) -> None:
    """Two grouping factors."""
    mean = pyro.param("mean", lambda: y.mean())
    scales = [pyro.param(name, lambda: _start(y), constraint=positive) for name in ("first", "second", "within")]
    with pyro.plate("first_groups", int(first.max()) + 1):
        a = pyro.sample("a", dist.Normal(torch.zeros_like(mean), scales[0]))
    with pyro.plate("second_groups", int(second.max()) + 1):
        c = pyro.sample("c", dist.Normal(torch.zeros_like(mean), scales[1]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean + a[first] + c[second], scales[2]), obs=y)


def crossed_slopes(x: Tensor, first: Tensor, second: Tensor, y: Tensor) -> None:
    """Two grouping factors, the first of which has slopes too (subjects and items)."""
    beta, D = _line(x, y)
    between = pyro.param("between", lambda: _start(y), constraint=positive)
    within = pyro.param("within", lambda: _start(y), constraint=positive)
    with pyro.plate("first_groups", int(first.max()) + 1):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2).to(y), D))
    with pyro.plate("second_groups", int(second.max()) + 1):
        c = pyro.sample("c", dist.Normal(torch.zeros_like(between), between))
    with pyro.plate("rows", len(y)):
        own = beta + b[first]
        pyro.sample("y", dist.Normal(own[..., 0] + own[..., 1] * x + c[second], within), obs=y)


def nested(outer: Tensor, inner: Tensor, y: Tensor) -> None:
    """Inner groups, each within one outer group."""
    mean = pyro.param("mean", lambda: y.mean())
    scales = [pyro.param(name, lambda: _start(y), constraint=positive) for name in ("outer", "inner", "within")]
    with pyro.plate("outer_groups", int(outer.max()) + 1):
        a = pyro.sample("a", dist.Normal(mean, scales[0]))
    with pyro.plate("inner_groups", len(outer)):
        c = pyro.sample("c", dist.Normal(a[outer], scales[1]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(c[inner], scales[2]), obs=y)
