"""What a first attempt often gets wrong, and the sentence that it gets: what, where, why, what to do."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em

X = torch.cat([torch.linspace(-3, -1, 12), torch.linspace(1, 3, 8)])
PAIRS = torch.stack([X, -X, 2 * X], -1)


def mixture(x: Any = None, size: int | None = None, K: int = 2, rows: int = 2, start: Any = 1.0) -> None:
    w = pyro.param("w", torch.ones(K) / K, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.linspace(-1, 1, rows))
    sd = pyro.param("sd", torch.as_tensor(start).expand(rows).clone(), constraint=constraints.positive)
    with pyro.plate("data", len(X) if size is None else size):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(loc[z], sd[z]), obs=x)


def without_plate(x: Tensor) -> None:
    z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
    pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor([-1.0, 1.0]))[z], 1.0), obs=x)


def event_of_another_size(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1), obs=x)


def random_features(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(torch.nn.functional.dropout(loc, 0.5)[z], 1.0), obs=x)


def branch(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        own = dist.Normal if z.reshape(-1)[0] == 0 else dist.Laplace
        pyro.sample("x", own(loc[z], 1.0), obs=x)


def unconstrained_scale(x: Tensor, start: Any = -1.0, size: int = 2) -> None:
    sd = pyro.param("sd", torch.as_tensor(start))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(size) / size))
        pyro.sample("x", dist.Normal(0.0, sd if sd.dim() == 0 else sd[z]), obs=x)


def many_rows(x: Tensor) -> None:
    """So many that the plain run draws one state for all of them, which may be the valid one."""
    unconstrained_scale(x.expand(1000, -1).reshape(-1), torch.tensor([-1.0, 1.0, 1.0, 1.0]), 4)


def columns_without_event(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(3))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def no_covariance(x: Tensor, S: Any = None) -> None:
    S = pyro.param("S", -torch.eye(3) if S is None else S)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), S), obs=x)


def negative_probability(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([1.5, -0.5]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)


def random_effect(x: Tensor) -> None:
    tau = pyro.param("tau", torch.tensor(-1.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, tau))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x)


HALF = torch.eye(3) + torch.tensor([[0.0, 0.5, 0.0], [0, 0, 0], [0, 0, 0]])
MISTAKES = {
    "no obs=": (mixture, (), r"observes no data: none of its sites \('z', 'x'\) has obs="),
    "plate of another size": (mixture, (X, 15), r"Site 'x': .*shape \(20,\).*plate 'data' of 15 elements"),
    "plate of size 1": (mixture, (X, 1), r"Site 'x': .*shape \(20,\).*plate 'data' of 1 elements"),
    "an event of another size": (event_of_another_size, (PAIRS,), r"shape \(20, 3\).*events shape \(2,\)"),
    "NumPy": (mixture, (X.numpy(),), r"is a ndarray, not a torch tensor\. Give the model torch\.as_tensor"),
    "a negative scale": (mixture, (X, None, 2, 2, -1.0), r"'sd' starts outside of .*: entry 0 \(and 1 more\) is -1"),
    "a negative scale without a constraint": (
        unconstrained_scale, (X,), r"'x': its argument 'scale' is -1, and has to be greater than 0\. It is made of 'sd'"
    ),
    "a scale of 0": (unconstrained_scale, (X, 0.0), r"'x': its argument 'scale' is 0, and has to be greater than 0"),
    "one of several scales": (
        unconstrained_scale, (X, torch.tensor([-1.0, -2.0])), r"'x': its argument 'scale' is -[12] in row"
    ),
    "one of several scales, that no row may draw": (many_rows, (X,), "'x': its argument 'scale' is -1"),
    "a scale of a latent": (random_effect, (X,), r"'u': its argument 'scale' is -1.*greater than 0.*'tau'"),
    "a negative probability": (negative_probability, (X,), r"'z': its argument 'probs' is -0\.5 in row.*at least 0"),
    "columns without to_event": (
        columns_without_event, (PAIRS,), r"'x': plate 'data' has 20 elements, at dim -1, .* 3 of them.*to_event\(1\)"
    ),
    "no covariance matrix": (no_covariance, (PAIRS,), "not positive definite where it starts.*positive_definite"),
    "half a covariance matrix": (
        no_covariance, (PAIRS, HALF), "'x': its argument 'covariance_matrix' cannot be used: it is not symmetric"
    ),
    "a label out of range": (mixture, (X.new_full((20,), torch.inf),), r"in row 0 \(and 19 more\) is NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_data_that_do_not_fit_the_model_are_named(name: str) -> None:
    model, args, message = MISTAKES[name]
    for ask in (pyro_em.plan, pyro_em.fit):
        with pytest.raises(pyro_em.InputError, match=message) as caught:
            ask(model, *args)
        assert "Trace Shapes" not in str(caught.value)
    assert not list(pyro.get_param_store().keys())


def test_data_outside_of_a_plate_are_refused_with_the_plates_there_are() -> None:
    with pytest.raises(pyro_em.Refusal, match=r"'x'.*belong to none of its plates.*Its plates: none.*pyro\.plate"):
        pyro_em.fit(without_plate, X)


def test_a_table_shorter_than_the_latent_has_states_is_explained() -> None:
    with pytest.raises(IndexError) as caught:
        pyro_em.fit(mixture, X, K=3)
    assert any("needs a row for each of the latent's states" in note for note in caught.value.__notes__)


def test_a_branch_that_enumeration_cannot_take_is_explained() -> None:
    def each(x: Tensor) -> None:
        for n in pyro.plate("data", 3):
            z = pyro.sample(f"z_{n}", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))
            pyro.sample(f"x_{n}", dist.Normal(1.0 if z else -1.0, 1.0), obs=x[n])

    with pytest.raises(RuntimeError, match="Boolean value") as caught:
        pyro_em.fit(each, X)
    assert any("branches in Python on a latent" in note for note in caught.value.__notes__)


def test_randomness_of_the_model_itself_is_told_from_a_latent_that_is_summed() -> None:
    with pytest.raises(pyro_em.Refusal, match=r"'x': two runs of the model .* draws random numbers"):
        pyro_em.fit(random_features, X)


@pytest.mark.parametrize("seed", range(6))
def test_a_branch_on_a_latent_is_refused_whatever_was_drawn(seed: int) -> None:
    torch.manual_seed(seed)
    with pytest.raises(pyro_em.Refusal, match="branches on its value"):
        pyro_em.plan(branch, X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": torch.ones(20)}, "weights is a dict by plate"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"callbacks": print}, r"callbacks=\[function\]"),
    ],
)
def test_options_of_another_kind_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pyro_em.InputError, match=message):
        pyro_em.fit(mixture, X, **options)


def test_what_is_no_model_or_no_option_is_named() -> None:
    with pytest.raises(pyro_em.InputError, match="The model is a Tensor, not a function"):
        pyro_em.fit(X, mixture)
    with pytest.raises(pyro_em.InputError, match=r"no option 'max_iter'\. Its options: e_step"):
        pyro_em.EM(mixture, max_iter=3)


def test_plan_takes_every_option_of_fit() -> None:
    defaults = {n: p.default for n, p in inspect.signature(pyro_em.fit).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert str(pyro_em.plan(mixture, X, **defaults)) == str(pyro_em.plan(mixture, X))


def identity_link(x: Tensor, family: str = "Poisson") -> None:
    """A rate (a probability, a concentration) that is linear in a covariate: nothing keeps it in its space."""
    a, b = pyro.param("a", torch.tensor(0.5)), pyro.param("b", torch.tensor(0.1))
    v = torch.linspace(-1, 1, len(x))
    y = {"Poisson": 3.0 * (v > 0), "Bernoulli": 1.0 * (v > 0), "Beta": 0.5 + 0.49 * v.sign() * (v.abs() > 0.4)}[family]
    with pyro.plate("data", len(x)):
        made = dist.Beta(a + b * v, 1.0) if family == "Beta" else getattr(dist, family)(a + b * v)
        pyro.sample("y", made, obs=y)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
@pytest.mark.parametrize("algorithm", ["em", "gem"])
@pytest.mark.parametrize("family", ["Poisson", "Bernoulli", "Beta"])
def test_no_step_leaves_the_space_of_an_argument(family: str, algorithm: str) -> None:
    """0 log λ − λ rises for ever below λ = 0, and log Γ has values at negative concentrations."""
    model = functools.partial(identity_link, family=family)
    found = pyro_em.fit(model, X.double(), algorithm=algorithm, max_iter=40)
    low, high = (float(found.params["a"] + s * found.params["b"]) for s in (-1, 1))
    assert low >= -1e-6 and (family != "Bernoulli" or high <= 1 + 1e-6)
    assert np.isfinite(found.log_likelihood)
    assert found.history["objective"] == sorted(found.history["objective"])


def test_a_maximum_at_the_edge_of_a_space_is_said_to_be_there() -> None:
    with pytest.warns(pyro_em.BoundaryEstimate, match="'y': its argument 'rate' ended at the edge of its space"):
        found = pyro_em.fit(identity_link, X)
    assert float(found.params["a"]) == pytest.approx(float(found.params["b"]), abs=1e-6)
    assert not found.converged


def test_a_start_by_init_outside_of_the_space_is_named() -> None:
    for model, init, argument in ((identity_link, {"b": 5.0}, "rate"), (unconstrained_scale, {"sd": -1.0}, "scale")):
        args = (X, 1.0) if model is unconstrained_scale else (X,)
        with pytest.raises(pyro_em.NonFiniteError, match=f"its argument '{argument}' is -[0-9.]+.*has to be"):
            pyro_em.fit(model, *args, init=init)


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_standard_errors_carry_the_units_of_the_data(unit: float) -> None:
    def scaled(x: Tensor, unit: float) -> None:
        w = pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)
        loc = pyro.param("loc", unit * torch.tensor([-1.0, 1.0]))
        sd = pyro.param("sd", unit * torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(loc[z], sd[z]), obs=x)

    one = pyro_em.fit(functools.partial(scaled, unit=1.0), X, max_iter=20, tol=0).standard_errors()
    own = pyro_em.fit(functools.partial(scaled, unit=unit), unit * X, max_iter=20, tol=0).standard_errors()
    for name, factor in (("w", 1.0), ("loc", unit), ("sd", unit)):
        assert torch.allclose(own[name], factor * one[name], rtol=1e-6, atol=0)
        assert bool((own[name] > 0).all())


def beta_binomial(n: Tensor, y: Tensor) -> None:
    m = pyro.param("m", n.new_tensor(0.3), constraint=constraints.unit_interval)
    k = pyro.param("k", n.new_tensor(5.0), constraint=constraints.positive)
    with pyro.plate("players", len(y)):
        p = pyro.sample("p", dist.Beta(m * k, (1 - m) * k))
        pyro.sample("y", dist.Binomial(n, p), obs=y)


def logit_normal(n: Tensor, y: Tensor) -> None:
    loc = pyro.param("loc", n.new_tensor(-1.0))
    sd = pyro.param("sd", n.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("players", len(y)):
        a = pyro.sample("a", dist.Normal(loc, sd))
        pyro.sample("y", dist.Binomial(n, logits=a), obs=y)


def non_centred(s: Tensor, y: Tensor) -> None:
    mu, tau = (pyro.param(name, s.new_tensor(5.0), constraint=constraints.positive) for name in ("mu", "tau"))
    with pyro.plate("schools", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * u, s), obs=y)


AT_BATS, HITS = np.full(6, 45.0), np.array([24.0, 17, 16, 15, 8, 4])
SINGLE = {
    "conjugate": (beta_binomial, {}),
    "quadrature": (logit_normal, {"e_step": {"a": pyro_em.Quadrature(num_nodes=15)}}),
    "Gaussian": (non_centred, {}),
}


@pytest.mark.parametrize("route", SINGLE)
def test_continuous_latents_of_a_model_in_float32_are_integrated_as_in_float64(route: str) -> None:
    """Binding once refused these: rounding made them look as if rows shared their latents."""
    model, options = SINGLE[route]
    found = {}
    for dtype in (torch.float32, torch.float64):
        pyro.clear_param_store()
        n, y = (torch.tensor(a, dtype=dtype) for a in (AT_BATS, HITS * (10 if route == "Gaussian" else 1)))
        found[dtype] = pyro_em.fit(model, n, y, max_iter=3, tol=0, **options)
    single, double = found[torch.float32], found[torch.float64]
    assert single.log_likelihood == pytest.approx(double.log_likelihood, rel=1e-6)
    assert all(value.dtype == torch.float32 for value in single.params.values())
    for name, value in double.params.items():
        assert single.params[name].item() == pytest.approx(value.item(), rel=1e-4)
