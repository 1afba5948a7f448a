"""`algorithm="svi"`: the same model text and result, a bound instead of the evidence.

Tight bounds are held to the exact algorithms, loose ones to a KL divergence or an evidence known in closed form.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import init_to_value
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.errors import InputError
from tests.oracles import log_prior
from tests.problems import BY_NAME


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.05})


def two_means(y: Tensor) -> None:
    """Two groups of known spread: weights and means have conjugate priors."""
    w = pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 2.0])))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def two_groups() -> Tensor:
    return torch.cat([torch.randn(12) - 2.0, torch.randn(18) + 2.0])


@pytest.mark.slow
def test_one_text_under_em_map_em_svi_and_nuts() -> None:
    y = two_groups()
    start = {"w": torch.tensor([0.5, 0.5]), "mu": torch.tensor([-1.0, 1.0])}
    em, exact, svi = (
        pyro_em.fit(two_means, y, algorithm=a, init=start, tol=1e-10, max_iter=400, optim=o)
        for a, o in (("em", None), ("map-em", None), ("svi", adam()))
    )
    assert em.converged
    assert exact.converged
    assert em.log_likelihood > exact.log_likelihood
    assert exact.log_posterior > em.log_likelihood + log_prior(two_means, (y,), em.params)
    for name in ("w", "mu"):
        torch.testing.assert_close(svi.params[name], exact.params[name], atol=1e-5, rtol=0)
    assert svi.log_posterior == pytest.approx(exact.log_posterior, abs=1e-8)

    kernel = NUTS(two_means, init_strategy=init_to_value(values=start), max_tree_depth=5)
    chain = MCMC(kernel, num_samples=200, warmup_steps=60, disable_progbar=True)
    with pyro.validation_enabled(False):  # for speed
        chain.run(y)
    draws = chain.get_samples()
    problem = exact.problem
    assert problem is not None
    log_joint = torch.tensor(
        [
            problem.objective(problem.evidence({"w": w, "mu": mu})[0])
            for w, mu in zip(draws["w"], draws["mu"], strict=True)
        ]
    )
    # The density of the draws is highest at the mode, and P/2 lower on average (Laplace; here P = 3).
    deficit = exact.log_posterior - log_joint
    assert deficit.min() > 0
    assert 1.0 < deficit.mean() < 2.2
    for name in ("w", "mu"):
        centre, spread = draws[name].mean(0), draws[name].std(0)
        assert ((exact.params[name] - centre).abs() < spread).all()


@pytest.mark.parametrize(
    ("name", "algorithm"), [("poisson_map", "map-em"), ("latent_class_map", "map-em"), ("module_mixture", "em")]
)
def test_long_enough_svi_ends_where_the_exact_algorithm_does(name: str, algorithm: str) -> None:
    problem = BY_NAME[name]
    exact = pyro_em.fit(
        problem.model, *problem.args, algorithm=algorithm, init=problem.start(), tol=1e-10, max_iter=5000
    )
    svi = pyro_em.fit(problem.model, *problem.args, algorithm="svi", init=problem.start(), max_iter=400, optim=adam())
    assert svi.params.keys() == exact.params.keys()
    for site in exact.params:
        torch.testing.assert_close(svi.params[site], exact.params[site], atol=1e-4, rtol=0)
    assert svi.history["objective"][-1] == pytest.approx(exact.history["objective"][-1], abs=1e-6)
    assert svi.elbo == pytest.approx(svi.log_likelihood, abs=1e-9)
    assert svi.gap == pytest.approx(0.0, abs=1e-9)
    assert svi.num_parameters == exact.num_parameters
    assert svi.num_observations == exact.num_observations
    assert (svi.log_posterior is None) == (exact.log_posterior is None)


def test_what_a_result_promises() -> None:
    problem = BY_NAME["gmm_map"]
    result = pyro_em.fit(problem.model, *problem.args, algorithm="svi", init=problem.start(), max_iter=20, seed=0)
    assert result.algorithm == "svi"
    assert not result.exact
    assert not result.converged
    assert result.outcome is pyro_em.Outcome.steps_done
    assert result.num_iterations == 20
    assert {len(values) for values in result.history.values()} == {21}
    assert result.log_likelihood == pytest.approx(float(problem.oracle(result.params).log_evidence), rel=1e-12)
    prior = float(log_prior(problem.model, problem.args, result.params))
    assert result.log_posterior == pytest.approx(result.log_likelihood + prior, rel=1e-12)
    assert result.history["objective"][-1] == pytest.approx(result.elbo + prior, rel=1e-12)
    assert result.restarts == ((result.history["objective"][-1], "steps_done"),)
    rows = len(problem.args[0])
    assert result.posterior().marginal("z").probs.shape == (rows, 2)
    assert float(result.log_prob().sum()) == pytest.approx(result.log_likelihood)
    assert result.predictive(num_samples=3)["y"].shape == (3, rows)
    assert result.bic > result.aic
    with pytest.raises(InputError, match="svi"):
        result.information()
    text = str(result.plan)
    assert "AutoDelta over 'w', 'mu', 'var'" in text
    assert result.plan.route("z") == "enumerate"
    assert result.plan.route("mu") == "gradient"
    plan = pyro_em.plan(problem.model, *problem.args, algorithm="svi")
    assert str(plan) == text


def _free_guide(y: Tensor) -> None:
    """q(z_n) of its own for every row, which the guide sums over."""
    with pyro.plate("rows", len(y)):
        q = pyro.param("q", torch.tensor([0.7, 0.3]).repeat(len(y), 1), constraint=constraints.simplex)
        pyro.sample("z", dist.Categorical(q), infer={"enumerate": "parallel"})


def test_the_gap_is_the_divergence_from_the_posterior() -> None:
    problem = BY_NAME["gmm_diagonal"]
    start = pyro_em.fit(
        problem.model, *problem.args, algorithm="svi", guide=_free_guide, init=problem.start(), max_iter=0
    )
    posterior = start.posterior().marginal("z").probs
    q = start.params["q"]
    divergence = float((q * (q.log() - posterior.log())).sum())
    assert start.gap == pytest.approx(divergence, rel=1e-10)
    assert start.elbo < start.log_likelihood - 1
    after = pyro_em.fit(
        problem.model,
        *problem.args,
        algorithm="svi",
        guide=_free_guide,
        init=problem.start(),
        max_iter=60,
        optim=adam(),
    )
    assert after.elbo > start.elbo
    assert 0 < after.gap < start.gap
    assert after.num_parameters == 9  # the guide's are not the model's


def normal_effects(y: Tensor) -> None:
    """y_n | z_n ~ N(mu + z_n, 1/4), z_n ~ N(0, 1): y_n ~ N(mu, 5/4)."""
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + z, 0.5), obs=y)


def test_continuous_latents_get_a_normal_guide() -> None:
    """The exact posterior is in the family, so the bound must close on the evidence, and never pass it."""
    y = 1.0 + torch.randn(8)
    plan = pyro_em.plan(normal_effects, y, algorithm="svi")
    assert "AutoNormal over 'z'" in str(plan)
    assert "Trace_ELBO" in str(plan)
    slowing = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.99})
    result = pyro_em.fit(normal_effects, y, algorithm="svi", max_iter=500, seed=0, optim=slowing)
    evidence = float(dist.Normal(result.params["mu"], 1.25**0.5).log_prob(y).sum())
    assert evidence - 0.05 < result.elbo < evidence + 0.01  # up to the Monte Carlo error of 100 draws
    torch.testing.assert_close(result.params["AutoNormal.locs.z"], 0.8 * (y - y.mean()), atol=0.1, rtol=0)
    assert result.log_likelihood is None
    assert result.gap is None
    assert result.log_posterior is None
    assert (result.num_parameters, result.num_observations) == (1, 8)
    with pytest.raises(InputError):
        _ = result.aic


def test_roles_decide_between_point_and_distribution() -> None:
    y = two_groups()
    point = pyro_em.plan(two_means, y, algorithm="svi")
    spread = pyro_em.plan(two_means, y, algorithm="svi", roles={"mu": "latent"})
    assert point.route("mu") == "gradient"
    assert spread.route("mu") == "guide"
    result = pyro_em.fit(two_means, y, algorithm="svi", roles={"mu": "latent"}, max_iter=30, seed=0)
    assert result.log_likelihood is None
    assert result.params["w"].shape == (2,)
    assert "AutoGuideList.1.scales.mu" in result.params
    assert not any(name.endswith(".w") for name in result.params)


def test_structural_zeros_keep_the_bound_a_bound() -> None:
    """A state that must follow meets a word it cannot say: TraceEnum_ELBO alone would report -36 a clash."""
    words = torch.tensor([[0, 1, 1], [0, 0, 1]])

    def left_right(words: Tensor) -> None:
        A = pyro.param("A", torch.tensor([[0.5, 0.5], [0.0, 1.0]]), constraint=constraints.simplex)
        B = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        with pyro.plate("sequences", len(words)):
            z = torch.tensor(0)
            for t in pyro.markov(range(3)):
                z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=words[:, t])

    result = pyro_em.fit(left_right, words, algorithm="svi", max_iter=3)
    assert result.gap == pytest.approx(0.0, abs=1e-10)


def test_clamped_zeros_are_why_the_loss_is_our_own() -> None:
    """The reason given in guides.py: at a probability of 0, Pyro's loss and ours differ by the clamp."""

    def certain(y: Tensor) -> None:
        w = pyro.param("w", torch.tensor([1.0, 0.0]), constraint=constraints.simplex)
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(torch.tensor([0.0, 20.0])[z], 1.0), obs=y)

    y = torch.tensor(20.0)
    clamped = -TraceEnum_ELBO().loss(config_enumerate(certain), lambda y: None, y)
    assert clamped > -40
    exact = pyro_em.fit(certain, y, max_iter=0).log_likelihood
    assert exact == pytest.approx(float(dist.Normal(0.0, 1.0).log_prob(y)))
    ours = -pyro_em.ExactELBO().loss(certain, lambda y: None, y)
    assert ours < -170
