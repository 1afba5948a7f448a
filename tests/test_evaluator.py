"""E-steps on request (pyro_em/evaluator.py): replays change no bit, starts that go together change no result."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em import evaluator
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.plated import Plated
from pyro_em.evaluator import Evaluator, Mapped, Request
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from tests.problems import BY_NAME, Problem

CLOSED = (
    "gmm_full", "gmm_diagonal", "gmm_tied", "gmm_scale_tril", "gmm_precision", "poisson_mixture", "item_plate",
    "latent_class_counts", "coins", "exponential_mixture", "multinomial_mixture", "zero_inflated_poisson",
    "factorial", "dawid_skene", "latent_class_map",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")


def _fit(problem: Problem, **options: object) -> pyro_em.FitResult:
    algorithm = "map-em" if problem.priors else "em"
    own = {**problem.fit_options(algorithm), "init": problem.start(), "max_iter": 45, "tol": 0, **options}
    return pyro_em.fit(problem.model, *problem.args, **own)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("accelerate", [None, "squarem"])
def test_replays_change_no_bit(name: str, accelerate: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _fit(BY_NAME[name], accelerate=accelerate)
    monkeypatch.setattr(evaluator, "WARM", 10**9)
    expected = _fit(BY_NAME[name], accelerate=accelerate)
    assert found.history["objective"] == expected.history["objective"]
    assert found.history["score"] == expected.history["score"]
    assert all(torch.equal(value, expected.params[key]) for key, value in found.params.items())


def _evaluator(name: str) -> tuple[Evaluator, Problem]:
    problem = BY_NAME[name]
    bound = bind(problem.model, problem.args, {}, with_prior=problem.priors)
    m_step = MStep(bound, "auto", "map-em" if problem.priors else "em")
    return Evaluator(choose_engine(bound, m_step), m_step), problem


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_are_replayed(name: str) -> None:
    evaluate, problem = _evaluator(name)
    params, magnitude = problem.start(), 0.0
    kinds = []
    for _ in range(2 * evaluator.WARM):
        (found,) = evaluate([Request(params, magnitude)])
        assert not isinstance(found, Exception)
        kinds.append(isinstance(found, Mapped))
        magnitude = found.magnitude
        params = found.updated if isinstance(found, Mapped) else evaluate.m_step.update(params, found)[0]
    assert kinds[-1], "nothing was recorded"


def test_where_a_guard_fails_the_ordinary_code_answers() -> None:
    """A component that dies is told as without a recording."""
    x = torch.cat([torch.randn(30), torch.full((3,), 40.0)])
    init = {"w": torch.tensor([0.5, 0.5]), "loc": torch.tensor([0.0, 40.0]), "scale": torch.tensor([1.0, 3.0])}

    def model(x: Tensor) -> None:
        w = pyro.param("w", init["w"], constraint=constraints.simplex)
        loc, scale = pyro.param("loc", init["loc"]), pyro.param("scale", init["scale"], constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    with pytest.raises(pyro_em.DegenerateLikelihoodError) as raised:
        pyro_em.fit(model, x, max_iter=50, tol=0)
    assert raised.value.component == 1
    assert raised.value.result is not None


@pytest.mark.parametrize("name", ["gmm_full", "poisson_mixture", "latent_class_counts", "gmm_map", "factorial"])
@pytest.mark.parametrize("accelerate", [None, "anderson"])
def test_starts_that_go_together_end_where_each_would(name: str, accelerate: str | None) -> None:
    problem = BY_NAME[name]
    together = _fit(problem, restarts=4, seed=3, tol=1e-8, max_iter=400, accelerate=accelerate)
    seen: list[int] = []
    alone = _fit(
        problem, tol=1e-8, max_iter=400, accelerate=accelerate, callbacks=[lambda step: seen.append(step.start)]
    )
    assert set(seen) == {0}
    assert together.restarts[0][0] == pytest.approx(alone.history["objective"][-1], rel=1e-10)
    assert together.history["objective"][-1] == max(objective for objective, _ in together.restarts)


def test_one_start_that_collapses_does_not_disturb_the_others() -> None:
    x = torch.cat([torch.randn(40), torch.randn(40) + 6.0])

    def model(x: Tensor, K: int = 3) -> None:
        w = pyro.param("w", torch.ones(K) / K, constraint=constraints.simplex)
        loc = pyro.param("loc", torch.stack([x[1], x[50], x[0]]))
        scale = pyro.param("scale", torch.tensor([1.0, 1.0, 1e-9]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    result = pyro_em.fit(model, x, restarts=6, seed=0, max_iter=60)
    outcomes = [outcome for _, outcome in result.restarts]
    assert outcomes[0] == "degenerate"
    assert len(outcomes) == 6
    assert result.outcome.name != "degenerate"


def test_a_category_that_vanishes_is_laid_out_on_its_own() -> None:
    """1 - Σ of the others would know a small count to rounding of the weight only."""
    x = torch.cat([torch.zeros(50), torch.ones(49), torch.tensor([2.0])]).long()

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        p = pyro.param("p", torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.6999999, 1e-7]]), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Categorical(p[z]), obs=x)

    problem = bind(model, (x,), {}, with_prior=False)
    engine, m_step = Plated(problem), MStep(problem, "auto", "em")
    found, _ = m_step.update(problem.start, engine.e_step(problem.start))
    assert engine.generation == 1
    r = problem.start["w"] * problem.start["p"][:, x].T
    r = r / r.sum(1, keepdim=True)
    expected = torch.stack([(r * (x == v).unsqueeze(1)).sum(0) for v in range(3)], 1) / r.sum(0).unsqueeze(1)
    torch.testing.assert_close(found["p"], expected, rtol=1e-13, atol=0)
