"""State-space models as observed sites: the laws of EM against the joint normal of states and data.

G1 monotone, G2 gap zero, G4 Fisher's identity, G6 the M-step is the argmax, G7 the limit is the maximum of the
marginal likelihood, G8 and G9 invariance and determinism; bad input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from tests.laws import largest_score, perturbed, to_constrained, to_free
from tests.state_space import Case, Dense
from tests.state_space_cases import CASES, full, trend

EPS = torch.finfo(torch.float64).eps
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _fit(case: Case, **options: Any) -> Any:
    algorithm = "em" if case.log_prior is None else "map-em"
    init = {name: value.clone() for name, value in case.init.items()}
    return pyro_em.fit(case.model, case.data, algorithm=algorithm, init=init, **options)


def _support(case: Case) -> dict[str, Any]:
    return {name: case.support.get(name, constraints.real) for name in case.init}


@every
def test_monotone_and_closed(case: Case) -> None:
    """G1; every update is in closed form, and the objective at both ends is that of the joint normal."""
    result = _fit(case, max_iter=15, tol=0)
    objective = np.array(result.history["objective"])
    assert (np.diff(objective) >= -16 * EPS * np.abs(objective).max()).all()
    assert objective[-1] > objective[0]
    assert objective[0] == pytest.approx(float(case.objective(case.init)), rel=1e-12)
    assert objective[-1] == pytest.approx(float(case.objective(result.params)), rel=1e-12)
    assert {row.route for row in result.plan.m_step} == {"closed"}
    assert "integrated out by a Kalman filter" in result.plan.e_step[0 if case.log_prior is None else -1].reason


@every
def test_gap_is_zero(case: Case) -> None:
    """G2, and E[log joint] + entropy of the states is the evidence, where every state has a density."""
    result = _fit(case, max_iter=2, tol=0)
    truth = float(case.log_evidence(result.params))
    assert result.log_likelihood == pytest.approx(truth, rel=1e-12)
    assert float(result.log_prob().sum()) == pytest.approx(truth, rel=1e-12)
    if case.copies:
        return
    own = case.dense(result.params)
    posteriors = [own.posterior(y) for y in case.data]
    entropy = sum(0.5 * float(torch.logdet(2 * torch.pi * torch.e * cov)) for _, cov in posteriors)
    assert truth - entropy == pytest.approx(
        float(sum(own.expected_log_joint(y, *p) for y, p in zip(case.data, posteriors, strict=True))), rel=1e-10
    )
    if entropy > 0:
        assert result.posterior().entropy() == pytest.approx(entropy, rel=1e-8)


@every
def test_score_is_the_gradient_of_the_marginal_likelihood(case: Case) -> None:
    """G4."""
    support = _support(case)
    free = {n: u.requires_grad_() for n, u in to_free(case.init, support).items()}
    value = case.objective(to_constrained(free, support))
    gradient = dict(zip(free, torch.autograd.grad(value, list(free.values())), strict=True))
    result = _fit(case, max_iter=0)
    observations = max(1, len(case.data))
    largest = largest_score(gradient, case.init, support)
    assert result.history["score"][0] * observations == pytest.approx(largest, rel=1e-8)


@every
def test_m_step_is_the_argmax(case: Case) -> None:
    """G6."""
    q = case.q(case.init)
    updated = _fit(case, max_iter=1, tol=0).params
    support = _support(case)
    free = {n: u.detach().requires_grad_() for n, u in to_free(updated, support).items()}
    best = q(to_constrained(free, support))
    gradient = torch.autograd.grad(best, list(free.values()))
    assert max(float(g.abs().max()) for g in gradient) <= 1e-9 * case.data.numel()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale in (1e-3, 1e-1, 1.0):
            for _ in range(10):
                neighbour = q(perturbed(updated, support, scale, generator))
                assert float(neighbour) <= float(best) + 16 * EPS * abs(float(best))


@pytest.mark.parametrize("case", [c for c in CASES if c.attained], ids=lambda c: c.name)
def test_limit_is_a_maximum_of_the_marginal_likelihood(case: Case) -> None:
    """G7."""
    result = _fit(case, max_iter=20_000, tol=1e-7, accelerate="squarem")
    support = _support(case)
    names = list(case.init)
    shapes = {n: u.shape for n, u in to_free(case.init, support).items()}
    sizes = [int(np.prod(shapes[n])) for n in names]

    def loss(u: Any) -> tuple[float, Any]:
        vector = torch.tensor(u, requires_grad=True)
        pieces = {n: p.reshape(shapes[n]) for n, p in zip(names, vector.split(sizes), strict=True)}
        value = case.objective(to_constrained(pieces, support))
        (gradient,) = torch.autograd.grad(value, vector)
        return -float(value.detach()), -gradient.numpy()

    first = torch.cat([u.reshape(-1) for u in to_free(case.init, support).values()]).numpy()
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 0, "gtol": 1e-7})
    assert result.history["objective"][-1] == pytest.approx(-float(found.fun), rel=1e-7)


def test_a_weight_is_a_repeat_and_runs_are_equal() -> None:
    case = CASES[0]
    weights = torch.tensor([2.0, 1.0, 0.0])
    weighted = _fit(case, max_iter=5, tol=0, weights={"sequences": weights})
    init = {name: value.clone() for name, value in case.init.items()}
    repeated = pyro_em.fit(full, case.data[[0, 0, 1]], init=init, max_iter=5, tol=0)
    assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood, rel=1e-12)
    again = _fit(case, max_iter=5, tol=0, weights={"sequences": weights})
    for name, value in repeated.params.items():
        torch.testing.assert_close(weighted.params[name], value, rtol=1e-9, atol=1e-11)
        assert torch.equal(weighted.params[name], again.params[name])


def test_long_chains_take_the_same_steps_as_the_reference() -> None:
    """The compiled engine (steady state, blocks) and the interpreted one (two-level filter) agree."""
    generator = torch.Generator().manual_seed(0)
    y = torch.cumsum(torch.randn(1, 700, 1, generator=generator), 1) + torch.randn(1, 700, 1, generator=generator)
    fast = pyro_em.fit(trend, y, max_iter=4, tol=0)
    slow = pyro_em.fit(_opaque(trend), y, max_iter=4, tol=0, m_step={"unused": "fixed"})
    assert fast.plan.engine.startswith("inside")
    assert slow.plan.engine.startswith("interpreted")
    gains = np.diff(fast.history["objective"])  # the two differ by the constant of the extra site
    np.testing.assert_allclose(gains, np.diff(slow.history["objective"]), rtol=0, atol=1e-9)
    for name in ("q", "r"):
        torch.testing.assert_close(fast.params[name], slow.params[name], rtol=1e-9, atol=0)


def _opaque(model: Any) -> Any:
    """The same model with a parameter that is not recognised, so that nothing is compiled."""

    def wrapped(y: Tensor) -> None:
        unused = pyro.param("unused", torch.tensor([0.3, 0.7]))
        pyro.sample("beside", dist.Normal(unused.sin() * unused, 1.0).to_event(1), obs=torch.zeros(2))
        model(y)

    return wrapped


def _rotation(y: Tensor) -> None:
    """Two numbers fill all four entries of the transition matrix, one of them with both signs."""
    a, b = pyro.param("a", torch.tensor(0.5)), pyro.param("b", torch.tensor(0.1))
    F = a * torch.eye(2) + b * torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    noise = dist.Normal
    start = noise(torch.zeros(2), 1.0).to_event(1)
    H = torch.tensor([[1.0, 0.0, 0.5], [0.3, 1.0, 0.0]])
    fn = dist.GaussianHMM(
        start, F, noise(torch.zeros(2), 0.5).to_event(1), H, noise(torch.zeros(3), 0.7).to_event(1), duration=y.shape[1]
    )
    with pyro.plate("sequences", len(y)):
        pyro.sample("y", fn, obs=y)


def test_tied_entries_of_both_signs() -> None:
    result = pyro_em.fit(_rotation, CASES[0].data, max_iter=500, tol=1e-8)
    assert result.converged
    assert all(row.route == "closed" for row in result.plan.m_step)


def test_a_mixture_of_linear_systems() -> None:
    """Sequences of two kinds: the integrated site is a factor of the discrete latent."""
    F = torch.tensor([[[0.9]], [[-0.7]]])
    generator = torch.Generator().manual_seed(3)
    kinds = torch.arange(12) % 2
    z, steps = torch.zeros(12, 1), []
    for _ in range(15):
        z = z * F[kinds, :, 0] + 0.5 * torch.randn(12, 1, generator=generator)
        steps.append(z + 0.3 * torch.randn(12, 1, generator=generator))
    y = torch.stack(steps, 1)

    def model(y: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        F = pyro.param("F", torch.tensor([[[0.5]], [[-0.1]]]))
        q = pyro.param("q", torch.tensor([1.0]), constraint=constraints.positive)
        start, noise = (dist.Normal(torch.zeros(1), s).to_event(1) for s in (1.0, 0.3))
        with pyro.plate("sequences", len(y)):
            k = pyro.sample("k", dist.Categorical(w))
            move = dist.Normal(torch.zeros(1), q).to_event(1)
            fn = dist.GaussianHMM(start, F[k].unsqueeze(-3), move, torch.eye(1), noise, duration=y.shape[-2])
            pyro.sample("y", fn, obs=y)

    result = pyro_em.fit(model, y, max_iter=40, tol=0)
    assert (np.diff(result.history["objective"]) >= -1e-9).all()
    assert torch.equal(result.posterior().mode()["k"], kinds)

    def log_evidence(k: int) -> Tensor:
        p = result.params
        own = Dense.of(15, torch.zeros(1), torch.eye(1), p["F"][k], torch.zeros(1), torch.diag(p["q"] ** 2),
                       torch.eye(1), torch.zeros(1), 0.09 * torch.eye(1)).observed()  # fmt: skip
        return torch.stack([own.log_prob(row.reshape(-1)) for row in y]) + p["w"][k].log()

    truth = torch.logsumexp(torch.stack([log_evidence(0), log_evidence(1)]), 0).sum()
    assert result.log_likelihood == pytest.approx(float(truth), rel=1e-12)
