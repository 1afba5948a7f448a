"""Effects of crossing and nested plates: the sparse factors against dense algebra, the engine against the reference."""

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
from models import linear_mixed
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.pooled import Pooled
from pyro_em.evidence import elimination_order
from pyro_em.evidence.block_cholesky import factor
from pyro_em.evidence.elimination_order import Family, Order
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from tests.dense import dense
from tests.emulated import emulated_device
from tests.engines import same_as_reference
from tests.latent_problems import BY_NAME
from tests.linear_graphs import Graph, linear_graph

# By name: the (elements, size) of each family, and for each site the elements of families that its rows read.
_rng = np.random.default_rng(0)
_any = _rng.integers
DESIGNS: dict[str, tuple[list[tuple[int, int]], list[dict[int, Any]]]] = {
    "crossed": ([(30, 1), (8, 1)], [{0: _any(0, 30, 60), 1: _any(0, 8, 60)}]),
    "slopes crossed": ([(30, 2), (8, 1), (3, 3)], [{0: _any(-1, 30, 60), 1: _any(0, 8, 60), 2: _any(-1, 3, 60)}]),
    "nested thrice": (
        [(20, 2), (6, 1), (40, 1)],
        [{0: np.arange(20), 1: np.arange(20) % 6}, {2: np.arange(40), 0: np.arange(40) % 20}],
    ),
    "independent": ([(12, 2)], [{0: _any(0, 12, 60)}]),
    "two elements of one plate": ([(9, 1), (20, 1)], [{0: _any(0, 9, 40), 1: _any(0, 20, 40)}, {0: _any(0, 9, 8)}]),
}


@pytest.mark.parametrize("full", [1, 4, 100])
@pytest.mark.parametrize("small", [0, 8, 100])
@pytest.mark.parametrize("name", DESIGNS)
def test_sparse_factors_are_those_of_the_dense_matrix(
    name: str, small: int, full: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is eliminated in steps, kept whole or left to the dense tail."""
    monkeypatch.setattr(elimination_order, "SMALL", small)
    monkeypatch.setattr(elimination_order, "FULL", full)
    sizes, sites = DESIGNS[name]
    rng, families, first = np.random.default_rng(1), [], 0
    for elements, size in sizes:
        families.append(Family(elements, size, first))
        first += elements * size
    begins = np.cumsum([0, *(elements for elements, _ in sizes)])
    coupled = [np.stack([np.where(e >= 0, begins[f] + e, -1) for f, e in rows.items()], 1) for rows in sites]
    order = Order(families, coupled)
    assert small < 100 or not order.levels
    J, store = np.eye(first), order.zeros().index_add(0, order.diagonal, torch.ones(first, dtype=torch.float64))
    read = []
    for rows in sites:
        for n in range(len(next(iter(rows.values())))):
            u = np.concatenate([families[f].unknowns[e[n]] for f, e in rows.items() if e[n] >= 0])
            t = rng.normal(size=len(u))
            np.add.at(J, np.ix_(u, u), np.outer(t, t))
            one, other = np.meshgrid(u, u, indexing="ij")
            cells = torch.tensor(order.cells(one, other, once=True).reshape(-1))
            store = store.index_add(0, cells, torch.tensor(np.outer(t, t).reshape(-1)))
            read.append((order.cells(one, other), one, other))
    factored = factor(order, store)
    assert factored is not None
    h = np.append(rng.normal(size=first), 0.0)
    np.testing.assert_allclose(factored.solve(torch.tensor(h)).numpy()[:-1], np.linalg.solve(J, h[:-1]), atol=1e-13)
    assert float(factored.log_det()) == pytest.approx(np.linalg.slogdet(J)[1], rel=1e-13)
    inverse, found = np.linalg.inv(J), factored.inverse().numpy()
    for own, one, other in read:
        np.testing.assert_allclose(found[own], inverse[one, other], atol=1e-13)
    store[order.diagonal[-1]] -= 1e6
    assert factor(order, store) is None


@pytest.mark.parametrize("name", ["crossed", "nested", "common_shock", "subjects_and_items", "pupils_in_classes"])
def test_it_is_the_reference_in_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_pooled.py, with every plate that can be eliminated in a step of its own."""
    monkeypatch.setattr(elimination_order, "SMALL", 0)
    same_as_reference(BY_NAME[name], Pooled)


@pytest.mark.parametrize("name", ["crossed", "pupils_in_classes"])
def test_steps_run_where_the_data_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination_order, "SMALL", 0)
    own = BY_NAME[name]
    expected = pyro_em.fit(own.model, *own.args, init=own.start(), max_iter=2, tol=0)
    with emulated_device() as device:
        args, start = [x.to(device) for x in own.args], {n: x.to(device) for n, x in own.start().items()}
        found = pyro_em.fit(own.model, *args, init=start, max_iter=2, tol=0)
        params = {n: value.cpu() for n, value in found.params.items()}
    assert found.plan.engine.startswith("pooled")
    assert found.log_likelihood == expected.log_likelihood
    assert all(torch.equal(params[n], expected.params[n]) for n in params)


GRAPHS = [linear_graph("nested", seed) for seed in (4, 8, 24)]
GRAPHS += [linear_graph("long", seed) for seed in (2, 8, 12, 13, 18, 19, 22)]  # all closed forms, plates that couple


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.filterwarnings("ignore::pyro_em.errors.CollinearDesign")
def test_random_designs_are_the_dense_joint_normal(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evidence to 1e-10 of a dense normal, the update that of the interpreted path."""
    monkeypatch.setattr(elimination_order, "SMALL", 0)
    bound = bind(graph.model, (), {}, with_prior=False, roles=graph.roles, params=graph.start)
    m, other = MStep(bound, "auto", "em"), MStep(bound, "auto", "em")
    engine = choose_engine(bound, m)
    assert isinstance(engine, Pooled)
    assert engine.coupled
    expectation, reference = engine.e_step(graph.start), Interpreted(bound).e_step(graph.start)
    value = float(dense(graph.model, (), graph.start).log_evidence.detach())
    assert abs(expectation.log_likelihood - value) <= 1e-10 * (1 + abs(value))
    assert m.score(graph.start, expectation) == pytest.approx(other.score(graph.start, reference), rel=1e-9)
    updated, expected = m.update(graph.start, expectation)[0], other.update(graph.start, reference)[0]
    for parameter, own in expected.items():
        torch.testing.assert_close(updated[parameter], own, rtol=1e-9, atol=1e-9)


def _many(rows: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Subjects (90) by items (7) with slopes, so that a level is chosen without being told to."""
    generator = torch.Generator().manual_seed(0)
    subject, item = torch.randint(90, (rows,), generator=generator), torch.randint(7, (rows,), generator=generator)
    x, noise = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    b, c = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (90, 7))
    return x, subject, item, 1 + b[subject] + 0.5 * x + c[item] + 0.5 * noise


def test_rows_of_the_same_elements_are_one_cell() -> None:
    x, subject, item, y = _many()
    plan = pyro_em.plan(linear_mixed.crossed, subject, item, y)
    cells = len({(int(a), int(c)) for a, c in zip(subject, item, strict=True)})
    assert cells < len(y)
    assert f"rows pooled to {cells} cells" in plan.engine
    assert "90 blocks of 1, then 7 entries together" in plan.engine
    slopes = pyro_em.plan(linear_mixed.crossed_slopes, x, subject, item, y)
    assert "90 blocks of 2, then 7 entries together" in slopes.engine


def test_schools_are_eliminated_after_their_classes() -> None:
    outer, inner, y = linear_mixed.simulate_nested(80, 4, 960)
    plan = pyro_em.plan(linear_mixed.nested, outer, inner, y)
    assert "320 blocks of 1, then 80 blocks of 1" in plan.engine


@pytest.mark.parametrize("model", ["crossed", "crossed_slopes", "nested"])
def test_fits_are_those_of_the_interpreted_path(model: str) -> None:
    """Iterate by iterate over a whole fit, designs of several levels."""
    x, *rest = _many()
    args = {
        "crossed": tuple(rest), "crossed_slopes": (x, *rest), "nested": linear_mixed.simulate_nested(30, 4, 240)
    }[model]  # fmt: skip
    bound = bind(getattr(linear_mixed, model), args, {}, with_prior=False)
    m, engine, reference = (
        MStep(bound, "auto", "em"),
        choose_engine(bound, MStep(bound, "auto", "em")),
        Interpreted(bound),
    )
    assert isinstance(engine, Pooled)
    params = other = bound.start
    for _ in range(8):
        found, expected = engine.e_step(params), reference.e_step(other)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
        params, other = m.update(params, found)[0], m.update(other, expected)[0]
        for name, value in other.items():
            torch.testing.assert_close(params[name], value, rtol=1e-11, atol=1e-12)


def test_rows_that_are_masked_count_nothing() -> None:
    _, subject, item, y = _many()
    known = torch.arange(len(y)) % 5 > 0

    def model(keep: Tensor) -> None:
        mean, scale = (
            pyro.param("mean", torch.zeros(())),
            pyro.param("scale", torch.ones(3), constraint=constraints.positive),
        )
        with pyro.plate("subjects", 90):
            a = pyro.sample("a", dist.Normal(0.0, scale[0]))
        with pyro.plate("items", 7):
            c = pyro.sample("c", dist.Normal(0.0, scale[1]))
        own = slice(None) if keep.numel() > 1 else known
        with pyro.plate("rows", len(y[own])), pyro.poutine.mask(mask=keep):
            pyro.sample("y", dist.Normal(mean + a[subject[own]] + c[item[own]], scale[2]), obs=y[own])

    found = [pyro_em.fit(model, keep, max_iter=6, tol=0) for keep in (known, torch.tensor(True))]
    assert all(result.plan.engine.startswith("pooled") for result in found)
    assert found[0].log_likelihood == pytest.approx(found[1].log_likelihood, rel=1e-12)
    for name, value in found[1].params.items():
        torch.testing.assert_close(found[0].params[name], value, rtol=1e-11, atol=1e-12)


def test_a_factor_without_effect_ends_at_no_variance() -> None:
    """Items that differ less than chance would have it: their variance is 0, which the engine can be asked for."""
    _, subject, item, y = _many()
    means = torch.zeros(7, dtype=torch.float64).index_add(0, item, y) / torch.bincount(item)
    with pytest.warns(pyro_em.BoundaryEstimate, match="'second'"):
        result = pyro_em.fit(linear_mixed.crossed, subject, item, y - means[item], accelerate="anderson")
    assert result.plan.engine.startswith("pooled")
    without = pyro_em.fit(linear_mixed.model, subject, y - means[item], accelerate="anderson")
    assert result.log_likelihood == pytest.approx(without.log_likelihood, abs=1e-3)
