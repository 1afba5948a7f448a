"""The same model written in another way, and legal distributions that are rare: one answer, or a sentence that is true.

Oracles: dense joint normals, closed forms of marginals, 40-digit arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints, transforms
from torch import Tensor

import pyro_em
from tests.dense import dense

positive = constraints.positive
RNG = np.random.default_rng(3)
TABLE = torch.tensor(RNG.normal(size=(12, 4)) + RNG.normal(size=(12, 1)))
Model = Callable[[Tensor], None]


def _loadings() -> tuple[Tensor, Tensor]:
    W = pyro.param("W", torch.tensor([[0.9], [0.4], [-0.6], [0.2]]))
    return W, pyro.param("D", torch.tensor([1.0, 0.8, 1.2, 0.9]), constraint=positive)


def low_rank_latent(x: Tensor) -> None:
    W, D = _loadings()
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.LowRankMultivariateNormal(torch.zeros(4), W, D))
        pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)


def low_rank_around_a_latent(x: Tensor) -> None:
    W, D = _loadings()
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.LowRankMultivariateNormal(z.unsqueeze(-1) * torch.ones(4), W, D), obs=x)


def moved_latent(x: Tensor) -> None:
    m, t = pyro.param("m", torch.tensor(0.2)), pyro.param("t", torch.tensor(0.8), constraint=positive)
    with pyro.plate("rows", len(x), dim=-2):
        move = transforms.ComposeTransform([transforms.AffineTransform(1.0, 2.0), transforms.AffineTransform(m, -t)])
        b = pyro.sample("b", dist.TransformedDistribution(dist.Normal(0.0, 0.5), [move]))
        with pyro.plate("cells", 4, dim=-1):
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def moved_response(x: Tensor) -> None:
    """The base location is a latent and a parameter that starts at 0."""
    m, s = pyro.param("m", torch.tensor(0.0)), pyro.param("s", torch.tensor(0.8), constraint=positive)
    with pyro.plate("rows", len(x), dim=-2):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("cells", 4, dim=-1):
            base = dist.Normal(b + m, s)
            pyro.sample("x", dist.TransformedDistribution(base, [transforms.AffineTransform(0.3, 2.0)]), obs=x)


def precision(x: Tensor) -> None:
    """Factors and noise by precision matrices."""
    W, _ = _loadings()
    P = pyro.param("P", 2 * torch.eye(4), constraint=constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(1), precision_matrix=4 * torch.eye(1)))
        pyro.sample("x", dist.MultivariateNormal(z @ W.T, precision_matrix=P), obs=x)


def separate_sites(x: Tensor) -> None:
    """A Python loop over cells, and a latent of all rows beside those of each."""
    t, s = (pyro.param(n, torch.tensor(v), constraint=positive) for n, v in (("t", 0.8), ("s", 1.1)))
    common = pyro.sample("common", dist.MultivariateNormal(torch.zeros(4), 2 * torch.eye(4)))
    with pyro.plate("rows", len(x)):
        b = pyro.sample("b", dist.Normal(0.0, t))
        for j in range(4):
            pyro.sample(f"x{j}", dist.Normal(common[j] - b, s), obs=x[:, j])


def sequential_plate(x: Tensor) -> None:
    t, s = (pyro.param(n, torch.tensor(v), constraint=positive) for n, v in (("t", 0.8), ("s", 1.1)))
    for n in pyro.plate("rows", 5):
        b = pyro.sample(f"b{n}", dist.Normal(0.0, t))
        pyro.sample(f"x{n}", dist.Normal(b, s).expand([4]).to_event(1), obs=x[n])


def design_matrix(x: Tensor) -> None:
    """Z b as statisticians write it: one vector of effects of everything."""
    y, group = x.flatten(), torch.arange(48) % 7
    Z = torch.nn.functional.one_hot(group).double()
    t, s = (pyro.param(n, torch.tensor(v), constraint=positive) for n, v in (("t", 0.8), ("s", 1.1)))
    b = pyro.sample("b", dist.Normal(torch.zeros(7), t).to_event(1))
    pyro.sample("y", dist.Normal(torch.einsum("ng,g->n", Z, b), s).to_event(1), obs=y)


def skipped_dims(x: Tensor) -> None:
    """Plates at -3 and -1, nothing between them; effects without a centre of their own."""
    m, t = pyro.param("m", torch.tensor(0.2)), pyro.param("t", torch.tensor(0.8), constraint=positive)
    with pyro.plate("rows", len(x), dim=-3):
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        with pyro.plate("cells", 4, dim=-1):
            pyro.sample("x", dist.Normal(m + t * e, 1.0), obs=x.unsqueeze(1))


def rotated(x: Tensor) -> None:
    """Loadings by matmul of an expanded latent, its entries in reverse."""
    W = pyro.param("W", torch.tensor([[0.9, 0.1], [0.4, -0.5], [-0.6, 0.3], [0.2, 0.8]]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 2]).to_event(1))
        loc = torch.matmul(W, z.flip(-1).unsqueeze(-1)).squeeze(-1)
        pyro.sample("x", dist.Independent(dist.Normal(loc, 0.7), 1), obs=x)


FORMS: list[tuple[Model, dict[str, str]]] = [
    (low_rank_latent, {}),
    (low_rank_around_a_latent, {}),
    (moved_latent, {}),
    (moved_response, {}),
    (precision, {}),
    (separate_sites, {"common": "latent"}),
    (sequential_plate, {}),
    (design_matrix, {"b": "latent"}),
    (skipped_dims, {}),
    (rotated, {}),
]


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
@pytest.mark.parametrize(("model", "roles"), FORMS, ids=[m.__name__ for m, _ in FORMS])
def test_forms_of_normal_models(model: Model, roles: dict[str, str]) -> None:
    """Evidence, means and variances against the dense joint normal of the model as written; EM climbs."""
    result = pyro_em.fit(model, TABLE, roles=roles, max_iter=3, tol=0)
    truth, posterior = dense(model, (TABLE,), result.params), result.posterior()
    assert result.exact and (np.diff(result.history["log_likelihood"]) > 0).all()
    assert result.log_likelihood == pytest.approx(float(truth.log_evidence.detach()), rel=1e-11)
    for site, mean in truth.mean.items():
        torch.testing.assert_close(posterior.mean(site).reshape(mean.shape), mean.detach(), rtol=1e-9, atol=1e-10)
        variance = posterior.variance(site).reshape(mean.shape)
        torch.testing.assert_close(variance, truth.variance[site].detach(), rtol=1e-9, atol=1e-10)


def test_a_logarithm_by_its_transform_is_log_normal() -> None:
    """The same closed forms, as a response and as a prior."""

    def model(y: Tensor, written: bool) -> None:
        m, s = pyro.param("m", torch.tensor(0.1)), pyro.param("s", torch.tensor(1.0), constraint=positive)

        def log_normal(loc: Any, scale: Any) -> Any:
            if not written:
                return dist.LogNormal(loc, scale)
            return dist.TransformedDistribution(dist.Normal(loc, scale), [transforms.ExpTransform()])

        rate = pyro.sample("rate", log_normal(0.5, 0.4))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", log_normal(m, s), obs=y)
            pyro.sample("count", dist.Poisson(rate), obs=y.round())

    y = TABLE[:, 0].exp()
    one, other = (pyro_em.fit(model, y, written, algorithm="map-em") for written in (True, False))
    assert [row.route for row in one.plan.m_step] == [row.route for row in other.plan.m_step]
    assert one.log_posterior == pytest.approx(other.log_posterior, rel=1e-13)
    for name, value in other.params.items():
        torch.testing.assert_close(one.params[name], value, rtol=1e-10, atol=0)


def test_a_uniform_probability_is_a_beta_one() -> None:
    wins = torch.tensor([[3.0, 5.0], [0.0, 1.0], [6.0, 6.0]])

    def model(prior: Any) -> None:
        with pyro.plate("rows", 3, dim=-2):
            p = pyro.sample("p", prior)
            with pyro.plate("games", 2, dim=-1):
                pyro.sample("wins", dist.Binomial(6, p), obs=wins)

    one, other = (pyro_em.fit(model, prior) for prior in (dist.Uniform(0.0, 1.0), dist.Beta(1.0, 1.0)))
    expected = dist.Beta(1 + wins.sum(-1), 13 - wins.sum(-1))
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-13)
    torch.testing.assert_close(one.posterior().mean("p").flatten(), expected.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.posterior().variance("p").flatten(), expected.variance, rtol=1e-12, atol=0)

    def elsewhere() -> None:
        with pyro.plate("rows", 3):
            p = pyro.sample("p", dist.Uniform(0.0, 0.5))
            pyro.sample("wins", dist.Binomial(6, p), obs=wins[:, 0])

    with pytest.raises(pyro_em.Refusal, match=r"'p'.*Uniform.*neither in"):
        pyro_em.plan(elsewhere)


def test_priors_that_are_not_normal_say_so() -> None:
    """A latent alone is not said to be connected with itself; one that meets another names it."""

    def alone(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Laplace(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 4]).to_event(1), obs=x)

    def heavy(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.StudentT(4.0, 0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 4]).to_event(1), obs=x)

    def met(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.StudentT(4.0, 0.0, 1.0))
            pyro.sample("x", dist.Normal(u + z, 1.0), obs=x[:, 0])

    with pytest.raises(pyro_em.Refusal, match=r"latent is Laplace, whose density is not Gaussian.*Quadrature") as found:
        pyro_em.plan(alone, TABLE)
    assert "it meets" not in str(found.value) and "connected" not in str(found.value)
    with pytest.raises(pyro_em.Refusal, match=r"'z'.*StudentT.*it meets 'u' in one density"):
        pyro_em.plan(met, TABLE)
    # The remedy that is offered works, for a density that is smooth.
    result = pyro_em.fit(heavy, TABLE, e_step={"z": pyro_em.Quadrature(41)}, max_iter=0)
    z = torch.linspace(-15, 15, 6001)
    joint = dist.StudentT(4.0, 0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(TABLE.unsqueeze(-1)).sum(1)
    expected = float((joint.logsumexp(-1) + (z[1] - z[0]).log()).sum())
    assert result.log_likelihood == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore::pyro_em.errors.SeparatedData")
def test_student_vectors_of_many_degrees_of_freedom() -> None:
    """Differences of log-gammas lost all digits there; normal data drive the degrees of freedom there."""
    x = torch.tensor(np.random.default_rng(5).normal(size=(40, 3)))

    def model(x: Tensor) -> None:
        nu = pyro.param("nu", torch.tensor(4.0), constraint=positive)
        L = pyro.param("L", torch.eye(3), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateStudentT(nu, pyro.param("mu", torch.zeros(3)), L), obs=x)

    result = pyro_em.fit(model, x, max_iter=3, tol=0)
    v = result.params
    u = torch.linalg.solve_triangular(v["L"], (x - v["mu"]).T, upper=False)
    with mpmath.workdps(40):
        nu, total = mpmath.mpf(float(v["nu"])), mpmath.mpf(0)
        constant = mpmath.loggamma((nu + 3) / 2) - mpmath.loggamma(nu / 2) - 1.5 * mpmath.log(nu * mpmath.pi)
        constant -= sum(mpmath.log(float(entry)) for entry in v["L"].diagonal())
        for square in u.square().sum(0).tolist():
            total += constant - (nu + 3) / 2 * mpmath.log1p(square / nu)
    assert float(v["nu"]) > 1e6
    assert result.log_likelihood == pytest.approx(float(total), rel=1e-13)


def test_data_masked_as_a_whole_are_drawn_like_others() -> None:
    """`.mask(False)` of one observed site says that it is missing, not that its distribution is flat."""

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros((), dtype=torch.float64))
        for i, value in enumerate(x):
            pyro.sample(f"x_{i}", dist.Normal(loc, 1.0).mask(bool(i != 1)), obs=value)

    result = pyro_em.fit(model, torch.tensor([1.0, 50.0, 2.0], dtype=torch.float64))
    assert result.params["loc"].item() == pytest.approx(1.5, rel=1e-12)
    drawn = result.predictive(num_samples=400)
    assert float(drawn["x_1"].mean()) == pytest.approx(1.5, abs=0.2)
    assert float(drawn["x_1"].std()) == pytest.approx(1.0, abs=0.15)


def test_a_network_beside_random_effects_is_its_layers_written_out() -> None:
    """A module's parameters are its own leaves: taken for the copies handed in, they looked as if nothing moved, and a
    network passed for an affine predictor (the objective fell by nine orders of magnitude)."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(12) % 4
    X, noise = torch.randn(12, 2, generator=generator), torch.randn(12, generator=generator)
    y = noise + torch.tensor([-3.0, 3.0, 1.0, -2.0])[group]
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    for value in network.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator))
    start = [value.detach().clone() for value in network.parameters()]

    def rows(f: Callable[[Tensor], Tensor]) -> None:
        with pyro.plate("groups", 4):
            b = pyro.sample("b", dist.Normal(0.0, pyro.param("tau", torch.tensor(0.5), constraint=positive)))
        with pyro.plate("rows", 12):
            pyro.sample("y", dist.Normal(f(X).squeeze(-1) + b[group], 1.0), obs=y)

    def module() -> None:
        rows(pyro.module("net", network))

    def written_out() -> None:
        w, c, v, d = (pyro.param(name, value.clone()) for name, value in zip("wcvd", start, strict=True))
        rows(lambda x: torch.tanh(x @ w.T + c) @ v.T + d)

    one, two = (pyro_em.fit(model, max_iter=3, tol=0) for model in (written_out, module))
    assert one.history["objective"] == pytest.approx(two.history["objective"], abs=1e-9)
    assert [two.plan.route(name) for name in ("net$$$0.weight", "net$$$2.weight")] == ["numeric", "numeric"]
    oracle = dense(written_out, (), one.params)
    assert one.log_likelihood == pytest.approx(float(oracle.log_evidence.detach()), abs=1e-9)
