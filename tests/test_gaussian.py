"""The laws of EM over models with Gaussian latents; every number is checked against one dense joint normal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.arviz import to_datatree
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from tests.dense import Dense, dense
from tests.latent_problems import BY_NAME, LATENT_PROBLEMS, LatentProblem
from tests.laws import largest_score, perturbed, to_constrained, to_free
from tests.oracles import constraints as supports
from tests.oracles import log_prior
from tests.test_resources import Largest

EPS = torch.finfo(torch.float64).eps
UNWEIGHTED = [p for p in LATENT_PROBLEMS if "weights" not in p.options]
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")


def _fit(problem: LatentProblem, **options: Any) -> Any:
    return pyro_em.fit(
        problem.model, *problem.args, init=problem.start(), algorithm=problem.algorithm, **problem.options, **options
    )


def _oracle(problem: LatentProblem, params: dict[str, Tensor]) -> Dense:
    return dense(problem.model, problem.args, params)


@pytest.mark.parametrize("problem", LATENT_PROBLEMS, ids=lambda p: p.name)
def test_monotone(problem: LatentProblem) -> None:
    """G1: no update lowers the objective by more than rounding."""
    result = _fit(problem, max_iter=12, tol=0)
    objective = np.array(result.history["objective"])
    scale = float(result.log_prob().abs().sum()) + abs(objective).max()
    assert (np.diff(objective) >= -16 * EPS * scale).all()
    assert objective[-1] > objective[0]
    assert result.exact


@pytest.mark.parametrize("problem", UNWEIGHTED, ids=lambda p: p.name)
def test_evidence_and_moments(problem: LatentProblem) -> None:
    """G2, G3, G5: log p(x), posterior means and variances against the dense normal, after two updates."""
    result = _fit(problem, max_iter=2, tol=0)
    truth = _oracle(problem, result.params)
    value = float(truth.log_evidence.detach())
    assert abs(result.log_likelihood - value) <= 1e-11 * (1 + abs(value))
    assert abs(result.elbo - value) <= 1e-11 * (1 + abs(value))
    posterior = result.posterior()
    assert posterior.log_evidence == pytest.approx(value, rel=1e-12)
    for site, mean in truth.mean.items():
        torch.testing.assert_close(posterior.mean(site), mean.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(posterior.variance(site), truth.variance[site].detach(), rtol=1e-9, atol=1e-10)
        marginal = posterior.marginal(site)
        torch.testing.assert_close(marginal.mean, mean.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(marginal.variance, truth.variance[site].detach(), rtol=1e-9, atol=1e-10)
    if problem.algorithm == "map-em":
        prior = float(log_prior(problem.model, problem.args, result.params))
        assert result.log_posterior == pytest.approx(value + prior, rel=1e-12)


@pytest.mark.parametrize("problem", UNWEIGHTED, ids=lambda p: p.name)
def test_fisher_identity(problem: LatentProblem) -> None:
    """G4: the score that stops the fit is the gradient of the dense log-evidence."""
    result = _fit(problem, max_iter=0)
    support = supports(problem.model, problem.args, problem.init)
    free = {n: u.requires_grad_() for n, u in to_free(problem.start(), support).items()}
    params = to_constrained(free, support)
    value = _oracle(problem, params).log_evidence
    if problem.algorithm == "map-em":
        value = value + log_prior(problem.model, problem.args, params)
    gradient = dict(zip(free, torch.autograd.grad(value, list(free.values())), strict=True))
    largest = largest_score(gradient, problem.start(), support)
    found = float(result.history["score"][0]) * result.problem.graph.num_observations
    assert found == pytest.approx(largest, rel=1e-8)


@pytest.mark.parametrize("problem", LATENT_PROBLEMS, ids=lambda p: p.name)
def test_m_step_is_the_argmax(problem: LatentProblem) -> None:
    """G6: Q at the update is above Q at random feasible neighbours."""
    bound = bind(
        problem.model,
        problem.args,
        {},
        with_prior=problem.algorithm == "map-em",
        weights=problem.options.get("weights"),
    )
    m = MStep(bound, "auto", problem.algorithm)
    start = problem.start()
    expectation = Interpreted(bound).e_step(start)
    at = expectation.sufficient.problem
    updated, _ = m.update(start, expectation)
    best, _ = at.expected_log_joint(updated, expectation.weights)
    rng = torch.Generator().manual_seed(0)
    support = {n: r.constraint for n, r in bound.parameters.items()}
    for scale in (1e-3, 0.1):
        for _ in range(10):
            other, _ = at.expected_log_joint(perturbed(updated, support, scale, rng), expectation.weights)
            assert float(other.detach()) <= float(best.detach()) + 1e-10 * abs(float(best.detach()))


def test_pointwise_log_likelihood_is_by_group() -> None:
    """Rows of a sibling plate are no independent units; the groups are."""
    problem = BY_NAME["random_slopes"]
    result = _fit(problem, max_iter=1, tol=0)
    pointwise = result.log_prob()
    days, subject, y = problem.args
    v = result.params
    for group in range(5):
        own = subject == group
        Z = torch.stack([torch.ones(int(own.sum())), days[own]], -1)
        expected = torch.distributions.MultivariateNormal(
            Z @ v["beta"], Z @ v["D"] @ Z.T + v["s2"] * torch.eye(len(Z))
        ).log_prob(y[own])
        torch.testing.assert_close(pointwise[group], expected, rtol=1e-11, atol=1e-11)
    assert result.num_observations == 5


def test_inference_data() -> None:
    """Log-likelihoods are evaluated without gradients around them, the elimination takes its own."""
    problem = BY_NAME["random_slopes"]
    result = _fit(problem, max_iter=3, tol=0)
    tree = to_datatree(result, num_draws=20, num_log_likelihood_draws=4)
    (found,) = tree["log_likelihood"].data_vars.values()
    assert bool(np.isfinite(found).all())
    assert found.shape[-1] == 5


def test_samples_have_the_posterior_moments() -> None:
    problem = BY_NAME["crossed"]
    result = _fit(problem, max_iter=1, tol=0)
    torch.manual_seed(0)
    posterior = result.posterior()
    draws = posterior.sample(20_000)
    truth = _oracle(problem, result.params)
    for site in ("a", "c"):
        spread = truth.variance[site].sqrt().detach()
        assert draws[site].shape == (20_000, *truth.mean[site].shape)
        assert float(((draws[site].mean(0) - truth.mean[site].detach()) / spread).abs().max()) < 0.04
        torch.testing.assert_close(draws[site].var(0), spread**2, rtol=0.06, atol=0.0)
    both = torch.cat([draws["a"], draws["c"]], -1)
    y = problem.args[2]
    location = draws["a"][:, problem.args[0]] + draws["c"][:, problem.args[1]]
    assert both.shape == (20_000, 10)
    assert float((location.mean(0) + result.params["mu"] - y).abs().max()) < 3.0


def test_mixed_draws_follow_the_states() -> None:
    """Draws and mode of a Gaussian latent are those given the drawn (best) state of the discrete one."""
    problem = BY_NAME["mixture_of_groups"]
    result = _fit(problem, max_iter=3, tol=0)
    posterior, truth = result.posterior(), _oracle(problem, result.params)
    torch.manual_seed(0)
    draws = posterior.sample(20_000)
    assert draws["b"].shape == draws["k"].shape == (20_000, 6)
    spread = truth.variance["b"].sqrt().detach()
    assert float(((draws["b"].mean(0) - truth.mean["b"].detach()) / spread).abs().max()) < 0.04
    mode = posterior.mode()
    y, v = problem.args[0], result.params

    def joint(k: Tensor, b: Tensor) -> Tensor:
        own = v["w"][k].log() + torch.distributions.Normal(v["mu"][k], v["tau"][k]).log_prob(b)
        return (own + torch.distributions.Normal(b, v["sd"][k]).log_prob(y).sum(0)).sum()

    best = joint(mode["k"], mode["b"])
    for flip in range(6):
        other = mode["k"].clone()
        other[flip] = 1 - other[flip]
        for shift in torch.linspace(-1.5, 1.5, 61):
            moved = mode["b"].clone()
            moved[flip] += shift
            assert joint(other, moved) <= best + 1e-12
            assert joint(mode["k"], moved) <= best + 1e-12


def test_entropy_is_that_of_the_normal() -> None:
    result = _fit(BY_NAME["factor_analysis"], max_iter=1, tol=0)
    marginal = result.posterior().marginal("z")
    expected = float(marginal.entropy().sum())
    assert result.posterior().entropy() == pytest.approx(expected, rel=1e-10)
    assert result.icl == pytest.approx(result.bic + 2 * expected, rel=1e-12)


def test_weights_are_repeats() -> None:
    """G8: integer weights give what repeated rows give."""
    x = BY_NAME["factor_analysis"].args[0]
    counts = torch.arange(len(x)) % 3
    start = BY_NAME["factor_analysis"].start()
    model = BY_NAME["factor_analysis"].model
    weighted = pyro_em.fit(model, x, init=start, weights={"rows": counts.double()}, max_iter=3, tol=0)
    repeated = pyro_em.fit(model, x.repeat_interleave(counts, 0), init=start, max_iter=3, tol=0)
    assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood, rel=1e-12)
    for name, value in weighted.params.items():
        torch.testing.assert_close(value, repeated.params[name], rtol=1e-8, atol=1e-9)


def test_standard_errors_are_those_of_the_dense_evidence() -> None:
    problem = BY_NAME["random_intercepts"]
    result = _fit(problem, tol=1e-10)
    support = supports(problem.model, problem.args, problem.init)
    names = list(result.params)

    def value(u: Tensor) -> Tensor:
        params = to_constrained(dict(zip(names, u, strict=True)), support)
        return _oracle(problem, params).log_evidence

    free = torch.stack([to_free(result.params, support)[n] for n in names])
    hessian = torch.autograd.functional.hessian(value, free)
    sd = torch.linalg.inv(-hessian).diagonal().sqrt()
    errors = result.standard_errors()
    assert float(errors["mu"]) == pytest.approx(float(sd[names.index("mu")]), rel=1e-6)
    tau = float(result.params["tau"]) * float(sd[names.index("tau")])
    assert float(errors["tau"]) == pytest.approx(tau, rel=1e-6)


def test_the_plan_names_route_and_cost() -> None:
    problem = BY_NAME["crossed"]
    plan = pyro_em.plan(problem.model, *problem.args)
    assert plan.route("a") == plan.route("c") == "Gaussian"
    text = str(plan)
    assert "6 blocks of 1 x 1" in text and "4 entries of c" in text and "MiB" in text


def test_memory_is_checked_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """G13."""
    monkeypatch.setattr(pyro_em.settings, "max_table_bytes", 5000)
    row, column = torch.arange(40), torch.arange(40) % 30
    with pytest.raises(pyro_em.errors.ResourceError, match="Gaussian latents 'a', 'c'"):
        pyro_em.plan(BY_NAME["crossed"].model, row, column, torch.zeros(40))


@pytest.mark.parametrize(("rows", "first", "second"), [(60, 12, 8), (400, 30, 20)])
def test_crossed_effects_take_the_memory_that_was_predicted(rows: int, first: int, second: int) -> None:
    """G13: the largest table is that of the rows at all atoms; each group has a row, so that the system is smaller."""
    row, column = torch.arange(rows) % first, torch.arange(rows) % second
    y = torch.randn(rows)
    bound = bind(BY_NAME["crossed"].model, (row, column, y), {}, with_prior=False)
    common = min(first, second)
    predicted = 8 * (common + 2) * rows
    assert bound.continuous is not None and f"{predicted / 2**20:.3g} MiB" in bound.continuous.routes[0].cost
    with Largest() as largest:
        bound.evidence(bound.start)
    assert largest.bytes == predicted


def test_a_process_that_is_observed_as_one_event() -> None:
    """One event of twelve elements: its scale is known, though no element has more than one datum."""
    rng = np.random.default_rng(0)
    x = torch.as_tensor(np.sort(rng.uniform(-3, 3, 12)))
    y = torch.sin(x) + 0.3 * torch.as_tensor(rng.normal(size=12))
    gram = torch.exp(-0.5 * (x.unsqueeze(-1) - x) ** 2) + 1e-6 * torch.eye(12)

    def model(y: Tensor) -> None:
        noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
        size = pyro.param("size", torch.tensor(1.0), constraint=constraints.positive)
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(12), size * gram))
        pyro.sample("y", dist.Normal(f, noise).to_event(1), obs=y)

    found = pyro_em.fit(model, y, max_iter=5000, accelerate="squarem")
    noise, size = found.params["noise"], found.params["size"]
    marginal = dist.MultivariateNormal(torch.zeros(12), size * gram + noise**2 * torch.eye(12))
    assert found.converged and found.log_likelihood == pytest.approx(float(marginal.log_prob(y)), rel=1e-10)
    expected = size * gram @ torch.linalg.solve(marginal.covariance_matrix, y)
    torch.testing.assert_close(found.posterior().mean("f"), expected, rtol=0, atol=1e-9)
