"""Parameter expansion against what it says it is: the model with latents of free mean and covariance, as itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import factor_analysis, linear_mixed
from pyro_em import evaluator
from pyro_em.binding import bound_for
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.expansion import Expansion, expansion_of
from pyro_em.m_step.auto import MStep
from pyro_em.types import Params
from tests.dense import dense

D = 6
GROUP = torch.arange(6).repeat_interleave(4)
LATENT: Any = {"em": "latent"}


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(seed: int) -> Tensor:
    return _normal(40, 2, seed=seed) @ _normal(2, D, seed=seed + 1) + _normal(40, D, seed=seed + 2) + 1.0


ROWS = _rows(3)
X = _normal(24, seed=3)
Y = 1.0 + _normal(6, seed=4)[GROUP] + (0.5 + 0.6 * _normal(6, seed=5)[GROUP]) * X + 0.3 * _normal(24, seed=6)


def factors(x: Tensor, mean: Tensor, scale: Tensor, prior: bool = False) -> None:
    """Two factors whose distribution is given."""
    normal = dist.Normal(0.0, 1.0).expand([D, 2]).to_event(2)
    start = _normal(D, 2, seed=7)
    W = pyro.sample("W", normal) if prior else pyro.param("W", start)
    b = pyro.param("b", torch.linspace(0, 0.5, D))
    sd = pyro.param("sd", torch.linspace(0.8, 1.3, D), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mean, scale).to_event(1), infer=LATENT)
        pyro.sample("x", dist.Normal(z @ W.T + b, sd).to_event(1), obs=x)


def anchored(x: Tensor, mean: Tensor, scale: Tensor) -> None:
    """The same, where loadings were measured too: what they multiply is not free."""
    factors(x, mean, scale)
    pyro.sample("anchor", dist.Normal(pyro.param("W"), 0.5).to_event(2), obs=torch.ones(D, 2))


def any_factors(x: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """The same with any normal distribution of the factors."""
    W, b = pyro.param("W", torch.zeros(D, 2)), pyro.param("b", torch.zeros(D))
    sd = pyro.param("sd", torch.ones(D), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(mean, covariance))
        pyro.sample("x", dist.Normal(z @ W.T + b, sd).to_event(1), obs=x)


def scaled(x: Tensor, y: Tensor, group: Tensor, same: bool = False, fixed: bool = False) -> None:
    """Random intercepts and slopes of known distribution times their scales; with `same` one scale for both."""
    tau = pyro.param("tau", torch.tensor(0.7), constraint=constraints.positive)
    slope = tau if same else pyro.param("slope", torch.tensor(0.5))
    a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("groups", 6):
        e = pyro.sample("e", dist.Normal(0.0, 1.0), infer=LATENT)
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer=LATENT)
    with pyro.plate("rows", len(y)):
        more = 1.0 if fixed else slope
        pyro.sample("y", dist.Normal(a + b * x + tau * e[group] + more * u[group] * x, sd), obs=y)


def shared_loading(x: Tensor) -> None:
    """One loading for all measurements (parallel tests), and no mean."""
    w = pyro.param("w", torch.tensor(0.6))
    sd = pyro.param("sd", torch.ones(D), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 2.0).to_event(1))
        pyro.sample("x", dist.Normal((w * z).expand(*z.shape[:-1], D), sd).to_event(1), obs=x)


def _updates(model: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> tuple[MStep, Any, Expansion | None]:
    algorithm = options.get("algorithm", "em")
    problem = bound_for(model, args, {}, algorithm, None, None, None, {}, False).problem
    m = MStep(problem, options.get("m_step", "auto"), algorithm)
    engine = choose_engine(problem, m)
    return m, engine, expansion_of(engine, m)


STANDARD = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
OTHER = (torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([1.5, 0.7], dtype=torch.float64))


@pytest.mark.parametrize("prior", [STANDARD, OTHER], ids=["standard", "other"])
def test_it_is_the_model_with_a_free_distribution_of_the_latents(prior: tuple[Tensor, Tensor]) -> None:
    """The maximum over μ and Σ by the dense joint normal; the likelihood of the expanded model and of the result."""
    m, engine, expansion = _updates(factors, (ROWS, *prior))
    assert expansion is not None
    start: Params = m.problem.start
    posterior = dense(factors, (ROWS, *prior), start)
    z = posterior.mean["z"]
    mean = z.mean(0)
    spread = torch.stack([posterior.joint[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] for n in range(len(ROWS))])
    covariance = spread.mean(0) + (z - mean).T @ (z - mean) / len(z)

    expectation = engine.e_step(start)
    plain, _ = m.update(start, expectation)
    m.expansion = expansion
    params, _ = m.update(start, engine.e_step(start))
    free = dense(any_factors, (ROWS, mean, covariance), plain).log_evidence.detach()
    torch.testing.assert_close(
        dense(factors, (ROWS, *prior), params).log_evidence.detach(), free, rtol=1e-12, atol=1e-12
    )
    assert engine.e_step(params).log_likelihood == pytest.approx(float(free), rel=1e-12)
    assert float(free) > engine.e_step(plain).log_likelihood > expectation.log_likelihood


Blocks = list[tuple[str, int, int, bool]]  # site, latents, cells, whether their mean is free
TABLE: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Blocks]] = {
    "factors": (factors, (ROWS, *STANDARD), {}, [("z", 2, D, True)]),
    "ppca": (factor_analysis.ppca, (ROWS, 2), {}, [("z", 2, D, True)]),
    "low_rank": (factor_analysis.low_rank, (ROWS, 1), {}, [("x_factor", 1, D, True)]),
    "held means": (factors, (ROWS, *STANDARD), {"m_step": {"b": "fixed"}}, [("z", 2, D, False)]),
    "held loadings": (factors, (ROWS, *STANDARD), {"m_step": {"W": "fixed"}}, []),
    "measured loadings": (anchored, (ROWS, *STANDARD), {}, []),
    "prior of loadings": (factors, (ROWS, *STANDARD, True), {"algorithm": "map-em"}, []),
    "prior that does not count": (factors, (ROWS, *STANDARD, True), {}, [("z", 2, D, True)]),
    "scales": (scaled, (X, Y, GROUP), {}, [("e", 1, 1, True), ("u", 1, 1, True)]),
    "one scale for both": (scaled, (X, Y, GROUP, True), {}, []),
    "a slope of 1": (scaled, (X, Y, GROUP, False, True), {}, [("e", 1, 1, True)]),
    "shared loading": (shared_loading, (ROWS,), {}, [("z", 1, D, False)]),
    "covariance of its own": (linear_mixed.slopes, (X, GROUP, Y), {}, []),
    "markers": (factor_analysis.confirmatory, (ROWS, torch.tensor([0, 0, 0, 1, 1, 1])), {}, []),
}


@pytest.mark.parametrize("name", TABLE)
def test_which_latents_take_part(name: str) -> None:
    model, args, options, expected = TABLE[name]
    _, _, found = _updates(model, args, **options)
    blocks = () if found is None else found.blocks
    assert [(b.site, *b.slopes.shape, b.intercepts is not None) for b in blocks] == expected


@pytest.mark.parametrize("name", [name for name, (*_, blocks) in TABLE.items() if blocks])
def test_it_climbs_and_rests_where_em_does(name: str) -> None:
    model, args, options, _ = TABLE[name]
    m, engine, expansion = _updates(model, args, **options)
    assert expansion is not None
    params, m.expansion = m.problem.start, expansion
    for _ in range(10):
        before = engine.e_step(params)
        params, _ = m.update(params, before)
        assert engine.e_step(params).log_likelihood >= before.log_likelihood - 1e-13 * before.magnitude
    fit: dict[str, Any] = {**options, "accelerate": "anderson", "tol": 1e-9, "max_iter": 5000, "progress": False}
    pyro.clear_param_store()
    limit = pyro_em.fit(model, *args, **fit).params
    expectation = engine.e_step(limit)
    moved, _ = m.update(limit, expectation)
    assert engine.e_step(moved).log_likelihood == pytest.approx(expectation.log_likelihood, rel=1e-12)
    assert m.score(moved, engine.e_step(moved)) < 1e-6


@pytest.mark.parametrize("accelerate", ["squarem", "anderson"])
@pytest.mark.parametrize("name", ["factors", "scales"])
def test_accelerated_fits_take_it_recorded_or_not(name: str, accelerate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, _, _ = TABLE[name]
    fit: dict[str, Any] = {"accelerate": accelerate, "tol": 1e-8, "max_iter": 2000, "progress": False}
    recorded = pyro_em.fit(model, *args, **fit)
    with monkeypatch.context() as patched:
        patched.setattr(evaluator, "WARM", 10**6)
        pyro.clear_param_store()
        ordinary = pyro_em.fit(model, *args, **fit)
    assert recorded.history["objective"] == ordinary.history["objective"]
    pyro.clear_param_store()
    plain = pyro_em.fit(model, *args, max_iter=20_000, tol=1e-8, progress=False)
    assert recorded.log_likelihood == pytest.approx(plain.log_likelihood, abs=1e-6)
    assert 4 * recorded.history["num_e_steps"][-1] < plain.history["num_e_steps"][-1]


@pytest.mark.parametrize("seed", [0, 9])
def test_a_noise_that_vanishes_ends_the_fit_without_complaint(seed: int) -> None:
    """Heywood cases: the supremum is at a noise of 0, where residuals are differences of large terms."""
    pyro.clear_param_store()
    result = pyro_em.fit(factors, _rows(seed), *STANDARD, accelerate="anderson", tol=1e-8, progress=False)
    assert result.converged
    least = float(result.params["sd"].min())
    assert least < 1e-3
    # The square of a residual over its noise loses eps (1/σ)² where data are of size 1, 3e-9 at a σ of 3e-4.
    rounding = 4 * torch.finfo(torch.float64).eps / least**2
    assert all(b >= a - rounding for a, b in itertools.pairwise(result.history["objective"]))
