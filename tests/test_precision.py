"""precision="mixed": float32 where it carries, and a result that only float64 has judged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import gmm, hmm
from pyro_em.e_step.plated import Plated
from pyro_em.problem import bind


@pytest.fixture(scope="module")
def clouds() -> Tensor:
    """Overlapping: EM takes many updates."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-1.8, 0.0], [1.6, 0.5], [0.0, 2.4]], dtype=torch.float64)
    which = torch.randint(3, (12_000,), generator=generator)
    return centres[which] + torch.randn(12_000, 2, generator=generator, dtype=torch.float64)


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """12,000 rows of two features would be one chunk, and done in float64."""
    monkeypatch.setattr("pyro_em.e_step.product.CHUNK_CELLS", 2**12)


def _start(x: Tensor) -> dict[str, Tensor]:
    return {"loc": x[:3].clone(), "covariance": torch.eye(2).repeat(3, 1, 1), "weights": torch.full((3,), 1 / 3)}


def _fit(x: Tensor, **options: Any) -> pyro_em.FitResult:
    return pyro_em.fit(gmm.model, x, 3, init=_start(x), **options)


class _Watched:
    """Precisions of the products of a fit, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rough: list[bool] = []
        core = Plated.core

        def watched(engine: Plated, stages: Any) -> Any:
            self.rough += [stage.rough for stage in stages]
            return core(engine, stages)

        monkeypatch.setattr(Plated, "core", watched)


@pytest.mark.parametrize("options", [{}, {"accelerate": "anderson"}, {"accelerate": "squarem"}, {"temperature": 1.5}])
def test_the_limit_is_that_of_float64(clouds: Tensor, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _fit(clouds, tol=1e-9, max_iter=2000, **options)
    watched = _Watched(monkeypatch)
    found = _fit(clouds, tol=1e-9, max_iter=2000, precision="mixed", **options)
    assert found.converged and found.history["score"][-1] <= 1e-9
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-13)
    for name, value in expected.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=0, atol=1e-5)
    # One in float64, which knows the scale, then rough ones (and the recording of the map), then float64's.
    first, last = watched.rough.index(True), len(watched.rough) - watched.rough[::-1].index(True)
    assert last - first - sum(watched.rough) in (0, 1) and last - first > 5
    assert found.history["num_e_steps"][-1] > last


def test_rough_sums_have_the_digits_of_float32(clouds: Tensor) -> None:
    problem = bind(gmm.model, (clouds, 3), {}, with_prior=False)
    engine = Plated(problem)
    stage = engine.before(problem.start, torch.zeros(()))
    (exact,), (rough,) = engine.core([stage]), engine.core([type(stage)(stage.tensors, stage.kind, rough=True)])
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float64
        error = (a - b).abs().max() / a.abs().max()
        assert 0 < error < 1e-5


def test_exactly_as_many_updates_as_asked(clouds: Tensor) -> None:
    found = _fit(clouds, tol=0, max_iter=30, precision="mixed")
    assert found.num_iterations == 30 and len(found.history["objective"]) == 31
    again = _fit(clouds, tol=0, max_iter=0, precision="mixed").log_likelihood
    assert again == _fit(clouds, tol=0, max_iter=0).log_likelihood
    seconds = found.history["seconds"]
    assert all(a <= b for a, b in itertools.pairwise(seconds))


def test_few_rows_stay_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = _Watched(monkeypatch)
    assert pyro_em.fit(gmm.model, gmm.load(), 2, precision="mixed").converged
    assert watched.rough and not any(watched.rough)


def test_stopped_by_a_callback(clouds: Tensor) -> None:
    found = _fit(clouds, tol=0, precision="mixed", callbacks=[lambda step: step.iteration == 5])
    assert found.num_iterations == 5
    exact = pyro_em.fit(gmm.model, clouds, 3, init=found.params, max_iter=0)
    assert found.log_likelihood == exact.log_likelihood


def test_restarts_of_both_precisions_together(clouds: Tensor) -> None:
    found = pyro_em.fit(gmm.model, clouds, 3, restarts=3, seed=0, precision="mixed", max_iter=400)
    expected = pyro_em.fit(gmm.model, clouds, 3, restarts=3, seed=0, max_iter=400)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-10)
    assert [name for _, name in found.restarts] == [name for _, name in expected.restarts]


def test_data_far_from_zero() -> None:
    """Centred before anything is squared: float32 would give negative variances at an offset of 1e6."""
    x = gmm.simulate(60_000, 2, 2) + 1e6
    start = {"loc": x[[0, 1]].clone()}
    found = pyro_em.fit(gmm.model, x, 2, init=start, precision="mixed", max_iter=200)
    expected = pyro_em.fit(gmm.model, x, 2, init=start, max_iter=200)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-10)


def test_collapse_is_reported_by_float64() -> None:
    x = torch.cat([torch.zeros(20_000, 1), torch.randn(20_000, 1) + 5])

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.full((2,), 0.5), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([0.0, 5.0]))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(loc[z].unsqueeze(-1), scale[z].unsqueeze(-1)).to_event(1), obs=x)

    with pytest.raises(pyro_em.DegenerateLikelihoodError):
        pyro_em.fit(model, x, precision="mixed")


@pytest.mark.parametrize(
    ("model", "args", "options", "message"),
    [
        (gmm.model, lambda: (gmm.load(), 2), {"precision": "single"}, "must be one of float64, mixed"),
        (gmm.model, lambda: (gmm.load(), 2), {"precision": "mixed", "algorithm": "gem"}, "interpreted"),
        (gmm.model, lambda: (gmm.load(), 2), {"precision": "mixed", "algorithm": "cem"}, "belongs to the exact"),
        (hmm.gaussian, lambda: (hmm.simulate(),), {"precision": "mixed"}, "run grouped"),
    ],
)
def test_refusals(model: Any, args: Callable[[], tuple[Any, ...]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(pyro_em.InputError, match=message):
        pyro_em.fit(model, *args(), **options)
