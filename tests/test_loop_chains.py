"""The laws of EM over loops with Gaussian states, against the dense joint normal of the model as written.

G1 monotone, G2 gap zero, G3 posterior, G4 Fisher's identity, G6 the M-step is the argmax, G9 determinism.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.errors import InputError, Refusal
from pyro_em.state_space.smoother import smooth
from tests.classics import positive
from tests.dense import dense, expected_log_joint
from tests.laws import largest_score, perturbed, to_constrained, to_free
from tests.loop_chains import BY_NAME, LOOP_PROBLEMS, LoopProblem
from tests.mixed_chains import MIXED_PROBLEMS
from tests.oracles import constraints, log_prior

EPS = torch.finfo(torch.float64).eps
ALL = [*LOOP_PROBLEMS, *MIXED_PROBLEMS]
every = pytest.mark.parametrize("problem", ALL, ids=lambda p: p.name)
UNWEIGHTED = [p for p in ALL if not p.options]


def _fit(problem: LoopProblem, **options: Any) -> Any:
    own = {"algorithm": problem.algorithm, **problem.options, **options}
    return pyro_em.fit(problem.model, *problem.args, init=problem.start(), **own)


def _objective(problem: LoopProblem, params: Any) -> Tensor:
    if problem.options:  # weights of the sequences: one dense normal for each
        rows = [tuple(x[:, [i]] for x in problem.args) for i in range(problem.args[0].shape[1])]
        parts = [dense(problem.model, own, params).log_evidence for own in rows]
        return (problem.options["weights"]["sequences"] * torch.stack(parts)).sum()
    value = dense(problem.model, problem.args, params).log_evidence
    return value + log_prior(problem.model, problem.args, params) if problem.algorithm == "map-em" else value


@every
def test_monotone_and_closed(problem: LoopProblem) -> None:
    """G1 and G2: both ends are the joint normal's, and nothing but Kalman kernels and closed forms was needed."""
    result = _fit(problem, max_iter=12, tol=0)
    objective = np.array(result.history["objective"])
    assert (np.diff(objective) >= -16 * EPS * np.abs(objective).max()).all()
    assert objective[-1] > objective[0]
    assert objective[0] == pytest.approx(float(_objective(problem, problem.start()).detach()), rel=1e-12)
    assert objective[-1] == pytest.approx(float(_objective(problem, result.params).detach()), rel=1e-12)
    assert "Kalman filter" in " ".join(row.reason for row in result.plan.e_step)
    assert result.plan.engine.startswith("inside")
    assert ({row.route for row in result.plan.m_step} == {"closed"}) == problem.closed


@every
def test_score_is_the_gradient_of_the_marginal_likelihood(problem: LoopProblem) -> None:
    """G4."""
    support = constraints(problem.model, problem.args, problem.init)
    free = {n: u.requires_grad_() for n, u in to_free(problem.init, support).items()}
    value = _objective(problem, to_constrained(free, support))
    gradient = dict(zip(free, torch.autograd.grad(value, list(free.values())), strict=True))
    result = _fit(problem, max_iter=0)
    largest = largest_score(gradient, problem.init, support)
    assert result.history["score"][0] * result.problem.graph.num_observations == pytest.approx(largest, rel=1e-8)


@pytest.mark.parametrize("problem", [p for p in UNWEIGHTED if not p.completes], ids=lambda p: p.name)
def test_m_step_is_the_argmax(problem: LoopProblem) -> None:
    """G6."""
    q = expected_log_joint(problem.model, problem.args, problem.start())
    updated = _fit(problem, max_iter=1, tol=0).params
    support = constraints(problem.model, problem.args, updated)

    def at(params: Any) -> Tensor:
        value = q(params)
        return value + log_prior(problem.model, problem.args, params) if problem.algorithm == "map-em" else value

    free = {n: u.detach().requires_grad_() for n, u in to_free(updated, support).items()}
    best = at(to_constrained(free, support))
    gradient = torch.autograd.grad(best, list(free.values()))
    assert max(float(g.abs().max()) for g in gradient) <= 1e-9 * problem.args[0].numel()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale in (1e-3, 1e-1, 1.0):
            for _ in range(5):
                neighbour = float(at(perturbed(updated, support, scale, generator)))
                assert neighbour <= float(best) + 16 * EPS * abs(float(best))


@pytest.mark.parametrize("problem", UNWEIGHTED, ids=lambda p: p.name)
def test_states_are_those_of_the_joint_normal(problem: LoopProblem) -> None:
    """G3: means and variances of every state under its own name, sequences under theirs, modes and draws."""
    result = _fit(problem, max_iter=1, tol=0)
    truth = dense(problem.model, problem.args, result.params)
    posterior = result.posterior()
    close = {"rtol": 1e-9, "atol": 1e-10}
    for name, mean in truth.mean.items():
        own = posterior.mean(name)
        torch.testing.assert_close(own.reshape(mean.shape), mean, **close)
        torch.testing.assert_close(posterior.variance(name).reshape(mean.shape), truth.variance[name], **close)
        marginal = posterior.marginal(name)
        torch.testing.assert_close(marginal.variance.reshape(mean.shape), truth.variance[name], **close)
        if problem in LOOP_PROBLEMS:
            torch.testing.assert_close(posterior.mode()[name].reshape(mean.shape), mean, **close)
    for name in posterior.latents:
        assert posterior.sample(3)[name].shape == (3, *posterior.mean(name).shape)


def test_sequences_have_time_first() -> None:
    for name, latent, shape in (("system", "x", (4, 3, 2)), ("wandering", "x", (7, 2)), ("factor", "f", (6,))):
        posterior = _fit(BY_NAME[name], max_iter=0).posterior()
        assert posterior.latents == (latent,)
        assert posterior.mean(latent).shape == shape
        assert torch.equal(posterior.mean(latent)[2], posterior.mean(f"{latent}_2"))


def test_draws_have_the_moments_of_the_posterior() -> None:
    """Across steps too: the variance of a difference of two levels."""
    posterior = _fit(BY_NAME["local_level"], max_iter=0).posterior()
    torch.manual_seed(0)
    draws = posterior.sample(20_000)["x"]
    torch.testing.assert_close(draws.mean(0), posterior.mean("x"), rtol=0, atol=0.02)
    states = posterior.states("y")
    lag = states.lag_covariance[:, 0, 0]
    v = posterior.variance("x")
    expected = v[1:] + v[:-1] - 2 * lag
    torch.testing.assert_close((draws[:, 1:] - draws[:, :-1]).var(0), expected, rtol=0.05, atol=0.01)


def test_the_two_loops_take_the_same_steps() -> None:
    together, alone = (_fit(BY_NAME[name], max_iter=6, tol=0) for name in ("local_level", "step_by_step"))
    assert together.history["objective"] == pytest.approx(alone.history["objective"], rel=1e-13)
    for name, value in together.params.items():
        torch.testing.assert_close(alone.params[name], value, rtol=1e-12, atol=0)
    again = _fit(BY_NAME["local_level"], max_iter=6, tol=0)
    assert all(torch.equal(again.params[n], v) for n, v in together.params.items())


def test_missing_cells_in_all_ways() -> None:
    """NaN under missing="nan", a mask and `obs_mask` are one; some cells of a vector are left out exactly."""
    problem = BY_NAME["autoregression"]
    y, seen = problem.args

    def model(y: Tensor, obs_mask: bool) -> None:
        phi, mu = pyro.param("phi", torch.tensor(0.6)), pyro.param("mu", torch.tensor(0.3))
        s, x = pyro.param("s", torch.tensor(1.0), constraint=positive), torch.tensor(0.0)
        for t in pyro_em.markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(phi * x, s))
            known = {"obs_mask": seen[t]} if obs_mask else {}
            pyro.sample(f"y_{t}", dist.Normal(mu + x, 0.5), obs=y[t], **known)

    gaps = torch.where(seen, y, torch.nan)
    masked = _fit(problem, max_iter=3, tol=0)
    nan = pyro_em.fit(model, gaps, False, missing="nan", max_iter=3, tol=0)
    by_mask = pyro_em.fit(model, gaps, True, max_iter=3, tol=0)
    for other in (nan, by_mask):
        assert other.history["objective"] == pytest.approx(masked.history["objective"], rel=1e-13)
    imputed = nan.impute()["y"]
    states = nan.posterior().mean("x") + nan.params["mu"]
    assert imputed.missing.shape == imputed.mean.shape == imputed.variance.shape == y.shape
    torch.testing.assert_close(imputed.mean[~seen], states[~seen])
    assert torch.equal(imputed.sample(2)[:, seen], y[seen].expand(2, -1))
    with pytest.raises(InputError, match="NaN"):
        pyro_em.fit(model, gaps, False)

    system = BY_NAME["system"]
    holes = system.args[0].clone()
    holes[1, 0, 2] = holes[3, 1, 0] = holes[2, 2] = torch.nan
    result = pyro_em.fit(system.model, holes, init=system.start(), missing="nan", max_iter=4, tol=0)
    assert (np.diff(result.history["objective"]) > 0).all()
    filled = result.impute()["y"]
    assert filled.mean.shape == holes.shape
    assert torch.equal(filled.missing, holes.isnan())
    assert torch.equal(filled.sample(2)[:, ~holes.isnan()], holes[~holes.isnan()].expand(2, -1))
    hidden = result.posterior().states("y").chain
    torch.testing.assert_close(smooth(hidden).log_evidence.sum(), torch.tensor(result.log_likelihood))


def test_imputed_sites_are_those_of_the_model() -> None:
    """Two observed sites a step, one of them a vector; steps of `pyro.markov` are sites of their own."""

    def model(a: Tensor, b: Tensor, loop: Any) -> None:
        r = pyro.param("r", torch.tensor(0.7), constraint=positive)
        x = torch.tensor(0.0)
        for t in loop(len(a)):
            x = pyro.sample(f"x_{t}", dist.Normal(0.8 * x, 1.0))
            pyro.sample(f"a_{t}", dist.Normal(x, r), obs=a[t])
            pyro.sample(f"b_{t}", dist.Normal(torch.stack([2 * x, 2 * x], -1), 0.5).to_event(1), obs=b[t])

    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, generator=g), torch.randn(5, 2, generator=g)
    a[3], b[1, 0], b[4] = torch.nan, torch.nan, torch.nan
    together, alone = (
        pyro_em.fit(model, a, b, loop, missing="nan", max_iter=0)
        for loop in (pyro_em.markov, lambda T: pyro.markov(range(T)))
    )
    found, steps = together.impute(), alone.impute()
    assert {name: tuple(own.mean.shape) for name, own in found.items()} == {"a": (5,), "b": (5, 2)}
    assert set(steps) == {"a_3", "b_1", "b_4"}
    states = together.posterior().mean("x")
    torch.testing.assert_close(found["a"].mean[3], states[3])
    for step in (1, 4):
        torch.testing.assert_close(found["b"].mean[step], steps[f"b_{step}"].mean)
        torch.testing.assert_close(found["b"].variance[step], steps[f"b_{step}"].variance)
    torch.testing.assert_close(found["b"].mean[4], 2 * states[4].expand(2))


def test_new_data_and_predictions() -> None:
    problem = BY_NAME["trend"]
    result = _fit(problem, max_iter=2, tol=0)
    longer = torch.cat([problem.args[0], torch.tensor([2.0, 1.5, 3.0])])
    truth = dense(problem.model, (longer,), result.params)
    assert float(result.log_prob(longer).sum()) == pytest.approx(float(truth.log_evidence.detach()), rel=1e-12)
    torch.testing.assert_close(result.posterior(longer).mean("level")[8], truth.mean["level_8"])
    assert result.predictive(num_samples=3)["level_4"].shape == (3,)
    forecast = result.posterior().states("y").forecast(2).mean
    level, slope = (result.posterior().mean(n)[-1] for n in ("level", "slope"))
    torch.testing.assert_close(forecast[:, 0], torch.stack([level + slope, level + 2 * slope]))


def test_steps_that_are_not_alike_are_refused() -> None:
    def counting(y: Tensor) -> None:
        q, x, n = pyro.param("q", torch.tensor(1.0), constraint=positive), torch.tensor(0.0), 0
        for t in pyro_em.markov(len(y)):
            n = 1 + n
            x = pyro.sample(f"x_{t}", dist.Normal(x / n, q))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    with pytest.raises(Refusal, match=r"'y_1:6'.*at step 2 alone its 'state.matrix'"):
        pyro_em.fit(counting, torch.randn(6))


def test_other_loops_are_left_to_other_routes() -> None:
    """A location that is no affine function, and a latent that is not normal, are refused as anywhere."""

    def bent(y: Tensor, normal: bool) -> None:
        x = torch.tensor(0.5)
        for t in pyro_em.markov(len(y)):
            fn = dist.Normal(x.sin(), 1.0) if normal else dist.Gamma(2.0 + x**2, 1.0)
            x = pyro.sample(f"x_{t}", fn)
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    for normal in (True, False):
        with pytest.raises(Refusal, match="'x_"):
            pyro_em.fit(bent, torch.rand(4), normal)


def test_rounding_of_long_series_is_no_failed_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """∂Q/∂u at the argmax grows with the steps: closed forms stay closed, nothing is maximised by Newton's method."""
    monkeypatch.setattr("pyro_em.m_step.auto.maximise", lambda *_, **__: pytest.fail("the certificate failed"))
    g, problem = torch.Generator().manual_seed(0), BY_NAME["controlled"]
    y, u = torch.cumsum(torch.randn(10_000, generator=g), 0), torch.randn(10_000, 2, generator=g)
    result = pyro_em.fit(problem.model, y, u, init=problem.start(), max_iter=2, tol=0)
    assert (np.diff(result.history["objective"]) > 0).all()


def test_padded_series_are_the_shorter_ones() -> None:
    """G8: at every iterate; states behind the end of a series, which no data read, leave the moments."""
    problem = BY_NAME["ragged"]
    y, ends = problem.args

    def alone(y: Tensor, lengths: list[int]) -> None:
        a = pyro.param("a", torch.tensor(0.5))
        q, r = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "r"))
        for i, steps in enumerate(lengths):
            x = pyro.sample(f"x{i}_start", dist.Normal(0.0, 1.0))
            for t in pyro.markov(range(steps)):
                x = pyro.sample(f"x{i}_{t}", dist.Normal(a * x, q))
                pyro.sample(f"y{i}_{t}", dist.Normal(x, r), obs=y[t, i])

    padded = _fit(problem, max_iter=4, tol=0)
    roles = {f"x{i}_start": "latent" for i in range(3)}  # without a plate, and with known numbers: a parameter else
    short = pyro_em.fit(alone, y, ends.sum(0).tolist(), init=problem.start(), max_iter=4, tol=0, roles=roles)
    assert padded.history["objective"] == pytest.approx(short.history["objective"], rel=1e-9)
    for name, value in short.params.items():
        torch.testing.assert_close(padded.params[name], value, rtol=1e-8, atol=1e-9)
