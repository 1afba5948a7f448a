"""The engine of pooled rows equals the interpreted reference: evidence, score, updates; and it is chosen."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pyro_em
from models import linear_mixed
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.pooled import Pooled
from pyro_em.e_step.pooled_data import Rows, pool
from pyro_em.m_step.choose import opened
from pyro_em.m_step.linear import Linear
from tests.engines import bound_with_m_step, same_as_reference
from tests.latent_problems import BY_NAME, LATENT_PROBLEMS, LatentProblem

DISCRETE = {"mixture_of_groups"}
IN_STATES = {"mixture_of_factors", "latent_first"}  # an engine of their own: test_pooled_states.py
POOLED = [p for p in LATENT_PROBLEMS if p.name not in DISCRETE | IN_STATES]


@pytest.mark.parametrize("problem", POOLED, ids=lambda p: p.name)
def test_it_is_the_reference(problem: LatentProblem) -> None:
    same_as_reference(problem, Pooled)


@pytest.mark.parametrize("problem", POOLED, ids=lambda p: p.name)
def test_blocks_are_those_of_the_whole_system(problem: LatentProblem) -> None:
    bound, m = bound_with_m_step(problem)
    params, engine = problem.start(), choose_engine(bound, m)
    for unit in m.units:
        if not isinstance(unit, Linear):
            continue
        sufficient = opened(engine.e_step(params))
        unit.gradient(params, sufficient)
        parts = unit._parts(sufficient)
        whole = unit.precision(params, sufficient)
        assert sum(part.numel() for part in parts) == unit.size
        for part, block in zip(parts, unit._blocks(parts, params, sufficient), strict=True):
            expected = whole[part.unsqueeze(-1), part.unsqueeze(-2)]
            torch.testing.assert_close(block, expected, rtol=1e-14, atol=1e-14 * float(whole.abs().max()))


@pytest.mark.parametrize("name", ["factor_analysis", "random_slopes", "crossed", "mixture_of_factors"])
def test_an_e_step_is_gone_with_its_last_name(name: str) -> None:
    problem = BY_NAME[name]
    bound, m = bound_with_m_step(problem)
    params, engine = problem.start(), choose_engine(bound, m)
    expectation = engine.e_step(params)
    m.score(params, expectation)
    m.update(params, expectation)
    left = weakref.ref(expectation.sufficient)
    gc.disable()
    try:
        del expectation
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("name", "place", "moved", "rtol"),
    [
        ("factor_analysis", 0, {"b": [1.0] * 4}, 1e-10),
        ("random_slopes", 2, {"beta": [1.0, 0.0]}, 1e-10),
        ("crossed", 2, {"mu": [1.0]}, 1e-10),
        ("repeated_vectors", 3, {"effect": [1.0] * 3}, 1e-9),  # its rounds end in steps at the reference's atoms
    ],
)
def test_data_far_from_zero_keep_their_digits(
    name: str, place: int, moved: dict[str, list[float]], rtol: float
) -> None:
    problem, far = BY_NAME[name], 1e5
    args = tuple(a + far if i == place else a for i, a in enumerate(problem.args))
    init = {n: v + far * torch.tensor(moved[n], dtype=v.dtype) if n in moved else v for n, v in problem.init.items()}
    same_as_reference(replace(problem, args=args, init=init), Pooled, rtol=rtol)


@pytest.mark.parametrize(
    "name",
    [
        "factor_analysis",
        "random_slopes",
        "random_intercepts",
        "eight_schools",
        "matches",
        "crossed",
        "nested",
        "subjects_and_items",
    ],
)
@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
def test_updates_are_recorded(name: str) -> None:
    """After the warm-up the tape replays what the engine does: the same fit, whichever way."""
    problem = BY_NAME[name]
    result = pyro_em.fit(problem.model, *problem.args, init=problem.start(), max_iter=40, tol=0)
    assert result.plan.engine.startswith("pooled")
    bound, m = bound_with_m_step(problem)
    engine, params = choose_engine(bound, m), problem.start()
    for _ in range(40):
        params, _ = m.update(params, engine.e_step(params))
    for name, value in params.items():
        torch.testing.assert_close(result.params[name], value, rtol=0, atol=0)


def test_restarts_share_the_pooled_rows() -> None:
    problem = BY_NAME["random_slopes"]
    result = pyro_em.fit(problem.model, *problem.args, restarts=3, seed=1, max_iter=25, tol=0)
    alone = pyro_em.fit(problem.model, *problem.args, max_iter=25, tol=0)
    assert result.restarts[0][0] == pytest.approx(alone.log_likelihood, rel=1e-13)


@pytest.mark.parametrize("name", sorted(DISCRETE))
def test_the_plan_says_why_not(name: str) -> None:
    problem = BY_NAME[name]
    engine = pyro_em.plan(problem.model, *problem.args).engine
    assert engine.startswith("interpreted (Gaussian latents; ")
    assert "loadings" in engine


def test_groups_of_equal_design_are_one_class() -> None:
    """Groups of 4 rows whose covariate is the same in all, and one of 2 rows; whatever the order of the rows."""
    generator = torch.Generator().manual_seed(0)
    group = torch.cat([torch.arange(5).repeat(4), torch.tensor([5, 5])])
    day = torch.cat([torch.arange(4).repeat_interleave(5), torch.arange(2)]).double()
    y = torch.randn(22, 1, generator=generator, dtype=torch.float64)
    shared = torch.stack([torch.ones(22, dtype=torch.float64), day], -1)
    classes = pool([Rows(group, shared, y)], torch.ones(6, dtype=torch.float64))
    assert sorted(classes.weight.tolist()) == [1.0, 5.0]
    assert classes.sites[0].count == 22
    kept = _squares(classes.sites[0], classes.ones)
    torch.testing.assert_close(kept, _by_hand(group, shared, y), rtol=1e-13, atol=1e-13)


def _squares(site: object, ones: Tensor) -> Tensor:
    """Σ over all rows of (φ, y)(φ, y)ᵀ, put together again."""
    columns = torch.cat([site.design.unsqueeze(-1) * ones[:, None, None], site.data], 2)  # type: ignore[attr-defined]
    found = torch.einsum("umvc,umwc->vw", columns, columns)
    left = site.left.mT @ site.left  # type: ignore[attr-defined]
    return found + torch.nn.functional.pad(left, (2, 0, 2, 0))


def _by_hand(group: Tensor, shared: Tensor, y: Tensor) -> Tensor:
    rows = torch.cat([shared, y], -1)
    return rows.mT @ rows


BALANCED = torch.arange(8).repeat_interleave(6)


def _without_groups(covariate: bool) -> tuple[Tensor, ...]:
    """Rows whose group means differ less than chance would have it: the variance between groups is 0."""
    generator = torch.Generator().manual_seed(1)
    y, x = (torch.randn(48, generator=generator, dtype=torch.float64) for _ in range(2))
    means = torch.zeros(8, dtype=torch.float64).index_add(0, BALANCED, y) / 6
    y = y - 0.9 * means[BALANCED]
    return (x, BALANCED, y) if covariate else (BALANCED, y)


@pytest.mark.parametrize("accelerate", ["squarem", "anderson"])
def test_eight_schools_end_at_no_variance(accelerate: str) -> None:
    """tau = 0: mu is the mean weighted by precision, and the boundary is reported."""
    y, sigma = BY_NAME["eight_schools"].args
    with pytest.warns(pyro_em.BoundaryEstimate, match="'tau2'"):
        result = pyro_em.fit(
            BY_NAME["eight_schools"].model, y, sigma, init={"mu": 3.0, "tau2": 30.0}, accelerate=accelerate
        )
    assert result.converged
    expected = float((y / sigma**2).sum() / (sigma**-2).sum())
    assert float(result.params["mu"]) == pytest.approx(expected, abs=1e-3)  # as far as tau2 is above 0
    limit = torch.distributions.Normal(torch.tensor(expected, dtype=y.dtype), sigma).log_prob(y).sum()
    assert result.log_likelihood == pytest.approx(float(limit), abs=1e-5)


def test_mixed_models_without_variance_between_groups() -> None:
    group, y = _without_groups(False)
    with pytest.warns(pyro_em.BoundaryEstimate, match="'between'"):
        result = pyro_em.fit(linear_mixed.model, group, y, accelerate="anderson")
    assert result.converged
    limit = torch.distributions.Normal(y.mean(), y.std(correction=0)).log_prob(y).sum()
    assert result.log_likelihood == pytest.approx(float(limit), abs=1e-4)
    with pytest.warns(pyro_em.BoundaryEstimate, match="'D'"):
        slopes = pyro_em.fit(linear_mixed.slopes, *_without_groups(True), accelerate="anderson")
    # D itself is kept to rounding, which is all that is left of its smallest eigenvalue.
    assert slopes.outcome.name in ("converged", "stalled")
    smallest, largest = torch.linalg.eigvalsh(slopes.params["D"]).tolist()
    assert 0 <= smallest < 1e-6 * largest


def test_a_variance_that_the_data_show_is_no_boundary(recwarn: pytest.WarningsRecorder) -> None:
    group, y = linear_mixed.load()
    pyro_em.fit(linear_mixed.model, group, y, accelerate="anderson")
    assert not [w for w in recwarn if issubclass(w.category, pyro_em.BoundaryEstimate)]


def test_an_effect_without_variance_is_allowed() -> None:
    """log p(x) at tau = 0 exactly, which no Normal could be asked for."""
    problem = BY_NAME["random_intercepts"]
    bound, m = bound_with_m_step(problem)
    engine = choose_engine(bound, m)
    assert isinstance(engine, Pooled)
    params = {**problem.start(), "tau": torch.tensor(0.0, dtype=torch.float64)}
    (sums,) = engine.core([engine.before(params, torch.zeros(()))])
    (y,) = problem.args
    expected = torch.distributions.Normal(params["mu"], params["sd"]).log_prob(y).sum()
    assert float(sums[-1][0]) == pytest.approx(float(expected), rel=1e-13)
