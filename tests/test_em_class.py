"""`EM`: SVI's shape around the exact algorithms. A step is one update; the store carries the parameters."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_em
from pyro_em.errors import InputError, Refusal
from tests.problems import BY_NAME, Problem

CASES = [
    ("gmm_full", "em"),
    ("categorical_hmm", "em"),
    ("transformed", "em"),
    ("module_mixture", "em"),
    ("gmm_diagonal", "gem"),
]


def _register(problem: Problem) -> None:
    """Put the problem's start into the store, from where `EM` and `SVI` begin."""
    pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=0)


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_steps_are_the_iterates_of_fit(name: str, algorithm: str) -> None:
    problem = BY_NAME[name]
    _register(problem)
    em = pyro_em.EM(problem.model, algorithm=algorithm)
    losses = em.run(*problem.args, num_steps=6)
    stepped = {site: pyro.param(site).detach().clone() for site in problem.init}
    assert all(a >= b for a, b in pairwise(losses))
    result = pyro_em.fit(problem.model, *problem.args, algorithm=algorithm, init=problem.start(), max_iter=6, tol=0)
    assert losses == pytest.approx([-v for v in result.history["objective"][:6]], rel=1e-10)
    assert em.evaluate_loss(*problem.args) == pytest.approx(-result.history["objective"][6], rel=1e-10)
    for site, value in result.params.items():
        torch.testing.assert_close(stepped[site], value, rtol=1e-8, atol=1e-8)


def test_a_step_returns_the_loss_before_it() -> None:
    problem = BY_NAME["poisson_mixture"]
    _register(problem)
    em = pyro_em.EM(problem.model)
    before = em.evaluate_loss(*problem.args)
    assert before == em.evaluate_loss(*problem.args), "to evaluate must not move anything"
    assert -before == pytest.approx(float(problem.oracle(problem.start()).log_evidence), rel=1e-12)
    assert em.step(*problem.args) == before
    after = em.evaluate_loss(*problem.args)
    assert after < before
    assert em.step(*problem.args) == after


def test_another_object_continues_from_the_store() -> None:
    problem = BY_NAME["gmm_diagonal"]
    _register(problem)
    pyro_em.EM(problem.model).step(*problem.args)
    expected = pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=1, tol=0).params
    _register(problem)
    pyro_em.EM(problem.model).step(*problem.args)
    for name, value in expected.items():
        torch.testing.assert_close(pyro.param(name).detach(), value)
    loss = pyro_em.EM(problem.model).step(*problem.args)
    assert -loss == pytest.approx(float(problem.oracle(expected).log_evidence), rel=1e-12)


def test_store_leaves_are_updated_in_place() -> None:
    problem = BY_NAME["gmm_diagonal"]
    _register(problem)
    em = pyro_em.EM(problem.model)
    leaves = dict(pyro.get_param_store().named_parameters())
    em.step(*problem.args)
    assert all(leaf is leaves[name] for name, leaf in pyro.get_param_store().named_parameters())


def test_sample_sites_move_and_their_priors_count_under_map_em() -> None:
    problem = BY_NAME["coins_map"]
    em = pyro_em.EM(problem.model, algorithm="map-em")
    losses = em.run(*problem.args, num_steps=200)
    exact = pyro_em.fit(problem.model, *problem.args, algorithm="map-em", init=problem.start(), tol=1e-9)
    assert -losses[-1] == pytest.approx(exact.log_posterior, abs=1e-8)
    plain = pyro_em.EM(problem.model, algorithm="em").run(*problem.args, num_steps=200)
    assert plain[-1] == pytest.approx(
        -pyro_em.fit(problem.model, *problem.args, init=problem.start()).log_likelihood, abs=1e-8
    )


def test_new_data_go_on_from_the_same_parameters() -> None:
    """As SVI does with minibatches: another call, other data, same parameters."""
    problem = BY_NAME["one_hot_mixture"]
    (y,) = problem.args
    _register(problem)
    em = pyro_em.EM(problem.model)
    em.step(y)
    held = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    loss = em.evaluate_loss(y[:10])
    density = dist.Normal(held["mu"], held["sd"]).log_prob(y[:10, None]) + held["w"].log()
    assert loss == pytest.approx(-float(density.logsumexp(-1).sum()), rel=1e-12)


def test_options_reach_the_fit() -> None:
    problem = BY_NAME["gmm_diagonal"]
    _register(problem)
    first = torch.tensor([1.0, 0.0]).repeat_interleave(20)
    em = pyro_em.EM(problem.model, m_step={"sd": "fixed"}, weights={"rows": first})
    em.step(*problem.args)
    torch.testing.assert_close(pyro.param("sd").detach(), problem.start()["sd"], rtol=1e-14, atol=0)
    half = pyro_em.fit(
        problem.model, problem.args[0][:20], init=problem.start(), m_step={"sd": "fixed"}, max_iter=1, tol=0
    )
    assert em.evaluate_loss(*problem.args) == pytest.approx(-half.log_likelihood, rel=1e-10)


@pytest.mark.parametrize(
    "options", [{"algorithm": "svi"}, {"algorithm": "newton"}, {"loss": Trace_ELBO()}], ids=["svi", "unknown", "loss"]
)
def test_what_it_cannot_do_is_said_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        pyro_em.EM(BY_NAME["gmm_diagonal"].model, **options)


def test_a_guide_with_a_distribution_is_refused() -> None:
    problem = BY_NAME["coins_map"]

    def guide(*args: Any) -> None:
        pyro.sample("p", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))

    with pytest.raises(Refusal, match="'p'"):
        pyro_em.EM(problem.model, guide, algorithm="map-em").step(*problem.args)


def test_an_exact_elbo_is_its_loss() -> None:
    problem = BY_NAME["gmm_diagonal"]
    em = pyro_em.EM(problem.model, None, None, pyro_em.ExactELBO())
    assert em.step(*problem.args) > em.step(*problem.args)
