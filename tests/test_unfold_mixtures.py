"""Mixtures written as one distribution are mixtures: the closed forms are those of the model with a latent site."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em

START = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, -2.0]])


def _data(rows: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-3.0, 0.0], [3.0, 1.0], [0.0, -4.0]])
    which = torch.randint(3, (rows,), generator=generator)
    return centres[which] + torch.randn(rows, 2, generator=generator)


def _parameters() -> tuple[Tensor, Tensor, Tensor]:
    w = pyro.param("w", torch.full((3,), 1 / 3), constraint=constraints.simplex)
    loc = pyro.param("loc", START.clone())
    return w, loc, pyro.param("scale", torch.ones(3, 2), constraint=constraints.positive)


def joint(x: Tensor) -> None:
    w, loc, scale = _parameters()
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(loc, scale).to_event(1)), obs=x)


def written_out(x: Tensor) -> None:
    w, loc, scale = _parameters()
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)


def test_a_mixture_is_fitted_by_the_same_updates() -> None:
    x = _data()
    found = pyro_em.fit(joint, x, max_iter=12, tol=0)
    expected = pyro_em.fit(written_out, x, max_iter=12, tol=0)
    assert found.history["log_likelihood"] == expected.history["log_likelihood"]
    assert all(torch.equal(found.params[name], value) for name, value in expected.params.items())
    assert "precision-weighted mean" in str(found.plan) and "plated" in str(found.plan)
    params = found.params
    components = dist.Normal(params["loc"], params["scale"]).to_event(1)
    own = dist.MixtureSameFamily(dist.Categorical(params["w"]), components)
    torch.testing.assert_close(found.log_prob(), own.log_prob(x), rtol=1e-12, atol=1e-12)
    shares = found.posterior().responsibilities("x_component")
    torch.testing.assert_close(shares, expected.posterior().responsibilities("z"), rtol=0, atol=0)
    assert found.predictive(num_samples=2)["x"].shape == (2, 60, 2)


def test_components_that_differ_by_row_and_group() -> None:
    """A regression in every component, weights of two groups: arguments have dims of plates left of the components."""
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(40, generator=generator)
    group = (torch.arange(40) > 25).long()
    y = torch.where(torch.rand(40, generator=generator) < 0.4 + 0.3 * group, 2 * c, 1 - c)
    y = y + 0.3 * torch.randn(40, generator=generator)

    def model(y: Tensor) -> None:
        logits = pyro.param("logits", torch.tensor([[0.1, 0.0], [0.0, 0.1]]))
        slope = pyro.param("slope", torch.tensor([1.0, -0.5]))
        with pyro.plate("rows", len(y)):
            components = dist.Normal(slope * c.unsqueeze(-1), 0.5)
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(logits=logits[group]), components), obs=y)

    found = pyro_em.fit(model, y, max_iter=50)
    assert found.converged
    leaves = {name: value.clone().requires_grad_() for name, value in found.params.items()}
    own = dist.MixtureSameFamily(
        dist.Categorical(logits=leaves["logits"][group]), dist.Normal(leaves["slope"] * c.unsqueeze(-1), 0.5)
    )
    value = own.log_prob(y).sum()
    assert found.log_likelihood == pytest.approx(float(value.detach()), rel=1e-12)
    for gradient in torch.autograd.grad(value, list(leaves.values())):
        assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize("gate", ["gate", "gate_logits"])
def test_zero_inflated_counts(gate: str) -> None:
    generator = torch.Generator().manual_seed(2)
    y = torch.poisson(torch.full((80,), 2.5), generator=generator) * (torch.rand(80, generator=generator) < 0.6)

    def model(y: Tensor) -> None:
        real = constraints.unit_interval if gate == "gate" else constraints.real
        share = pyro.param("share", torch.tensor(0.3), constraint=real)
        rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.ZeroInflatedPoisson(rate, **{gate: share}), obs=y)

    found = pyro_em.fit(model, y, tol=1e-9)
    leaves = {name: value.clone().requires_grad_() for name, value in found.params.items()}
    own = dist.ZeroInflatedPoisson(leaves["rate"], **{gate: leaves["share"]}).log_prob(y).sum()
    assert found.converged and found.log_likelihood == pytest.approx(float(own.detach()), rel=1e-12)
    for gradient in torch.autograd.grad(own, list(leaves.values())):
        assert float(gradient.abs()) < 1e-6
    zeros = found.posterior().marginal("y_zero").mean  # type: ignore[attr-defined]
    assert bool((zeros[y > 0] == 0).all()) and bool((zeros[y == 0] > 0.1).all())


def test_what_is_wrapped_keeps_its_own_density() -> None:
    """Elements of one event have components of their own, which are in no plate."""
    x = torch.tensor([-1.0, 0.5, 2.0])

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(loc, 1.0))
        pyro.sample("x", mixture.expand([3]).to_event(1), obs=x)

    found = pyro_em.fit(model, x)
    own = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(found.params["loc"], 1.0)).log_prob(x)
    assert found.converged and found.log_likelihood == pytest.approx(float(own.sum()), rel=1e-12)
    (row,) = found.plan.m_step
    assert row.route == "numeric" and "hides its arguments" in row.reason


def test_weights_that_alone_read_a_latent() -> None:
    """The mixture has the batch shape of its parts, which a plate cannot give the dim of the latent's states."""
    x = _data(20)[:, 0].double()

    def shared_parts(x: Tensor, inside: bool) -> None:
        w = pyro.param("w", torch.tensor([[0.3, 0.7], [0.8, 0.2]], dtype=torch.float64), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 2.0], dtype=torch.float64))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4)).long()
            if inside:
                pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(w[z]), dist.Normal(loc, 1.0)), obs=x)
            else:
                c = pyro.sample("c", dist.Categorical(w[z]))
                pyro.sample("x", dist.Normal(loc[c], 1.0), obs=x)

    found, expected = (pyro_em.fit(shared_parts, x, inside, max_iter=3, tol=0) for inside in (True, False))
    assert found.history["log_likelihood"] == pytest.approx(expected.history["log_likelihood"], rel=1e-12)


def test_parts_chosen_by_a_latent() -> None:
    """`MaskedMixture` takes a mask that may be a latent; its own `expand` has no second argument."""
    x = _data(20)[:, 0].double()

    def model(x: Tensor, masked: bool) -> None:
        loc = pyro.param("loc", torch.tensor(-1.0, dtype=torch.float64))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            parts = dist.Normal(loc, 1.0), dist.Normal(1.0, 2.0)
            either = dist.Normal(torch.where(z == 1, 1.0, loc), 1.0 + z)
            pyro.sample("x", dist.MaskedMixture(z == 1, *parts) if masked else either, obs=x)

    found, expected = (pyro_em.fit(model, x, masked, max_iter=3, tol=0) for masked in (True, False))
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-9)


def test_log_likelihoods_of_zero_inflated_counts_for_arviz() -> None:
    """Shapes of `ZeroInflatedDistribution` are tuples, no torch.Size."""
    x = torch.tensor([0.0, 0.0, 3.0, 5.0, 0.0, 2.0, 0.0, 7.0], dtype=torch.float64)

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.4, dtype=torch.float64), constraint=constraints.unit_interval)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.ZeroInflatedDistribution(dist.Geometric(p), gate=torch.tensor(0.2)), obs=x)

    result = pyro_em.fit(model, x)
    tree = result.to_inference_data(num_draws=3)
    for p, found in zip(tree["posterior"]["p"].values[0], tree["log_likelihood"]["x"].values[0], strict=True):
        density = dist.ZeroInflatedDistribution(dist.Geometric(torch.tensor(p)), gate=torch.tensor(0.2)).log_prob(x)
        torch.testing.assert_close(torch.tensor(found), density, rtol=1e-12, atol=0)
