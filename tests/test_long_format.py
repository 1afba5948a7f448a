"""Discrete latents read by an index from rows of another plate (`z[group]`), beside the laws over zoo_long.py.

Oracles: the same model in wide form (a padded table with a mask), and enumeration of every assignment in plain Pyro.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

import pyro_em
from models import dawid_skene
from pyro_em.e_step.plated import compile_plated
from pyro_em.e_step.product import Prepared
from pyro_em.problem import bind
from tests import zoo_long
from tests.classics import positive, simplex
from tests.oracles import enumerate_model
from tests.problems import BY_NAME


def _rows(G: int, longest: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Group, time and value of each row, groups of 1 to `longest` rows in no order."""
    rng = torch.Generator().manual_seed(seed)
    group = torch.arange(G).repeat_interleave(torch.randint(1, longest + 1, (G,), generator=rng))
    group = group[torch.randperm(len(group), generator=rng)]
    t = torch.randint(0, 4, (len(group),), generator=rng).double()
    classes = torch.randint(0, 2, (G,), generator=rng)[group]
    lines = torch.tensor([-1.0, 1.0])[classes] + torch.tensor([0.4, -0.2])[classes] * t
    return group, t, lines + 0.8 * torch.randn(len(group), generator=rng)


def _wide(group: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Columns as tables (G, longest), and which of their cells are rows."""
    count = torch.bincount(group)
    order = torch.argsort(group, stable=True)
    place = torch.cat([torch.arange(int(n)) for n in count])
    tables = [torch.zeros(len(count), int(count.max())) for _ in range(len(columns) + 1)]
    for table, column in zip(tables, (*columns, torch.ones(len(group))), strict=True):
        table[group[order], place] = column[order]
    return (*tables[:-1], tables[-1].bool())


def growth_wide(t: Tensor, y: Tensor, seen: Tensor, K: int = 2) -> None:
    w = pyro.param("w", torch.ones(K) / K, constraint=simplex)
    a, b = pyro.param("a", torch.zeros(K)), pyro.param("b", torch.zeros(K))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("groups", len(y), dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("times", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(a[z] + b[z] * t, sd).mask(seen), obs=y)


START = {"w": [0.4, 0.6], "a": [-0.5, 0.5], "b": [0.1, 0.0], "sd": 1.0}


def _start() -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in START.items()}


def test_long_is_wide() -> None:
    """Update by update, to rounding, over 60 groups of unequal lengths; also their log-likelihoods and posteriors."""
    group, t, y = _rows(60, 6)
    long = pyro_em.fit(zoo_long.growth_classes, group, t, y, 60, init=_start(), max_iter=8, tol=0)
    table = _wide(group, t, y)
    wide = pyro_em.fit(growth_wide, *table, init=_start(), max_iter=8, tol=0)
    for name, value in wide.params.items():
        torch.testing.assert_close(long.params[name], value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.tensor(long.history["score"]), torch.tensor(wide.history["score"]), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(long.log_prob(), wide.log_prob().reshape(-1), rtol=1e-10, atol=1e-10)
    own, other = long.posterior(), wide.posterior()
    assert own.marginal("z").probs.shape == (60, 2)
    torch.testing.assert_close(own.marginal("z").probs, other.marginal("z").probs.reshape(60, 2), rtol=1e-9, atol=1e-12)
    assert own.entropy() == pytest.approx(other.entropy(), rel=1e-9)
    assert torch.equal(own.mode()["z"], other.mode()["z"].reshape(-1))
    assert (long.bic, long.icl) == (pytest.approx(wide.bic, rel=1e-10), pytest.approx(wide.icl, rel=1e-9))
    errors, others = long.standard_errors(), wide.standard_errors()
    for name in errors:
        torch.testing.assert_close(errors[name], others[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["counts_in_rows", "levels_weighted", "vectors_in_rows", "levels_map"])
def test_statistics_are_summed_to_groups(name: str) -> None:
    """Log-densities from the sums are those of the rows, by the product and around the means of groups alike."""
    problem = BY_NAME[name]
    weights = {} if problem.weights is None else {"groups": problem.weights}
    bound = bind(problem.model, problem.args, {}, with_prior=problem.priors, weights=weights)
    engine, start = compile_plated(bound), problem.start()
    found, rows = engine.spot_check(start)
    assert found == pytest.approx(rows, rel=1e-13)
    (program,) = engine.programs
    arguments = engine._arguments(start).arguments
    by_product = program.product.log_joint([Prepared(program._coefficients(arguments, ()))])
    around = program.product.log_joint([program.prepared(arguments, torch.ones(()))])
    torch.testing.assert_close(by_product, around, rtol=1e-12, atol=1e-12)
    assert "summed to their groups" in engine.reason


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
def test_the_published_raters_in_long_format() -> None:
    """Dawid and Skene (1979), rows as in the file: the table's fit update by update, and the published solution."""
    long = pyro_em.fit(dawid_skene.rows, *dawid_skene.load_rows())
    table = pyro_em.fit(dawid_skene.model, *dawid_skene.load())
    assert long.converged and long.num_iterations == table.num_iterations
    assert long.log_likelihood == pytest.approx(table.log_likelihood, rel=1e-12)
    assert long.log_likelihood == pytest.approx(-190.730997, abs=1e-3)
    for name, value in table.params.items():
        torch.testing.assert_close(long.params[name], value, rtol=1e-7, atol=1e-9)
    own, other = (result.posterior().marginal("z").probs for result in (long, table))
    torch.testing.assert_close(own, other.reshape(own.shape), rtol=1e-7, atol=1e-9)
    published = torch.tensor([0.40, 0.42, 0.11, 0.07])  # their table 2, class marginals to two digits
    torch.testing.assert_close(long.params["prevalence"], published, rtol=0, atol=0.005)


def test_the_plan_says_so() -> None:
    group, t, y = _rows(9, 4)
    plan = str(pyro_em.plan(zoo_long.growth_classes, group, t, y, 9))
    assert "2 states x 9 elements, read by an index from the rows of 'y' (long format)" in plan
    assert "E-steps run predicted" in plan


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "position": lambda z, group: z[group],
    "last dim": lambda z, group: z[..., group],
    "index_select": lambda z, group: torch.index_select(z, 0, group),
    "gather": lambda z, group: z.gather(-1, group),
    "Vindex": lambda z, group: Vindex(z)[..., group],
    "one-hot": lambda z, group: (torch.nn.functional.one_hot(group).double() @ z.double()).long(),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_way_to_index(form: str) -> None:
    group, _, y = _rows(5, 4, 1)

    def model(group: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-0.5, 0.7]))
        with pyro.plate("groups", 5):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc[FORMS[form](z, group)], 1.0), obs=y)

    result = pyro_em.fit(model, group, y, max_iter=2, tol=0)
    truth = enumerate_model(model, (group, y), result.params)
    assert result.log_likelihood == pytest.approx(float(truth.log_evidence), rel=1e-12)
    torch.testing.assert_close(result.posterior().marginal("z").probs, truth.marginal("z"), rtol=1e-9, atol=1e-12)


def multilevel(school: Tensor, pupil: Tensor, y: Tensor) -> None:
    """Classes of pupils within classes of schools (Vermunt 2003); rows read the pupil."""
    pi = pyro.param("pi", torch.tensor([0.4, 0.6]), constraint=simplex)
    A = pyro.param("A", torch.tensor([[0.7, 0.3], [0.25, 0.75]]), constraint=simplex)
    loc = pyro.param("loc", torch.tensor([-0.5, 0.7]))
    with pyro.plate("schools", 3):
        u = pyro.sample("u", dist.Categorical(pi))
    with pyro.plate("pupils", len(school)):
        w = pyro.sample("w", dist.Categorical(A[u[school]]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc[w[pupil]], 1.0), obs=y)


def both_levels(school: Tensor, pupil: Tensor, y: Tensor) -> None:
    """The rows read both; that pupils are nested in schools is known from the rows alone."""
    table = pyro.param("table", torch.tensor([[-0.9, 0.2], [0.1, 1.3]]))
    with pyro.plate("schools", 3):
        u = pyro.sample("u", dist.Categorical(torch.tensor([0.4, 0.6])))
    with pyro.plate("pupils", len(school)):
        w = pyro.sample("w", dist.Categorical(torch.tensor([0.3, 0.7])))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(table[u[school[pupil]], w[pupil]], 1.0), obs=y)


@pytest.mark.parametrize("model", [multilevel, both_levels], ids=lambda m: m.__name__)
def test_nested_groups(model: Callable[..., None]) -> None:
    school, pupil = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 0, 3, 1])
    y = torch.randn(12, generator=torch.Generator().manual_seed(3)) + torch.tensor([0.0, 2, 0, 3, -2])[pupil]
    result = pyro_em.fit(model, school, pupil, y, max_iter=3, tol=0)
    truth, posterior = enumerate_model(model, (school, pupil, y), result.params), result.posterior()
    assert result.log_likelihood == pytest.approx(float(truth.log_evidence), rel=1e-12)
    for site in ("u", "w"):
        torch.testing.assert_close(posterior.marginal(site).probs, truth.marginal(site), rtol=1e-9, atol=1e-12)
    assert {n: v.tolist() for n, v in posterior.mode().items()} == {n: v.tolist() for n, v in truth.mode()[1].items()}
    assert posterior.entropy() == pytest.approx(truth.entropy(), rel=1e-9)
    drawn = posterior.sample(2000)["w"].double().mean(0)
    torch.testing.assert_close(drawn, truth.marginal("w")[:, 1], rtol=0, atol=0.05)
    assert result.log_prob().shape == (3,)


def test_a_latent_in_two_plates_and_groups_without_rows() -> None:
    """z[site, month] of a grid of latents; some cells of it have no row, one row of each argument has no effect."""
    place, month = torch.tensor([0, 0, 1, 2, 2, 0]), torch.tensor([0, 1, 1, 0, 0, 1])
    x, y = torch.tensor([0.0, 1, 1, 2, 1, 1]), torch.tensor([0.3, 1.2, -0.7, 2.5, 1.1, 0.8])

    def model(place: Tensor, month: Tensor, x: Tensor, y: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor([-0.5, 0.9]))
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
        with pyro.plate("places", 3, dim=-2), pyro.plate("months", 2, dim=-1):
            z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(slope[z[..., place, month]] * x, 1.0), obs=y)

    result = pyro_em.fit(model, place, month, x, y, max_iter=1, tol=0)
    truth = enumerate_model(
        model, (place, month, x, y), {n: torch.tensor(v) for n, v in {"slope": [-0.5, 0.9], "w": [0.4, 0.6]}.items()}
    )
    seen = truth.marginal("z")[place, month].unique(dim=0)  # of the cells with rows: the others do not count
    assert len(seen) == 4
    torch.testing.assert_close(result.params["w"], seen.mean(0), rtol=1e-10, atol=1e-12)
    truth = enumerate_model(model, (place, month, x, y), result.params)
    assert result.log_likelihood == pytest.approx(float(truth.log_evidence), rel=1e-12)
    torch.testing.assert_close(result.posterior().marginal("z").probs, truth.marginal("z"), rtol=1e-9, atol=1e-12)
    own = result.log_prob()  # a row that reads no state counts in its own group
    assert float(own.sum()) == pytest.approx(result.log_likelihood, rel=1e-12)
    alone = dist.Normal(0.0, 1.0).log_prob(y[0])
    assert float(own[0, 0]) == pytest.approx(float(alone), rel=1e-12)


def test_results_in_long_format() -> None:
    group, t, y = _rows(8, 4, 2)
    y = y.clone()
    y[3] = torch.nan
    result = pyro_em.fit(zoo_long.growth_classes, group, t, y, 8, init=_start(), max_iter=5, tol=0, missing="nan")
    a, b = result.params["a"], result.params["b"]
    q = result.posterior().marginal("z").probs
    means = a[:, None] + b[:, None] * t  # (K, N)
    imputed = result.impute()["y"]
    assert float(imputed.mean[3]) == pytest.approx(float(q[group[3]] @ means[:, 3]), rel=1e-10)
    spread = q[group[3]] @ (means[:, 3] - imputed.mean[3]) ** 2 + result.params["sd"] ** 2
    assert float(imputed.variance[3]) == pytest.approx(float(spread), rel=1e-10)
    draws = result.predictive(num_samples=3, seed=0)
    assert draws["z"].shape == (3, 8) and draws["y"].shape == (3, len(y))
    data: Any = result.to_inference_data(num_draws=20, latent_draws=7)
    assert dict(data["latent_posterior"].sizes).get("groups") == 8, data["latent_posterior"]
    assert dict(data["log_likelihood"].sizes).get("groups") == 8
