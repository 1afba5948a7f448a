"""Acceleration: the objective never falls, the limit is plain EM's, and fewer E-steps are spent on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import gmm, lca, poisson_mixture
from pyro_em.accelerate.anderson import ridge
from pyro_em.accelerate.base import Coordinates, evaluate
from pyro_em.e_step.base import Engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.errors import InputError
from pyro_em.loop import EMMap, Iterate, Step, Steps
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from tests.problems import BY_NAME

T = TypeVar("T")
METHODS = ("squarem", "anderson")
EPS = torch.finfo(torch.float64).eps
# Several limits have probabilities of exactly 0 or 1, which are rightly warned of and not at issue here.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")


@dataclass(frozen=True)
class Case:
    model: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def fit(self, accelerate: str | None, **options: Any) -> Any:
        pyro.clear_param_store()
        return pyro_em.fit(self.model, *self.args, accelerate=accelerate, **{**self.options, **options})


def overlapping(num_rows: int, components: int, features: int, separation: float, seed: int) -> Tensor:
    """Gaussian components whose means are `separation` apart in units of their own spread, roughly. (N, D)."""
    rng = np.random.default_rng(seed)
    centres = 1.5 * separation * rng.normal(size=(components, features))
    roots = 0.3 * rng.normal(size=(components, features, features)) + np.eye(features)
    z = rng.integers(0, components, num_rows)
    noise = rng.normal(size=(num_rows, features))
    return torch.from_numpy(centres[z] + np.einsum("nij,nj->ni", roots[z], noise))


def left_right(y: Tensor) -> None:
    """A chain that starts in its first state and never goes back: structural zeros."""
    start = torch.tensor([1.0, 0.0, 0.0])
    pi = pyro.param("pi", start, constraint=constraints.simplex)
    table = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]])
    A = pyro.param("A", table, constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-0.5, 0.5, 1.5]))
    with pyro.plate("series", len(y)):
        z = None
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[:, t])


def _case(name: str, algorithm: str = "em") -> Case:
    problem = BY_NAME[name]
    return Case(problem.model, problem.args, {"init": problem.start(), **problem.fit_options(algorithm)})


def _hasselblad() -> Case:
    deaths, frequency = poisson_mixture.load_unique()
    start = {"weights": torch.tensor([0.5, 0.5]), "rate": torch.tensor([1.0, 3.0])}
    return Case(poisson_mixture.model, (deaths,), {"weights": {"rows": frequency}, "init": start})


def _stages() -> Tensor:
    rng = np.random.default_rng(5)
    return torch.from_numpy(rng.normal(np.minimum(np.arange(6) // 2, 2), 1.0, (12, 6)))


CASES: dict[str, Callable[[], Case]] = {
    "gmm four components": lambda: Case(gmm.model, (overlapping(500, 4, 2, 0.9, 2), 4)),
    "gmm ridge": lambda: Case(gmm.model, (overlapping(500, 3, 2, 1.0, 1), 3)),
    "hasselblad": _hasselblad,
    "lca boundary": lambda: Case(lca.model, (lca.load(), 3)),
    "lca map-em": lambda: Case(
        lca.bayesian, (lca.load_alzheimer(), 2), {"algorithm": "map-em", "init": "random", "seed": 1}
    ),
    "hmm": lambda: _case("gaussian_hmm"),
    "hmm map-em": lambda: _case("hmm_map", "map-em"),
    "left-right hmm": lambda: Case(left_right, (_stages(),)),
    "numeric m-step": lambda: _case("linkage"),
    "gem": lambda: _case("poisson_mixture", "gem"),
    "modules": lambda: _case("module_mixture"),
    "coupled": lambda: _case("shared_mean"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_monotone_and_counted(name: str, method: str) -> None:
    """G1 for what callbacks see and for the history; each update costs what it must, and no more."""
    case = CASES[name]()
    seen: list[float] = []
    result = case.fit(method, max_iter=40, tol=0, callbacks=[lambda step: seen.append(step.objective)])
    objective = np.array(result.history["objective"])
    assert seen == result.history["objective"]
    drop = 16 * EPS * (1 + np.abs(objective).max())
    assert (np.diff(objective) >= -drop).all(), np.diff(objective).min()
    assert objective[-1] > objective[0]

    assert result.num_iterations == 40
    assert {len(values) for values in result.history.values()} == {41}
    counts = np.array(result.history["num_e_steps"])
    assert counts[0] == 1
    assert set(np.diff(counts)) <= ({2, 3} if method == "squarem" else {1, 2})
    final = result.log_posterior if result.log_posterior is not None else result.log_likelihood
    assert final == pytest.approx(objective[-1], rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["hmm", "hmm map-em", "left-right hmm", "lca map-em", "numeric m-step", "coupled"])
def test_limit_is_that_of_plain_em(name: str, method: str) -> None:
    case = CASES[name]()
    plain = case.fit(None, max_iter=1500, tol=1e-10)
    quick = case.fit(method, max_iter=1500, tol=1e-10)
    assert quick.history["score"][-1] <= 1e-8
    for parameter, value in plain.params.items():
        torch.testing.assert_close(quick.params[parameter], value, rtol=0, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("method", METHODS)
def test_structural_zeros_stay_exactly_zero(method: str) -> None:
    case = CASES["left-right hmm"]()
    result = case.fit(method, max_iter=30, tol=0)
    assert torch.equal(result.params["pi"], torch.tensor([1.0, 0.0, 0.0]))
    forbidden = torch.tensor([[0, 0, 1], [1, 0, 0], [1, 1, 0]]).bool()
    assert (result.params["A"][forbidden] == 0).all()
    assert (result.params["A"][~forbidden] > 0).all()


def _e_steps_to(result: Any, target: float) -> int:
    """E-steps until the objective is within 1e-3 nat of `target`."""
    reached = np.array(result.history["objective"]) >= target - 1e-3
    assert reached.any()
    return int(result.history["num_e_steps"][int(reached.argmax())])


@pytest.mark.parametrize("method", METHODS)
def test_five_times_fewer_e_steps_on_the_times_deaths(method: str) -> None:
    """Hasselblad 1969: log-likelihood -1989.9459, weight 0.3599, rates 1.256 and 2.663."""
    case = CASES["hasselblad"]()
    quick = case.fit(method, tol=1e-9)
    assert quick.converged
    assert quick.log_likelihood == pytest.approx(-1989.945860, abs=1e-6)
    torch.testing.assert_close(quick.params["weights"], torch.tensor([0.3599, 0.6401]), atol=1e-4, rtol=0)
    torch.testing.assert_close(quick.params["rate"], torch.tensor([1.2561, 2.6634]), atol=1e-4, rtol=0)
    plain = case.fit(None, max_iter=700, tol=0)
    assert 5 * _e_steps_to(quick, -1989.945860) <= _e_steps_to(plain, -1989.945860)


@pytest.mark.parametrize("method", METHODS)
def test_five_times_fewer_e_steps_on_overlapping_components(method: str) -> None:
    case = Case(gmm.model, (overlapping(2000, 4, 2, 0.9, 2), 4))
    quick = case.fit(method, tol=1e-8)
    plain = case.fit(None, max_iter=300, tol=0)
    assert quick.log_likelihood >= plain.log_likelihood
    assert 5 * _e_steps_to(quick, quick.log_likelihood) <= _e_steps_to(plain, quick.log_likelihood)


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_and_fresh_for_every_start(method: str) -> None:
    """G9; and a second start is accelerated as if it were alone."""
    case = Case(lca.model, (lca.load_alzheimer(), 2), {"seed": 3, "tol": 1e-7})
    first, second = (case.fit(method, restarts=2) for _ in range(2))
    assert first.history["objective"] == second.history["objective"]
    assert first.restarts == second.restarts
    assert all(torch.equal(first.params[n], second.params[n]) for n in first.params)
    starts: list[Step] = []
    case.fit(method, restarts=2, callbacks=[lambda s: starts.append(s) if s.iteration == 0 else None])
    alone = case.fit(method, init=starts[1].params)
    # Products of one start and of several side by side may round differently, where the processor's library does.
    assert alone.log_likelihood == pytest.approx(first.restarts[1][0], rel=1e-13, abs=0)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_move(method: str) -> None:
    case = _case("poisson_mixture")
    result = case.fit(method, m_step="fixed", max_iter=3, tol=0)
    assert result.num_iterations == 3
    assert all(torch.equal(result.params[n], v) for n, v in case.options["init"].items())


def test_options_are_checked() -> None:
    case = _case("poisson_mixture")
    with pytest.raises(InputError, match=r"accelerate: 'newton' is none of None, 'squarem', 'anderson'"):
        case.fit("newton")
    with pytest.raises(InputError, match="accelerate belongs to the exact algorithms"):
        case.fit("squarem", algorithm="svi", init=None)


def _mixture_of_gaussians() -> tuple[EMMap, Iterate]:
    problem = BY_NAME["gmm_full"]
    bound = bind(problem.model, problem.args, {}, with_prior=False)
    em = EMMap(bound, MStep(bound, "auto", "em"))
    return em, _answered(em.at(problem.start(), 0), Interpreted(bound))


def _answered(steps: Steps[T], engine: Engine) -> T:
    """What steps that ask for E-steps come to."""
    answer: Any = None
    while True:
        try:
            request = steps.throw(answer) if isinstance(answer, Exception) else steps.send(answer)
        except StopIteration as stop:
            return stop.value
        try:
            answer = engine.e_step(request.params)
        except Exception as error:
            answer = error


@pytest.mark.parametrize("far", [float("nan"), float("inf"), 1e3, -1e3, 1e6])
def test_unusable_proposals_are_none(far: float) -> None:
    """NaN, overflow, a rounded-off weight or a singular covariance: refused, never raised."""
    em, current = _mixture_of_gaussians()
    coordinates = Coordinates.around(em, current.params)
    free = coordinates.to_free(current.params)
    for i in range(len(free)):
        moved = free.clone()
        moved[i] = far
        proposal = _answered(evaluate(em, coordinates, moved, 1), Interpreted(em.problem))
        if proposal is not None:
            assert np.isfinite(proposal.objective)
            assert all(p.isfinite().all() for p in proposal.params.values())
            assert (proposal.params["pi"] > 0).all()


def test_coordinates_hold_the_boundary() -> None:
    """A zero has no coordinate; parameters with another pattern of zeros are not covered."""
    case = CASES["left-right hmm"]()
    bound = bind(case.model, case.args, {}, with_prior=False)
    em = EMMap(bound, MStep(bound, "auto", "em"))
    coordinates = Coordinates.around(em, bound.start)
    free = coordinates.to_free(bound.start)
    assert free.shape == (5,)  # two free transitions, three means
    assert coordinates.cover(bound.start)
    moved = coordinates.from_free(free + 0.3)
    assert ((moved["A"] == 0) == (bound.start["A"] == 0)).all()
    gone = {**bound.start, "A": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]])}
    come = {**bound.start, "A": torch.tensor([[0.8, 0.1, 0.1], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]])}
    assert not coordinates.cover(gone)
    assert not coordinates.cover(come)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.05, 1e-4])
def test_ridge_gives_the_share_asked_for(share: float) -> None:
    singular, target = torch.tensor([3.0, 0.5, 1e-3, 1e-7]), torch.tensor([1.0, -0.2, 1e-3, 1e-9])
    penalty = ridge(singular, target, share)
    gamma = singular * target / (singular**2 + penalty)
    assert float(gamma @ gamma) == pytest.approx(share * float(((target / singular) ** 2).sum()), rel=3e-3)
