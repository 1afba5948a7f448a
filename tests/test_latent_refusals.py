"""G12: continuous latents that have no exact posterior are refused, with the site at fault, why, and what to do.

Each model differs from an exact one in a single expression. `ZERO` models multiply the nonlinearity by a parameter
that starts at 0, so that at the start nothing gives them away.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em

X = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4, 1.1], dtype=torch.float64)
Model = Callable[[Tensor], None]


def _through(function: Callable[[Tensor], Tensor]) -> Model:
    """x ~ Normal(f(z), 1), one z a row."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(function(z), 1.0), obs=x)

    return model


def _zero(function: Callable[[Tensor, Tensor], Tensor]) -> Model:
    """x ~ Normal(z + f(z, w), 1) with w = 0 at the start."""

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + function(z, w), 1.0), obs=x)

    return model


def _vector(function: Callable[[Tensor], Tensor], size: int = 3) -> Model:
    """x ~ Normal(f(z), 1) with `size` z a row."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            pyro.sample("x", dist.Normal(function(z), 1.0), obs=x)

    return model


def _likelihood(make: Callable[[Tensor], dist.Distribution], data: Tensor) -> Model:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", make(z), obs=data)

    return model


def two_latents(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(u * v, 1.0), obs=x)


def scale_latent(x: Tensor) -> None:
    """The location and the scale of a row are both latent."""
    with pyro.plate("rows", len(x)):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, s), obs=x)


def heavy_prior(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Laplace(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete_child(x: Tensor) -> None:
    """The odds of a discrete latent depend on the Gaussian one."""
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(logits=z)).long()
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)


def states_inside(x: Tensor) -> None:
    """Every row has a state, but its Gaussian effect is shared by all rows: 2^6 joint states."""
    with pyro.plate("groups", 2, dim=-2):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(b + 3.0 * k, 1.0), obs=x)


def bounded(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Uniform(-1.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def zero_scale(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor(0.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, (w * z).exp()), obs=x)


def prior_spread(x: Tensor) -> None:
    """A latent's scale depends on another latent."""
    with pyro.plate("rows", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(0.0, u.exp()))
        pyro.sample("x", dist.Normal(v, 1.0), obs=x)


def robust_intercepts(x: Tensor) -> None:
    """Student errors as a scale mixture around random intercepts: kinds of latents that meet."""
    group = torch.arange(len(x)) % 2
    with pyro.plate("groups", 2):
        b = pyro.sample("b", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))
    with pyro.plate("rows", len(x)):
        w = pyro.sample("w", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(b[group], w.rsqrt()), obs=x)


def infinite_counts(x: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        n = pyro.sample("n", dist.Poisson(rate))
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


def mixture_prior(x: Tensor) -> None:
    parts = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2) / 2), parts))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def penalised(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("pen", -0.5 * (z - 1) ** 2)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# (model, site that is named, a word of the reason)
REFUSED: dict[str, tuple[Model, str, str]] = {
    "tanh": (_through(torch.tanh), "x", "affine"),
    "exp": (_through(torch.exp), "x", "affine"),
    "abs": (_through(torch.abs), "x", "affine"),
    "square": (_through(torch.square), "x", "affine"),
    "sin": (_through(lambda z: z + 0.1 * torch.sin(3 * z)), "x", "affine"),
    "where": (_through(lambda z: torch.where(z > 0.5, z, 0.5 * z)), "x", "affine"),
    "relu": (_through(torch.relu), "x", "affine"),
    "clamp": (_through(lambda z: z.clamp(-2.0, 2.0)), "x", "affine"),
    "fraction": (_through(lambda z: z / (1 + z**2)), "x", "affine"),
    "small beside the data": (_through(lambda z: 1e6 + z + 0.01 * z**2), "x", "affine"),
    "largest entry": (_vector(lambda z: z.amax(-1)), "x", "affine"),
    "sorted entries": (_vector(lambda z: z.sort(-1).values[..., 0]), "x", "affine"),
    "softmax": (_vector(lambda z: z.softmax(-1)[..., 0]), "x", "affine"),
    "length": (_vector(lambda z: z.norm(dim=-1)), "x", "affine"),
    "neighbours": (_through(lambda z: z + z.roll(1, -1)), "x", "several elements"),
    "plate mean": (_through(lambda z: z - z.mean(-1, keepdim=True)), "x", "several elements"),
    "running sum": (_through(lambda z: z.cumsum(-1)), "x", "several elements"),
    "zero tanh": (_zero(lambda z, w: w * torch.tanh(z)), "x", "affine"),
    "zero abs": (_zero(lambda z, w: w * z.abs()), "x", "affine"),
    "zero square": (_zero(lambda z, w: (w * z) ** 2), "x", "affine"),
    "zero roll": (_zero(lambda z, w: w * z.roll(1, -1)), "x", "several elements"),
    "zero scale": (zero_scale, "x", "scale"),
    "product": (two_latents, "x", "affine"),
    "scale": (_likelihood(lambda z: dist.Normal(0.0, z.exp()), X), "x", "scale"),
    "latent scale": (scale_latent, "s", "Gamma"),
    "kinds that meet": (robust_intercepts, "b", r"meets 'w' \(Gamma\) in one density"),
    "prior spread": (prior_spread, "v", "scale"),
    "bernoulli": (_likelihood(lambda z: dist.Bernoulli(logits=z), (X > 0).double()), "x", "not quadratic"),
    "poisson": (_likelihood(lambda z: dist.Poisson(z.exp()), X.abs().round()), "x", "not quadratic"),
    "student": (_likelihood(lambda z: dist.StudentT(4.0, z, 1.0), X), "x", "not quadratic"),
    "cauchy": (_likelihood(lambda z: dist.Cauchy(z, 1.0), X), "x", "not quadratic"),
    "laplace": (heavy_prior, "z", "Laplace"),
    "discrete child": (discrete_child, "k", "not quadratic"),
    "states inside": (states_inside, "b", "exponential"),
    "bounded": (bounded, "z", "Uniform"),
    "mixture": (mixture_prior, "z", "MixtureSameFamily"),
    "no entries": (_vector(lambda z: z.sum(-1), 0), "z", "no entries"),
    "factor": (penalised, "pen", "of factors it is not found"),
    "infinite": (infinite_counts, "n", "infinitely many"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    model, site, reason = REFUSED[name]
    with pytest.raises(pyro_em.Refusal, match=reason) as caught:
        pyro_em.plan(model, X)
    assert caught.value.site == site
    assert len(caught.value.remedy) > 20
    assert len(pyro.get_param_store()) == 0


def test_the_linear_twin_is_accepted() -> None:
    """The table refuses what it refuses for the stated reason: without it the models are exact."""
    for model in (_through(lambda z: 2 * z + 1), _zero(lambda z, w: w * z), _vector(lambda z: z.sum(-1))):
        plan = pyro_em.plan(model, X)
        assert plan.exact and plan.route("z") == "Gaussian"


def test_what_depends_on_the_parameters_is_refused_when_it_appears() -> None:
    """A switch that only closes far from every point that was looked at: the E-step's own check finds it."""

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            bent = torch.where(w > 50.0, z.abs(), z)
            pyro.sample("x", dist.Normal(w + bent, 1.0), obs=x)

    assert pyro_em.plan(model, X).route("z") == "Gaussian"
    with pytest.raises(pyro_em.Refusal, match="affine") as caught:
        pyro_em.fit(model, X + 1000.0, max_iter=50)
    assert caught.value.site == "x"


@pytest.mark.parametrize("accelerate", ["squarem", "anderson"])
def test_a_component_that_collapses_is_not_told_to_be_nonlinear(accelerate: str) -> None:
    """Extrapolated to scales of 1e-160 residuals overflow, which says nothing of the model's form."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(4, 3, generator=generator) + torch.randn(4, 1, generator=generator)

    def model() -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
        W = pyro.param("W", torch.tensor([[1.0, 0.5, 0.2], [0.3, -0.4, 1.0]]))
        s = pyro.param("s", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("rows", 4):
            k = pyro.sample("k", dist.Categorical(w))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = mu[k] + W[k] * z.unsqueeze(-1)
            pyro.sample("y", dist.Normal(loc, s[k].unsqueeze(-1)).to_event(1), obs=rows)

    with pytest.raises(pyro_em.DegenerateLikelihoodError, match="collapsed"):
        pyro_em.fit(model, accelerate=accelerate, tol=1e-7, max_iter=120)


def test_a_detached_parameter_beside_a_latent_is_seen() -> None:
    """The location has a gradient, but to the latent alone."""

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.1))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0 * w, 1.0))
            pyro.sample("x", dist.Normal(z + w.detach(), sd), obs=x)

    with pytest.raises(pyro_em.Refusal, match="'loc' follows the parameters, but no gradient leads back"):
        pyro_em.plan(model, X)
