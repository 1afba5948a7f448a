"""The one-page edition and the full engine solve the same problems, under the same tests.

Every law here runs on `pyro_em.mini.fit` and on `pyro_em.fit`: the objective never falls, it is the evidence
that enumeration finds, its limit is stationary, and classic runs are met digit by digit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

import pyro_em
import pyro_em.mini
from tests.oracles import enumerate_model, log_prior

Fit = Callable[..., Any]

BACKENDS = [pytest.param(pyro_em.mini.fit, id="mini"), pytest.param(pyro_em.fit, id="full")]
both = pytest.mark.parametrize("fit", BACKENDS)


def gaussian_mixture(x: Tensor) -> None:  # x: (N, D)
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([[-1.0, 0.5], [1.0, 0.0]]))
    sd = pyro.param("sd", torch.ones(2, 2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], sd[z]).to_event(1), obs=x)


def poisson_mixture(y: Tensor) -> None:  # y: (N,)
    w = pyro.param("w", torch.tensor([0.287, 0.713]), constraint=constraints.simplex)
    rate = pyro.param("rate", torch.tensor([1.101, 2.582]), constraint=constraints.positive)
    with pyro.plate("days", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Poisson(rate[z]), obs=y)


def latent_classes(x: Tensor) -> None:  # x: (N, D) of zeros and ones
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    p = pyro.param(
        "p", torch.tensor([[0.3, 0.4, 0.35, 0.6], [0.6, 0.7, 0.5, 0.3]]), constraint=constraints.unit_interval
    )
    with pyro.plate("rows", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("items", x.shape[-1], dim=-1) as items:
            pyro.sample("x", dist.Bernoulli(Vindex(p)[z, items]), obs=x)


def hidden_markov(x: Tensor) -> None:  # x: (S, T)
    start = pyro.param("start", torch.tensor([0.6, 0.4]), constraint=constraints.simplex)
    move = pyro.param("move", torch.tensor([[0.7, 0.3], [0.2, 0.8]]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-0.5, 0.8]))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("series", len(x)):
        z: Any = None
        for t in pyro.markov(range(x.shape[-1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else Vindex(move)[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], sd), obs=x[:, t])


def saturating_mixture(dose: Tensor, y: Tensor) -> None:  # (N,) each
    """No closed form: the location is a nonlinear curve of two parameters."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    top = pyro.param("top", torch.tensor([1.0, 3.0]))
    half = pyro.param("half", torch.tensor(1.0), constraint=constraints.positive)
    sd = pyro.param("sd", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(top[z] * dose / (half + dose), sd), obs=y)


def bayesian_classes(x: Tensor) -> None:  # x: (N, D) of zeros and ones
    w = pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 3.0])))
    with pyro.plate("classes", 2, dim=-2), pyro.plate("answers", x.shape[-1], dim=-1):
        p = pyro.sample("p", dist.Beta(2.0, 1.5))
    with pyro.plate("rows", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("items", x.shape[-1], dim=-1) as items:
            pyro.sample("x", dist.Bernoulli(Vindex(p)[z, items]), obs=x)


def coins(heads: Tensor) -> None:  # heads of 10 tosses: (N,)
    p = pyro.param("p", torch.tensor([0.6, 0.5]), constraint=constraints.unit_interval)
    with pyro.plate("rounds", len(heads), dim=-2):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        with pyro.plate("tosses", 10, dim=-1):
            pyro.sample("x", dist.Bernoulli(p[z]), obs=(torch.arange(10) < heads[:, None]).double())


@dataclass(frozen=True)
class Problem:
    model: Callable[..., None]
    args: tuple[Tensor, ...]
    plate: str | None
    algorithms: tuple[str, ...] = ("em", "gem")
    init: dict[str, Tensor] = field(default_factory=dict)


def _problems() -> list[Problem]:
    rng = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    group = (torch.arange(30) % 3 == 0).double()
    points = normal(30, 2) * torch.tensor([0.7, 1.2]) + group[:, None] * torch.tensor([2.5, -1.0])
    counts = torch.poisson(1.0 + 5 * group, generator=rng)
    answers = torch.bernoulli(0.25 + 0.5 * group[:, None].expand(30, 4), generator=rng)
    path = torch.tensor([[-1.0, -1, 1, 1], [1.0, 1, 1, -1], [-1.0, 1, 1, 1], [-1.0, -1, -1, -1], [1.0, -1, -1, 1]])
    series = 1.5 * path + 0.5 * normal(5, 4)
    dose = torch.linspace(0.2, 4.0, 30, dtype=torch.float64)
    response = (1.0 + 2.5 * group) * dose / (0.6 + dose) + 0.15 * normal(30)
    map_start = {
        "w": torch.tensor([0.5, 0.5], dtype=torch.float64),
        "p": torch.tensor([[0.3, 0.4, 0.35, 0.6], [0.6, 0.7, 0.5, 0.3]], dtype=torch.float64),
    }
    return [
        Problem(gaussian_mixture, (points,), "rows"),
        Problem(poisson_mixture, (counts,), "days"),
        Problem(latent_classes, (answers,), "rows"),
        Problem(hidden_markov, (series,), "series"),
        Problem(saturating_mixture, (dose, response), "rows"),
        Problem(bayesian_classes, (answers,), "rows", ("em", "map-em"), map_start),
    ]


CASES = [pytest.param(p, a, id=f"{p.model.__name__}-{a}") for p in _problems() for a in p.algorithms]


def _objective(problem: Problem, params: dict[str, Tensor], algorithm: str) -> Tensor:
    """log p(x | params) by enumeration in plain Pyro, plus the log prior for map-em."""
    evidence = enumerate_model(problem.model, problem.args, params, problem.plate).log_evidence
    return evidence + log_prior(problem.model, problem.args, params) if algorithm == "map-em" else evidence


@both
@pytest.mark.parametrize(("problem", "algorithm"), CASES)
def test_monotone_and_equal_to_enumeration(fit: Fit, problem: Problem, algorithm: str) -> None:
    result = fit(problem.model, *problem.args, algorithm=algorithm, init=problem.init, max_iter=12, tol=0.0)
    assert result.num_iterations == 12
    assert not result.converged

    climbed = torch.tensor(result.history["objective"], dtype=torch.float64)
    assert (climbed.diff() >= -1e-13 * climbed.abs().max()).all()
    assert climbed[-1] > climbed[0] + 0.1

    exact = enumerate_model(problem.model, problem.args, result.params, problem.plate).log_evidence
    assert result.log_likelihood == pytest.approx(float(exact), rel=1e-12)
    if algorithm == "map-em":
        prior = float(log_prior(problem.model, problem.args, result.params))
        assert result.log_posterior == pytest.approx(float(exact) + prior, rel=1e-12)


@both
@pytest.mark.parametrize(("problem", "algorithm"), CASES)
def test_the_limit_is_stationary(fit: Fit, problem: Problem, algorithm: str) -> None:
    """The gradient of the enumerated objective, in unconstrained coordinates, is what `tol` promises."""
    result = fit(problem.model, *problem.args, algorithm=algorithm, init=problem.init, max_iter=500, tol=1e-4)
    assert result.converged

    supports = pyro_em.mini.Program(lambda: problem.model(*problem.args), False).maps
    free = {n: supports[n].inv(value).detach().requires_grad_() for n, value in result.params.items()}
    params = {n: supports[n](u) for n, u in free.items()}
    gradient = torch.autograd.grad(_objective(problem, params, algorithm), [*free.values()])
    size = problem.args[0].numel()
    assert max(float(g.abs().max()) for g in gradient) / size < 1e-4


@pytest.mark.parametrize(("problem", "algorithm"), [c for c in CASES if c.values[1] != "gem"])
def test_mini_and_full_take_the_same_steps(problem: Problem, algorithm: str) -> None:
    mini, full = (
        f(problem.model, *problem.args, algorithm=algorithm, init=problem.init, max_iter=5, tol=0.0)
        for f in (pyro_em.mini.fit, pyro_em.fit)
    )
    assert mini.params.keys() == full.params.keys()
    for name, value in mini.params.items():
        torch.testing.assert_close(value, full.params[name], rtol=0.0, atol=1e-6)


# Do & Batzoglou 2008: five rounds of ten tosses with one of two coins. A Bernoulli model lacks their binomial
# coefficients, a constant that is added back below.
COINS = {
    0: (-11.3205865761, [0.6, 0.5]),
    1: (-10.0859820045, [0.713012235401, 0.581339308314]),
    2: (-9.94984013559, [0.745292036082, 0.569255750172]),
    10: (-9.7969245597, [0.796744149475, 0.519658662204]),
}


@both
@pytest.mark.parametrize("steps", COINS)
def test_two_coins_digit_by_digit(fit: Fit, steps: int) -> None:
    heads = torch.tensor([5.0, 9.0, 8.0, 4.0, 7.0])
    log_likelihood, p = COINS[steps]
    result = fit(coins, heads, max_iter=steps, tol=0.0)
    choose = torch.lgamma(torch.tensor(11.0)) - torch.lgamma(heads + 1) - torch.lgamma(11 - heads)
    assert result.num_iterations == steps
    assert result.log_likelihood + float(choose.sum()) == pytest.approx(log_likelihood, abs=1e-9)
    torch.testing.assert_close(result.params["p"], torch.tensor(p), rtol=0.0, atol=1e-10)


# Hasselblad 1969: days with k = 0, ..., 9 death notices of women over 80 in the London Times.
DAYS = torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1])
LONDON_TIMES = {
    0: (-1990.03799918, [0.287, 0.713], [1.101, 2.582]),
    1: (-1990.03246749, [0.28705975633, 0.71294024367], [1.10537382426, 2.58033682662]),
    5: (-1990.02465039, [0.287879479645, 0.712120520355], [1.11507698739, 2.57811209086]),
    100: (-1989.97729284, [0.313015532112, 0.686984467888], [1.16947268339, 2.60685834397]),
}


@both
@pytest.mark.parametrize("steps", LONDON_TIMES)
def test_london_times_digit_by_digit(fit: Fit, steps: int) -> None:
    log_likelihood, w, rate = LONDON_TIMES[steps]
    result = fit(poisson_mixture, torch.arange(10.0).repeat_interleave(DAYS), max_iter=steps, tol=0.0)
    assert result.log_likelihood == pytest.approx(log_likelihood, abs=1e-8)  # 12 digits are published
    torch.testing.assert_close(result.params["w"], torch.tensor(w), rtol=0.0, atol=1e-9)
    torch.testing.assert_close(result.params["rate"], torch.tensor(rate), rtol=0.0, atol=1e-9)


# What follows is about mini alone: its ring, its proofs, its refusals.


def test_the_ring_has_exact_gradients() -> None:
    """Where Pyro's clamps (a logit of -60) and where torch.logsumexp divides 0 by 0 (an impossible state)."""
    factor: Any = torch.tensor([[0.0, -60.0], [-torch.inf, -torch.inf]], requires_grad=True)
    prior: Any = torch.tensor([-1.0, -2.0], requires_grad=True)
    factor._pyro_dims, prior._pyro_dims = "ab", "a"
    total = pyro_em.mini.StableLogRing().sumproduct([factor, prior], {"a", "b"})
    by_factor, by_prior = torch.autograd.grad(total, [factor, prior])
    small = torch.tensor(-60.0).exp() / (1 + torch.tensor(-60.0).exp())
    torch.testing.assert_close(by_factor, torch.tensor([[1.0, small], [0.0, 0.0]]), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(by_prior, torch.tensor([1.0, 0.0]))


def _sine(y: Tensor) -> None:
    """sin has value 0 and slope 1 at the start 0: there, and only there, `mu` looks gathered."""
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu.sin(), 1.0), obs=y)


def test_a_wrong_proof_is_corrected_by_the_climb() -> None:
    result = pyro_em.mini.fit(_sine, torch.tensor([0.3, 0.9]), tol=1e-6)
    assert result.converged
    assert float(result.params["mu"].sin()) == pytest.approx(0.6, abs=1e-5)
