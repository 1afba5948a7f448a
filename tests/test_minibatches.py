"""M-steps in minibatches: Q of some rows, the noise test, acceptance on all rows, and the limit of a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em
from pyro_em.m_step import auto, composed, minibatches
from pyro_em.m_step.minibatches import adam, climb, noise, seed_of
from pyro_em.m_step.numeric import Block
from pyro_em.m_step.rows import NotSliced, Rows, rows_of
from pyro_em.problem import Problem, bind
from tests.classics import positive, simplex
from tests.problems import BY_NAME

N = 2000


def experts(x: Tensor, y: Tensor) -> None:
    """Saturated locations behind tanh, for which no rule is closed."""
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=simplex)
    slope = pyro.param("slope", torch.tensor([0.5, -0.3]))
    level = pyro.param("level", torch.tensor([0.4, -0.4]))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(3 * torch.tanh(level[z] + slope[z] * x), sd), obs=y)


def _data(count: int = N) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(5)
    x, kind = rng.normal(size=count), rng.random(count) < 0.6
    y = 3 * np.tanh(np.where(kind, 0.5 + x, -0.8 - 0.4 * x)) + 0.4 * rng.normal(size=count)
    return torch.as_tensor(x), torch.as_tensor(y)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every numeric M-step counts as that of a network, and a thousand rows as many."""
    monkeypatch.setattr(auto, "NEWTON_LIMIT", 0)
    monkeypatch.setattr(composed, "MAX_SIZE", 0)
    monkeypatch.setattr(auto, "CLIMB", 8)
    monkeypatch.setattr(minibatches, "LARGE", 1000)


def _opened(problem: Problem, names: tuple[str, ...] = ()) -> tuple[Rows, Block, Any]:
    evidence, _ = problem.evidence(problem.start)
    names = names or tuple(problem.parameters)
    return rows_of(problem), Block.of_q(problem, problem.start, evidence.weights, names), evidence.weights


@pytest.mark.parametrize(
    "name", ["ridge_regressions", "global_and_local", "zero_inflated_regression", "dawid_skene", "nested_classes"]
)
def test_parts_of_the_rows_average_to_the_whole(name: str) -> None:
    """Weights, priors, a latent outside of the rows, inner plates and masks included: values and gradients."""
    case = BY_NAME[name]
    weights = {} if case.weights is None else {case.plate: case.weights}
    problem = bind(case.model, case.args, {}, with_prior=case.priors, weights=weights)
    rows, block, posterior = _opened(problem)
    u, sizes = block.free(), [2, rows.size - 2]
    parts = torch.randperm(rows.size, generator=torch.Generator().manual_seed(0)).split(sizes)
    found = [block.with_objective(rows.objective(part, posterior)).gradient(u) for part in parts]
    q, gradient, _ = block.gradient(u)
    shares = torch.tensor(sizes) / rows.size
    value = sum(share * own[0].detach() for share, own in zip(shares, found, strict=True))
    slope = sum(share * own[1] for share, own in zip(shares, found, strict=True))
    assert rows.plate == case.plate
    torch.testing.assert_close(value, q.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, gradient, rtol=1e-11, atol=1e-11)


def test_noise_is_that_of_single_rows() -> None:
    """N* from a few parts against trace and mean of the gradients of all rows, one by one."""
    problem = bind(experts, _data(512), {}, with_prior=False)
    rows, block, posterior = _opened(problem, ("level", "slope"))
    u = block.free()
    pairs = [torch.tensor([i, i + 1]) for i in range(0, 512, 2)]
    each = torch.stack([block.with_objective(rows.objective(p, posterior)).gradient(u)[1] for p in pairs])
    expected = 2 * float(each.var(0).sum()) / float(block.gradient(u)[1].square().sum())
    found = [noise(rows, block, u, posterior, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert np.mean(found) == pytest.approx(expected, rel=0.25)  # eight estimates of a variance from 16 parts


def test_a_fit_ends_where_that_on_all_rows_ends(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """G1, G7, G9: the objective never falls, the limit is the maximum, and a fit repeats bit for bit."""
    passes: list[int] = []
    original = minibatches._passed

    def counted(*args: Any) -> Tensor:
        passes.append(1)
        return original(*args)

    monkeypatch.setattr(minibatches, "_passed", counted)
    first = pyro_em.fit(experts, *_data(), tol=1e-5)
    assert first.converged and 0 < len(passes) < first.num_iterations  # at the end on all rows
    pyro.clear_param_store()
    one, two = (pyro_em.fit(experts, *_data(), max_iter=n, tol=0) for n in (1, 3))
    pyro.clear_param_store()
    resumed = pyro_em.fit(experts, *_data(), init=one.params, max_iter=2, tol=0)
    assert all(torch.equal(two.params[n], resumed.params[n]) for n in two.params)
    rise = np.diff(first.history["objective"])
    assert (rise >= -1e-9).all()
    reason = next(row.reason for row in first.plan.m_step if row.name == "slope")
    assert "Adam on 20 rows of plate 'rows' at a time, kept if Q rises; at the end L-BFGS on all" in reason
    monkeypatch.setattr(minibatches, "LARGE", N + 1)
    pyro.clear_param_store()
    whole = pyro_em.fit(experts, *_data(), tol=1e-5)
    assert "Adam" not in str(whole.plan)
    assert first.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-9)
    for name, value in whole.params.items():
        torch.testing.assert_close(first.params[name], value, rtol=0.0, atol=1e-3)


def test_gem_takes_minibatches_too(small: None) -> None:
    result = pyro_em.fit(experts, *_data(), algorithm="gem", max_iter=2, tol=0)
    assert (np.diff(result.history["objective"]) > 0).all()
    assert "as told; Adam on 20 rows" in str(result.plan)


@pytest.mark.parametrize("rate", [1e-5, 0.03, 30.0, 1e300])
def test_q_never_falls(rate: float) -> None:
    """Whatever the optimiser does on the minibatches; where nothing of it helps, L-BFGS climbs on all rows."""
    problem = bind(experts, _data(400), {}, with_prior=False)
    rows, block, posterior = _opened(problem)
    before = block.q(block.free())
    moved = climb(rows, block, posterior, num_steps=3, optimiser=lambda leaves: torch.optim.SGD(leaves, lr=rate))
    assert all(bool(value.isfinite().all()) for value in moved.values())
    assert float(problem.expected_log_joint(moved, posterior)[0].detach()) > before


def test_a_climb_is_a_function_of_the_parameters() -> None:
    """So that fits resume bit for bit; another place draws another order."""
    problem = bind(experts, _data(400), {}, with_prior=False)
    rows, block, posterior = _opened(problem)
    torch.manual_seed(1)
    one = climb(rows, block, posterior, num_steps=3)
    torch.manual_seed(2)
    two = climb(rows, block, posterior, num_steps=3, optimiser=adam)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert len({seed_of(problem.start), seed_of(one)}) == 2


class _Normalised(PyroModule):
    """Batch normalisation makes a row depend on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[torch.nn.Sequential](
            PyroModule[torch.nn.Linear](1, 3), PyroModule[torch.nn.BatchNorm1d](3), PyroModule[torch.nn.Linear](3, 2)
        )

    def forward(self, x: Tensor, y: Tensor) -> None:
        loc = self.net(x.unsqueeze(-1))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("y", dist.Normal(Vindex(loc)[torch.arange(len(y)), z], 1.0), obs=y)


def _own_data() -> Callable[[], None]:
    x, y = _data(50)
    return lambda: experts(x, y)


def _counts_rows(x: Tensor, y: Tensor) -> None:
    assert len(y) == 50
    experts(x, y)


def _distances(square: Tensor, y: Tensor) -> None:
    experts(square[:, 0], y)


def _sorted(x: Tensor, y: Tensor) -> None:
    experts(x - x.mean(), y)


@pytest.mark.parametrize(
    ("model", "args", "reason"),
    [
        (_own_data(), (), "no argument of the model is as long as plate 'rows'"),
        (_sorted, _data(50), "site 'y' at a row of plate 'rows' depends on the other rows"),
        (_Normalised().double(), _data(50), "site 'y' at a row of plate 'rows' depends on the other rows"),
        (_counts_rows, _data(50), "on some rows of plate 'rows' the model fails"),
        (_distances, (torch.outer(_data(50)[1], _data(50)[1]), _data(50)[1]), "as long as plate 'rows' in two dims"),
    ],
    ids=["closure", "centred", "batch norm", "fails", "two dims"],
)
def test_models_that_cannot_be_run_on_some_rows(model: Any, args: Any, reason: str) -> None:
    with pytest.raises(NotSliced, match=reason):
        rows_of(bind(model, args, {}, with_prior=False))


def test_the_plan_says_why_all_rows_are_taken(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minibatches, "LARGE", 40)
    told = str(pyro_em.plan(_sorted, *_data(50)))
    assert (
        "L-BFGS steps that raise Q, on all rows (site 'y' at a row of plate 'rows' depends on the other rows)" in told
    )
