"""The same fits on a CUDA device, where there is one: equal to those on the CPU, by the rounding of another device.

`test_device.py` holds the package to the devices of its tensors without the hardware; here it meets it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import pyro_em
from models import gmm
from tests.latent_problems import BY_NAME as LATENT_BY_NAME
from tests.latent_problems import LATENT_PROBLEMS
from tests.problems import BY_NAME, PROBLEMS
from tests.test_device import MODELS, _fit, _moved

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.EMWarning")
CUDA = torch.device("cuda:0")
DIGITS = {"rtol": 1e-7, "atol": 1e-9}


def _assert_equal(found: Any, expected: Any) -> None:
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-10, abs=1e-8)
    for name, value in found.params.items():
        assert value.device == CUDA
        torch.testing.assert_close(value.cpu(), expected.params[name], **DIGITS)


@pytest.mark.parametrize("name", [problem.name for problem in PROBLEMS])
def test_problems(name: str) -> None:
    expected, found = (_fit(BY_NAME[name], 3, device) for device in (torch.device("cpu"), CUDA))
    _assert_equal(found, expected)
    rows, errors = found.log_prob(), found.standard_errors()
    assert rows.device == CUDA
    torch.testing.assert_close(rows.cpu(), expected.log_prob(), rtol=1e-8, atol=1e-8)
    for site, value in expected.standard_errors().items():
        torch.testing.assert_close(errors[site].cpu(), value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [problem.name for problem in LATENT_PROBLEMS])
def test_continuous_latents(name: str) -> None:
    own = LATENT_BY_NAME[name]

    def fit(device: torch.device) -> Any:
        args, start, options = (_moved(x, device) for x in (own.args, own.start(), own.options))
        return pyro_em.fit(own.model, *args, init=start, algorithm=own.algorithm, max_iter=2, tol=0, **options)

    _assert_equal(fit(CUDA), fit(torch.device("cpu")))


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, load, options = MODELS[name]
    expected, found = (
        pyro_em.fit(model, *_moved(load(), device), max_iter=3, tol=0, **options)
        for device in (torch.device("cpu"), CUDA)
    )
    _assert_equal(found, expected)


@pytest.mark.parametrize("name", ["gmm_full", "categorical_hmm", "latent_class_map"])
def test_replayed_updates(name: str) -> None:
    expected, found = (_fit(BY_NAME[name], 24, device) for device in (torch.device("cpu"), CUDA))
    _assert_equal(found, expected)


@pytest.mark.parametrize("algorithm", ["em", "map-em", "gem", "cem", "sem", "svi"])
def test_algorithms(algorithm: str) -> None:
    """Every flag runs to its end on the device of the data."""
    result = pyro_em.fit(gmm.bayesian, gmm.load().to(CUDA), algorithm=algorithm, seed=0, max_iter=20, tol=0)
    assert all(value.device == CUDA for value in result.params.values())


def test_large() -> None:
    """Rows in many chunks, restarts side by side, float32 first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 5, generator=generator) + 4 * torch.randint(3, (200_000, 1), generator=generator)

    def fit(device: torch.device, **options: Any) -> Any:
        return pyro_em.fit(gmm.model, x.to(device), 3, restarts=3, seed=0, max_iter=30, **options)

    expected = fit(torch.device("cpu"))
    _assert_equal(fit(CUDA), expected)
    assert fit(CUDA, precision="mixed").log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-6)


def test_results(tmp_path: Path) -> None:
    """Posterior readings, predictions, files and tables."""
    problem = BY_NAME["gmm_full"]

    def all_of(device: torch.device) -> list[Any]:
        args = _moved(problem.args, device)
        result = pyro_em.fit(problem.model, *args, restarts=3, seed=0, max_iter=5, tol=0)
        posterior = result.posterior(*args)
        result.save(tmp_path / f"{device.type}.nc")
        values = [
            posterior.responsibilities("z"), posterior.mode()["z"], posterior.entropy(), result.log_prob(*args),
            pyro_em.load(tmp_path / f"{device.type}.nc").params,
        ]  # fmt: skip
        assert posterior.sample(3)["z"].device == args[0].device
        assert result.predictive(num_samples=2)
        assert result.to_inference_data()
        return tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, values)

    for found, expected in zip(all_of(CUDA), all_of(torch.device("cpu")), strict=True):
        torch.testing.assert_close(found, expected, **DIGITS)


def test_wide_solves() -> None:
    """More rows than a CUDA grid has blocks for: PyTorch's own triangular solve returns other numbers."""
    x = torch.randn(600_000, 2, generator=torch.Generator().manual_seed(0))
    expected = pyro_em.fit(gmm.tied, x, 2, max_iter=2, tol=0)
    found = pyro_em.fit(gmm.tied, x.to(CUDA), 2, max_iter=2, tol=0)
    _assert_equal(found, expected)
    torch.testing.assert_close(found.log_prob().cpu(), expected.log_prob(), rtol=1e-9, atol=1e-9)
