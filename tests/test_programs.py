"""What programs hold besides sites and parameters: noted values, penalties, detached parameters, names used twice."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em import InputError, Refusal
from tests.classics import positive, simplex

GENERATOR = torch.Generator().manual_seed(0)
X = torch.cat([torch.randn(30, generator=GENERATOR, dtype=torch.float64) + m for m in (-2.0, 2.0)])
Note = Callable[[str, Tensor], Tensor]


def _plain(_: str, value: Tensor) -> Tensor:
    return value


def _parameters() -> tuple[Tensor, Tensor, Tensor]:
    w = pyro.param("w", torch.ones(2) / 2, constraint=simplex)
    return w, pyro.param("loc", torch.tensor([-1.0, 1.0])), pyro.param("sd", torch.tensor(1.0), constraint=positive)


def mixture(x: Tensor, note: Note = pyro.deterministic, locations: Note = _plain, scale: Note = _plain) -> None:
    w, loc, sd = _parameters()
    doubled = note("doubled", 2 * locations("loc", loc))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        mu = note("mu", doubled[z])
        pyro.sample("x", dist.Normal(mu, scale("sd", sd)), obs=x)
    note("residual", x - mu)


def test_noted_values_are_no_data() -> None:
    """Those outside of the plate would make one observation of all rows: other BIC, other tolerance, other engine."""
    noted, plain = pyro_em.fit(mixture, X), pyro_em.fit(mixture, X, note=_plain)
    assert noted.log_likelihood == plain.log_likelihood
    assert (noted.bic, noted.num_observations, noted.num_iterations) == (plain.bic, 60, plain.num_iterations)
    assert str(noted.plan) == str(plain.plan)
    torch.testing.assert_close(noted.log_prob(), plain.log_prob(), rtol=0, atol=0)


def test_noted_values_are_predicted_with_the_data() -> None:
    draws = pyro_em.fit(mixture, X).predictive(X, num_samples=7, seed=0)
    shapes = {name: tuple(value.shape) for name, value in draws.items()}
    assert shapes == {"z": (7, 60), "x": (7, 60), "doubled": (7, 2), "mu": (7, 60), "residual": (7, 60)}
    assert torch.equal(draws["mu"], draws["doubled"].gather(1, draws["z"].long()))


@pytest.mark.parametrize("loop", [pyro_em.markov, lambda T: pyro.markov(range(T))], ids=["pyro_em", "pyro"])
def test_noted_values_in_loops(loop: Any) -> None:
    def chain(y: Tensor, note: Note = pyro.deterministic) -> None:
        _, loc, sd = _parameters()
        table = pyro.param("table", torch.tensor([[0.9, 0.1], [0.2, 0.8]]), constraint=simplex)
        z = 0
        for t in loop(len(y)):
            z = pyro.sample(f"z_{t}", dist.Categorical(table[z]))
            pyro.sample(f"y_{t}", dist.Normal(note(f"mu_{t}", loc[z]), sd), obs=y[t])

    noted, plain = (pyro_em.fit(chain, X[20:40], max_iter=5, tol=0, **o) for o in ({}, {"note": _plain}))
    assert noted.log_likelihood == plain.log_likelihood
    assert noted.bic == plain.bic


def test_a_penalty_is_no_observation() -> None:
    """`pyro.factor` outside of all plates, as a normal prior: the maximum of map-em, with n rows."""

    def model(x: Tensor, prior: bool) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 0.5)) if prior else pyro.param("loc", torch.tensor(0.1))
        if not prior:
            pyro.factor("penalty", dist.Normal(0.0, 0.5).log_prob(loc))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    penalised = pyro_em.fit(model, X[:30], False, tol=1e-10)
    fitted = pyro_em.fit(model, X[:30], True, algorithm="map-em", tol=1e-10)
    assert penalised.num_observations == fitted.num_observations == 30
    torch.testing.assert_close(penalised.params["loc"], fitted.params["loc"], rtol=1e-8, atol=0)
    assert penalised.log_likelihood == pytest.approx(fitted.log_posterior, rel=1e-12)


DETACHED: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda v: v.detach(),
    "item": lambda v: v.item() if not v.dim() else torch.tensor(v.tolist()),
    "numpy": lambda v: torch.as_tensor(v.detach().numpy() * 1.0),
}


@pytest.mark.parametrize("way", DETACHED)
@pytest.mark.parametrize(("argument", "slot"), [("locations", "loc"), ("scale", "scale")])
def test_a_detached_parameter_is_refused(way: str, argument: str, slot: str) -> None:
    """It would stay where it starts, with a score of 0."""
    with pytest.raises(Refusal, match=rf"Site 'x': its argument '{slot}' follows the parameters.*fixed"):
        pyro_em.fit(mixture, X, **{argument: lambda _, value: DETACHED[way](value)})


def test_a_parameter_detached_in_a_distribution_that_hides_its_arguments_is_refused() -> None:
    def model(x: Tensor) -> None:
        w, loc, _ = _parameters()
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.TransformedDistribution(dist.Gumbel(loc[z].detach(), 1.0), []), obs=x)

    with pytest.raises(Refusal, match=r"Site 'x': its log-density follows the parameters.* no gradient"):
        pyro_em.fit(model, X)


def test_a_parameter_detached_beside_another_is_refused() -> None:
    def model(x: Tensor) -> None:
        w, loc, sd = _parameters()
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(loc[z] + shift.detach(), sd), obs=x)

    with pytest.raises(Refusal, match=r"Site 'x': its argument 'loc' follows the parameters 'shift', but no gradient"):
        pyro_em.fit(model, X)


def test_gradients_switched_off_are_refused() -> None:
    with pytest.raises(Refusal, match="'loc'"):
        pyro_em.fit(torch.no_grad()(mixture), X)
    with pytest.raises(Refusal, match=r"'loc': the model switches off the gradient.*fixed"):
        pyro_em.fit(mixture, X, locations=lambda _, loc: loc.requires_grad_(False))


def test_a_parameter_without_a_use_keeps_its_value() -> None:
    def model(x: Tensor) -> None:
        pyro.param("unused", torch.tensor(3.0))
        mixture(x)

    result = pyro_em.fit(model, X)
    assert float(result.params["unused"]) == 3.0
    assert result.plan.route("unused") == "unused"


def test_names_that_a_loop_uses_again_are_named() -> None:
    def plates(x: Tensor) -> None:
        for t in pyro.markov(range(2)):
            with pyro.plate("rows", len(x)):
                pyro.sample(f"x_{t}", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    def sites(x: Tensor) -> None:
        for _ in range(2):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x[0])

    with pytest.raises(InputError, match=r"Plate 'rows' is made twice.*plate = pyro.plate\('rows', size\)"):
        pyro_em.fit(plates, X)
    with pytest.raises(InputError, match=r"Site 'x' is sampled twice.*f'x_\{t\}'"):
        pyro_em.fit(sites, X)


def test_data_that_are_no_tensors_are_named_beside_the_models_own_error() -> None:
    def model(x: Any) -> None:
        loc = pyro.param("loc", torch.stack([x[[0, 1]].mean(), x[[2, 3]].mean()]))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc[0], 1.0), obs=x)

    with pytest.raises(TypeError) as caught:
        pyro_em.fit(model, X.tolist())
    assert any("Argument 'x' of the model is a list" in note for note in caught.value.__notes__)


def _topics(words: Tensor, concentration: float = 2.0) -> None:
    with pyro.plate("topics", 3):
        topics = pyro.sample("topics_words", dist.Dirichlet(torch.full((8,), concentration)))
    with pyro.plate("documents", words.shape[1]):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("words", words.shape[0]):
            z = pyro.sample("z", dist.Categorical(theta))
            pyro.sample("w", dist.Categorical(topics[z]), obs=words)


WORDS = torch.randint(8, (6, 10), generator=torch.Generator().manual_seed(1))


def test_topics_of_documents_are_refused_and_fitted_with_an_amortised_guide() -> None:
    """A point estimate in the guide that a network makes: it has no parameter of its own name."""
    with pytest.raises(Refusal, match=r"'theta'.*discrete latents in other plates.*algorithm='svi'"):
        pyro_em.fit(_topics, WORDS)
    network = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.Softmax(-1))

    def guide(words: Tensor) -> None:
        q = pyro.param("q", torch.ones(3, 8), constraint=positive)
        with pyro.plate("topics", 3):
            pyro.sample("topics_words", dist.Dirichlet(q))
        counts = torch.zeros(8, words.shape[1]).scatter_add(0, words, torch.ones(words.shape)).T
        with pyro.plate("documents", words.shape[1]):
            pyro.sample("theta", dist.Delta(pyro.module("network", network)(counts), event_dim=1))

    result = pyro_em.fit(_topics, WORDS, algorithm="svi", guide=guide, max_iter=3, seed=0)
    assert result.params["theta"].shape == (10, 3)
    assert {"network$$$0.weight", "q"} <= result.params.keys()
    assert result.plan.route("z") == "enumerate"


def test_a_prior_without_a_mode_is_named() -> None:
    """Concentrations below 1: the posterior rises without limit as a probability goes to 0; em ignores it."""

    def model(words: Tensor, latent: bool) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.full((9,), 0.5)))
        with pyro.plate("documents", len(words)):
            if latent:
                pyro.sample("rate", dist.Gamma(pyro.param("a", torch.tensor(2.0), constraint=positive), 1.0))
            pyro.sample("w", dist.Categorical(p), obs=words)

    with pytest.raises(pyro_em.NonFiniteError, match=r"Site 'p'.*below 1 has no mode.*at least 1"):
        pyro_em.fit(model, WORDS[0], False, algorithm="map-em")
    for latent in (False, True):
        with pytest.warns(pyro_em.BoundaryEstimate, match="'p'"):
            result = pyro_em.fit(model, WORDS[0], latent)
        expected = torch.bincount(WORDS[0], minlength=9) / 10
        torch.testing.assert_close(result.params["p"], expected.double())


def test_a_stochastic_block_model_is_refused_and_svi_is_offered() -> None:
    def model(links: Tensor) -> None:
        w = pyro.param("w", torch.ones(2) / 2, constraint=simplex)
        p = pyro.param("p", torch.tensor([[0.5, 0.2], [0.2, 0.4]]), constraint=constraints.unit_interval)
        with pyro.plate("nodes", len(links)):
            z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("from", len(links), dim=-2), pyro.plate("to", len(links), dim=-1):
            pyro.sample("links", dist.Bernoulli(p[z[..., :, None], z[..., None, :]]), obs=links)

    def guide(links: Tensor) -> None:
        q = pyro.param("q", torch.tensor([0.4, 0.6]).repeat(len(links), 1), constraint=simplex)
        with pyro.plate("nodes", len(links)):
            pyro.sample("z", dist.Categorical(q))

    links = (torch.rand(9, 9, generator=torch.Generator().manual_seed(2)) < 0.4) * 1.0
    with pytest.raises(
        Refusal, match=r"'links'.*latent 'z'.*2\^9 states.*stochastic block model.*algorithm='svi' with a guide"
    ):
        pyro_em.fit(model, links)
    assert pyro_em.fit(model, links, algorithm="svi", guide=guide, max_iter=3, seed=0).params["q"].shape == (9, 2)


def _hidden(x: Tensor, hide: Callable[[], Any]) -> None:
    loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
    with pyro.plate("rows", len(x)):
        with hide():
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(loc[z.long()], 1.0), obs=x)


def _noisy(x: Tensor, draw: Callable[[int], Tensor]) -> None:
    loc = pyro.param("loc", torch.randn(()))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc + draw(len(x)), 1.0), obs=x)


def _of_numpy(n: int) -> Tensor:
    return torch.from_numpy(np.random.standard_normal(n))


def _of_python(n: int) -> Tensor:
    return torch.tensor([random.gauss(0.0, 1.0) for _ in range(n)])


@pytest.mark.parametrize("seed", range(3))
def test_hidden_latents_are_refused(seed: int) -> None:
    """One coin for all rows, that no handler sees: every fit of it converged, to another maximum each."""
    torch.manual_seed(seed)
    with pytest.raises(Refusal, match=r"'x': two runs of the model .* draws random numbers outside of its sites"):
        pyro_em.fit(_hidden, X, hide=pyro.poutine.block)
    assert pyro_em.fit(_hidden, X, hide=contextlib.nullcontext).converged


@pytest.mark.parametrize("draw", [torch.randn, _of_numpy, _of_python], ids=["torch", "numpy", "python"])
def test_random_numbers_of_the_model_are_refused(draw: Callable[[int], Tensor]) -> None:
    with pytest.raises(Refusal, match=r"'x': two runs of the model .* draws random numbers outside of its sites"):
        pyro_em.fit(_noisy, X, draw=draw)
    assert pyro_em.fit(_noisy, X, draw=torch.zeros).converged  # a start may be drawn
