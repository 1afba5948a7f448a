"""The plated engine (e_step/plated.py) equals the reference; what it collapses, evaluates directly, and declines."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.plated import Plated, compile_plated
from pyro_em.errors import NonFiniteError
from pyro_em.m_step.auto import MStep
from pyro_em.problem import Problem, bind
from tests.problems import PROBLEMS
from tests.problems import Problem as Case

SERVED = [
    case
    for case in PROBLEMS
    if case.name
    in {
        "gmm_full",
        "gmm_diagonal",
        "gmm_spherical",
        "gmm_isotropic",
        "gmm_tied",
        "gmm_scale_tril",
        "transformed",
        "gmm_precision",
        "shared_mean",
        "poisson_mixture",
        "item_plate",
        "latent_class_counts",
        "blood_group",
        "coins",
        "exponential_mixture",
        "geometric_mixture",
        "lognormal_mixture",
        "multinomial_mixture",
        "zero_inflated_poisson",
        "one_hot_mixture",
        "factorial",
        "dawid_skene",
        "module_mixture",
        "coins_map",
        "gmm_map",
        "poisson_map",
        "latent_class_map",
        "label_as_site",
        "heavy_prior_map",
        "angle_mixture",
        "counts_in_rows",
        "levels_weighted",
        "vectors_in_rows",
        "levels_map",
    }
]


def _bound(case: Case) -> Problem:
    weights = {} if case.weights is None else {case.plate: case.weights}
    return bind(case.model, case.args, {}, with_prior=case.priors, weights=weights)


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_chosen_by_structure(case: Case) -> None:
    problem = _bound(case)
    engine = choose_engine(problem, MStep(problem, "auto", "map-em" if case.priors else "em"))
    assert isinstance(engine, Plated) == (case in SERVED), engine.reason


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_equals_the_reference(case: Case) -> None:
    problem = _bound(case)
    algorithm = "map-em" if case.priors else "em"
    functions = MStep(problem, "auto", algorithm).reads.functions
    plated, reference = Plated(problem, functions), Interpreted(problem)
    params = {**problem.start, **case.start()}
    for _ in range(3):
        found, expected = plated.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12, abs=1e-12)
        assert found.log_prior == pytest.approx(expected.log_prior, rel=1e-12, abs=1e-12)
        ours, _ = MStep(problem, "auto", algorithm).update(params, found)
        theirs, _ = MStep(problem, "auto", algorithm).update(params, expected)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-12)
        params = ours


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_spot_check_agrees(case: Case) -> None:
    problem = _bound(case)
    functions = MStep(problem, "auto", "map-em" if case.priors else "em").reads.functions
    found, reference = Plated(problem, functions).spot_check({**problem.start, **case.start()})
    assert found == pytest.approx(reference, rel=1e-12)


def _mixture(x: Tensor, start: Tensor, scale: float = 1.0) -> None:
    w = pyro.param("w", torch.full((2,), 0.5), constraint=constraints.simplex)
    loc = pyro.param("loc", start)
    sd = pyro.param("sd", torch.full((2,), scale), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(loc[z], sd[z]), obs=x)


def _counts(x: Tensor) -> None:
    w = pyro.param("w", torch.full((2,), 0.5), constraint=constraints.simplex)
    rate = pyro.param("rate", torch.tensor([1.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


def test_equal_rows_are_collapsed() -> None:
    x = torch.poisson(torch.full((2000,), 2.0))
    problem = bind(_counts, (x,), {}, with_prior=False)
    engine = Plated(problem)
    assert engine.programs[0].product.features.num_rows == len(x.unique())
    expected = Interpreted(problem).e_step(problem.start)
    assert engine.e_step(problem.start).log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-13)


def test_weights_count_collapsed_rows() -> None:
    x = torch.poisson(torch.full((500,), 2.0))
    weights = {"data": torch.rand(500)}
    problem = bind(_counts, (x,), {}, with_prior=False, weights=weights)
    expected = Interpreted(problem).e_step(problem.start)
    assert Plated(problem).e_step(problem.start).log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-13)


def test_distant_narrow_components_keep_their_digits() -> None:
    """Components 1e6 of their standard deviations from the centre: η·x - A alone would lose 12 digits."""
    offsets = torch.tensor([-1.0, 1.0])
    x = torch.cat([o + 1e-6 * torch.randn(40) for o in offsets])
    problem = bind(_mixture, (x, offsets.clone(), 1e-6), {}, with_prior=False)
    found = Plated(problem).e_step(problem.start).log_likelihood
    expected = Interpreted(problem).e_step(problem.start).log_likelihood
    assert found == pytest.approx(expected, rel=1e-13)


def test_memory_is_bounded_by_the_chunk() -> None:
    x = torch.randn(400_000)
    engine = Plated(bind(_mixture, (x, torch.tensor([-1.0, 1.0])), {}, with_prior=False))
    features = engine.programs[0].product.features
    chunks = [phi for _, phi in features.chunks()]
    assert sum(phi.shape[1] for phi in chunks) == 400_000 and len(chunks) == engine.programs[0].product.num_chunks > 1
    assert all(phi.is_contiguous() and phi.numel() * 8 <= 4_600_000 for phi in chunks)


def test_an_impossible_row_is_named() -> None:
    x = torch.tensor([0.0, 3.0, 1.0])

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.full((2,), 0.5), constraint=constraints.simplex)
        rate = pyro.param("rate", torch.tensor([1.0, 2.0]), constraint=constraints.nonnegative)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Poisson(rate[z]), obs=x)

    problem = bind(model, (x,), {}, with_prior=False)
    with pytest.raises(NonFiniteError, match=r"rows 1, 2 of plate \['data'\]"):
        Plated(problem).e_step({**problem.start, "rate": torch.zeros(2)})


def test_declines_arguments_that_vary_along_the_rows() -> None:
    x, noise = torch.randn(20), torch.rand(20) + 0.5

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.full((2,), 0.5), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(loc[z], noise), obs=x)

    with pytest.raises(NotCompiled, match="'scale' of site 'x' varies along plate 'data'"):
        compile_plated(bind(model, (x,), {}, with_prior=False))


def test_the_plan_names_the_engine() -> None:
    x = torch.randn(30)
    assert "plated" in str(pyro_em.plan(_mixture, x, torch.tensor([-1.0, 1.0])))


def _no_latents(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)


def _loop(x: Tensor) -> None:
    table, z = pyro.param("table", torch.full((2, 2), 0.5), constraint=constraints.simplex), 0
    for t in pyro_em.markov(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(table[z]))
        pyro.sample(f"x_{t}", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x[t])


def _nonlinear(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor([0.3, 0.7]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(torch.sin(a[z]) + a[0] * a[1], 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(_no_latents, "no latents"), (_loop, "pyro_em.markov"), (_nonlinear, "'a' enters 'x.loc'")],
)
def test_what_it_declines(model: Any, reason: str) -> None:
    with pytest.raises(NotCompiled, match=reason):
        compile_plated(bind(model, (torch.linspace(-1, 1, 6),), {}, with_prior=False))
