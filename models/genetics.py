"""Two classics of EM in genetics: incomplete counts, completed through a constant 0/1 table.

`abo`: allele frequencies from blood groups, under Hardy-Weinberg equilibrium.

    a, b ~ Categorical(frequency) over the alleles (A, B, O),    phenotype = the group that a and b make
    P(O) = r²,  P(A) = p² + 2pr,  P(B) = q² + 2qr,  P(AB) = 2pq

`linkage`: 197 animals in 4 cells with probabilities (1/2 + t/4, (1-t)/4, (1-t)/4, t/4); the first cell is
the sum of two latent ones, so z ~ Categorical(1/2, t/4, (1-t)/4, (1-t)/4, t/4) and cell = table[z].

Both read each category once, the counts being the weights of the rows: `weights={"groups": counts}`, or
`weights={"cells": counts}`. Log-likelihoods therefore lack the multinomial coefficient. The table enters as
logits, log 1 = 0 and log 0 = -inf, because torch clamps `probs` and an impossible cell must stay impossible.

Sources: G. J. McLachlan and T. Krishnan, The EM Algorithm and Extensions (2008), example 2.4; A. P. Dempster,
N. M. Laird and D. B. Rubin, Maximum likelihood from incomplete data via the EM algorithm, JRSS B 39 (1977).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

DATA = Path(__file__).parent / "data"
PHENOTYPES = ("O", "A", "B", "AB")
CELLS = ("AB", "Ab", "aB", "ab")

# Phenotype of the alleles a and b, both in the order (A, B, O).
GROUP_OF = torch.tensor([[1, 3, 1], [3, 2, 2], [1, 2, 0]])
# Observed cell of each latent cell.
CELL_OF = torch.tensor([0, 0, 1, 2, 3])


def load(problem: Literal["abo", "linkage"] = "abo") -> tuple[Tensor, Tensor]:
    """The four categories, 0..3 in the order of `PHENOTYPES` or `CELLS` (4,), and their counts (4,)."""
    file = {"abo": "abo_mclachlan.csv", "linkage": "linkage_rao.csv"}[problem]
    return torch.arange(4), torch.from_numpy(np.loadtxt(DATA / file, delimiter=",", skiprows=1, usecols=1))


def simulate(
    num_individuals: int = 500, problem: Literal["abo", "linkage"] = "abo", *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Categories and counts at allele frequencies (0.3, 0.1, 0.6), or at t = 0.6."""
    generator = torch.Generator().manual_seed(seed)
    if problem == "abo":
        frequency = torch.tensor([0.3, 0.1, 0.6])
        a, b = torch.multinomial(frequency.repeat(2, 1), num_individuals, replacement=True, generator=generator)
        seen = GROUP_OF[a, b]
    else:
        probs = torch.tensor([0.5, 0.15, 0.1, 0.1, 0.15])
        seen = CELL_OF[torch.multinomial(probs, num_individuals, replacement=True, generator=generator)]
    return torch.arange(4), torch.bincount(seen, minlength=4).double()


def _certain(outcome: Tensor) -> Tensor:
    """Logits (..., 4) that put all mass on the given outcome."""
    return torch.nn.functional.one_hot(outcome, 4).double().log()


def abo(phenotypes: Tensor) -> None:
    """`phenotypes` (G,): one row a blood group with counts as weights, or one row a person."""
    start = torch.full((3,), 1 / 3, dtype=torch.float64)
    frequency = pyro.param("frequency", start, constraint=constraints.simplex)
    with pyro.plate("groups", len(phenotypes)):
        a = pyro.sample("a", dist.Categorical(frequency))
        b = pyro.sample("b", dist.Categorical(frequency))
        pyro.sample("phenotype", dist.Categorical(logits=Vindex(_certain(GROUP_OF))[a, b]), obs=phenotypes)


def linkage(cells: Tensor) -> None:
    """`cells` (G,): one row a cell with counts as weights, or one row an animal."""
    t = pyro.param("t", torch.tensor(0.5, dtype=torch.float64), constraint=constraints.unit_interval)
    probs = torch.stack([torch.full_like(t, 0.5), t / 4, (1 - t) / 4, (1 - t) / 4, t / 4])
    with pyro.plate("cells", len(cells)):
        z = pyro.sample("z", dist.Categorical(probs))
        pyro.sample("cell", dist.Categorical(logits=_certain(CELL_OF)[z]), obs=cells)
