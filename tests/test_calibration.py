"""G14: exact posteriors are calibrated, errors shrink as 1/√N, intervals cover what they say.

Simulation-based calibration (Talts et al. 2018): among draws of the posterior the rank of the value that made the data
is uniform. Replications are rows, or plates of one model, so that one E-step or one fit does all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em

positive = constraints.positive
DRAWS = 99


def _simulate(model: Any, *args: Any) -> dict[str, Tensor]:
    """One draw of all sites of a model, whose data are left open."""
    with pyro.get_param_store().scope():
        nodes = pyro.poutine.trace(model).get_trace(*args).nodes
    return {n: s["value"].detach() for n, s in nodes.items() if s["type"] == "sample"}


def _uniform(truth: Tensor, draws: Tensor, generator: np.random.Generator) -> float:
    """p-value of the ranks' uniformity, ties broken at random. Draws come first."""
    below = (draws < truth).sum(0).numpy().ravel()
    ties = (draws == truth).sum(0).numpy().ravel()
    ranks = below + generator.integers(0, ties + 1)
    counts = np.bincount(ranks // 10, minlength=10)
    return float(scipy.stats.chisquare(counts).pvalue)


def intercepts(y: Tensor | None = None) -> None:
    """Two groups' effects in every row, one of which is seen in both columns."""
    sd = pyro.param("sd", torch.tensor(0.7), constraint=positive)
    with pyro.plate("rows", 1500):
        a = pyro.sample("a", dist.Normal(0.5, 1.2))
        b = pyro.sample("b", dist.Normal(a, 0.8))
        pyro.sample("y", dist.Normal(torch.stack([a, a + b], -1), sd).to_event(1), obs=y)


def rates(y: Tensor | None = None) -> None:
    shape = pyro.param("shape", torch.tensor(2.0), constraint=positive)
    with pyro.plate("rows", 1500):
        rate = pyro.sample("rate", dist.Gamma(shape, 0.5))
        with pyro.plate("days", 3):
            pyro.sample("y", dist.Poisson(rate), obs=y)


def levels(y: Tensor | None = None) -> None:
    q = pyro.param("q", torch.tensor(0.6), constraint=positive)
    x = torch.tensor(0.0)
    with pyro.plate("sequences", 300):
        for t in pyro_em.markov(5):
            x = pyro.sample(f"x_{t}", dist.Normal(0.9 * x, q))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=None if y is None else y[t])


def classes(y: Tensor | None = None) -> None:
    w = pyro.param("w", torch.tensor([0.2, 0.3, 0.5]), constraint=constraints.simplex)
    with pyro.plate("rows", 3000):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(torch.tensor([-1.0, 0.5, 1.5])[z], 1.0), obs=y)


def chain(y: Tensor | None = None) -> None:
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    z: Any = 0
    with pyro.plate("sequences", 600):
        for t in pyro_em.markov(5):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(1.0 * z, 1.0), obs=None if y is None else y[t])


def _data(drawn: dict[str, Tensor]) -> Tensor:
    steps = [drawn[name] for name in drawn if name.startswith("y_")]
    return torch.stack(steps) if steps else drawn["y"]


@pytest.mark.parametrize(
    ("model", "sites"), [(intercepts, "a b"), (rates, "rate"), (levels, "x_0 x_2 x_4")], ids=lambda x: str(x)[:20]
)
def test_ranks_among_posterior_draws_are_uniform(model: Any, sites: str) -> None:
    drawn = _simulate(model)
    posterior = pyro_em.fit(model, _data(drawn), max_iter=0).posterior()
    draws = posterior.sample(DRAWS)
    generator = np.random.default_rng(0)
    for site in sites.split():
        base, _, step = site.partition("_")
        own = draws[site] if site in draws else draws[base][:, int(step)]
        truth = drawn[site]
        assert _uniform(truth, own.reshape(DRAWS, *truth.shape), generator) > 1e-3
        assert _uniform(truth, 1.3 * own.reshape(DRAWS, *truth.shape) + 0.4, generator) < 1e-3, "blind test"
        z = (truth - posterior.mean(site).reshape(truth.shape)) / posterior.variance(site).reshape(truth.shape).sqrt()
        assert abs(float(z.mean())) < 4 / np.sqrt(z.numel()) and abs(float(z.var()) - 1) < 0.25


@pytest.mark.parametrize(("model", "site"), [(classes, "z"), (chain, "z_3")], ids=["classes", "chain"])
def test_states_are_as_frequent_as_their_probabilities_say(model: Any, site: str) -> None:
    """Among rows of posterior probability near p a share p is in that state, by deciles of p."""
    drawn = _simulate(model)
    posterior = pyro_em.fit(model, _data(drawn), max_iter=0).posterior()
    p = posterior.marginal(site).probs.reshape(-1, posterior.marginal(site).probs.shape[-1])
    truth = torch.nn.functional.one_hot(drawn[site].long().reshape(-1), p.shape[-1]).double()
    p = p.double()
    for state in range(p.shape[-1]):
        order = p[:, state].argsort()
        for part in order.chunk(10):
            own, seen = p[part, state], truth[part, state]
            error = (own * (1 - own)).sum().sqrt()
            assert abs(float((seen - own).sum())) <= 4 * float(error) + 1e-9


def replicated(y: Tensor) -> None:
    """R mixtures side by side, y (N, R): locations (R, 2) and a scale (R,) each, weights known."""
    N, R = y.shape
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]).repeat(R, 1))
    sd = pyro.param("sd", torch.ones(R), constraint=positive)
    with pyro.plate("replications", R, dim=-1), pyro.plate("rows", N, dim=-2):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("y", dist.Normal(Vindex(mu)[torch.arange(R), z], sd), obs=y)


def _fitted(N: int, R: int, seed: int = 0) -> Any:
    rng = np.random.default_rng([N, seed])
    y = rng.normal(np.where(rng.random((N, R)) < 0.4, -1.5, 1.5), 0.8)
    result = pyro_em.fit(replicated, torch.tensor(y), tol=1e-7)
    assert result.converged
    return result


def test_errors_shrink_with_the_root_of_the_number_of_rows() -> None:
    sizes = [100, 400, 1600]
    errors = [float((_fitted(N, 80).params["mu"] - torch.tensor([-1.5, 1.5])).square().mean().sqrt()) for N in sizes]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.06)


def test_intervals_cover_what_they_say() -> None:
    """95 % intervals cover 93 to 97 % of 1200 true values, of enough rows that the likelihood is near its normal."""
    inside = []
    for seed in range(8):
        result = _fitted(600, 50, seed)
        errors = result.standard_errors()
        for name, truth in (("mu", torch.tensor([-1.5, 1.5])), ("sd", torch.tensor(0.8))):
            inside.append(((result.params[name] - truth).abs() <= 1.959964 * errors[name]).double().reshape(-1))
    assert len(torch.cat(inside)) == 1200
    assert 0.93 <= float(torch.cat(inside).mean()) <= 0.97
