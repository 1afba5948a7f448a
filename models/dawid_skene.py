"""Dawid and Skene's raters: the true class of an item from the judgements of fallible observers.

    z_i ~ Categorical(prevalence),    rating_is | z_i = k ~ Categorical(confusion[rater_s, k])
    prevalence (K,), confusion (R, K, K): row k of a rater's table is how that rater calls class k

Ratings are laid out as items x slots (I, S): a slot is one rater's first, second, ... judgement of an item,
and `raters` (S,) says whose. Empty slots hold -1 and are masked. (In long format, one row a rating, the
class of the row's item would have to be gathered from one plate into another, which enumeration in Pyro
does not allow.)

A. P. Dawid and A. M. Skene, Maximum likelihood estimation of observer error-rates using the EM algorithm,
Applied Statistics 28 (1979). Data: 45 patients, fitness for anaesthesia in four grades by five observers,
the first of whom judged three times. The published solution, reached from the shares of votes, is a local
maximum.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.nn.functional import one_hot

DATA = Path(__file__).parent / "data"


def load() -> tuple[Tensor, Tensor]:
    """Ratings 0..3 of 45 patients in 7 slots (45, 7), and the slots' raters 0..4 (7,)."""
    rows = np.loadtxt(DATA / "anesthesia_long.csv", delimiter=",", skiprows=1, dtype=np.int64) - 1
    judged: dict[tuple[int, int, int], int] = {}  # (item, rater, repeat) to rating
    repeats: Counter[tuple[int, int]] = Counter()
    for item, rater, rating in rows.tolist():
        judged[item, rater, repeats[item, rater]] = rating
        repeats[item, rater] += 1
    slots = sorted({(rater, repeat) for _, rater, repeat in judged})
    ratings = [[judged.get((item, *slot), -1) for slot in slots] for item in range(rows[:, 0].max() + 1)]
    return torch.tensor(ratings), torch.tensor([rater for rater, _ in slots])


def simulate(
    num_items: int = 200, num_raters: int = 4, num_classes: int = 4, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Raters who are right 7 times in 10; a tenth of the slots is empty. (I, R) and (R,)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(num_classes, (num_items, 1), generator=generator).expand(-1, num_raters)
    other = torch.randint(1, num_classes, truth.shape, generator=generator)
    right = torch.rand(truth.shape, generator=generator) < 0.7
    ratings = torch.where(right, truth, (truth + other) % num_classes)
    empty = torch.rand(truth.shape, generator=generator) < 0.1
    return ratings.masked_fill(empty, -1), torch.arange(num_raters)


def _from_votes(ratings: Tensor, raters: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Prevalence and confusion if each item's class were distributed as its votes."""
    votes = one_hot(ratings.clamp(min=0), num_classes) * (ratings >= 0).unsqueeze(-1)  # (I, S, K)
    share = votes.sum(1) / votes.sum((1, 2)).unsqueeze(-1).clamp(min=1)  # (I, K)
    by_slot = torch.einsum("ik,isc->skc", share.double(), votes.double())
    # A hundredth of a vote in every cell: an exact 0 in a start could never be left again.
    confusion = torch.full((int(raters.max()) + 1, num_classes, num_classes), 0.01, dtype=torch.float64)
    confusion.index_add_(0, raters, by_slot)
    prevalence = share.double().sum(0) + 0.01
    return prevalence / prevalence.sum(), confusion / confusion.sum(-1, keepdim=True)


def model(ratings: Tensor, raters: Tensor, num_classes: int = 4) -> None:
    """Start: the shares of votes as if they were the posterior of the classes."""
    num_items, num_slots = ratings.shape
    prevalence = pyro.param(
        "prevalence", lambda: _from_votes(ratings, raters, num_classes)[0], constraint=constraints.simplex
    )
    confusion = pyro.param(
        "confusion", lambda: _from_votes(ratings, raters, num_classes)[1], constraint=constraints.simplex
    )
    with pyro.plate("items", num_items, dim=-2):
        z = pyro.sample("z", dist.Categorical(prevalence))
        with pyro.plate("slots", num_slots, dim=-1), pyro.poutine.mask(mask=ratings >= 0):
            # Masked slots are never scored, but the value must lie in the support.
            pyro.sample("rating", dist.Categorical(Vindex(confusion)[raters, z]), obs=ratings.clamp(min=0))
