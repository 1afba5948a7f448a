"""CUDA by the device of the data: the same code, which forgets no tensor on the CPU.

Without the hardware, on a device that is emulated (emulated.py): the results there are those of the CPU bit for bit.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import pyro_em
import pyro_em.device as device_module
from models import glmm, gmm, mvn_missing, overdispersed, state_space
from pyro_em import products
from pyro_em.evidence import banded
from tests import zoo_quadrature
from tests.emulated import emulated_device
from tests.latent_problems import BY_NAME as LATENT_BY_NAME
from tests.latent_problems import LATENT_PROBLEMS
from tests.problems import BY_NAME, PROBLEMS, SHORT, Problem

pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.EMWarning")


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, torch.nn.Module):  # a model with parameters of its own is moved by its user
        return copy.deepcopy(x).to(device)
    return tree_map(lambda y: y.to(device) if isinstance(y, torch.Tensor) else y, x)


def _fit(problem: Problem, max_iter: int, device: torch.device) -> Any:
    options = problem.fit_options("map-em" if problem.priors else "em")
    given = (problem.model, problem.args, problem.start(), options)
    model, args, start, options = (_moved(x, device) for x in given)
    pyro.clear_param_store()  # a module would go on from what another fit left there
    return pyro_em.fit(model, *args, init=start, max_iter=max_iter, tol=0, **options)


def _compare(problem: Problem, max_iter: int, rounds: bool) -> None:
    expected = _fit(problem, max_iter, torch.device("cpu"))
    pointwise, errors = expected.log_prob(), expected.standard_errors()
    with emulated_device() as device:
        found = _fit(problem, max_iter, device)
        rows, spread = found.log_prob(), found.standard_errors()
        assert all(x.device == device for x in (rows, *found.params.values(), *spread.values()))
        rows, params, spread = (tree_map(Tensor.cpu, x) for x in (rows, found.params, spread))
    digits = {"rtol": 1e-9, "atol": 1e-9} if rounds else {"rtol": 0, "atol": 0}
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=digits["rtol"], abs=0)
    torch.testing.assert_close(rows, pointwise, **digits)
    for values, others in ((params, expected.params), (spread, errors)):
        for name, value in values.items():
            torch.testing.assert_close(value, others[name], **digits)


@pytest.mark.parametrize("name", [problem.name for problem in PROBLEMS])
def test_problems(name: str) -> None:
    _compare(BY_NAME[name], 3, bool(BY_NAME[name].rounds))


@pytest.mark.parametrize("name", ["gmm_full", "categorical_hmm", "latent_class_map"])
def test_replayed_updates(name: str) -> None:
    _compare(BY_NAME[name], 24, bool(BY_NAME[name].rounds))


@pytest.mark.parametrize("name", [problem.name for problem in PROBLEMS if problem.rounds == SHORT])
def test_band_solves_are_why_some_problems_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, multiplied by PyTorch, the CPU has the numbers of the other device to the last bit."""
    monkeypatch.setattr(banded, "MOST", 0)
    monkeypatch.setattr(products, "_numpy_suits", lambda: False)
    _compare(BY_NAME[name], 3, rounds=False)


@pytest.mark.parametrize("name", [problem.name for problem in LATENT_PROBLEMS])
def test_continuous_latents(name: str) -> None:
    own = LATENT_BY_NAME[name]

    def fit(device: torch.device) -> Any:
        args, start, options = (_moved(x, device) for x in (own.args, own.start(), own.options))
        return pyro_em.fit(own.model, *args, init=start, algorithm=own.algorithm, max_iter=2, tol=0, **options)

    expected = fit(torch.device("cpu"))
    with emulated_device() as device:
        found = fit(device)
        params = {name: value.cpu() for name, value in found.params.items()}
    assert found.log_likelihood == expected.log_likelihood
    assert all(torch.equal(params[name], expected.params[name]) for name in params)


RULE = {"e_step": {"u": pyro_em.Quadrature(num_nodes=7, tolerance=1e-2)}}


def _groups(most: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (or shares, at most 9 counts over `most`), a covariate, four groups."""
    g = torch.arange(24) % 4
    counts = (torch.arange(24) * 7 % 10).double()
    y = counts if most == 1 else counts.clamp(min=0.5) / most
    return y, torch.linspace(-1, 1, 24), g


MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "state space": (state_space.local_level, lambda: (state_space.load(),), {}),
    "series side by side": (state_space.lds, lambda: (state_space.simulate(20, 3, num_observed=2),), {}),
    "quadrature": (glmm.model, glmm.load, {"e_step": {"b": pyro_em.Quadrature(num_nodes=7)}}),
    "classes beside quadrature": (zoo_quadrature.classes_of_groups, _groups, RULE),
    "inflated zeros beside it": (zoo_quadrature.inflated, _groups, RULE),
    "mean and precision beside it": (zoo_quadrature.shares, lambda: _groups(10.0), RULE),
    "missing cells": (mvn_missing.model, lambda: (mvn_missing.simulate(30, 3),), {"missing": "nan"}),
    "conjugate": (overdispersed.gamma_poisson, overdispersed.load, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, load, options = MODELS[name]
    expected = pyro_em.fit(model, *load(), max_iter=3, tol=0, **options)
    with emulated_device() as device:
        found = pyro_em.fit(model, *_moved(load(), device), max_iter=3, tol=0, **options)
        params = {name: value.cpu() for name, value in found.params.items()}
    assert found.log_likelihood == expected.log_likelihood
    assert all(torch.equal(params[name], expected.params[name]) for name in params)


def test_results(tmp_path: Path) -> None:
    """Drawn starts, posterior readings, predictions, files and tables."""
    problem = BY_NAME["gmm_full"]

    def all_of(device: torch.device) -> list[Any]:
        args = _moved(problem.args, device)
        result = pyro_em.fit(problem.model, *args, restarts=3, seed=0, max_iter=5, tol=0)
        posterior = result.posterior(*args)
        torch.manual_seed(3)  # draws of a posterior go on from the global state
        draws = pyro_em.fit(problem.model, *args, init="random", seed=1, max_iter=1, tol=0).params
        result.save(tmp_path / f"{device.type}.nc")
        loaded = pyro_em.load(tmp_path / f"{device.type}.nc")
        values = [
            posterior.responsibilities("z"), posterior.mode()["z"], posterior.sample(3)["z"], posterior.entropy(),
            result.log_prob(*args), result.icl, result.predictive(num_samples=2), draws, loaded.params,
        ]  # fmt: skip
        return [*(tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, values)), result.summary()]

    expected = all_of(torch.device("cpu"))
    with emulated_device() as device:
        found = all_of(device)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@pytest.mark.parametrize("estimated", [True, False])
def test_an_index_out_of_range_does_not_reach_the_device(estimated: bool) -> None:
    """The user's mistake is said as on the CPU, and not the end of the process's device: of a parameter in a sentence
    that names the row, of a table that is none by torch's IndexError."""

    def model(group: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        table = loc if estimated else torch.arange(3.0)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(table[group] + loc[0] * z, 1.0), obs=y)

    told, match = IndexError, "index 3 is out of bounds for "
    if estimated:
        told, match = pyro_em.InputError, "'loc' has 3 elements, 0 to 2, and is indexed by 3 in row 2 of the index"
    data = torch.tensor([0, 1, 3, 2]), torch.zeros(4)
    with pytest.raises(told, match=match):
        pyro_em.fit(model, *data)
    with emulated_device() as device, pytest.raises(told, match=match):
        pyro_em.fit(model, *(x.to(device) for x in data))


@pytest.mark.parametrize("algorithm", ["em", "map-em", "gem", "cem", "sem", "svi"])
def test_algorithms(algorithm: str) -> None:
    """Every flag gives the parameters of the CPU."""
    expected = pyro_em.fit(gmm.bayesian, gmm.load(), algorithm=algorithm, seed=0, max_iter=8, tol=0)
    with emulated_device() as device:
        found = pyro_em.fit(gmm.bayesian, gmm.load().to(device), algorithm=algorithm, seed=0, max_iter=8, tol=0)
        params = {name: value.cpu() for name, value in found.params.items()}
    assert all(torch.equal(params[name], expected.params[name]) for name in params)


@pytest.mark.parametrize("left", [True, False])
def test_wide_systems_are_solved_part_by_part(left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA solves them wrong; the gradient passes the same way."""
    monkeypatch.setattr(device_module, "WIDE", 4)
    generator = torch.Generator().manual_seed(0)
    matrix, right = torch.randn(2, 3, 3, generator=generator).tril() + 3 * torch.eye(3), torch.randn(2, 3, 11)
    right = right if left else right.mT

    def solved() -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in (matrix, right)]
        found = torch.linalg.solve_triangular(*inputs, upper=False, left=left)
        return found, *torch.autograd.grad((found**3).sum(), inputs)

    expected = solved()
    with emulated_device() as device, device_module.on_device(right.to(device)):
        found = solved()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_large_plate() -> None:
    """Rows drawn to be looked at, those of a spot check, products in place."""
    x = gmm.simulate(20_000, 3, 2)
    expected = pyro_em.fit(gmm.model, x, 3, max_iter=3, tol=0)
    with emulated_device() as device:
        found = pyro_em.fit(gmm.model, x.to(device), 3, max_iter=3, tol=0)
        params = {name: value.cpu() for name, value in found.params.items()}
    for name, value in expected.params.items():  # sums over larger chunks
        torch.testing.assert_close(params[name], value, rtol=1e-10, atol=1e-12)


def test_loops_are_folded_there_too() -> None:
    expected = pyro_em.plan(state_space.local_level, state_space.load())
    with emulated_device() as device:
        assert str(pyro_em.plan(state_space.local_level, state_space.load().to(device))) == str(expected)
