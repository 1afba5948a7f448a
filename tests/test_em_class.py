"""`EM`: SVI's shape around the exact algorithms. A step is one update; the store carries the parameters."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_em
from pyro_em.errors import InputError, Refusal
from tests import zoo
from tests.problems import BY_NAME, Problem

CASES = [
    ("gmm_full", "em"),
    ("categorical_hmm", "em"),
    ("transformed", "em"),
    ("gmm_diagonal", "gem"),
    ("gmm_map", "map-em"),
]


def _register(problem: Problem) -> None:
    """Put the problem's start into the store, as a user who begins from values of their own would."""
    pyro_em.EM(problem.model).step(*problem.args)
    store = pyro.get_param_store()
    for name, value in problem.start().items():
        if name in store:
            store[name] = value


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_steps_are_the_iterates_of_fit(name: str, algorithm: str) -> None:
    problem = BY_NAME[name]
    em = pyro_em.EM(problem.model, algorithm=algorithm)
    losses = em.run(*problem.args, num_steps=6)
    assert all(a >= b for a, b in zip(losses, losses[1:], strict=False))
    # The model's own start; for sample sites that is the draw which binding makes with a fixed seed.
    first = {n: r.value for n, r in em._bound[2].parameters.items()} if em._bound else {}
    result = pyro_em.fit(problem.model, *problem.args, algorithm=algorithm, init=first, max_iter=6, tol=0)
    assert losses == pytest.approx([-v for v in result.history["objective"][:6]], rel=1e-12)
    assert em.evaluate_loss(*problem.args) == pytest.approx(-result.history["objective"][6], rel=1e-12)
    for site, value in result.params.items():
        if site in pyro.get_param_store():
            torch.testing.assert_close(pyro.param(site).detach(), value, rtol=1e-12, atol=1e-12)


def test_a_step_returns_the_loss_before_it() -> None:
    problem = BY_NAME["poisson_mixture"]
    em = pyro_em.EM(problem.model)
    before = em.evaluate_loss(*problem.args)
    assert before == em.evaluate_loss(*problem.args), "to evaluate must not move anything"
    assert em.step(*problem.args) == before
    after = em.evaluate_loss(*problem.args)
    assert after < before
    assert em.step(*problem.args) == after
    assert -before == pytest.approx(float(problem.oracle({"pi": torch.ones(2) / 2, "lam": _own_start()}).log_evidence))


def _own_start() -> Tensor:
    """The rates with which the Poisson mixture of the table begins by itself."""
    problem = BY_NAME["poisson_mixture"]
    return pyro_em.fit(problem.model, *problem.args, max_iter=0).params["lam"]


def test_continues_from_the_store() -> None:
    problem = BY_NAME["gmm_diagonal"]
    _register(problem)
    pyro_em.EM(problem.model).step(*problem.args)
    expected = pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=1, tol=0).params
    pyro.clear_param_store()
    _register(problem)
    pyro_em.EM(problem.model).step(*problem.args)
    for name, value in expected.items():
        torch.testing.assert_close(pyro.param(name).detach(), value)
    new = pyro_em.EM(problem.model)
    assert new.step(*problem.args) == pytest.approx(-problem.oracle(expected).log_evidence.item(), rel=1e-12)


def test_store_leaves_are_updated_in_place() -> None:
    problem = BY_NAME["gmm_diagonal"]
    em = pyro_em.EM(problem.model)
    em.step(*problem.args)
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
    y = torch.cat([torch.randn(20) - 2, torch.randn(20) + 2])
    em = pyro_em.EM(zoo.one_hot_mixture)
    em.step(y)
    held = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    loss = em.evaluate_loss(y[:10])
    density = dist.Normal(held["mu"], held["sd"]).log_prob(y[:10, None]) + held["w"].log()
    assert loss == pytest.approx(-float(density.logsumexp(-1).sum()), rel=1e-12)


def test_options_reach_the_fit() -> None:
    problem = BY_NAME["gmm_diagonal"]
    em = pyro_em.EM(problem.model, m_step={"sd": "fixed"}, weights={"rows": torch.ones(40)})
    before = problem.model
    em.step(*problem.args)
    start = pyro_em.fit(before, *problem.args, max_iter=0).params
    assert torch.equal(pyro.param("sd").detach(), start["sd"])
    assert not torch.equal(pyro.param("mu").detach(), start["mu"])


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
