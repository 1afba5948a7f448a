"""The laws of EM over the table of problems × strategies; every number is checked against enumeration.

G1 monotone, G2 gap zero, G3 posterior, G4 Fisher's identity, G6 the M-step is the argmax, G7 the limit is the
maximum of the marginal likelihood. `objective` is log p(x | params), for map-em plus log p(params).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import transform_to

import pyro_em
from tests.laws import largest_score, marginal_probs, perturbed, polished, to_constrained, to_free
from tests.oracles import Enumeration, constraints, log_prior
from tests.problems import BY_NAME, PROBLEMS, Problem

EPS = torch.finfo(torch.float64).eps
# A probability that ends at 0 or 1 is rightly warned of, and not at issue here.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")

EXACT = [(p.name, a) for p in PROBLEMS for a in ("em", "map-em") if a == "em" or p.priors]
STRATEGIES = EXACT + [(p.name, "gem") for p in PROBLEMS]


def _fit(problem: Problem, algorithm: str, **options: Any) -> Any:
    return pyro_em.fit(problem.model, *problem.args, init=problem.start(), **problem.fit_options(algorithm), **options)


def _gradient(problem: Problem, params: dict[str, Tensor], algorithm: str) -> dict[str, Tensor]:
    """d objective / d u by automatic differentiation of the enumerated evidence."""
    support = constraints(problem.model, problem.args, params)
    free = {n: u.requires_grad_() for n, u in to_free(params, support).items()}
    value = problem.objective(to_constrained(free, support), algorithm)
    return dict(zip(free, torch.autograd.grad(value, list(free.values())), strict=True))


@pytest.mark.parametrize(("name", "algorithm"), STRATEGIES)
def test_monotone(name: str, algorithm: str) -> None:
    """G1, and the objective recorded is that of the oracle at both ends."""
    problem = BY_NAME[name]
    result = _fit(problem, algorithm, max_iter=25, tol=0)
    objective = np.array(result.history["objective"])
    pointwise = result.log_prob(*problem.args).abs()
    weights = torch.ones_like(pointwise) if problem.weights is None else problem.weights
    scale = max(float((weights * pointwise).sum()), float(np.abs(objective).max()))
    assert (np.diff(objective) >= -16 * EPS * scale).all(), np.diff(objective).min()
    assert objective[-1] > objective[0]

    prior = "map-em" if algorithm == "map-em" else "em"
    first = float(problem.objective(problem.start(), prior))
    last = float(problem.objective(result.params, prior))
    assert objective[0] == pytest.approx(first, rel=1e-12, abs=1e-12)
    assert objective[-1] == pytest.approx(last, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("name", "algorithm"), EXACT)
def test_gap_is_zero(name: str, algorithm: str) -> None:
    """G2: the ELBO of the exact posterior is the log-evidence, found by another route."""
    problem = BY_NAME[name]
    result = _fit(problem, algorithm, max_iter=3, tol=0)
    truth = float(problem.oracle(result.params).log_evidence)
    bound = 1e-12 * (1 + abs(truth))
    assert result.exact
    assert abs(result.elbo - truth) <= bound
    assert abs(result.log_likelihood - truth) <= bound
    assert abs(float(result.posterior().log_evidence) - truth) <= bound
    if algorithm == "map-em":
        prior = float(log_prior(problem.model, problem.args, result.params))
        assert abs(result.log_posterior - truth - prior) <= bound + 1e-12 * abs(prior)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_posterior(problem: Problem) -> None:
    """G3: marginals sum to one and equal those of enumeration, as do the joint mode and the entropy."""
    result = _fit(problem, "em", max_iter=2, tol=0)
    posterior, truth = result.posterior(*problem.args), problem.oracle(result.params)
    for site in truth.latents:
        expected = truth.marginal(site)
        marginal = marginal_probs(posterior, site, expected.shape)
        torch.testing.assert_close(marginal, expected, atol=1e-11, rtol=0.0)
        states = marginal.shape[-1]
        assert float((marginal.sum(-1) - 1).abs().max()) <= 4 * EPS * states
    mode, (best, _) = posterior.mode(), truth.mode()
    if problem.weights is None:
        found = truth.log_density(_in_place(mode, truth))
        assert found == pytest.approx(best, rel=1e-12, abs=1e-10)


def _in_place(values: dict[str, Tensor], truth: Enumeration) -> dict[str, Tensor]:
    """Values of the latents in the shapes of their sites, where a plate may leave dimensions of size 1."""
    shapes = {n: (*site["fn"].batch_shape, *site["fn"].event_shape) for n, site in truth.latents.items()}
    return {name: values[name].reshape(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.plate], ids=lambda p: p.name)
def test_pointwise_log_likelihood(problem: Problem) -> None:
    result = _fit(problem, "em", max_iter=2, tol=0)
    truth = problem.oracle(result.params)
    if len(truth.outer) > 1:  # a latent outside the plate couples its elements: there is one row
        assert result.log_prob(*problem.args).shape == ()
        assert float(result.log_prob(*problem.args)) == pytest.approx(float(truth.log_evidence), rel=1e-12)
        return
    found = result.log_prob(*problem.args).reshape(-1)
    torch.testing.assert_close(found, truth.pointwise, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize(("name", "algorithm"), EXACT)
def test_fisher_identity(name: str, algorithm: str) -> None:
    """G4: the score in the history (largest |d objective / d u| per observation) is the marginal gradient."""
    problem = BY_NAME[name]
    result = _fit(problem, algorithm, max_iter=1, tol=0)
    support = constraints(problem.model, problem.args, problem.init)
    largest = largest_score(_gradient(problem, problem.start(), algorithm), problem.init, support)
    truth = problem.oracle(problem.init)
    observations = truth.log_joint.shape[-1] if len(truth.outer) == 1 else 1  # a common latent couples all rows
    if problem.weights is not None:
        observations = float(problem.weights.sum())  # integer weights are repeats
    assert float(result.history["score"][0]) * observations == pytest.approx(largest, rel=1e-8)


# ExactELBO has no argument for weights; priors take a guide (test_elbo.py).
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.weights is None and not p.priors], ids=lambda p: p.name)
def test_exact_elbo_gradient(problem: Problem) -> None:
    """G4 again: the gradient of ExactELBO inside Pyro's SVI is that of the marginal likelihood."""
    support = constraints(problem.model, problem.args, problem.init)
    for name, value in problem.start().items():
        pyro.param(name, value, constraint=support[name])
    free = {n: pyro.param(n).unconstrained().detach().clone().requires_grad_() for n in problem.init}
    truth = problem.oracle({n: transform_to(support[n])(u) for n, u in free.items()}).log_evidence
    expected = torch.autograd.grad(truth, list(free.values()))
    elbo = pyro_em.ExactELBO()
    loss = elbo.differentiable_loss(problem.model, lambda *args: None, *problem.args)
    found = torch.autograd.grad(loss, [pyro.param(name).unconstrained() for name in problem.init])
    assert float(loss.detach()) == pytest.approx(-float(truth.detach()), rel=1e-12)
    torch.testing.assert_close([-g for g in found], list(expected), rtol=1e-8, atol=1e-9)


def test_exact_elbo_gradient_at_logits_of_minus_40() -> None:
    """Pyro's own log-einsum clamps this gradient: a product far below eps still has slope one in its logit."""

    def model(y: Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(-40.0))
        prior = torch.stack([torch.zeros(()), logit])
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", pyro.distributions.Categorical(logits=prior))
            pyro.sample("y", pyro.distributions.Normal(torch.tensor([0.0, 1.0])[z], 1.0), obs=y)

    y = torch.tensor([0.3, 1.2, -0.5])
    likelihood = np.exp(-0.5 * (y.numpy()[:, None] - np.array([0.0, 1.0])) ** 2)

    def log_evidence(logit: float) -> float:
        """Up to a constant, and without its limit at -inf, which would drown the derivative in rounding."""
        odds = np.exp(logit)
        return float((np.log1p(odds * likelihood[:, 1] / likelihood[:, 0]) - np.log1p(odds)).sum())

    step = 1e-4
    slope = (log_evidence(-40 + step) - log_evidence(-40 - step)) / (2 * step)
    svi = SVI(model, lambda y: None, pyro.optim.SGD({"lr": 0.0}), loss=pyro_em.ExactELBO())
    svi.step(y)
    loss = pyro_em.ExactELBO().differentiable_loss(model, lambda y: None, y)
    (gradient,) = torch.autograd.grad(loss, [pyro.param("logit").unconstrained()])
    assert slope != 0
    assert -float(gradient) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(("name", "algorithm"), [case for case in EXACT if not BY_NAME[case[0]].completes])
def test_m_step_is_the_argmax(name: str, algorithm: str) -> None:
    """G6: after one update no feasible neighbour has a larger Q (+ log prior), and its gradient is zero."""
    problem = BY_NAME[name]
    posterior = problem.oracle(problem.start())
    updated = _fit(problem, algorithm, max_iter=1, tol=0).params
    support = constraints(problem.model, problem.args, updated)

    def objective(params: dict[str, Tensor]) -> Tensor:
        value = posterior.expected_log_joint(params)
        return value + log_prior(problem.model, problem.args, params) if algorithm == "map-em" else value

    free = {n: u.detach().requires_grad_() for n, u in to_free(updated, support).items()}
    best = objective(to_constrained(free, support))
    gradient = torch.autograd.grad(best, list(free.values()))
    slack = 16 * EPS * abs(float(best.detach()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale in (1e-3, 1e-2, 1e-1, 1.0):
            for _ in range(13):
                neighbour = objective(perturbed(updated, support, scale, generator))
                assert float(neighbour) <= float(best) + slack
    elements = float(posterior.weights.sum())
    tolerance = 1e-10
    assert max(float(g.abs().max()) for g in gradient) <= tolerance * elements


RULES = {
    "gmm_full": "weighted scatter matrix",
    "gmm_scale_tril": "weighted scatter matrix",
    "gmm_diagonal": "precision-weighted mean",
    "shared_mean": "ratio of moments",
    "latent_class_counts": "ratio of counts",
    "coins": "ratio of counts",
    "exponential_mixture": "ratio of moments",
    "multinomial_mixture": "normalised counts",
    "heavy_prior_map": "root of a cubic",
    "poisson_map": "ratio of moments",
    "gmm_map": "ratio of moments",
    "additive": "linear solve",
    "regressions": "linear solve",
    "parallel_regressions": "linear solve",
    "heteroscedastic": "linear solve",
    "multivariate_regressions": "linear solve",
    "ridge_regressions": "linear solve",
    "poisson_regressions": "Newton",
    "experts": "Newton",
    "zero_inflated_regression": "Newton",
    "negative_binomial_regressions": "Newton",
    "gamma_free": "Newton",
    "beta_mixture": "Newton",
}


@pytest.mark.parametrize("name", [problem.name for problem in PROBLEMS if not problem.completes])
def test_rules_end_where_lbfgs_on_q_ends(name: str) -> None:
    """G6: from the same posterior, to 1e-8. L-BFGS is carried on by Newton's method on the same enumerated Q."""
    problem = BY_NAME[name]
    algorithm = "map-em" if problem.priors else "em"
    result = _fit(problem, algorithm, max_iter=1, tol=0)
    assert any(row.reason.startswith(RULES.get(name, "")) for row in result.plan.m_step)
    posterior, support = problem.oracle(problem.start()), constraints(problem.model, problem.args, problem.init)
    free = to_free(result.params, support)
    shapes, sizes = [u.shape for u in free.values()], [u.numel() for u in free.values()]

    def params(u: Tensor) -> dict[str, Tensor]:
        pieces = [piece.reshape(shape) for piece, shape in zip(u.split(sizes), shapes, strict=True)]
        return to_constrained(dict(zip(free, pieces, strict=True)), support)

    def q(u: Tensor) -> Tensor:
        value = posterior.expected_log_joint(params(u))
        return value + log_prior(problem.model, problem.args, params(u)) if problem.priors else value

    def loss(u: Any) -> tuple[float, Any]:
        leaf = torch.tensor(u, requires_grad=True)
        value = q(leaf)
        return -float(value.detach()), -torch.autograd.grad(value, leaf)[0].numpy()

    away = torch.cat([u.reshape(-1) for u in free.values()])
    away = away + 0.1 * torch.randn(away.shape, generator=torch.Generator().manual_seed(1))
    found = minimize(loss, away.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 300, "gtol": 1e-6})
    best = params(polished(q, torch.tensor(found.x), 3))
    for site, value in result.params.items():
        torch.testing.assert_close(value, best[site], rtol=0.0, atol=1e-8)


def _climb(problem: Problem, start: dict[str, Tensor], algorithm: str) -> tuple[float, dict[str, Tensor]]:
    """Maximise the enumerated objective from `start` with scipy's L-BFGS in unconstrained coordinates."""
    support = constraints(problem.model, problem.args, start)
    names = list(start)
    shapes = {n: u.shape for n, u in to_free(start, support).items()}
    sizes = [int(np.prod(shapes[n])) for n in names]

    def unpack(u: Any) -> dict[str, Tensor]:
        pieces = torch.as_tensor(u).split(sizes)
        return {n: piece.reshape(shapes[n]) for n, piece in zip(names, pieces, strict=True)}

    def loss(u: Any) -> tuple[float, Any]:
        vector = torch.tensor(u, requires_grad=True)
        value = problem.objective(to_constrained(unpack(vector), support), algorithm)
        (gradient,) = torch.autograd.grad(value, vector)
        return -float(value.detach()), -gradient.numpy()

    first = torch.cat([u.reshape(-1) for u in to_free(start, support).values()]).numpy()
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 0, "gtol": 1e-7})
    return -float(found.fun), to_constrained(unpack(found.x), support)


@pytest.mark.parametrize(("name", "algorithm"), EXACT)
def test_limit_is_a_maximum_of_the_marginal_likelihood(name: str, algorithm: str) -> None:
    """G7: L-BFGS on the enumerated objective, from the same start, ends where EM ends."""
    problem = BY_NAME[name]
    result = _fit(problem, algorithm, max_iter=20_000, tol=1e-8)
    assert result.converged
    reached = float(problem.objective(result.params, algorithm))
    limit, params = _climb(problem, problem.start(), algorithm)
    assert reached == pytest.approx(limit, rel=1e-8)
    if not problem.attained:  # nothing else to compare: the score goes to 0 along the way to the boundary
        assert any(bool(((p < 1e-4) | (p > 1 - 1e-4)).any()) for p in result.params.values())
        return
    for site, value in params.items():
        torch.testing.assert_close(result.params[site], value, atol=2e-3, rtol=2e-3)
    assert max(float(g.abs().max()) for g in _gradient(problem, result.params, algorithm).values()) <= 1e-5
