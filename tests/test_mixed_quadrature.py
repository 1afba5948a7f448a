"""Discrete latents beside latents that adaptive quadrature integrates, against sums over states and dense grids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

import pyro_em
from models import irt
from pyro_em import Quadrature
from tests import zoo_quadrature as zoo

Array = NDArray[np.float64]
GRID = np.linspace(-9.0, 9.0, 901)


def _answers(N: int, J: int) -> Tensor:
    """Of two classes, to one of which the items are in the other order."""
    generator = torch.Generator().manual_seed(0)
    ability = torch.randn(N, 1, generator=generator, dtype=torch.float64)
    turned = torch.where(torch.arange(N).unsqueeze(-1) % 2 == 0, 1.0, -1.0)
    chance = torch.sigmoid(ability + turned * torch.linspace(-2, 2, J, dtype=torch.float64))
    return (torch.rand(N, J, generator=generator) < chance).double()


def _joint(y: Array, params: dict[str, Tensor]) -> Array:
    """p(y_n, z = c, θ) on the grid times its spacing, (N, K, points)."""
    w, d, a = (params[n].numpy() for n in ("w", "d", "a"))
    eta = d[:, :, None] + a[None, :, None] * GRID  # (K, J, points)
    right, wrong = -np.logaddexp(0, -eta), -np.logaddexp(0, eta)
    data = np.einsum("nj,kjq->nkq", y, right) + np.einsum("nj,kjq->nkq", 1 - y, wrong)
    return np.asarray(w[None, :, None] * np.exp(data + stats.norm.logpdf(GRID)) * (GRID[1] - GRID[0]))


def _fit(y: Tensor, updates: int) -> Any:
    return pyro_em.fit(zoo.mixed_items, y, e_step={"theta": Quadrature(41)}, max_iter=updates, tol=0)


def test_classes_of_items_against_a_grid() -> None:
    """log p(x), the posteriors of class and ability, and the argmax of Q, from a table of every state and point."""
    y = _answers(20, 4)
    start, after = _fit(y, 0), _fit(y, 1)
    assert "adaptive" in str(start.plan) and "each of 2 discrete states" in str(start.plan)
    joint = _joint(y.numpy(), start.params)
    evidence = joint.sum((1, 2))
    np.testing.assert_allclose(start.log_prob().numpy().ravel(), np.log(evidence), atol=1e-10)
    weights = joint / evidence[:, None, None]
    posterior = start.posterior()
    np.testing.assert_allclose(posterior.marginal("z").probs.numpy().reshape(20, 2), weights.sum(2), atol=1e-10)
    np.testing.assert_allclose(posterior.mean("theta").numpy().ravel(), (weights * GRID).sum((1, 2)), atol=1e-9)
    np.testing.assert_allclose(after.params["w"].numpy(), weights.sum((0, 2)) / 20, atol=1e-10)
    d, a = after.params["d"].numpy(), after.params["a"].numpy()
    chance = 1 / (1 + np.exp(-(d[:, :, None] + a[None, :, None] * GRID)))
    left = y.numpy()[:, None, :, None] - chance  # (N, K, J, points)
    of_d = np.einsum("nkq,nkjq->kj", weights, left)
    of_a = np.einsum("nkq,q,nkjq->j", weights, GRID, left)
    assert max(np.abs(of_d).max(), np.abs(of_a).max()) < 1e-8  # ∂Q/∂d and ∂Q/∂a
    assert float(np.log(_joint(y.numpy(), after.params).sum((1, 2))).sum()) == pytest.approx(
        after.log_likelihood, abs=1e-9
    )
    assert after.log_likelihood > start.log_likelihood


def test_classes_that_were_simulated_are_found() -> None:
    """The fit starts at the classes' average, and its classes are those drawn: intercepts within their errors."""
    result = pyro_em.fit(
        irt.mixture, irt.simulate_mixture(2000), e_step={"theta": Quadrature(15)}, accelerate="squarem"
    )
    assert result.converged and "adaptive" in str(result.plan)
    errors, truth = result.standard_errors(), torch.linspace(-2, 2, 6, dtype=torch.float64)
    order = result.params["intercept"][:, -1].argsort(descending=True)
    away = (result.params["intercept"][order] - torch.stack([truth, -truth])) / errors["intercept"][order]
    assert float(away.abs().max()) < 4
    weights = result.params["weights"][order] - torch.tensor([0.6, 0.4])
    assert float((weights / errors["weights"]).abs().max()) < 4
    assert float((result.params["slope"] - 1).abs() / errors["slope"]) < 4


def test_a_class_that_nobody_is_in() -> None:
    """A weight of 0 stays 0, and the rest is the model without that class."""
    y = _answers(30, 4)
    start = {"w": torch.tensor([1.0, 0.0]), "d": torch.tensor([[0.1, -0.2, 0.3, 0.0], [1.0, 1.0, 1.0, 1.0]])}
    options: dict[str, Any] = {"e_step": {"theta": Quadrature(21)}, "max_iter": 3, "tol": 0}
    with pytest.warns(pyro_em.BoundaryEstimate):
        found = pyro_em.fit(zoo.mixed_items, y, init=start, **options)
    alone = pyro_em.fit(zoo.mixed_items, y, 1, init={"w": torch.ones(1), "d": start["d"][:1]}, **options)
    assert found.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-12)
    torch.testing.assert_close(found.params["d"][0], alone.params["d"][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.params["w"], start["w"], rtol=0, atol=0)


def _long(G: int, R: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of groups of two classes, a covariate and groups of different sizes."""
    generator = torch.Generator().manual_seed(3)
    share = torch.arange(1, G + 1).double()
    g = torch.cat([torch.arange(G), torch.multinomial(share, R - G, replacement=True, generator=generator)])
    x, u = torch.randn(R + G, generator=generator, dtype=torch.float64).split([R, G])
    eta = torch.where(g % 2 == 0, -0.5, 1.0) + 0.4 * x + 0.6 * u[g]
    return torch.poisson(eta.exp(), generator=generator), x, g


def _table(y: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same groups as rows of a table."""
    within = (torch.tril(g.unsqueeze(-1) == g).sum(-1)) - 1
    shape = int(g.max()) + 1, int(within.max()) + 1
    counts, covariate, seen = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    counts[g, within], covariate[g, within], seen[g, within] = y, x, True
    return counts, covariate, seen


@pytest.mark.parametrize("position", [False, True])
def test_long_format_is_the_table(position: bool) -> None:
    """Every answer is that of the model with the groups as rows, which test_quadrature.py has against integrals."""
    long = _long(5, 30)
    options: dict[str, Any] = {"e_step": {"u": Quadrature(21)}, "max_iter": 2, "tol": 0}
    options |= {"weights": {"groups": torch.arange(1, 6).double()}}
    found = pyro_em.fit(zoo.classes_of_groups, *long, position=position, **options)
    same = pyro_em.fit(zoo.classes_as_a_table, *_table(*long), **options)
    assert "adaptive" in str(found.plan) and "in each state of 'z'" in str(found.plan)
    assert found.log_likelihood == pytest.approx(same.log_likelihood, rel=1e-12)
    assert found.history["score"] == pytest.approx(same.history["score"], rel=1e-9)
    for name, value in same.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.log_prob(), same.log_prob().reshape(5), rtol=1e-11, atol=1e-11)
    own, other = found.posterior(), same.posterior()
    torch.testing.assert_close(own.marginal("z").probs, other.marginal("z").probs.reshape(5, 2), rtol=1e-9, atol=1e-12)
    for moment in ("mean", "variance"):
        torch.testing.assert_close(
            getattr(own, moment)("u"), getattr(other, moment)("u").reshape(5), rtol=1e-9, atol=1e-10
        )
    for marginal in (own.marginal("u"), other.marginal("u")):
        torch.testing.assert_close(marginal.mean.reshape(5), own.mean("u"), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(marginal.variance.reshape(5), own.variance("u"), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(own.mode()["u"], other.mode()["u"].reshape(5), rtol=1e-8, atol=1e-8)
    draws = own.sample(2000)
    assert draws["u"].shape == draws["z"].shape == (2000, 5)
    away = (draws["u"].mean(0) - own.mean("u")) / (own.variance("u") / 2000).sqrt()
    assert float(away.abs().max()) < 4.5


def test_classes_of_schools_above_the_pupils() -> None:
    """The evidence of a school sums over its pupils given its class: against a grid."""
    generator = torch.Generator().manual_seed(1)
    school, g = torch.arange(9) % 3, torch.arange(9).repeat_interleave(3)
    y = (torch.rand(27, generator=generator) < torch.tensor([0.2, 0.5, 0.8])[school][g]).double()
    result = pyro_em.fit(zoo.classes_of_schools, y, g, school, e_step={"u": Quadrature(31)}, max_iter=2, tol=0)
    w, m, d = (result.params[n].numpy() for n in ("w", "m", "d"))
    signs = 2 * y.numpy().reshape(9, 3) - 1
    data = -np.logaddexp(0, -signs[:, :, None] * (d[:, None] + GRID)).sum(1)  # (pupils, points)
    prior = stats.norm.logpdf(GRID, m[:, None], 0.7)  # (classes, points)
    pupils = np.log(np.exp(data[:, None] + prior).sum(-1) * (GRID[1] - GRID[0]))  # (pupils, classes)
    terms = np.log(w) + np.array([pupils[school.numpy() == s].sum(0) for s in range(3)])
    assert result.log_likelihood == pytest.approx(float(np.logaddexp.reduce(terms, axis=1).sum()), abs=1e-9)
    classes = np.exp(terms - np.logaddexp.reduce(terms, axis=1, keepdims=True))
    np.testing.assert_allclose(result.posterior().marginal("z").probs.numpy(), classes, atol=1e-9)
    assert "adaptive" in str(result.plan)


def _groups(density: Array, g: Array, spread: float) -> float:
    """Σ_g log ∫ N(u; 0, s) Π_n p(y_n | u) du, with the densities (rows, points) on the grid."""
    terms = np.array([density[g == k].prod(0) * stats.norm.pdf(GRID, 0, spread) for k in range(g.max() + 1)])
    return float(np.log(terms.sum(1) * (GRID[1] - GRID[0])).sum())


@pytest.mark.parametrize("by_row", [False, True])
def test_zeros_are_summed_row_by_row_at_every_node(by_row: bool) -> None:
    """log p(x) on a grid. (Its slopes are among the laws, test_continuous_laws.py.)"""
    y, x, g = _long(5, 60)
    y = y * (torch.arange(60) % 3 > 0)
    model = zoo.inflated_by_row if by_row else zoo.inflated
    result = pyro_em.fit(model, y, x, g, e_step={"u": Quadrature(31)}, max_iter=2, tol=0)
    assert "adaptive" in str(result.plan) and "ZeroInflatedPoisson" in str(result.plan)
    params = {name: value.numpy() for name, value in result.params.items()}
    eta = params["b"][0] + params["b"][1] * x.numpy()
    gate = 1 / (1 + np.exp(-params["c"][0] - params["c"][1] * x.numpy())) if by_row else np.full(60, params["gate"])
    counted = stats.poisson.pmf(y.numpy()[:, None], np.exp(eta[:, None] + GRID))
    density = np.where((y.numpy() == 0)[:, None], gate[:, None], 0.0) + (1 - gate[:, None]) * counted
    found = _groups(density, g.numpy(), float(params["s"]))
    assert result.log_likelihood == pytest.approx(found, abs=1e-8)
    assert np.diff(result.history["log_likelihood"]).min() > 0


def test_kinds_of_rows_beside_quadrature_are_not_latents() -> None:
    """A mixture inside of the integral keeps its own density; as a latent of each row it is refused, saying so."""
    y, _, g = _long(5, 40)
    result = pyro_em.fit(zoo.two_kinds_of_rows, y, g, e_step={"u": Quadrature(31)}, max_iter=2, tol=0)
    w, m, s = (result.params[n].numpy() for n in ("w", "m", "s"))
    rate = np.exp(m[:, None, None] + GRID)
    density = np.einsum("k,knq->nq", w, stats.poisson.pmf(y.numpy()[:, None], rate))
    assert result.log_likelihood == pytest.approx(_groups(density, g.numpy(), float(s)), abs=1e-8)
    assert result.history["log_likelihood"][-1] > result.history["log_likelihood"][0]

    def latent(y: Tensor, g: Tensor) -> None:
        with pyro.plate("groups", 5):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"em": "latent"})
        with pyro.plate("rows", 40):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Poisson((u[..., g] + z).exp()), obs=y)

    with pytest.raises(pyro_em.Refusal, match="sums over its states"):
        pyro_em.fit(latent, y, g, e_step={"u": Quadrature(31)})
