"""Angles: von Mises against scipy, its concentrations over fourteen decades, and hidden Markov models of tracks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, special, stats
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import movement
from pyro_em.families import FAMILIES
from pyro_em.kernels import DirectionKernel, ResultantKernel

FAMILY = FAMILIES[dist.VonMises]


def angles(direction: float, concentration: float, number: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).vonmises(direction, concentration, number))


def one(x: Tensor, low: float = -math.inf, high: float = math.inf) -> None:
    space = constraints.real if low == -math.inf else constraints.interval(low, high)
    start = 0.0 if low == -math.inf else (low + high) / 2
    mu = pyro.param("mu", torch.tensor(start), constraint=space)
    kappa = pyro.param("kappa", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.VonMises(mu, kappa), obs=x)


def two(x: Tensor) -> None:
    w = pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([3.0, 1.0]))
    kappa = pyro.param("kappa", torch.tensor([1.0, 20.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.VonMises(mu[z], kappa[z]), obs=x)


@pytest.mark.parametrize("kappa", [0.0, 1e-6, 0.3, 5.0, 700.0, 1e5])
def test_the_density_is_scipys(kappa: float) -> None:
    x = 2.0 + torch.tensor([-7.0, -0.1, 0.0, 3.0]) / max(1.0, kappa**0.5)
    found = FAMILY.log_prob({"loc": torch.tensor(2.0), "concentration": torch.tensor(kappa)}, x)
    if kappa == 0.0:
        expected = np.full(4, -math.log(2 * math.pi))
    else:
        expected = kappa * special.cosm1(x.numpy() - 2.0) - np.log(2 * math.pi * special.ive(0, kappa))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13)


def test_a_concentration_is_where_the_mean_resultant_length_is() -> None:
    kappa = torch.logspace(-6, 8, 57)
    length = torch.special.i1e(kappa) / torch.special.i0e(kappa)
    found = ResultantKernel(torch.tensor(3.0), 3.0 * length).argmax()
    # 1 - R/n is rounded to eps, which is 2 κ eps of it.
    assert ((found / kappa - 1).abs() < 1e-15 * (8 + 8 * kappa + 1 / kappa)).all()
    edges = ResultantKernel(torch.tensor([2.0, 2.0, 2.0, 0.0]), torch.tensor([2.0, 0.0, -1.0, 0.0]))
    assert edges.argmax()[:3].tolist() == [math.inf, 0.0, 0.0]
    assert edges.argmax()[3].isnan()
    assert edges.is_empty().tolist() == [False, False, False, True]


def test_a_fit_is_scipys() -> None:
    x = angles(2.9, 3.0, 400)
    found = pyro_em.fit(one, x)
    kappa, mu, _ = stats.vonmises.fit(x.numpy(), fscale=1)
    assert found.params["mu"].item() == pytest.approx(mu, abs=1e-12)
    assert found.params["kappa"].item() == pytest.approx(kappa, abs=1e-7)  # theirs is a search
    assert found.log_likelihood == pytest.approx(stats.vonmises.logpdf(x, kappa, mu).sum(), rel=1e-12)
    assert "Newton in the mean resultant length (VonMises.concentration)" in str(found.plan)
    # Fisher information: n κ A(κ) of the direction.
    length = special.ive(1, kappa) / special.ive(0, kappa)
    assert found.standard_errors()["mu"].item() == pytest.approx((400 * kappa * length) ** -0.5, rel=1e-9)


def test_turns_do_not_count() -> None:
    x = angles(3.0, 2.0, 300)
    turns = 2 * math.pi * torch.arange(300).remainder(3)
    first, second = pyro_em.fit(one, x), pyro_em.fit(one, x + turns)
    assert first.log_likelihood == pytest.approx(second.log_likelihood, rel=1e-13)
    assert first.params["mu"].item() == pytest.approx(second.params["mu"].item(), abs=1e-12)


def test_a_direction_goes_on_past_a_half_turn() -> None:
    """The nearest of the angles that are the same direction: accelerations see no jump."""
    kernel = DirectionKernel(torch.tensor(-1.0), torch.tensor(-0.1), torch.tensor(3.0))
    assert kernel.argmax().item() == pytest.approx(math.pi + math.atan(0.1), abs=1e-15)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 2 * math.pi, 2.0), (2 * math.pi, 4 * math.pi, 2.0 + 2 * math.pi), (0.0, 1.5, 1.5), (2.5, 4.0, 2.5)],
)
def test_directions_are_turned_into_their_interval(low: float, high: float, expected: float) -> None:
    x = 2.0 + torch.tensor([-0.5, -0.2, 0.0, 0.2, 0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pyro_em.BoundaryEstimate)  # where the end of the interval is the best
        found = pyro_em.fit(one, x, low, high)
    assert found.params["mu"].item() == pytest.approx(expected, abs=1e-12)
    at = found.params["mu"]
    best = optimize.minimize_scalar(
        lambda k: -float(FAMILY.log_prob({"loc": at, "concentration": torch.tensor(k)}, x).sum()),
        bounds=(0.01, 60), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    assert found.params["kappa"].item() == pytest.approx(best.x, rel=1e-6)


@pytest.mark.parametrize("concentration", [1e2, 1e4, 1e6, 1e8])
def test_a_narrow_component_keeps_its_digits(concentration: float) -> None:
    normal = np.random.default_rng(1).normal(size=300) / concentration**0.5
    x = torch.cat([angles(3.1, 3.0, 400), torch.from_numpy(1.0 + normal)])
    found = pyro_em.fit(two, x)
    assert found.converged
    assert found.params["kappa"][1].item() == pytest.approx(concentration, rel=0.3)
    assert "plated" in str(found.plan)


def test_a_component_on_one_angle_is_degenerate() -> None:
    x = torch.cat([angles(3.0, 30.0, 40), torch.tensor([0.9])])
    with pytest.raises(pyro_em.DegenerateLikelihoodError, match=r"component 1 .* update of 'kappa' is unbounded"):
        pyro_em.fit(two, x)


def test_a_von_mises_prior_of_a_direction() -> None:
    """The mode: κ_n e(μ_n) = κ₀ e(μ₀) + κ Σ e(x)."""

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.VonMises(torch.tensor(1.0), torch.tensor(5.0)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.VonMises(mu, 2.0), obs=x)

    x = angles(2.5, 2.0, 7)
    found = pyro_em.fit(model, x, algorithm="map-em")
    total = 5 * np.exp(1j) + 2 * np.exp(1j * x.numpy()).sum()
    assert found.params["mu"].item() == pytest.approx(np.angle(total), abs=1e-14)
    assert "prior VonMises" in str(found.plan)


def test_an_unknown_transformation_of_a_direction_is_numeric() -> None:
    """Regression of an angle on a covariate through 2 arctan (Fisher and Lee 1992), against scipy's optimiser."""
    x = torch.linspace(-1, 1, 60)
    y = angles(0.0, 4.0, 60) + 0.5 + 2 * torch.atan(1.5 * x)

    def model(x: Tensor, y: Tensor) -> None:
        mu, slope = pyro.param("mu", torch.tensor(0.0)), pyro.param("slope", torch.tensor(0.5))
        kappa = pyro.param("kappa", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.VonMises(mu + 2 * torch.atan(slope * x), kappa), obs=y)

    def loss(u: Any) -> float:
        return -float(stats.vonmises.logpdf(y, np.exp(u[2]), u[0] + 2 * np.arctan(u[1] * x.numpy())).sum())

    best = optimize.minimize(loss, [0.0, 0.5, 0.0], method="BFGS")
    found = pyro_em.fit(model, x, y)
    assert found.converged
    assert found.log_likelihood == pytest.approx(-best.fun, abs=1e-7)
    assert found.params["slope"].item() == pytest.approx(best.x[1], abs=1e-4)


def test_a_track_of_an_animal() -> None:
    """Steps and turns: a maximum of the likelihood by a forward recursion in NumPy with scipy's densities."""
    step, angle = movement.simulate(30, seed=2)
    found = pyro_em.fit(movement.model, step, angle, tol=1e-9)
    assert found.converged
    steps, turns = step.numpy(), angle.numpy()

    def log_likelihood(initial: Any, transition: Any, shape: Any, rate: Any, mu: Any, kappa: Any) -> float:
        table = stats.gamma.logpdf(steps[:, None], shape, scale=1 / rate)
        table[1:] += stats.vonmises.logpdf(turns[1:, None], kappa, mu)
        total, forward = 0.0, initial
        for t, row in enumerate(np.exp(table)):
            forward = (forward if t == 0 else forward @ transition) * row
            total += np.log(forward.sum())
            forward = forward / forward.sum()
        return float(total)

    names = ("initial", "transition", "shape", "rate", "direction", "concentration")
    params = [found.params[name].numpy() for name in names]
    assert found.log_likelihood == pytest.approx(log_likelihood(*params), rel=1e-12)

    def at(u: Any) -> float:
        a, b = special.expit(u[:2])
        table = np.array([[a, 1 - a], [1 - b, b]])
        return log_likelihood(params[0], table, np.exp(u[2:4]), np.exp(u[4:6]), u[6:8], np.exp(u[8:10]))

    stay = special.logit(np.diag(params[1]))
    best = np.concatenate([stay, np.log(params[2]), np.log(params[3]), params[4], np.log(params[5])])
    for way in 1e-4 * np.eye(10):
        assert (at(best + way) - at(best - way)) / 2e-4 == pytest.approx(0.0, abs=1e-5)
        assert at(best + 100 * way) < at(best) > at(best - 100 * way)
    assert found.params["rate"][0] > 3 * found.params["rate"][1]  # they rest, they travel
