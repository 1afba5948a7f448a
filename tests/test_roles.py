"""The rules of roles.py, one model each: what a site is, and the reason that the plan prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.errors import InputError
from pyro_em.model.capture import capture
from pyro_em.model.roles import RoleOf, assign_roles

Y = torch.tensor([0.2, -0.4, 1.3], dtype=torch.float64)


def _roles(model: Callable[..., Any], **options: Any) -> dict[str, RoleOf]:
    return assign_roles(capture(model, (Y,), {}), **options)


def mixture(y: Tensor) -> None:
    """Data, an enumerated latent, and a parameter with fixed hyperparameters in a plate of its own."""
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def test_data_discrete_latents_and_parameters() -> None:
    roles = _roles(mixture)
    assert {name: role.role for name, role in roles.items()} == {"loc": "parameter", "z": "latent", "y": "data"}
    assert list(roles) == ["loc", "z", "y"], "program order"
    assert "enumerated" in roles["z"].reason
    assert "fixed hyperparameters" in roles["loc"].reason
    assert roles["loc"].override is not None
    assert 'roles={"loc": "latent"}' in roles["loc"].override


def test_a_site_in_a_data_plate_is_latent() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    role = _roles(model)["effect"]
    assert role.role == "latent"
    assert "'rows'" in role.reason
    assert role.override is not None
    assert 'roles={"effect": "parameter"}' in role.override


def test_a_prior_with_a_parameter_makes_a_latent() -> None:
    def model(y: Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("groups", 2):
            effect = pyro.sample("effect", dist.Normal(0.0, spread))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(effect[torch.tensor([0, 1, 1])], 1.0), obs=y)

    role = _roles(model)["effect"]
    assert role.role == "latent"
    assert "'spread'" in role.reason


def test_a_prior_with_a_latent_makes_a_latent() -> None:
    def model(y: Tensor) -> None:
        regime = pyro.sample("regime", dist.Bernoulli(0.5))
        loc = pyro.sample("loc", dist.Normal(regime, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    role = _roles(model)["loc"]
    assert role.role == "latent"
    assert "latent 'regime'" in role.reason


def test_priors_may_lean_on_parameters_of_their_own_plate() -> None:
    """Means given covariances, as in a Normal-inverse-Wishart prior: both are parameters."""

    def model(y: Tensor) -> None:
        with pyro.plate("components", 2):
            var = pyro.sample("var", dist.InverseGamma(2.0, 1.0))
            loc = pyro.sample("loc", dist.Normal(0.0, (var / 0.1).sqrt()))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal(loc[z], var[z].sqrt()), obs=y)

    roles = _roles(model)
    assert roles["var"].role == roles["loc"].role == "parameter"

    def hierarchy(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, tau))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc.sum(), 1.0), obs=y)

    roles = _roles(hierarchy)
    assert (roles["tau"].role, roles["loc"].role) == ("parameter", "latent")


def test_a_markov_site_is_latent() -> None:
    def model(y: Tensor) -> None:
        x: Any = 0.0
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(x, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    roles = _roles(model)
    assert [roles[f"x_{t}"].role for t in range(3)] == ["latent"] * 3
    assert "markov" in roles["x_0"].reason


def test_infinitely_many_states_are_said() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            n = pyro.sample("n", dist.Poisson(2.0))
            pyro.sample("y", dist.Normal(n, 1.0), obs=y)

    assert "infinitely many" in _roles(model)["n"].reason


def test_the_user_has_the_last_word() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0), infer={"em": "parameter"})
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    assert _roles(model)["effect"] == RoleOf("parameter", "as told")
    assert _roles(model, roles={"effect": "latent"})["effect"].role == "latent"
    assert _roles(mixture, roles={"loc": "latent"})["loc"] == RoleOf("latent", "as told")


def test_a_delta_in_the_guide_is_a_parameter() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("effect", dist.Delta(pyro.param("at", torch.zeros(len(y)))))

    assert "Delta" in _roles(model, deltas=["effect"])["effect"].reason
    assert pyro_em.plan(model, Y, algorithm="map-em").route("effect") == "Gaussian"
    result = pyro_em.fit(model, Y, algorithm="map-em", guide=guide)
    torch.testing.assert_close(result.params["effect"], Y / 2)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"mu": "parameter"}, "no sample site 'mu'.*loc, z, y"),
        ({"loc": "data"}, "'data' is no role"),
        ({"z": "parameter"}, "'z' is discrete"),
    ],
)
def test_overrides_that_cannot_be(roles: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _roles(mixture, roles=roles)


def test_the_plan_says_whether_priors_count() -> None:
    assert "ignored by 'em'" in str(pyro_em.plan(mixture, Y))
    assert "its prior counts" in str(pyro_em.plan(mixture, Y, algorithm="map-em"))


def test_the_plan_says_how_scaled_effects_are_integrated_out() -> None:
    """Their prior has fixed hyperparameters and their plate no data of its own, as that of component means."""
    group = torch.arange(12) % 3

    def model(y: Tensor) -> None:
        size = pyro.param("size", torch.tensor(0.7))
        with pyro.plate("groups", 3):
            e = pyro.sample("e", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(size * e[group], 0.5), obs=y)

    y = torch.arange(12.0) % 5
    assert 'roles={"e": "latent"} integrates it out, where that is exact' in str(pyro_em.plan(model, y))
    found = pyro_em.fit(model, y, roles={"e": "latent"}, max_iter=3, tol=0)
    same = (group.unsqueeze(-1) == group).double()
    marginal = dist.MultivariateNormal(torch.zeros(12), found.params["size"] ** 2 * same + 0.25 * torch.eye(12))
    assert found.log_likelihood == pytest.approx(float(marginal.log_prob(y)), rel=1e-10)


def test_a_rule_makes_its_site_a_latent() -> None:
    """Abilities by row have a prior without parameters and no plate with data: they would be point estimates."""

    def model(y: Tensor, person: Tensor | None = None) -> None:
        d = pyro.param("d", torch.tensor(0.2))
        with pyro.plate("persons", 12, dim=-1):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            if person is None:
                with pyro.plate("items", 4, dim=-2):
                    pyro.sample("y", dist.Bernoulli(logits=theta - d), obs=y)
        if person is not None:
            with pyro.plate("rows", len(y), dim=-1):
                pyro.sample("y", dist.Bernoulli(logits=theta[person] - d), obs=y)

    generator = torch.Generator().manual_seed(0)
    y = torch.bernoulli(torch.rand(12, 1, generator=generator).expand(12, 4), generator=generator)
    options: dict[str, Any] = {"e_step": {"theta": pyro_em.Quadrature(15)}, "max_iter": 5, "tol": 0}
    table = pyro_em.fit(model, y.T, **options)
    long = pyro_em.fit(model, y.reshape(-1), torch.arange(12).repeat_interleave(4), **options)
    assert long.log_likelihood == pytest.approx(table.log_likelihood, rel=1e-11)
    torch.testing.assert_close(long.params["d"], table.params["d"], rtol=1e-10, atol=0)
    torch.testing.assert_close(long.posterior().mean("theta"), table.posterior().mean("theta"), rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="no continuous latent 'theta'"):
        pyro_em.fit(model, y.T, **options, roles={"theta": "parameter"})
