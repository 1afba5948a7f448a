"""E-steps on request (pyro_em/evaluator.py): replays change no bit, starts that go together change no result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em import evaluator
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.plated import Plated
from pyro_em.evaluator import Evaluator
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from pyro_em.recordings import Around, Mapped, Request, Ways
from pyro_em.tape import replay
from tests import zoo_quadrature
from tests.latent_problems import LATENT_PROBLEMS, LatentProblem
from tests.problems import BY_NAME, Problem

CLOSED = (
    "gmm_full", "gmm_diagonal", "gmm_tied", "gmm_scale_tril", "gmm_precision", "poisson_mixture", "item_plate",
    "latent_class_counts", "coins", "exponential_mixture", "multinomial_mixture", "zero_inflated_poisson",
    "factorial", "dawid_skene", "latent_class_map",
)  # fmt: skip
RUN = (  # engines that are recorded whole: what ran the model, its recognised arguments, groups of sites
    "gamma_mixture", "global_and_local", "gaussian_hmm", "regressions", "poisson_regressions", "censored_mixture",
    "timed_factorial", "hmm_map", "gmm_map", "shared_mean", "ridge_regressions",
)  # fmt: skip
VARYING = ("poisson_regressions", "shared_mean", "ridge_regressions")  # in the number of steps or rounds
LATENT = ("factor_analysis", "random_slopes", "eight_schools", "mixture_of_factors", "two_sets")
TABLE = {**BY_NAME, **{problem.name: problem for problem in LATENT_PROBLEMS if problem.name in LATENT}}
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")


@pytest.fixture(autouse=True)
def _written_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays by arithmetic of Python (tape/scalars.py) too, although the fits are short."""
    monkeypatch.setattr(replay, "OFTEN", 8)


def _fit(problem: Problem | LatentProblem, **options: object) -> pyro_em.FitResult:
    own = problem.fit_options(_algorithm(problem)) if isinstance(problem, Problem) else dict(problem.options)
    own |= {"algorithm": _algorithm(problem), "init": problem.start(), "max_iter": 45, "tol": 0, **options}
    return pyro_em.fit(problem.model, *problem.args, **own)


def _algorithm(problem: Problem | LatentProblem) -> str:
    return "map-em" if isinstance(problem, Problem) and problem.priors else "em"


@pytest.mark.parametrize(
    ("name", "accelerate"),
    [
        *((n, a) for n in CLOSED for a in (None, "squarem")),
        *((n, None) for n in (*RUN, *LATENT)),
        ("poisson_regressions", "squarem"),
    ],
)
def test_replays_change_no_bit(name: str, accelerate: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _fit(TABLE[name], accelerate=accelerate)
    monkeypatch.setattr(evaluator, "WARM", 10**9)
    expected = _fit(TABLE[name], accelerate=accelerate)
    assert found.history["objective"] == expected.history["objective"]
    assert found.history["score"] == expected.history["score"]
    assert all(torch.equal(value, expected.params[key]) for key, value in found.params.items())


def test_replays_of_quadrature_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate of its error now and then is what the first attempts to record meet."""
    y = torch.as_tensor(np.random.default_rng(0).random((12, 3)) < [0.3, 0.5, 0.7]).double()
    options = {"e_step": {"theta": pyro_em.Quadrature(11)}, "max_iter": 30, "tol": 0}
    found = pyro_em.fit(zoo_quadrature.ability, y, **options)
    monkeypatch.setattr(evaluator, "WARM", 10**9)
    expected = pyro_em.fit(zoo_quadrature.ability, y, **options)
    assert found.history["objective"] == expected.history["objective"]
    assert all(torch.equal(value, expected.params[key]) for key, value in found.params.items())


def _evaluator(name: str) -> tuple[Evaluator, Problem | LatentProblem]:
    problem = TABLE[name]
    algorithm = _algorithm(problem)
    bound = bind(problem.model, problem.args, {}, with_prior=algorithm == "map-em")
    m_step = MStep(bound, "auto", algorithm)
    return Evaluator(choose_engine(bound, m_step), m_step), problem


@pytest.mark.parametrize("name", [*CLOSED, *RUN, *LATENT])
def test_closed_forms_are_replayed(name: str) -> None:
    evaluate, problem = _evaluator(name)
    params, magnitude = problem.start(), 0.0
    kinds = []
    for _ in range(40):
        (found,) = evaluate([Request(params, magnitude)])
        assert not isinstance(found, Exception)
        kinds.append(isinstance(found, Mapped))
        magnitude = found.magnitude
        params = found.updated if isinstance(found, Mapped) else evaluate.m_step.update(params, found)[0]
    assert not evaluate.refusal
    assert any(kinds), "nothing was recorded"
    assert all(kinds[-5:]) or name in VARYING


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"max_iter": 12, "tol": 0}, []),  # 9 updates would be left
        ({"max_iter": 45, "tol": 0}, [3]),
        ({"max_iter": 30, "tol": 0}, [6]),  # not before the pace of the first updates is surer
        ({"max_iter": 1000, "tol": 1e-3}, []),  # over soon, as the score says
        ({"max_iter": 8, "tol": 0, "restarts": 3}, [6]),  # the other starts count
        ({"max_iter": 12, "tol": 0, "algorithm": "sem"}, []),
    ],
)
def test_what_does_not_pay_is_not_recorded(
    options: dict[str, Any], recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a fit is the same bit for bit."""
    made, record = [], Evaluator._record
    monkeypatch.setattr(evaluator, "PAYS", 10)
    monkeypatch.setattr(Evaluator, "_record", lambda self, request: made.append(self._count) or record(self, request))
    found = _fit(TABLE["gmm_full"], seed=1, **options)
    assert made == recorded
    monkeypatch.setattr(evaluator, "WARM", 10**9)
    expected = _fit(TABLE["gmm_full"], seed=1, **options)
    assert found.history["objective"] == expected.history["objective"]
    assert all(torch.equal(value, expected.params[key]) for key, value in found.params.items())


def test_what_keeps_going_other_ways_is_recorded_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton's method that takes another number of steps at every update: a recording costs many of them."""
    evaluate, problem = _evaluator("gamma_mixture")
    made, tried, add = [], [], Ways.add

    def counted(self: Ways, *args: Any) -> Any:
        made.append(evaluate._count)
        return add(self, *args)

    monkeypatch.setattr(Ways, "add", counted)
    monkeypatch.setattr(Ways, "__call__", lambda self, inputs: tried.append(evaluate._count))
    for _ in range(80):
        evaluate([Request(problem.start(), 1.0)])
    assert made == [3, 6, 18, 66]
    waits = [count - made[i] for i in range(4) for count in tried if made[i] < count <= [*made, 81][i + 1]]
    assert waits == [1, 2, 3, *[1, 2, 3, 4, 8], *[1, 2, 3, 4, 8, 16, 32], *[1, 2, 3, 4, 8]]


def test_what_is_too_large_for_one_recording_is_recorded_around_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, problem = _evaluator("gmm_full")
    monkeypatch.setattr(replay, "MOST_BYTES", 12_000)
    params, magnitude = problem.start(), 0.0
    for _ in range(10):
        (found,) = evaluate([Request(params, magnitude)])
        magnitude = found.magnitude  # type: ignore[union-attr]
    assert isinstance(evaluate._recording, Around) and isinstance(found, Mapped) and not evaluate.refusal


class _Counting:
    """A model that is another one from its call number `after` on."""

    def __init__(self, after: int) -> None:
        self.calls, self.after = 0, after

    def __call__(self, x: Tensor) -> None:
        self.calls += 1
        loc = pyro.param("loc", torch.tensor(0.3))
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc + z, sd), obs=x + 0.1 * (self.calls > self.after))


def test_a_model_that_changes_is_not_frozen() -> None:
    model, x = _Counting(10**9), torch.tensor([0.4, -1.0, 2.2, 0.9])
    bound = bind(model, (x,), {}, with_prior=False)
    m_step = MStep(bound, "auto", "em")
    evaluate = Evaluator(Interpreted(bound), m_step)
    params, magnitude, kinds = bound.start, 0.0, []
    for i in range(1, evaluator.REFRESH + 2):
        if i == 50:
            model.after = model.calls
        (found,) = evaluate([Request(params, magnitude)])
        assert not isinstance(found, Exception)
        kinds.append(isinstance(found, Mapped))
        magnitude = found.magnitude
        params = found.updated if isinstance(found, Mapped) else m_step.update(params, found)[0]
    assert kinds[-10:] == [True] * 8 + [False] * 2
    assert "a later replay differs" in evaluate.refusal


def test_ordinary_evaluations_become_rare() -> None:
    assert [count for count in range(1, 1000) if evaluator._refreshed_at(count)] == [100, 200, 400, 800]


def test_data_that_a_callback_changes_are_seen_at_the_end() -> None:
    """The last iterate is evaluated by the reference path, which reads the data anew."""
    x = torch.tensor([0.4, -1.0, 2.2, 0.9])

    def change(step: pyro_em.Step) -> None:
        if step.iteration == 20:
            x.add_(1.0)

    with pytest.raises(pyro_em.PyroEMError, match="the reference"):
        pyro_em.fit(_Counting(10**9), x, max_iter=30, tol=0, callbacks=[change])


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
