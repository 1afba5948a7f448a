"""Adaptive quadrature against scipy's integrator and dense grids; its error estimate against the true error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

import pyro_em
from pyro_em import Quadrature
from pyro_em.errors import Refusal
from tests import zoo_quadrature as zoo

NAN = float("nan")
Array = np.ndarray[Any, Any]


def _answers(N: int = 12, J: int = 4, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(N, 1))
    return torch.tensor((rng.random((N, J)) < 1 / (1 + np.exp(-1.5 * theta - np.linspace(-1, 1, J)))).astype(float))


def _counts(G: int = 6, R: int = 25, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    g = np.concatenate([np.arange(G), rng.integers(0, G, R - G)])
    x = rng.normal(size=R)
    y = rng.poisson(np.exp(0.2 + 0.4 * x + rng.normal(0, 0.8, G)[g])).astype(float)
    return torch.tensor(y), torch.tensor(x), torch.tensor(g)


def _bernoulli(y: Array, eta: Array) -> float:
    return float((y * eta - np.logaddexp(0, eta)).sum())


def _moments(log_f: Callable[[float], float], centre: float, width: float) -> tuple[float, float, float]:
    """log ∫ exp f, and the mean and variance of the normalised density, by scipy.integrate.quad."""
    top = max(log_f(centre + width * t) for t in np.linspace(-1, 1, 201))

    def moment(k: int, about: float = 0.0) -> float:
        def value(z: float) -> float:
            return float(np.exp(log_f(z) - top) * (z - about) ** k)

        pieces = np.linspace(centre - width, centre + width, 9)
        parts = [integrate.quad(value, a, b, epsabs=1e-15, epsrel=1e-13) for a, b in itertools.pairwise(pieces)]
        return sum(p[0] for p in parts)

    mass = moment(0)
    mean = moment(1) / mass
    return top + np.log(mass), mean, moment(2, mean) / mass


def _ability(row: Array, d: Array, a: Array) -> tuple[float, float, float]:
    return _moments(lambda t: _bernoulli(row, d + a * t) + float(stats.norm.logpdf(t)), 0.0, 9.0)


def _at_start(model: Any, *args: Any, rule: Quadrature | None = None, sites: str = "theta", **options: Any) -> Any:
    e_step = {site: rule or Quadrature() for site in sites.split()}
    return pyro_em.fit(model, *args, e_step=e_step, max_iter=0, tol=0, **options)


def test_abilities_against_scipy() -> None:
    y = _answers()
    result = _at_start(zoo.ability, y, rule=Quadrature(41))
    d, a = result.params["d"].numpy(), result.params["a"].numpy()
    truth = np.array([_ability(row, d, a) for row in y.numpy()])
    np.testing.assert_allclose(result.log_prob().numpy(), truth[:, 0], atol=1e-9)
    assert result.log_likelihood == pytest.approx(truth[:, 0].sum(), abs=1e-9)
    posterior = result.posterior()
    np.testing.assert_allclose(posterior.mean("theta").numpy().ravel(), truth[:, 1], atol=1e-8)
    np.testing.assert_allclose(posterior.variance("theta").numpy().ravel(), truth[:, 2], atol=1e-8)
    marginal = posterior.marginal("theta")
    np.testing.assert_allclose(marginal.mean.numpy().ravel(), truth[:, 1], atol=1e-8)
    draws = posterior.sample(3000)["theta"]
    error = (draws.mean(0).numpy().ravel() - truth[:, 1]) / np.sqrt(truth[:, 2])
    assert np.abs(error).max() < 4.5 / np.sqrt(3000)
    np.testing.assert_allclose(draws.var(0).numpy().ravel(), truth[:, 2], rtol=0.15)
    mode = posterior.mode()["theta"].numpy().ravel()
    slope = (y.numpy() - 1 / (1 + np.exp(-d - a * mode[:, None]))) @ a - mode
    assert np.abs(slope).max() < 1e-9


@pytest.mark.parametrize("position", [False, True])
def test_groups_in_long_format_against_scipy(position: bool) -> None:
    y, x, g = _counts()
    result = _at_start(zoo.rates, y, x, g, position=position, sites="u")
    assert result.problem.continuous.routes[0].layout.batched is not position
    b0, b1, s = (float(result.params[n]) for n in ("b0", "b1", "s"))
    truth = []
    for k in range(6):
        own = (g == k).numpy()
        eta, counts = b0 + b1 * x.numpy()[own], y.numpy()[own]

        def log_f(u: float, eta: Array = eta, counts: Array = counts) -> float:
            return float(stats.poisson.logpmf(counts, np.exp(eta + u)).sum() + stats.norm.logpdf(u, 0, s))

        truth.append(_moments(log_f, 0.0, 6.0))
    np.testing.assert_allclose(result.log_prob().numpy(), np.array(truth)[:, 0], atol=1e-9)
    np.testing.assert_allclose(result.posterior().mean("u").numpy(), np.array(truth)[:, 1], atol=1e-8)


def _plane(log_f: Callable[[Array, Array], Array], width: float = 7.0, points: int = 561) -> float:
    """log ∫∫ exp f by the trapezoid rule, whose error is geometric for a smooth f that vanishes at the border."""
    t = np.linspace(-width, width, points)
    values = log_f(t[:, None], t[None, :])
    return float(values.max() + np.log(np.exp(values - values.max()).sum() * (t[1] - t[0]) ** 2))


def test_two_dimensions_against_a_grid() -> None:
    y, x = _answers(5, 4), torch.linspace(-1.5, 1.5, 4)
    vector = _at_start(zoo.slopes, y, x, sites="b", rule=Quadrature(31))
    S = (vector.params["L"] @ vector.params["L"].mT).numpy()
    apart = _at_start(zoo.two_sites, y, x, sites="b c", rule=Quadrature(31))
    for result, spread in ((vector, S), (apart, np.diag(apart.params["s"].numpy() ** 2))):
        precision, log_det = np.linalg.inv(spread), np.linalg.slogdet(spread)[1]
        d = float(result.params["d"])
        truth = []
        for row in y.numpy():

            def log_f(
                b: Array, c: Array, row: Array = row, P: Array = precision, ld: float = log_det, d: float = d
            ) -> Array:
                eta = [d + b + c * value for value in x.numpy()]
                data = sum(v * e - np.logaddexp(0, e) for v, e in zip(row, eta, strict=True))
                quadratic = P[0, 0] * b * b + 2 * P[0, 1] * b * c + P[1, 1] * c * c
                return np.asarray(data - quadratic / 2 - np.log(2 * np.pi) - ld / 2)

            truth.append(_plane(log_f))
        np.testing.assert_allclose(result.log_prob().numpy(), truth, atol=1e-8)
    assert apart.posterior().mean("c").shape == (5,)
    assert vector.posterior().variance("b").shape == (5, 2)


def test_draws_in_two_dimensions() -> None:
    """Means, variances and covariances of the draws, and their values, which are no nodes."""
    y, x = _answers(5, 4), torch.linspace(-1.5, 1.5, 4)
    for result, sites in (
        (_at_start(zoo.slopes, y, x, sites="b", rule=Quadrature(15)), "b"),
        (_at_start(zoo.two_sites, y, x, sites="b c", rule=Quadrature(15)), "bc"),
    ):
        torch.manual_seed(0)
        posterior, num = result.posterior(), 3000
        drawn = {site: own.reshape(num, 5, -1) for site, own in posterior.sample(num).items()}
        assert set(drawn) == set(sites)
        z = torch.cat([drawn[site] for site in sites], -1)
        mean = torch.cat([posterior.mean(site).reshape(5, -1) for site in sites], -1)
        variance = torch.cat([posterior.variance(site).reshape(5, -1) for site in sites], -1)
        assert float(((z.mean(0) - mean) / variance.sqrt()).abs().max()) < 4.5 / np.sqrt(num)
        torch.testing.assert_close(z.var(0), variance, rtol=0.15, atol=0)
        part = result.problem.evidence(result.params)[0].parts[0].posterior
        own, w = part.nodes.reshape(-1, 5, 2), part.weights.reshape(-1, 5)
        product = (w * (own[..., 0] - mean[:, 0]) * (own[..., 1] - mean[:, 1])).sum(0)
        centred = z - z.mean(0)
        found = (centred[..., 0] * centred[..., 1]).mean(0)
        assert float((found - product).abs().max()) < 4.5 * float(variance.prod(-1).sqrt().max()) / np.sqrt(num)
        assert len(z[:, 0, 0].unique()) == num


def test_discrete_classes_of_people() -> None:
    """log p(y) = log Σ_z w_z ∫ p(y | θ) N(θ; c_z, s) dθ, and the posterior of the class."""
    y = _answers(7)
    result = _at_start(zoo.ability_classes, y)
    d, w, centre = (result.params[n].numpy() for n in ("d", "w", "centre"))
    joint = np.array(
        [
            [
                np.log(w[k])
                + _moments(lambda t: _bernoulli(row, d + t) + float(stats.norm.logpdf(t, centre[k], 0.7)), 0.0, 8.0)[0]  # noqa: B023
                for k in (0, 1)
            ]
            for row in y.numpy()
        ]
    )
    truth = np.logaddexp.reduce(joint, 1)
    np.testing.assert_allclose(result.log_prob().numpy(), truth, atol=1e-9)
    found = result.posterior().responsibilities("z").numpy().reshape(7, 2)
    np.testing.assert_allclose(found, np.exp(joint - truth[:, None]), atol=1e-9)


def test_score_is_the_gradient_and_the_limit_is_a_maximum() -> None:
    """Fisher's identity at the start, a gradient of zero at the limit, by differentiating a dense trapezoid sum."""
    y, t = _answers(8, 3), torch.linspace(-10, 10, 4001)

    def gradient(params: dict[str, Tensor]) -> Tensor:
        d, log_a = params["d"].clone().requires_grad_(), params["a"].log().requires_grad_()
        eta = d + log_a.exp() * t.reshape(-1, 1, 1)
        log_f = (y * eta - torch.nn.functional.softplus(eta)).sum(-1) + dist.Normal(0.0, 1.0).log_prob(t).unsqueeze(-1)
        return torch.cat(torch.autograd.grad(log_f.logsumexp(0).sum(), (d, log_a)))

    rule = {"theta": Quadrature(31)}
    first = pyro_em.fit(zoo.ability, y, e_step=rule, max_iter=1, tol=0)
    start = _at_start(zoo.ability, y).params
    assert first.history["score"][0] * 8 == pytest.approx(float(gradient(start).abs().max()), rel=1e-8)
    # The slopes are held: the likelihood of eight people rises with them for ever.
    last = pyro_em.fit(zoo.ability, y, e_step=rule, m_step={"a": "fixed"}, tol=1e-9, accelerate="squarem")
    assert last.converged
    assert float(gradient(last.params)[:3].abs().max()) < 1e-6
    assert np.diff(last.history["objective"]).min() > -1e-10


def test_gaussian_latents_agree_with_exact_elimination() -> None:
    rng = np.random.default_rng(2)
    y = torch.tensor(rng.normal(0.5, 1.2, (9, 3)) + rng.normal(0, 0.7, (9, 1)))
    exact = pyro_em.fit(zoo.normal, y, max_iter=5, tol=0)
    for nodes in (3, 8):
        numeric = pyro_em.fit(zoo.normal, y, e_step={"b": Quadrature(nodes)}, max_iter=5, tol=0)
        assert numeric.log_likelihood == pytest.approx(exact.log_likelihood, rel=1e-11)
        for name, value in exact.params.items():
            torch.testing.assert_close(numeric.params[name], value, atol=1e-9, rtol=0)


def test_error_estimate_is_honest() -> None:
    y = _answers()
    d, a = np.linspace(-1, 1, 4), np.linspace(0.7, 1.6, 4)
    truth = np.array([_ability(row, d, a)[0] for row in y.numpy()])
    errors = []
    for nodes in (2, 3, 5, 7):
        result = _at_start(zoo.ability, y, rule=Quadrature(nodes, tolerance=1.0))
        assert result.problem is not None and result.problem.continuous is not None
        (route,) = result.problem.continuous.routes
        errors.append(np.abs(result.log_prob().numpy() - truth).sum())
        estimate = route.error  # type: ignore[attr-defined]
        assert estimate == pytest.approx(errors[-1], rel=0.5)
        assert f"{estimate:.1e}" in str(result.plan)
        assert result.integration_error == pytest.approx(estimate, rel=1e-12)
        assert f"error of quadrature {result.integration_error:.1e}" in result.summary()
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3
    with pytest.raises(Refusal, match=r"'theta'.*3 quadrature nodes.*num_nodes=7"):
        _at_start(zoo.ability, y, rule=Quadrature(3))


def test_a_fixed_grid_agrees_with_adaptive_nodes() -> None:
    y = _answers(30)
    y[torch.rand(30, 4, generator=torch.Generator().manual_seed(1)) < 0.1] = NAN
    options: dict[str, Any] = {"missing": "nan", "max_iter": 3, "tol": 0}
    adaptive = pyro_em.fit(zoo.ability, y, e_step={"theta": Quadrature(41)}, **options)
    fixed = pyro_em.fit(zoo.ability, y, e_step={"theta": Quadrature(121, adaptive=False)}, **options)
    assert fixed.log_likelihood == pytest.approx(adaptive.log_likelihood, abs=1e-7)
    for name, value in adaptive.params.items():
        torch.testing.assert_close(fixed.params[name], value, atol=1e-6, rtol=0)
    torch.testing.assert_close(fixed.log_prob(), adaptive.log_prob(), atol=1e-8, rtol=0)
    torch.testing.assert_close(fixed.log_prob(y[:7]), adaptive.log_prob()[:7], atol=1e-8, rtol=0)
    for moment in ("mean", "variance"):
        found, expected = (getattr(r.posterior(), moment)("theta").ravel() for r in (fixed, adaptive))
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    assert any("error of the log-likelihood" in note for note in fixed.plan.notes)
    assert 0 < fixed.integration_error < 1e-7
    with pytest.raises(Refusal, match=r"'theta'.*9 nodes.*num_nodes=17"):
        pyro_em.fit(zoo.ability, y, e_step={"theta": Quadrature(9, adaptive=False)}, **options)


def test_missing_answers_and_repeated_rows() -> None:
    y = _answers(10)
    partly = y.clone()
    partly[torch.rand(10, 4, generator=torch.Generator().manual_seed(0)) < 0.3] = NAN
    result = _at_start(zoo.ability, partly, missing="nan")
    d, a = result.params["d"].numpy(), result.params["a"].numpy()
    truth = [_ability(row[~np.isnan(row)], d[~np.isnan(row)], a[~np.isnan(row)])[0] for row in partly.numpy()]
    np.testing.assert_allclose(result.log_prob().numpy(), truth, atol=1e-9)

    rule = {"theta": Quadrature(31)}
    kinds, counts = torch.unique(y, dim=0, return_counts=True)
    options: dict[str, Any] = {"e_step": rule, "max_iter": 3, "tol": 0}
    once = pyro_em.fit(zoo.ability, kinds, weights={"people": counts.double()}, **options)
    all_rows = pyro_em.fit(zoo.ability, y, **options)
    assert once.log_likelihood == pytest.approx(all_rows.log_likelihood, rel=1e-12)
    for name, value in all_rows.params.items():
        torch.testing.assert_close(once.params[name], value, atol=1e-7, rtol=0)


def test_new_data_files_and_the_class(tmp_path: Path) -> None:
    y, rule = _answers(), {"theta": Quadrature(15)}
    result = pyro_em.fit(zoo.ability, y, e_step=rule, max_iter=2, tol=0)
    again = pyro_em.fit(zoo.ability, y, e_step=rule, max_iter=2, tol=0)
    assert all(torch.equal(again.params[n], v) for n, v in result.params.items())
    new = _answers(5, seed=7)
    torch.testing.assert_close(result.log_prob(new), _at_start(zoo.ability, new, init=result.params).log_prob())
    result.save(tmp_path / "fit.em")
    loaded = pyro_em.load(tmp_path / "fit.em", model=zoo.ability, args=(y,))
    assert torch.equal(loaded.posterior().mean("theta"), result.posterior().mean("theta"))
    assert loaded.integration_error == result.integration_error > 0
    assert pyro_em.plan(zoo.ability, y, e_step=rule).route("theta") == "quadrature"
    pyro.clear_param_store()
    losses = pyro_em.EM(zoo.ability, e_step=rule).run(y, num_steps=2)
    assert [-loss for loss in losses] == pytest.approx(result.history["objective"][:2], rel=1e-10)
