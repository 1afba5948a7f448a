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
from pyro_em.errors import InputError, NonFiniteError, Refusal
from tests.laws import largest_score, perturbed, to_constrained, to_free
from tests.published_state_space import local_level
from tests.state_space import CASES, Case, Dense, full, trend

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
    if case.name == "autoregression":  # one state is a copy of another
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


# The others are not identified (full, offsets) or end with a variance of 0 on so few steps.
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("autoregression", "tied", "prior")], ids=lambda c: c.name
)
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


def test_an_outlier_of_ten_thousand_standard_deviations_stays_finite() -> None:
    y = CASES[2].data.clone()
    y[0, 5] += 1e4
    result = pyro_em.fit(trend, y, max_iter=50, tol=0)
    assert all(bool(value.isfinite().all()) for value in result.params.values())
    assert (np.diff(result.history["objective"]) >= -1e-7).all()


def test_bad_input_is_named() -> None:
    y = CASES[2].data.clone()
    y[0, 3] = torch.nan
    with pytest.raises(InputError, match="'y'"):
        pyro_em.fit(trend, y)

    def silent(y: Tensor) -> None:
        q = pyro.param("q", torch.tensor([1.0]), constraint=constraints.positive)
        start = dist.Normal(torch.zeros(1), 0.0, validate_args=False).to_event(1)
        still = dist.Normal(torch.zeros(1), q * 0, validate_args=False).to_event(1)
        pyro.sample("y", dist.LinearHMM(start, torch.eye(1), still, torch.eye(1), still, duration=y.shape[1]), obs=y[0])

    with pytest.raises(NonFiniteError, match=r"'y'.*step 0"):
        pyro_em.fit(silent, CASES[2].data)


def test_standard_errors_are_those_of_the_dense_likelihood() -> None:
    case = CASES[4]
    result = _fit(case, max_iter=500, tol=1e-8, accelerate="squarem")
    names = list(case.init)

    def value(*values: Tensor) -> Tensor:
        return case.log_evidence(dict(zip(names, values, strict=True)))

    blocks = torch.autograd.functional.hessian(value, tuple(result.params[n] for n in names))
    hessian = torch.stack([torch.stack([b.reshape(()) for b in row]) for row in blocks])
    errors = torch.linalg.inv(-hessian).diagonal().sqrt()
    found = result.standard_errors()
    torch.testing.assert_close(torch.stack([found[n] for n in names]), errors, rtol=1e-5, atol=0)


@every
def test_states_are_those_of_the_joint_normal(case: Case) -> None:
    """G3: smoothed and filtered means and covariances, one-step densities, entropy."""
    result = _fit(case, max_iter=1, tol=0)
    own, states = case.dense(result.params), result.posterior().states("y")
    T, D = own.b.shape
    expected = [own.posterior(y) for y in case.data]
    mean = torch.stack([m.reshape(T + 1, D) for m, _ in expected])
    blocks = [c.reshape(T + 1, D, T + 1, D) for _, c in expected]
    covariance = torch.stack([torch.stack([b[t, :, t] for t in range(T + 1)]) for b in blocks])
    lag = torch.stack([torch.stack([b[t, :, t - 1] for t in range(1, T + 1)]) for b in blocks])
    close = {"rtol": 1e-9, "atol": 1e-10}
    shape = (len(case.data), T + 1, D)
    torch.testing.assert_close(states.mean.reshape(shape), mean, **close)
    torch.testing.assert_close(states.covariance.reshape(*shape, D), covariance, **close)
    torch.testing.assert_close(states.lag_covariance.reshape(len(case.data), T, D, D), lag, **close)
    torch.testing.assert_close(states.filtered().mean.reshape(shape)[:, -1], mean[:, -1], **close)
    steps = states.log_prob_steps().reshape(len(case.data), T)
    torch.testing.assert_close(steps.sum(), torch.as_tensor(result.log_likelihood), **close)
    if case.name != "autoregression":
        entropy = sum(0.5 * torch.logdet(2 * torch.pi * torch.e * c) for _, c in expected)
        torch.testing.assert_close(states.entropy().sum(), entropy, **close)


def test_draws_and_forecasts_of_states() -> None:
    """Moments of many joint draws, across two steps too; forecasts are the joint normal of a longer series."""
    case = next(c for c in CASES if c.name == "tied")
    result = _fit(case, max_iter=1, tol=0)
    own, states = case.dense(result.params), result.posterior().states("y")
    torch.manual_seed(0)
    draws = states.sample(40_000)
    T, D = own.b.shape
    assert draws.shape == (40_000, 3, T + 1, D)
    mean, covariance = own.posterior(case.data[0])
    flat = draws[:, 0].reshape(len(draws), -1)
    torch.testing.assert_close(flat.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(flat.mT), covariance, rtol=0, atol=0.02)

    longer = Dense.of(T + 2, own.m, own.P, own.F[0], own.b[0], own.Q[0], own.H[0], own.d[0], own.R[0]).observed()
    n = T * own.d.shape[-1]
    S, gap = longer.covariance_matrix, case.data[0].reshape(-1) - longer.mean[:n]
    gain = torch.linalg.solve(S[:n, :n], S[:n, n:]).mT
    future, spread = longer.mean[n:] + gain @ gap, S[n:, n:] - gain @ S[:n, n:]
    forecast = states.forecast(2)
    torch.testing.assert_close(forecast.mean[0].reshape(-1), future, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(forecast.covariance_matrix[0, 1], spread[3:, 3:], rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="steps"):
        states.forecast(0)
    wandering = next(c for c in CASES if c.name == "regression")
    with pytest.raises(InputError, match="differs from step to step"):
        _fit(wandering, max_iter=0).posterior().states("y").forecast(1)
    with pytest.raises(InputError, match="no sample site 'x'"):
        result.posterior().states("x")


def test_missing_cells_and_steps() -> None:
    """NaN cells are left out exactly: evidence, states and imputations are those of the joint normal of the rest."""
    case = next(c for c in CASES if c.name == "offsets")
    y = case.data.clone()
    y[0, 2] = torch.nan
    y[1, 3, 1] = torch.nan
    y[2, 4:, 0] = torch.nan
    y[2, 5] = torch.nan
    init = {name: value.clone() for name, value in case.init.items()}
    result = pyro_em.fit(case.model, y, init=init, missing="nan", max_iter=8, tol=0)
    assert (np.diff(result.history["objective"]) >= 0).all()
    own = case.dense(result.params)
    total = 0.0
    imputed = result.impute()["y"]
    for row, series in enumerate(y):
        seen = ~series.reshape(-1).isnan()
        joint = own.observed()
        S, gap = joint.covariance_matrix, (series.reshape(-1) - joint.mean)[seen]
        part = torch.distributions.MultivariateNormal(joint.mean[seen], S[seen][:, seen])
        total += float(part.log_prob(series.reshape(-1)[seen]))
        gain = torch.linalg.solve(S[seen][:, seen], S[seen][:, ~seen]).mT
        gone = series.isnan()
        torch.testing.assert_close(imputed.mean[row][gone], joint.mean[~seen] + gain @ gap, rtol=1e-9, atol=1e-9)
        variance = (S[~seen][:, ~seen] - gain @ S[seen][:, ~seen]).diagonal()
        torch.testing.assert_close(imputed.variance[row][gone], variance, rtol=1e-9, atol=1e-9)
    assert result.log_likelihood == pytest.approx(total, rel=1e-12)
    draws = imputed.sample(4000)
    torch.testing.assert_close(draws.mean(0)[y.isnan()], imputed.mean[y.isnan()], rtol=0, atol=0.1)
    assert torch.equal(draws[0][~y.isnan()], y[~y.isnan()])


def test_missing_steps_update_as_the_oracle_does() -> None:
    """G6 with a gap: whole steps are missing, so that the noise is estimated from the others."""
    case = next(c for c in CASES if c.name == "trend")
    y = case.data.clone()
    y[0, [3, 4, 9]] = torch.nan
    init = {name: value.clone() for name, value in case.init.items()}
    updated = pyro_em.fit(trend, y, init=init, missing="nan", max_iter=1, tol=0).params
    before = case.dense(case.init)
    mean, cov, H, d = before.joint()
    seen = ~y[0, :, 0].isnan()
    H, S = H[seen], (H @ cov @ H.mT + torch.block_diag(*before.R))[seen][:, seen]
    gain = torch.linalg.solve(S, H @ cov).mT
    m, V = mean + gain @ (y[0, seen, 0] - H @ mean - d[seen]), cov - gain @ H @ cov
    residual = y[0, seen, 0] - H @ m
    expected = (residual**2 + (H @ V @ H.mT).diagonal()).mean().sqrt()
    torch.testing.assert_close(updated["r"], expected, rtol=1e-10, atol=0)


def _switching(y: Tensor, in_states: bool) -> None:
    """A regime at every step that moves the states, or else only what is seen of them."""
    P = pyro.param("P", torch.tensor([[0.9, 0.1], [0.1, 0.9]]), constraint=constraints.simplex)
    a = pyro.param("a", torch.tensor([0.9, 0.1]))
    s, x = torch.tensor(0), torch.zeros(())
    for t in pyro.markov(range(len(y))):
        s = pyro.sample(f"s_{t}", dist.Categorical(P[s]))
        x = pyro.sample(f"x_{t}", dist.Normal(a[s] * x if in_states else 0.5 * x, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(x if in_states else a[s] * x, 1.0), obs=y[t])


@pytest.mark.parametrize(("in_states", "site"), [(True, "x_0"), (False, "y_0")])
def test_switching_systems_are_refused(in_states: bool, site: str) -> None:
    with pytest.raises(Refusal, match=rf"'{site}'.*switches.*svi"):
        pyro_em.fit(_switching, torch.randn(5), in_states)


def test_a_loop_over_steps_is_the_same_chain() -> None:
    """The local level written as a `pyro.markov` loop: the known iterates of the Nile on its first years."""

    def loop(y: Tensor) -> None:
        q = pyro.param("q", torch.tensor(1000.0), constraint=constraints.positive)
        r = pyro.param("r", torch.tensor(10000.0), constraint=constraints.positive)
        x = torch.tensor(1000.0)
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(x, torch.tensor(1000.0) if t == 0 else q.sqrt()))
            pyro.sample(f"y_{t}", dist.Normal(x, r.sqrt()), obs=y[t])

    y = torch.tensor([1120.0, 1160, 963, 1210, 1160])
    by_loop = pyro_em.fit(loop, y, max_iter=3, tol=0)
    by_site = pyro_em.fit(local_level, y, 1000.0, 1e6, max_iter=3, tol=0, init={"q": 1000.0, "r": 10000.0})
    assert by_loop.history["objective"] == pytest.approx(by_site.history["objective"], rel=1e-12)
    for name in ("q", "r"):
        torch.testing.assert_close(by_loop.params[name], by_site.params[name], rtol=1e-10, atol=0)
    states = by_site.posterior().states("y")
    loop_mean = torch.stack([by_loop.posterior().mean(f"x_{t}") for t in range(5)])
    torch.testing.assert_close(states.mean[1:, 0], loop_mean.reshape(-1), rtol=1e-9, atol=1e-9)
