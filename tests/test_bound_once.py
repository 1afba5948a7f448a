"""Binding of Gaussian latents: every question is asked once, and what is read of all columns together is right."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.evidence.columns import DOUBLE, _shared_index
from tests import zoo_latent as z


def test_a_model_runs_a_dozen_times() -> None:
    """Those of a whole fit, the check of its result included; twenty, before runs served several questions."""
    calls = []

    def model(x: Tensor, size: int) -> None:
        calls.append(len(x))
        z.factor_analysis(x, size)

    generator = torch.Generator().manual_seed(0)
    data = torch.randn(3000, 30, generator=generator, dtype=torch.float64)
    result = pyro_em.fit(model, data, 2, max_iter=3, tol=0)
    assert "31 pseudo-rows" in str(result.plan)
    assert len(calls) <= 14


def _tangents(index: list[list[int]], slopes: Tensor, draws: Tensor, shares: Tensor) -> tuple[list[Tensor], ...]:
    """Of rows (N, P) whose column c reads element index[c][n]."""
    ones = [slope.clone() for slope in slopes]
    at = [torch.tensor(own) for own in index]
    code = sum(w * t * (i + 1.0).unsqueeze(-1) for w, t, i in zip(shares, ones, at, strict=True))
    draw = sum(t * own[i].unsqueeze(-1) for t, own, i in zip(ones, draws, at, strict=True))
    assert isinstance(code, Tensor) and isinstance(draw, Tensor)
    return ones, [code, draw]


def test_all_columns_are_read_by_one_code() -> None:
    g = torch.Generator().manual_seed(0)
    slopes, draws, shares = (torch.randn(*shape, generator=g) for shape in ((3, 5, 2), (3, 4), (3,)))
    slopes[1] = 0.0  # a column that no row reads
    slopes[2, 3] = 0.0  # one that a row does not read
    rows = [2, 0, 3, 1, 1]
    ones, (code, draw) = _tangents([rows, rows, rows], slopes, draws, shares)
    found = _shared_index(ones, code, draw, draws, shares, DOUBLE)
    assert found is not None and found[1] is None
    assert found[0] is not None and found[0].tolist() == rows
    assert found[2] is not None and found[2].tolist() == [2, 0, 3, -1, 1]


@pytest.mark.parametrize("other", [[2, 0, 3, 1, 2], [0, 1, 2, 3, 0]])
def test_columns_that_read_other_elements_are_looked_at_one_by_one(other: list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    slopes, draws, shares = (torch.randn(*shape, generator=g) for shape in ((2, 5, 2), (2, 4), (2,)))
    ones, (code, draw) = _tangents([[2, 0, 3, 1, 1], other], slopes, draws, shares)
    assert _shared_index(ones, code, draw, draws, shares, DOUBLE) is None


def test_shares_that_cancel_tell_nothing() -> None:
    slopes = torch.tensor([[[2.0]], [[-1.0]]])
    draws, shares = torch.tensor([[0.3], [0.7]]), torch.tensor([0.5, 1.0])
    ones, (code, draw) = _tangents([[0], [0]], slopes, draws, shares)
    assert _shared_index(ones, code, draw, draws, shares, DOUBLE) is None


def test_columns_of_one_latent_read_at_two_elements() -> None:
    """y_n ~ b[g_n, 0] + b[h_n, 1]: the evidence is that of the dense normal."""
    g = torch.Generator().manual_seed(1)
    one, two = torch.arange(6) % 3, torch.randint(3, (6,), generator=g)
    y = torch.randn(6, generator=g)

    def model(y: Tensor) -> None:
        mean = pyro.param("mean", torch.tensor(0.2))
        spread = pyro.param("spread", torch.tensor(1.5), constraint=constraints.positive)
        with pyro.plate("groups", 3):
            b = pyro.sample("b", dist.Normal(torch.zeros(2), spread).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean + b[..., one, 0] + b[..., two, 1], 1.0), obs=y)

    result = pyro_em.fit(model, y, max_iter=0)
    same = [(own.unsqueeze(0) == own.unsqueeze(1)).double() for own in (one, two)]
    covariance = 1.5**2 * (same[0] + same[1]) + torch.eye(6)
    expected = dist.MultivariateNormal(torch.full((6,), 0.2), covariance).log_prob(y)
    assert result.log_likelihood == pytest.approx(float(expected), rel=1e-12)
