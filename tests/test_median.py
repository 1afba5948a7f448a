"""Mixtures of Laplace densities: weighted medians and mean absolute deviations, against all candidates one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.errors import Refusal
from tests.classics import positive, simplex

RNG = np.random.default_rng(23)
T = partial(torch.tensor, dtype=torch.float64)
X = torch.as_tensor(np.r_[RNG.laplace(-2.0, 0.5, 40), RNG.laplace(3.0, 1.5, 31)])
START = {"w": T([0.4, 0.6]), "m": T([-1.0, 2.0]), "b": T([1.0, 0.8])}
WEIGHTS = torch.as_tensor(RNG.integers(0, 4, 71)).double()


def mixture(x: Tensor, common: bool = False) -> None:
    w = pyro.param("w", torch.ones(2) / 2, constraint=simplex)
    m = pyro.param("m", torch.tensor([-1.0, 1.0]))
    b = pyro.param("b", torch.ones(1 if common else 2), constraint=positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Laplace(m[z], b[0] if common else b[z]), obs=x)


def _posterior(weights: Tensor | None) -> Tensor:
    """Responsibilities (N, 2) at the start, with the weights of the rows."""
    joint = START["w"].log() + dist.Laplace(START["m"], START["b"]).log_prob(X.unsqueeze(-1))
    return joint.softmax(-1) * (1.0 if weights is None else weights.unsqueeze(-1))


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("common", [False, True], ids=["scales", "one scale"])
def test_an_update_is_the_best_of_all_candidates(weights: Tensor | None, common: bool) -> None:
    """Q is concave with its kinks at the data: its maximum is at one of them."""
    init = {**START, "b": START["b"][:1]} if common else START
    options: dict[str, Any] = {} if weights is None else {"weights": {"rows": weights}}
    result = pyro_em.fit(mixture, X, common, init=init, max_iter=1, tol=0, **options)
    r = _posterior(weights)
    if common:
        joint = START["w"].log() + dist.Laplace(START["m"], START["b"][0]).log_prob(X.unsqueeze(-1))
        r = joint.softmax(-1) * (1.0 if weights is None else weights.unsqueeze(-1))
    distance = (X.unsqueeze(0) - X.unsqueeze(1)).abs()  # candidate, datum
    costs = distance @ r
    best = costs.argmin(0)
    torch.testing.assert_close(result.params["m"], X[best], rtol=0.0, atol=0.0)
    found = costs[best, torch.arange(2)]
    scale = found.sum() / r.sum() if common else found / r.sum(0)
    torch.testing.assert_close(result.params["b"], scale.expand(init["b"].shape), rtol=1e-13, atol=0.0)
    reasons = {row.name: row.reason for row in result.plan.m_step}
    assert (reasons["m"], reasons["b"]) == ("weighted median (Laplace.loc)", "ratio of moments (Laplace.scale)")


def test_a_fit_rises_and_ends_at_a_maximum() -> None:
    """G1, G7: no data point in place of a location, with its scale, is better; the engine is a compiled one."""
    result = pyro_em.fit(mixture, X, init=START, tol=1e-8)
    assert result.converged and "predicted" in str(result.plan)
    assert (np.diff(result.history["objective"]) >= -1e-11).all()

    def likelihood(m: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return (w.log() + dist.Laplace(m, b).log_prob(X.unsqueeze(-1))).logsumexp(-1).sum()

    m, b, w = (result.params[n] for n in ("m", "b", "w"))
    top = float(likelihood(m, b, w))
    assert result.log_likelihood == pytest.approx(top, rel=1e-12)
    for k in range(2):
        for move in (1e-3, 1e-2, 0.1, 0.5):
            for sign in (-1, 1):
                away = m.clone()
                away[k] += sign * move
                assert float(likelihood(away, b, w)) < top


def test_one_sample_is_numpys_median() -> None:
    """Of an even number the middle; rows behind a mask do not count."""
    x = torch.tensor([5.0, 1.0, 9.0, 2.0, 7.0, float("nan")])

    def model(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor(0.0))
        b = pyro.param("b", torch.tensor(1.0), constraint=positive)
        with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=~x.isnan() & (x != 9)):
            pyro.sample("x", dist.Laplace(m, b), obs=x)

    result = pyro_em.fit(model, x)
    assert result.converged
    assert float(result.params["m"]) == np.median([5.0, 1.0, 2.0, 7.0])
    assert float(result.params["b"]) == pytest.approx(np.abs(np.array([5.0, 1.0, 2.0, 7.0]) - 3.5).mean(), rel=1e-14)


def test_one_location_of_two_sites() -> None:
    """Of unequal known precision: the median of all data, weighted by it."""
    one, two = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])

    def model() -> None:
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("first", 3):
            pyro.sample("one", dist.Laplace(m, 0.2), obs=one)
        with pyro.plate("second", 4):
            pyro.sample("two", dist.Laplace(m, 1.0), obs=two)

    result = pyro_em.fit(model)
    cost = 5 * (one - one.unsqueeze(-1)).abs().sum(-1), (two - one.unsqueeze(-1)).abs().sum(-1)
    assert float(result.params["m"]) == float(one[(cost[0] + cost[1]).argmin()])


def test_a_component_without_rows_keeps_its_location() -> None:
    def model(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor([0.0, 7.0]))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Laplace(m[torch.zeros(len(x), dtype=torch.long)], 1.0), obs=x)

    with pytest.warns(pyro_em.errors.UnidentifiedParameter, match="'m'"):
        result = pyro_em.fit(model, X)
    assert result.params["m"].tolist() == [float(X.median()), 7.0]


def test_least_absolute_deviations_are_refused() -> None:
    def model(x: Tensor) -> None:
        b = pyro.param("slope", torch.zeros(2))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Laplace(b[0] + b[1] * torch.arange(len(x)), 1.0), obs=x)

    with pytest.raises(Refusal, match="'slope' enters the location of a Laplace density"):
        pyro_em.fit(model, X)
