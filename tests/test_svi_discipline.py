"""What `algorithm="svi"` leaves behind (fitted modules and store, or nothing), restarts, options, refusals."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_em
from pyro_em.errors import InputError, NonFiniteError, Refusal
from tests import classics
from tests.problems import BY_NAME
from tests.test_svi import adam, normal_effects, two_groups, two_means


class ModuleMixture(PyroModule):
    """A mixture whose means are a plain torch parameter and whose weights a constrained Pyro one."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor([-1.0, 1.0]))
        self.w = PyroParam(torch.tensor([0.4, 0.6]), constraint=constraints.simplex)

    def forward(self, y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(self.w))
            pyro.sample("y", dist.Normal(self.mu[z], 1.0), obs=y)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def _store() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def test_modules_learn_in_place_and_the_store_follows() -> None:
    y, model, other = two_groups(), ModuleMixture(), ModuleMixture()
    pyro_em.fit(other, y, algorithm="svi", max_iter=5)
    before = _weights(other)
    result = pyro_em.fit(model, y, algorithm="svi", restarts=2, max_iter=30, optim=adam())
    assert torch.equal(model.mu, result.params["mu"])
    torch.testing.assert_close(model.w, result.params["w"])
    assert torch.equal(pyro.param("mu"), result.params["mu"])
    assert _same(_weights(other), before)
    replayed = poutine.trace(model).get_trace(y)  # PyroModule follows the store: it must hold our values
    assert torch.equal(replayed.nodes["mu"]["value"], result.params["mu"])


class _Stop(Exception):
    pass


@pytest.mark.parametrize("error", [_Stop, KeyboardInterrupt])
def test_an_interrupted_fit_leaves_no_trace(error: type[BaseException]) -> None:
    y, model = two_groups(), ModuleMixture()
    pyro.param("mine", torch.tensor(3.0))
    before, store, state = _weights(model), _store(), torch.get_rng_state()

    def callback(step: pyro_em.Step) -> None:
        if step.iteration == 3:
            raise error

    with pytest.raises(error):
        pyro_em.fit(model, y, algorithm="svi", restarts=2, seed=0, callbacks=[callback])
    assert _same(_weights(model), before)
    assert _same(_store(), store)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_is_not_finite_names_the_step() -> None:
    y, model = two_groups(), ModuleMixture()
    before, store, state = _weights(model), _store(), torch.get_rng_state()
    with pytest.raises(NonFiniteError, match=r"step \d+ of SVI.*learning rate"):
        pyro_em.fit(model, y, algorithm="svi", optim=pyro.optim.SGD({"lr": 1e200}), seed=0)
    assert _same(_weights(model), before)
    assert _same(_store(), store)
    assert torch.equal(torch.get_rng_state(), state)


def test_entries_of_the_store_are_overwritten_in_place() -> None:
    y = two_groups()
    mine = torch.tensor([-1.0, 1.0])

    def model(y: Tensor) -> None:
        mu = pyro.param("mu", mine)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)

    pyro.param("mu", torch.tensor([5.0, 6.0]))
    leaf = pyro.param("mu").unconstrained()
    result = pyro_em.fit(model, y, algorithm="svi", max_iter=10)
    assert result.history["objective"][0] == pytest.approx(pyro_em.fit(model, y, max_iter=0).log_likelihood), (
        "the fit starts from the model, not from the store"
    )
    assert torch.equal(mine, torch.tensor([-1.0, 1.0])), "the user's own tensor was trained"
    pyro_em.fit(model, y, algorithm="svi", max_iter=10)
    assert pyro.param("mu").unconstrained() is leaf
    assert torch.equal(leaf, result.params["mu"])


def test_same_seed_same_bits_whoever_watches() -> None:
    y, seen = 1.0 + torch.randn(15), []
    options: dict[str, Any] = {"algorithm": "svi", "max_iter": 8, "restarts": 2}
    first = pyro_em.fit(normal_effects, y, seed=3, **options)
    again = pyro_em.fit(normal_effects, y, seed=3, callbacks=[seen.append], progress=False, **options)
    other = pyro_em.fit(normal_effects, y, seed=4, **options)
    assert _same(first.params, again.params)
    assert first.history["objective"] == again.history["objective"]
    assert first.restarts == again.restarts
    assert not _same(first.params, other.params)
    assert [step.iteration for step in seen] == [*range(1, 9)] * 2
    assert seen[0].objective == first.history["objective"][0] or first.restarts[1] > first.restarts[0]


def test_restarts_keep_the_best_and_report_all() -> None:
    y = torch.cat([torch.randn(10) - 6, torch.randn(10), torch.randn(10) + 6])
    result = pyro_em.fit(classics.normal_mixture, y, 3, algorithm="svi", restarts=4, seed=0, max_iter=15, init="random")
    objectives = [objective for objective, _ in result.restarts]
    assert len(objectives) == 4
    assert result.history["objective"][-1] == max(objectives)
    assert min(objectives) < max(objectives)
    assert result.elbo == pytest.approx(result.log_likelihood)


def test_a_callback_can_stop_it() -> None:
    problem = BY_NAME["poisson_mixture"]
    result = pyro_em.fit(problem.model, *problem.args, algorithm="svi", callbacks=[lambda step: step.iteration == 4])
    assert result.outcome is pyro_em.Outcome.interrupted
    assert result.num_iterations == 4
    assert len(result.history["objective"]) == 5


@pytest.mark.parametrize(
    "optim",
    [
        None,
        pyro.optim.ClippedAdam({"lr": 0.02}),
        pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.5}),
        torch.optim.RMSprop,
        lambda parameters: torch.optim.SGD(parameters, lr=0.001),
    ],
    ids=["default", "pyro", "schedule", "class", "function"],
)
def test_any_optimiser_climbs(optim: Any) -> None:
    problem = BY_NAME["gmm_diagonal"]
    result = pyro_em.fit(problem.model, *problem.args, algorithm="svi", init=problem.start(), max_iter=12, optim=optim)
    assert result.elbo > result.history["objective"][0]


def test_a_schedule_is_followed() -> None:
    """With a factor of 1e-8 a step only the first step moves anything."""
    problem = BY_NAME["gmm_diagonal"]
    one, many = (
        pyro_em.fit(
            problem.model,
            *problem.args,
            algorithm="svi",
            init=problem.start(),
            max_iter=n,
            optim=pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 1e-8}),
        )
        for n in (1, 10)
    )
    for name in one.params:
        torch.testing.assert_close(one.params[name], many.params[name], atol=1e-8, rtol=0)


def _partial_guide(y: Tensor) -> None:
    pyro.sample("w", dist.Delta(torch.tensor([0.5, 0.5]), event_dim=1))


def _foreign_guide(y: Tensor) -> None:
    pyro.sample("not_there", dist.Normal(0.0, 1.0))


def _counts(y: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        n = pyro.sample("n", dist.Poisson(rate))
        pyro.sample("y", dist.Normal(n, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (two_means, {"guide": _partial_guide}, Refusal, "'mu'.*guide leaves out"),
        (two_means, {"guide": _foreign_guide}, InputError, "'not_there'"),
        (_counts, {}, Refusal, "'n'.*infinitely many"),
        (two_means, {"optim": 0.1}, InputError, "optim: float"),
        (two_means, {"num_particles": 0}, InputError, "num_particles"),
        (two_means, {"init": {"nu": 1.0}}, InputError, "'nu'"),
        (two_means, {"init": {"w": torch.tensor([0.5, 0.6])}}, InputError, "'w'"),
        (two_means, {"init": "best"}, InputError, "'best'"),
        (normal_effects, {"init": "kmeans++"}, InputError, "kmeans"),
        (normal_effects, {"init": {"mu": torch.tensor(torch.nan)}}, InputError, "'mu'"),
        (normal_effects, {"init": {"z": torch.zeros(3)}}, InputError, "'z'"),
        (normal_effects, {"roles": {"nobody": "latent"}}, InputError, "'nobody'"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(
    model: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pyro_em.fit(model, two_groups(), algorithm="svi", **options)
    assert not _store()
