"""Dawid and Skene's raters: the true class of an item from the judgements of fallible observers.

    z_i ~ Categorical(prevalence),    rating_is | z_i = k ~ Categorical(confusion[rater_s, k])
    prevalence (K,), confusion (R, K, K): row k of a rater's table is how that rater calls class k

`rows` has them in long format, one row a rating: item, rater and rating are vectors (N,), and the row reads the
class of its item by an index, `z[item]`. (Pyro's own enumeration does not allow that.) For `model` ratings are laid
out as items x slots (I, S): a slot is one rater's first, second, ... judgement of an item, and `raters` (S,) says
whose. Empty slots hold -1 and are masked. Both are the same model, from the same start.

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


def load_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Item 0..44, rater 0..4 and rating 0..3 of 315 judgements, (315,) each."""
    rows = np.loadtxt(DATA / "anesthesia_long.csv", delimiter=",", skiprows=1, dtype=np.int64) - 1
    item, rater, rating = torch.as_tensor(rows).unbind(-1)
    return item.contiguous(), rater.contiguous(), rating.contiguous()


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


def simulate_rows(
    num_items: int = 200, num_raters: int = 4, num_classes: int = 4, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The same ratings in long format, without the empty slots."""
    ratings, _ = simulate(num_items, num_raters, num_classes, seed=seed)
    item, rater = (ratings >= 0).nonzero(as_tuple=True)
    return item, rater, ratings[item, rater]


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


def _from_rows(item: Tensor, rater: Tensor, rating: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """`_from_votes` of ratings in long format."""
    vote = one_hot(rating, num_classes).double()  # (N, K)
    votes = torch.zeros(int(item.max()) + 1, num_classes, dtype=torch.float64).index_add_(0, item, vote)
    share = votes / votes.sum(-1, keepdim=True).clamp(min=1)
    confusion = torch.full((int(rater.max()) + 1, num_classes, num_classes), 0.01, dtype=torch.float64)
    confusion.index_add_(0, rater, share[item].unsqueeze(-1) * vote.unsqueeze(-2))
    prevalence = share.sum(0) + 0.01
    return prevalence / prevalence.sum(), confusion / confusion.sum(-1, keepdim=True)


def rows(item: Tensor, rater: Tensor, rating: Tensor, num_classes: int = 4) -> None:
    """Ratings in long format, in any order, as many of an item as there are."""
    prevalence = pyro.param(
        "prevalence", lambda: _from_rows(item, rater, rating, num_classes)[0], constraint=constraints.simplex
    )
    confusion = pyro.param(
        "confusion", lambda: _from_rows(item, rater, rating, num_classes)[1], constraint=constraints.simplex
    )
    with pyro.plate("items", int(item.max()) + 1):
        z = pyro.sample("z", dist.Categorical(prevalence))
    with pyro.plate("ratings", len(rating)):
        pyro.sample("rating", dist.Categorical(confusion[rater, z[item]]), obs=rating)
