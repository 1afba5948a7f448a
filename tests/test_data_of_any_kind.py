"""Data of other dtypes, strides and graphs than usual: the fit is the usual one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyro_em
from tests import classics
from tests.test_bad_input import Y, _fit, _same

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
CLASSES = {"w": [0.4, 0.6], "P": [[0.2, 0.3, 0.4], [0.6, 0.7, 0.5]]}
COUNTS = [1, 2, 3, 0, 5, 7, 8, 1]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_counts_of_any_dtype(dtype: torch.dtype) -> None:
    found = _fit(torch.tensor(COUNTS).to(dtype), classics.poisson_mixture)
    assert found.log_likelihood == pytest.approx(
        _fit(torch.tensor(COUNTS, dtype=torch.float64), classics.poisson_mixture).log_likelihood, rel=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_promoted_before_anything_is_squared(dtype: torch.dtype) -> None:
    half = (100 + Y).to(dtype)
    assert _same(_fit(half), _fit(half.double()))
    late = pyro_em.fit(classics.normal_mixture, 100 + Y, max_iter=0).log_prob(half)
    torch.testing.assert_close(late, pyro_em.fit(classics.normal_mixture, 100 + Y, max_iter=0).log_prob(half.double()))


def test_flags_are_zeros_and_ones() -> None:
    flags = torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    assert _same(
        _fit(flags, classics.latent_class, init=CLASSES), _fit(flags.double(), classics.latent_class, init=CLASSES)
    )


def _read_only(y: Tensor) -> Tensor:
    array = y.numpy().copy()
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it could be written to: it is not
        return torch.from_numpy(array)


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda y: torch.stack([y, -y], 1)[:, 0],
    "reversed": lambda y: y.flip(0).flip(0),
    "read-only": _read_only,
    "with gradients": lambda y: y.clone().requires_grad_(),
    "inside of a graph": lambda y: (2 * y.clone().requires_grad_()) / 2,
}


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("algorithm", ["em", "gem", "svi"])
def test_memory_of_any_kind(kind: str, algorithm: str) -> None:
    data = MEMORY[kind](Y)
    found = _fit(data, algorithm=algorithm, seed=0)
    assert _same(found, _fit(Y, algorithm=algorithm, seed=0))
    assert not any(value.requires_grad for value in found.params.values())
    assert not data.is_leaf or data.grad is None


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")  # equal rows are best explained by certain answers
def test_expanded_data_are_repeats() -> None:
    """Stride 0 along the rows."""
    rows = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    shared = _fit(rows.unsqueeze(1).expand(2, 4, 3)[0], classics.latent_class, init=CLASSES, max_iter=2)
    assert _same(shared, _fit(rows[:1].repeat(4, 1), classics.latent_class, init=CLASSES, max_iter=2))
