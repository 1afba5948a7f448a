"""Long format: rows that couple the elements of a discrete latent are refused, and indices out of range are errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em import Refusal


def test_rows_that_couple_elements_are_refused() -> None:
    y, i, j = torch.randn(9), torch.arange(9) % 3, torch.arange(9) % 4

    def pairs(y: Tensor, i: Tensor, j: Tensor) -> None:
        table = pyro.param("table", torch.tensor([[0.1, 0.5], [0.7, -0.3]]))
        with pyro.plate("nodes", 4):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(table[z[i], z[j]], 1.0), obs=y)

    def crossing(y: Tensor, i: Tensor, j: Tensor) -> None:
        table = pyro.param("table", torch.tensor([[0.1, 0.5], [0.7, -0.3]]))
        with pyro.plate("rows_of", 3):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        with pyro.plate("columns_of", 4):
            w = pyro.sample("w", dist.Categorical(torch.ones(2) / 2))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(table[z[i], w[j]], 1.0), obs=y)

    def alone(y: Tensor, i: Tensor, j: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.1, 0.5]))
        with pyro.plate("groups", 3):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("y", dist.Normal(loc[z[2]], 1.0), obs=y[0])

    with pytest.raises(Refusal, match=r"'y'.*several elements of the discrete latent 'z'.*2\^4 states.*'svi'"):
        pyro_em.fit(pairs, y, i, j)
    with pytest.raises(Refusal, match=r"'y'.*'z' \(3 elements\) and 'w' \(4 elements\).*exponential.*'svi'"):
        pyro_em.fit(crossing, y, i, j)
    with pytest.raises(Refusal, match=r"'y'.*one element of the latent 'z'.*a plate \(of size 1"):
        pyro_em.fit(alone, y, i, j)


@pytest.mark.parametrize("latent", ["z", "b"])
@pytest.mark.parametrize("select", [False, True])
def test_an_index_out_of_range(latent: str, select: bool) -> None:
    """Of a discrete and of a continuous latent: Python takes -1 for the last group."""

    def model(group: Tensor, y: Tensor, seen: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.1, 0.5] if latent == "z" else 0.1))
        with pyro.plate("groups", 3):
            if latent == "z":
                value = loc[pyro.sample("z", dist.Categorical(torch.ones(2) / 2))]
            else:
                value = pyro.sample("b", dist.Normal(loc, 1.0))
        with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
            own = torch.index_select(value, 0, group) if select else value[group]
            pyro.sample("y", dist.Normal(own, 1.0), obs=y)

    y, seen = torch.tensor([0.1, 0.7, -0.4, 1.3]), torch.ones(4, dtype=torch.bool)
    with pytest.raises(pyro_em.InputError, match=rf"'{latent}'.*0 to 2.*by 3 in row 2 of the index"):
        pyro_em.fit(model, torch.tensor([0, 1, 3, 2]), y, seen)
    group = torch.tensor([0, -1, 2, -1])
    said = r"by -1 in row 1 \(and 1 more\)" if select else r"row 1 \(and 1 more\).*below 0"
    with pytest.raises(
        pyro_em.InputError, match=f"(?s)'{latent}'.*{said}|{said}.*'{latent}'|row 1.*'{latent}'.*below 0"
    ):
        pyro_em.fit(model, group, y, seen)
    if not select:  # rows behind a mask may have any index
        masked = pyro_em.fit(model, group, y, group >= 0, max_iter=2, tol=0)
        alone = pyro_em.fit(model, group[group >= 0], y[group >= 0], seen[:2], max_iter=2, tol=0)
        assert masked.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-12)


def test_groups_beside_a_loop_over_time() -> None:
    """A latent read by an index beside `pyro_em.markov` is refused, and what the sentence says to write is fitted."""
    y, group = torch.tensor([0.1, 2.2, 1.9, 0.3, 2.0, 0.2]), torch.tensor([0, 1, 1, 0, 1, 0])

    def model(loop: Callable[[int], Iterable[int]]) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 2.0]))
        with pyro.plate("groups", 2):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.6, 0.4])))
        with pyro.plate("rows", len(y)):
            pyro.sample("v", dist.Normal(mu[c[group]], 1.0), obs=y)
        z = torch.tensor(0)
        for t in loop(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.6, 0.4], [0.3, 0.7]])[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    with pytest.raises(Refusal, match=r"beside a pyro_em.markov loop.*or the loop as `for t in pyro.markov\(range"):
        pyro_em.fit(model, pyro_em.markov)

    found = pyro_em.fit(model, lambda steps: pyro.markov(range(steps)), max_iter=0)
    # The groups are independent of the chain: each has the sum over its class, written out.
    density = dist.Normal(torch.tensor([[0.0], [2.0]]), 1.0).log_prob(y)
    logs = torch.stack([density[:, group == g].sum(-1) for g in range(2)], -1) + torch.tensor([0.6, 0.4]).log()[:, None]
    table, emission = torch.tensor([[0.6, 0.4], [0.3, 0.7]]), dist.Normal(torch.tensor([0.0, 2.0]), 1.0)
    chain = dist.DiscreteHMM(torch.tensor([1.0, 0.0]).log(), table.log(), emission)
    expected = logs.logsumexp(0).sum() + chain.log_prob(y)
    assert found.log_likelihood == pytest.approx(float(expected), rel=1e-12)
