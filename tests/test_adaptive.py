"""The compiled engine of adaptive quadrature against the interpreted one: evidence, score and update, to 1e-10."""

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
from models import glmm, irt
from pyro_em import Quadrature
from pyro_em.e_step import adaptive, node_panels
from pyro_em.e_step.adaptive import Adaptive, AdaptiveRecorded, compile_adaptive
from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.node_cumulants import Counts, Curved, Trials
from pyro_em.e_step.node_several import Several
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.choose import opened
from pyro_em.model.compat import dims_of
from pyro_em.model.missing import complete_cases
from pyro_em.model.packing import align
from pyro_em.problem import Problem, bind
from tests import zoo_quadrature as zoo
from tests.classics import positive


def _answers(N: int, J: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ability = torch.randn(N, 1, generator=generator, dtype=torch.float64)
    return (torch.rand(N, J, generator=generator) < torch.sigmoid(ability + torch.linspace(-1, 1, J))).double()


def _counts(G: int, R: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, a covariate, and groups of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.arange(1, G + 1).double() ** 2
    g = torch.cat([torch.arange(G), torch.multinomial(share, R - G, replacement=True, generator=generator)])
    x, u = torch.randn(R + G, generator=generator, dtype=torch.float64).split([R, G])
    return torch.poisson((0.2 + 0.4 * x + 0.6 * u[g]).exp(), generator=generator), x, g


def _table(G: int, R: int, times: float = 1.0) -> tuple[Tensor, Tensor]:
    """Counts, which are `times` those of a Poisson, and a covariate (G, R)."""
    generator = torch.Generator().manual_seed(2)
    x, u = torch.randn(G, R + 1, generator=generator, dtype=torch.float64).split([R, 1], -1)
    return times * torch.poisson((0.2 + 0.4 * x + 0.8 * u).exp(), generator=generator), x


def _away(y: Tensor, x: Tensor, g: Tensor) -> None:
    """Not centred, and a second site that reads the same latent; the latent's mean depends on its group."""
    scale = pyro.param("scale", torch.tensor(0.7), constraint=positive)
    slope, level = pyro.param("slope", torch.tensor([0.1, 0.4])), pyro.param("level", torch.tensor(-0.2))
    shift = pyro.param("shift", torch.tensor(0.3))
    G = int(g.max()) + 1
    with pyro.plate("groups", G):
        u = pyro.sample("u", dist.Normal(shift * torch.linspace(-1, 1, G), 1.0))
        pyro.sample("late", dist.Bernoulli(logits=level + 0.5 * u), obs=(torch.arange(G) % 3 == 0).double())
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson((slope[0] + slope[1] * x + scale * u[..., g]).exp()), obs=y)


def _waits(y: Tensor, x: Tensor, g: Tensor) -> None:
    """Gamma waiting times, of which the kernel has no cumulant of its own here."""
    b = pyro.param("b", torch.tensor([0.2, 0.4]))
    s = pyro.param("s", torch.tensor(0.6), constraint=positive)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Gamma(2.0, torch.nn.functional.softplus(b[0] + b[1] * x + u[..., g])), obs=y + 0.5)


def _slopes(y: Tensor, x: Tensor, g: Tensor) -> None:
    """Correlated intercepts and slopes in long format."""
    b = pyro.param("b", torch.tensor([0.2, 0.4]))
    L = pyro.param("L", torch.tensor([[0.8, 0.0], [0.2, 0.5]]), constraint=constraints.lower_cholesky)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(2), scale_tril=L))
    with pyro.plate("rows", len(y)):
        own = u[..., g, :]
        pyro.sample("y", dist.Poisson((b[0] + own[..., 0] + (b[1] + own[..., 1]) * x).exp()), obs=y)


def _scaled_slopes(y: Tensor, x: Tensor, g: Tensor) -> None:
    """The same by standard deviations and a correlation."""
    b = pyro.param("b", torch.tensor([0.2, 0.4]))
    tau = pyro.param("tau", torch.tensor([0.8, 0.5]), constraint=positive)
    L = pyro.param("L", torch.eye(2), constraint=constraints.corr_cholesky)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(2), scale_tril=tau.diag() @ L))
    with pyro.plate("rows", len(y)):
        own = u[..., g, :]
        pyro.sample("y", dist.Poisson((b[0] + own[..., 0] + (b[1] + own[..., 1]) * x).exp()), obs=y)


def _binomial_slopes(y: Tensor, x: Tensor, g: Tensor) -> None:
    """Several trials in a row, with a free slope of the latent."""
    b, a = pyro.param("b", torch.tensor([0.2, 0.4])), pyro.param("a", torch.tensor(0.7), constraint=positive)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"em": "latent"})
    with pyro.plate("rows", len(y)):
        total = y + torch.arange(len(y)) % 3
        pyro.sample("y", dist.Binomial(total, logits=b[0] + b[1] * x + a * u[..., g]), obs=y)


def _overdispersed(y: Tensor, x: Tensor, g: Tensor) -> None:
    """Negative binomial counts by their mean: the size enters both arguments, one by its logarithm."""
    b, s = pyro.param("b", torch.tensor([0.2, 0.4])), pyro.param("s", torch.tensor(0.6), constraint=positive)
    size = pyro.param("size", torch.tensor(2.0), constraint=positive)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        eta = b[0] + b[1] * x + u[..., g]
        pyro.sample("y", dist.NegativeBinomial(size, logits=eta - size.log()), obs=y)


def _shapes(y: Tensor, x: Tensor, g: Tensor) -> None:
    """Gamma times with a mean, and a shape for each of two kinds of rows; correlated slopes."""
    b, shape = (
        pyro.param("b", torch.tensor([0.2, 0.4])),
        pyro.param("shape", torch.tensor([2.0, 3.0]), constraint=positive),
    )
    L = pyro.param("L", torch.tensor([[0.6, 0.0], [0.2, 0.4]]), constraint=constraints.lower_cholesky)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(2), scale_tril=L))
    with pyro.plate("rows", len(y)):
        own, shapes = u[..., g, :], shape[torch.arange(len(y)) % 2]
        eta = b[0] + own[..., 0] + (b[1] + own[..., 1]) * x
        pyro.sample("y", dist.Gamma(shapes, shapes * (-eta).exp()), obs=y + 0.5)


def _noisy(y: Tensor, x: Tensor, g: Tensor) -> None:
    """A mean behind an exponential, with a noise that grows with the covariate."""
    b, s = pyro.param("b", torch.tensor([0.2, 0.4])), pyro.param("s", torch.tensor(0.6), constraint=positive)
    c = pyro.param("c", torch.tensor([0.1, 0.2]))
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        mean = (0.5 * (b[0] + b[1] * x + u[..., g])).exp()
        pyro.sample("y", dist.Normal(mean, (c[0] + c[1] * x).exp()), obs=y)


GAPS = _answers(30, 4)
GAPS[torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) < 0.3] = float("nan")
WEIGHTS = {"people": torch.arange(1, 31).double()}
Y, X, G = _counts(5, 60)
ZEROS = Y * (torch.arange(60) % 3 > 0), X, G
LINE = torch.linspace(-1.5, 1.5, 4, dtype=torch.float64)
CASES: list[tuple[str, Any, tuple[Any, ...], str, int, dict[str, Any], type]] = [
    ("binomial rows", glmm.model, glmm.load(), "b", 15, {}, Trials),
    ("binomial groups", glmm.grouped, glmm.simulate(9, 5), "b", 15, {}, Trials),
    ("one trial, crossed plates", zoo.ability, (_answers(9, 4),), "theta", 11, {}, Trials),
    ("missing cells", zoo.ability, (GAPS,), "theta", 11, {}, Trials),
    ("weighted patterns", irt.model, (irt.load()[0],), "theta", 11, WEIGHTS, Trials),
    ("a common slope", irt.common_slope, (_answers(9, 4),), "theta", 11, {}, Trials),
    ("counts in groups", zoo.rates, _counts(6, 60), "u", 11, {}, Counts),
    ("indexed by position", zoo.rates, (*_counts(6, 40), True), "u", 11, {}, Counts),
    ("not centred, two sites", _away, _counts(6, 50), "u", 11, {}, Counts),
    ("waiting times", _waits, _counts(5, 40), "u", 11, {}, Curved),
    ("vectors", zoo.slopes, (_answers(5, 4), LINE), "b", 7, {}, Trials),
    ("vectors in groups", _slopes, _counts(5, 40), "u", 7, {}, Counts),
    ("vectors by scales and correlation", _scaled_slopes, _counts(5, 40), "u", 7, {}, Counts),
    ("several trials", _binomial_slopes, _counts(5, 40), "u", 11, {}, Trials),
    ("a dispersion", _overdispersed, _counts(5, 40), "u", 9, {}, Several),
    ("shapes of two kinds", _shapes, _counts(5, 40), "u", 5, {}, Several),
    ("a noise behind a predictor", _noisy, _counts(5, 40), "u", 9, {}, Several),
    ("classes by their mean", zoo.ability_classes, (_answers(9, 4),), "theta", 11, {}, Trials),
    ("classes of items", zoo.mixed_items, (_answers(9, 4),), "theta", 11, {}, Trials),
    ("classes with missing cells", zoo.mixed_items, (GAPS, 3), "theta", 11, WEIGHTS, Trials),
    ("two discrete latents", zoo.groups_in_classes, _table(6, 4), "u", 11, {}, Counts),
    ("vectors in classes", zoo.mixed_slopes, (_answers(5, 4), LINE), "b", 7, {}, Trials),
    ("a class drawn by the latent", zoo.drawn_by_ability, (_answers(9, 4),), "theta", 11, {}, Trials),
    ("a dispersion by class", zoo.mixed_dispersion, _table(6, 4, 3.0), "u", 9, {}, Several),
    ("classes in long format", zoo.classes_of_groups, _counts(5, 40), "u", 11, {}, Counts),
    ("classes by position", zoo.classes_of_groups, (*_counts(5, 40), True), "u", 11, {}, Counts),
    ("zeros of a row", zoo.inflated, ZEROS, "u", 11, {}, Several),
    ("zeros behind a predictor", zoo.inflated_by_row, ZEROS, "u", 11, {}, Several),
    ("shares by mean and precision", zoo.shares, ((Y + 1) / (Y.max() + 2), X, G), "u", 9, {}, Several),
    ("trials by mean and precision", zoo.overdispersed_trials, (Y.clamp(max=12), X, G), "u", 9, {}, Several),
    ("two latents", zoo.two_sites, (_answers(5, 4), LINE), "b c", 7, {}, Trials),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].replace(" ", "-"))


def _bound(model: Any, args: tuple[Any, ...], sites: str, nodes: int, weights: dict[str, Tensor]) -> Problem:
    rules = {site: Quadrature(nodes, tolerance=1.0) for site in sites.split()}
    return bind(complete_cases(model, "nan"), args, {}, with_prior=False, rules=rules, weights=weights)


def _agree(problem: Problem, updates: int = 2) -> Adaptive:
    """Evidence, score, weights and update of both engines along a few updates."""
    m, params = MStep(problem, "auto", "em"), problem.start
    engine, reference = compile_adaptive(problem, m), Interpreted(problem)
    for _ in range(updates):
        engine._count = 0  # both estimate the error at this E-step
        found = engine.e_step(params)
        for own in engine.sets:
            own.route.due = True
        expected = reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12, abs=1e-12)
        assert found.magnitude == pytest.approx(expected.magnitude, rel=1e-12)
        assert found.error == pytest.approx(expected.error, rel=1e-4, abs=1e-11)
        assert m.score(params, found) == pytest.approx(m.score(params, expected), rel=1e-10, abs=1e-10)
        for name, weight in expected.weights.items():
            assert isinstance(weight, Tensor)
            own = found.weights[name]
            assert isinstance(own, Tensor)
            torch.testing.assert_close(align(own, dims_of(weight)), weight, rtol=1e-9, atol=1e-11)
        moved, info = m.update(params, found)
        params, same = m.update(params, expected)
        assert info.rounds == same.rounds
        for name, value in params.items():
            torch.testing.assert_close(moved[name], value, rtol=1e-10, atol=1e-10)
    assert opened(found).problem.continuous is not None
    return engine


@cases
def test_both_engines_say_the_same(case: Any) -> None:
    _, model, args, sites, nodes, weights, kind = case
    engine = _agree(_bound(model, args, sites, nodes, weights))
    assert isinstance(engine, AdaptiveRecorded)
    assert isinstance(engine.sets[0].rows[-1].cumulant, kind)


@pytest.mark.parametrize("most", [40, 300])
@pytest.mark.parametrize("number", [1, 6, 8, 9, 11, 14, 18, 24])
def test_panels_of_any_size(number: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut along groups and along rows, and with the rows of a group in the last dim; modes from the last E-step."""
    _, model, args, sites, nodes, weights, _ = CASES[number]
    monkeypatch.setattr(node_panels, "MAX_CELLS", most)
    monkeypatch.setattr(adaptive, "RECORDED", 0)
    monkeypatch.setattr(adaptive, "RECORDED_SEVERAL", 0)
    engine = _agree(_bound(model, args, sites, nodes, weights), 3)
    panels = [panel for own in engine.sets for rows in own.rows for panel in rows.panels.panels]
    assert len(panels) > 2 and not isinstance(engine, AdaptiveRecorded)


def test_far_predictors() -> None:
    """The product of many small probabilities is not 0: log-densities far below the smallest number."""
    y, total, x, g = glmm.simulate(4, 40)
    problem = _bound(glmm.grouped, ((y > 1).double(), torch.ones_like(total), x, g), "b", 11, {})
    far = {**problem.start, "coef": torch.tensor([60.0, -30.0]).double()}
    m = MStep(problem, "auto", "em")
    engine, reference = compile_adaptive(problem, m), Interpreted(problem)
    found, expected = engine.e_step(far), reference.e_step(far)
    assert expected.log_likelihood < -2000
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
    assert m.score(far, found) == pytest.approx(m.score(far, expected), rel=1e-9)


RULE = Quadrature(15, tolerance=1.0)


def _stacked(y: Tensor) -> None:
    """A latent whose mean is a latent."""
    s = pyro.param("s", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(y)):
        a = pyro.sample("a", dist.Normal(0.0, s))
        b = pyro.sample("b", dist.Normal(a, 0.5))
        pyro.sample("y", dist.Poisson(b.exp()), obs=y[:, 0])


def _curved(y: Tensor) -> None:
    d = pyro.param("d", torch.tensor(0.1))
    with pyro.plate("rows", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=d + u + 0.1 * u * u), obs=y[:, 0])


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")  # six rows of draws say nothing of a spread
@pytest.mark.parametrize(
    ("model", "sites", "message"),
    [
        (_stacked, "a b", "depends on a latent"),
        (_curved, "u", "linear in latents"),
        (zoo.normal, "b", "several arguments of 'y'"),
    ],
)
def test_what_stays_interpreted(model: Callable[..., None], sites: str, message: str) -> None:
    problem = _bound(model, (_answers(6, 4),), sites, 7, {})
    with pytest.raises(NotCompiled, match=message):
        compile_adaptive(problem, MStep(problem, "auto", "em"))
    result = pyro_em.fit(model, _answers(6, 4), e_step=dict.fromkeys(sites.split(), RULE), max_iter=1, tol=0)
    assert "interpreted" in str(result.plan)


def test_a_fit_uses_it_and_says_so() -> None:
    args = _counts(6, 60)
    result = pyro_em.fit(zoo.rates, *args, e_step={"u": Quadrature(15)}, accelerate="squarem")
    assert result.converged and "adaptive" in str(result.plan) and "error of the log-likelihood" in str(result.plan)
    again = pyro_em.fit(zoo.rates, *args, e_step={"u": Quadrature(15)}, accelerate="squarem")
    assert again.history["objective"] == result.history["objective"]
