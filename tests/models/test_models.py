"""The models by themselves, in plain Pyro: they stand alone, simulate, trace, and start well.

`TABLE` lists every model function of every file with the data it is run on, and a test fails for one that
is not in it. Nothing of `pyro_em` is used. What the models score is checked in `test_likelihoods.py`.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from tests.models.table import (
    BY_INDEX,
    CONTINUOUS,
    FILES,
    FOLDER,
    TABLE,
    arguments,
    each_case,
    each_file,
    module,
    no_guide,
)


def test_every_model_function_is_listed() -> None:
    listed = {(file, function) for file, function, _ in TABLE}
    found = {
        (file, name)
        for file in FILES
        for name, value in vars(module(file)).items()
        if inspect.isroutine(value)
        and value.__module__ == f"models.{file}"
        and not name.startswith(("_", "load", "simulate", "guide"))
    }
    assert listed == found


@each_file
def test_imports_are_pyro_torch_numpy_and_the_standard_library(file: str) -> None:
    tree = ast.parse((FOLDER / f"{file}.py").read_text())
    in_load = {node for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "load" for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import does not survive `pyro-em fit path:model`"
            names = [node.module or ""]
        else:
            continue
        # scikit-learn carries the digits: it may be imported where they are loaded, and nowhere else.
        allowed = {"pyro", "torch", "numpy", *sys.stdlib_module_names} | ({"sklearn"} if node in in_load else set())
        assert {name.split(".")[0] for name in names} <= allowed


@each_file
def test_no_model_asks_for_enumeration(file: str) -> None:
    tree = ast.parse((FOLDER / f"{file}.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "infer"]


@each_file
def test_simulate_depends_on_its_seed_only(file: str) -> None:
    simulate = module(file).simulate
    state = torch.get_rng_state()
    first, again, other = (arguments(simulate(seed=seed)) for seed in (0, 0, 1))
    assert all(_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not _equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def _equal(a: Tensor, b: Tensor) -> bool:
    """NaN marks a missing cell."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_every_data_file_is_described() -> None:
    described = (FOLDER / "data" / "README.md").read_text()
    assert not [path.name for path in (FOLDER / "data").glob("*.csv") if f"`{path.name}`" not in described]


@each_case
def test_log_joint_and_its_gradient_are_finite(
    file: str, function: str, data: Callable[[], tuple[Tensor, ...]]
) -> None:
    model, args = getattr(module(file), function), data()
    if file == "vae":
        loss = Trace_ELBO().differentiable_loss(model, module(file).guide, *args)
    elif (file, function) in BY_INDEX:
        loss = Trace_ELBO().differentiable_loss(model, poutine.block(model, expose=["z", "prevalence"]), *args)
    else:
        discrete = ("k", "x") if file in CONTINUOUS else ("x", "z")
        guide = AutoDelta(poutine.block(model, hide_fn=lambda site: site["name"] in discrete))
        elbo = TraceEnum_ELBO(max_plate_nesting=2, strict_enumeration_warning=False)
        chosen = guide if function == "bayesian" or file in CONTINUOUS else no_guide
        loss = elbo.differentiable_loss(config_enumerate(model), chosen, *args)
    loss.backward()
    parameters = dict(pyro.get_param_store().named_parameters())
    assert loss.isfinite() and parameters
    for name, value in parameters.items():
        assert value.dtype == torch.float64, name
        assert value.grad is not None and value.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("file", "function", "data"),
    # The other parameters are sample sites, or those of a network which the file seeds itself; a run of a model with
    # continuous latents draws these.
    [c for c in TABLE if c[1] != "bayesian" and c[0] not in ("vae", *CONTINUOUS) and c[:2] not in BY_INDEX],
)
def test_start_is_the_same_each_time_and_leaves_the_generator_alone(
    file: str, function: str, data: Callable[[], tuple[Tensor, ...]]
) -> None:
    model, args = config_enumerate(getattr(module(file), function)), data()
    starts = []
    for _ in range(2):
        pyro.clear_param_store()
        state = torch.get_rng_state()
        TraceEnum_ELBO(max_plate_nesting=2, strict_enumeration_warning=False).loss(model, no_guide, *args)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append({name: value.detach().clone() for name, value in pyro.get_param_store().items()})
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_vae_learns_from_its_simulation() -> None:
    file = module("vae")
    data, network = file.simulate(), file.VAE()
    svi = SVI(network.model, network.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(300)]
    # Independent pixels of the right frequencies are the best that can be said without a latent.
    rate = data.mean(0)
    without_latent = -torch.distributions.Bernoulli(rate).log_prob(data).sum().item()
    assert np.mean(losses[-20:]) < 0.75 * without_latent < losses[0]


def test_vaes_of_one_seed_are_equal() -> None:
    file = module("vae")
    state = torch.get_rng_state()
    first, again, other = (file.VAE(seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
