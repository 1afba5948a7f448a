"""Mixtures of linear-Gaussian systems: the posterior of classes and states.

The laws of EM run over them in test_loop_chains.py; systems that switch are in test_switching_systems.py. Oracles:
dense joint normals for every assignment of the classes (dense.py), and Pyro's own density of `GaussianHMM`.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import pyro_em
from models.growth_curves import drifting, simulate
from pyro_em import pointwise
from pyro_em.arviz import to_datatree
from pyro_em.errors import InputError
from pyro_em.summary import available_information
from tests.dense import dense, expected_log_joint
from tests.laws import polished, to_constrained, to_free
from tests.loop_chains import LoopProblem
from tests.mixed_chains import BY_NAME, MIXED_PROBLEMS, hmm, levels, loop
from tests.oracles import constraints, trace


def _posterior(problem: LoopProblem, **options: Any) -> Any:
    own = {"algorithm": problem.algorithm, **problem.options, **options}
    return pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=0, **own).posterior()


def _assigned(problem: LoopProblem, fixed: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """The joint normal given the discrete latents, and log p(x, fixed)."""
    names = set(fixed)

    def model(*args: Any) -> None:
        with pyro.condition(data=fixed):
            problem.model(*args)

    given = dense(model, problem.args, problem.start())
    nodes = trace(problem.model, problem.args, problem.start(), fixed)
    assert names <= nodes.keys()
    return given, given.log_evidence.detach()


def _assignments(problem: LoopProblem) -> list[dict[str, Tensor]]:
    n = () if problem.name == "one_regime" else (problem.args[0].shape[-1 if problem.name == "two_choosers" else 1],)
    names = ("k", "j") if problem.name == "two_choosers" else ("k",)
    size = len(names) * (n[0] if n else 1)
    kind = torch.get_default_dtype() if problem.name == "experts" else torch.long
    found = []
    for states in itertools.product(range(2), repeat=size):
        values = torch.tensor(states).reshape(len(names), *n).to(kind)
        found.append(dict(zip(names, values, strict=True)))
    return found


def test_rules_end_where_lbfgs_on_q_ends() -> None:
    """G6: from the same posterior, to 1e-8, Q being that of every assignment. Carried on by Newton's method."""
    problem = BY_NAME["levels"]
    y, start = problem.args[0][:3, :2], problem.start()
    result = pyro_em.fit(levels, y, init=start, max_iter=1, tol=0)
    expected, support = expected_log_joint(levels, (y,), start), constraints(levels, (y,), start)
    free = to_free(result.params, support)
    shapes, sizes = [u.shape for u in free.values()], [u.numel() for u in free.values()]

    def q(u: Tensor) -> Tensor:
        pieces = [piece.reshape(shape) for piece, shape in zip(u.split(sizes), shapes, strict=True)]
        return expected(to_constrained(dict(zip(free, pieces, strict=True)), support))

    def loss(u: Any) -> tuple[float, Any]:
        leaf = torch.tensor(u, requires_grad=True)
        value = q(leaf)
        return -float(value.detach()), -torch.autograd.grad(value, leaf)[0].numpy()

    away = torch.cat([u.reshape(-1) for u in free.values()])
    away = away + 0.1 * torch.randn(away.shape, generator=torch.Generator().manual_seed(1))
    found = minimize(loss, away.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 300, "gtol": 1e-6})
    u = polished(q, torch.tensor(found.x), 3)
    pieces = [piece.reshape(shape) for piece, shape in zip(u.split(sizes), shapes, strict=True)]
    best = to_constrained(dict(zip(free, pieces, strict=True)), support)
    for site, value in result.params.items():
        torch.testing.assert_close(value, best[site].detach(), rtol=0.0, atol=1e-8)


some = pytest.mark.parametrize("name", ["levels", "one_regime", "two_choosers", "experts"])


@some
def test_classes_and_modes_are_those_of_every_assignment(name: str) -> None:
    """G3: responsibilities, and the joint mode of classes and states, by brute force."""
    problem = BY_NAME[name]
    posterior = _posterior(problem)
    assignments = _assignments(problem)
    each = [_assigned(problem, fixed) for fixed in assignments]
    weights = torch.stack([evidence for _, evidence in each]).softmax(0)
    for latent in assignments[0]:
        truth = sum(w * fixed[latent] for w, fixed in zip(weights, assignments, strict=True))
        torch.testing.assert_close(posterior.responsibilities(latent)[..., 1], truth.double(), rtol=1e-10, atol=1e-12)
    size = sum(x.numel() for x in each[0][0].mean.values())
    # log p(x, z, k) at the best z: the normal's density at its mean.
    peaks = [e - 0.5 * torch.logdet(2 * torch.pi * own.joint[:size, :size]) for own, e in each]
    best = int(torch.stack(peaks).argmax())
    mode = posterior.mode()
    for latent, value in assignments[best].items():
        assert torch.equal(mode[latent], value)
    for site, mean in each[best][0].mean.items():
        torch.testing.assert_close(mode[site].reshape(mean.shape), mean.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["levels", "one_regime", "two_choosers"])
def test_draws_are_joint(name: str) -> None:
    """Of states and classes: moments of the states, and those of the states given each class."""
    problem = BY_NAME[name]
    posterior, truth = _posterior(problem), dense(problem.model, problem.args, problem.start())
    torch.manual_seed(0)
    draws = posterior.sample(40_000)
    given = {int(state): [] for state in (0, 1)}  # type: ignore[var-annotated]
    for site, mean in truth.mean.items():
        own = draws[site].reshape(40_000, -1)
        torch.testing.assert_close(own.mean(0), mean.reshape(-1), rtol=0, atol=0.04)
        torch.testing.assert_close(own.var(0), truth.variance[site].reshape(-1), rtol=0.05, atol=0.02)
        picked = draws["k"].reshape(40_000, -1).expand(own.shape)
        for state, found in given.items():
            found.append((own * (picked == state)).sum(0) / (picked == state).sum(0))
    if name != "levels":
        return
    states = posterior.states("y").given  # (K, N) chains
    for state, found in given.items():
        torch.testing.assert_close(torch.stack(found), states.mean[state, 0, :, :, 0].mT, rtol=0, atol=0.05)


def test_clusters_of_growth_curves_are_found() -> None:
    """Of 24 curves that rise, stay and fall two may stray; the drifts are within two standard errors."""
    result = pyro_em.fit(drifting, simulate(), tol=1e-5)
    assert result.converged and result.plan.engine.startswith("inside")
    found = result.posterior().mode()["k"]
    truth = torch.tensor([2, 1, 0]).repeat(8)
    assert int((found != truth).sum()) <= 2
    drift, error = result.params["drift"], result.standard_errors()["drift"]
    assert bool(((drift - torch.tensor([-0.5, 0.0, 0.8])).abs() < 2 * error).all())


def test_states_of_a_mixture() -> None:
    """Filtered, predicted step by step, forecast, lag covariances: from shorter and longer data, and dense normals."""
    problem = BY_NAME["levels"]
    (y,), start = problem.args, problem.start()
    states = _posterior(problem).states("y")
    truth = dense(levels, (y,), start)
    n = y.shape[1]
    at = {site: i * n for i, site in enumerate(truth.mean)}
    lag = torch.stack([truth.joint[at[f"x_{t}"] :, at[f"x_{t - 1}"] :][:n, :n].diagonal() for t in range(1, len(y))])
    torch.testing.assert_close(states.lag_covariance[..., 0, 0], lag.mT.detach(), rtol=1e-9, atol=1e-10)
    filtered, shares, steps = states.filtered(), states.filtered_shares(), states.log_prob_steps()
    before = torch.zeros(n)
    for t in range(1, len(y) + 1):
        shorter = pyro_em.fit(levels, y[:t], init=start, max_iter=0)
        own = shorter.posterior()
        torch.testing.assert_close(filtered.mean[:, t - 1, 0], own.mean(f"x_{t - 1}"), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(filtered.variance[:, t - 1, 0], own.variance(f"x_{t - 1}"), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(shares[:, t - 1], own.responsibilities("k"), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(steps[:, t - 1], shorter.log_prob() - before, rtol=1e-9, atol=1e-10)
        before = shorter.log_prob()
    forecast = states.forecast(2)
    gaps = torch.cat([y, torch.full((2, n), torch.nan)])
    longer = pyro_em.fit(levels, gaps, init=start, max_iter=0, missing="nan")
    ahead = longer.posterior().mean("x")[-2:]
    torch.testing.assert_close(forecast.mean[..., 0], ahead.mT, rtol=1e-9, atol=1e-10)
    filled = longer.impute()["y"]
    torch.testing.assert_close(forecast.mean[..., 0], filled.mean[-2:].mT, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(forecast.variance[..., 0], filled.variance[-2:].mT, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(longer.posterior().states("y").observations()[0][:, -2:, 0], ahead.mT)
    assert filled.sample(3).shape == (3, *gaps.shape)
    assert states.sample_observations(2).shape == (2, n, len(y), 1)
    with pytest.raises(InputError, match="no closed form"):
        states.entropy()


@pytest.mark.parametrize("name", ["levels", "one_regime"])
def test_the_marginal_of_a_state_is_a_mixture_over_the_classes(name: str) -> None:
    """Its shares are those of the classes at every step; its moments are the states' own."""
    states = _posterior(BY_NAME[name]).states("y")
    marginal = states.marginal()
    shares = marginal.mixture_distribution.probs
    assert marginal.batch_shape == states.mean.shape[:-1] and shares.shape == (*marginal.batch_shape, 2)
    torch.testing.assert_close(shares, states.shares.movedim(0, -1).unsqueeze(-2).expand(shares.shape))
    torch.testing.assert_close(marginal.mean, states.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(marginal.variance, states.covariance.diagonal(dim1=-2, dim2=-1), rtol=1e-9, atol=1e-12)


def test_arviz_has_classes_and_states() -> None:
    """Moments of the states beside the shares of the classes, and joint draws of both: moments as in the posterior."""
    problem = BY_NAME["levels"]
    result = pyro_em.fit(levels, *problem.args, init=problem.start(), max_iter=3, tol=0)
    tree = to_datatree(result, num_draws=4, latent_draws=20_000)
    posterior, latents, draws = result.posterior(), tree["latent_posterior"], tree["latent_draws"]
    assert latents["k"].dims == ("sequences", "k_state")
    assert latents["x"].dims == ("moment", "time", "sequences")
    np.testing.assert_array_equal(latents["x"].sel(moment="mean"), posterior.mean("x"))
    np.testing.assert_array_equal(latents["x"].sel(moment="sd"), posterior.variance("x").sqrt())
    assert draws["x"].dims == ("chain", "draw", "time", "sequences")
    assert draws["k"].dims == ("chain", "draw", "sequences")
    np.testing.assert_allclose(draws["x"].mean(("chain", "draw")), posterior.mean("x"), atol=0.04)
    np.testing.assert_allclose(draws["x"].std(("chain", "draw")), posterior.variance("x").sqrt(), atol=0.03)
    np.testing.assert_allclose(draws["k"].mean(("chain", "draw")), posterior.mean("k"), atol=0.015)


def test_all_draws_of_the_parameters_are_filtered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointwise log-likelihoods of many parameter values: as one by one, but the model runs for two of them only."""
    problem = BY_NAME["noises"]
    result = pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=3, tol=0)
    assert result.problem is not None
    information, _ = available_information(result, 100)
    assert information is not None
    g = torch.Generator().manual_seed(0)
    draws = information.estimate + 0.1 * torch.randn(20, len(information.estimate), generator=g)
    one_by_one = [pointwise._pointwise(result.problem, information.constrained(u)) for u in draws]
    calls, original = [], pointwise._pointwise
    monkeypatch.setattr(pointwise, "_pointwise", lambda *args: calls.append(0) or original(*args))
    found = pointwise.pointwise_draws(result.problem, result.params, information, draws)
    torch.testing.assert_close(found, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)
    assert found.shape == (20, 3) and len(calls) == 2


def test_entropy_is_that_of_classes_and_states() -> None:
    problem = BY_NAME["levels"]
    assignments = _assignments(problem)
    each = [_assigned(problem, fixed) for fixed in assignments]
    weights = torch.stack([evidence for _, evidence in each]).softmax(0)
    inner = torch.stack([0.5 * torch.logdet(2 * torch.pi * torch.e * own.joint.detach()) for own, _ in each])
    truth = float(((inner - weights.log()) * weights).sum())
    assert _posterior(problem).entropy() == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("problem", MIXED_PROBLEMS, ids=lambda p: p.name)
def test_pointwise_densities_add_up(problem: LoopProblem) -> None:
    own = {"algorithm": problem.algorithm, **problem.options}
    result = pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=0, **own)
    values = result.log_prob()
    assert values.shape == (() if problem.name == "one_regime" else (problem.args[0].shape[-1],))
    weights = problem.options.get("weights", {}).get("sequences", 1.0)
    assert float((weights * values).sum()) == pytest.approx(result.log_likelihood, rel=1e-12)


def _walks(sequences: int, steps: int) -> Tensor:
    g = torch.Generator().manual_seed(3)
    a = torch.tensor([0.95, 0.2])[torch.arange(sequences) % 2]
    x, rows = torch.zeros(sequences), []
    for _ in range(steps):
        x = a * x + torch.randn(sequences, generator=g)
        rows.append(x + 0.5 * torch.randn(sequences, generator=g))
    return torch.stack(rows)


@pytest.mark.parametrize("gaps", [False, True])
def test_a_distribution_is_the_loop(gaps: bool) -> None:
    """The same iterates, whether chains of a class are looked at together (steady, with gaps step by step) or not."""
    y = _walks(14, 30)
    if gaps:
        y[3:5, 2] = y[10, :7] = torch.nan
    options: dict[str, Any] = {"missing": "nan"} if gaps else {}
    one = pyro_em.fit(loop, y, max_iter=5, tol=0, **options)
    other = pyro_em.fit(hmm, y.mT.unsqueeze(-1), max_iter=5, tol=0, **options)
    few = pyro_em.fit(loop, y[:, :3], max_iter=5, tol=0, **options)
    alike = pyro_em.fit(hmm, y[:, :3].mT.unsqueeze(-1), max_iter=5, tol=0, **options)
    assert one.history["log_likelihood"] == pytest.approx(other.history["log_likelihood"], rel=1e-12)
    assert few.history["log_likelihood"] == pytest.approx(alike.history["log_likelihood"], rel=1e-12)
    for name, value in one.params.items():
        torch.testing.assert_close(other.params[name], value, rtol=1e-9, atol=1e-10)
    assert {one.plan.engine.split()[0], other.plan.engine.split()[0]} == {"inside"}
    states, chain = other.posterior().states("y"), one.posterior()
    torch.testing.assert_close(states.mean[:, 1:, 0], chain.mean("x").mT, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(states.mean[:, 0, 0], chain.mean("x_start"), rtol=1e-9, atol=1e-10)
    if not gaps:
        own = {n: v.requires_grad_() for n, v in other.params.items()}
        y3, k = y.mT.unsqueeze(-1), torch.arange(2)
        chains = dist.GaussianHMM(
            dist.Normal(torch.zeros(1), 1.0).to_event(1), own["a"][k][:, None, None, None, None],
            dist.Normal(torch.zeros(1), own["q"][k][:, None, None, None]).to_event(1), torch.eye(1),
            dist.Normal(torch.zeros(1), own["r"]).to_event(1), duration=30,
        )  # fmt: skip
        value = (own["w"].log().unsqueeze(-1) + chains.log_prob(y3)).logsumexp(0)
        torch.testing.assert_close(other.log_prob(), value.detach(), rtol=1e-10, atol=1e-10)
