"""Every test starts alike: float64, an empty param store, a fixed seed, one thread, Pyro's validation on."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

from pyro_em import evaluator


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Give each test the same state, and hand the default dtype and the param store back unchanged."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    try:
        with pyro.validation_enabled(True):
            yield
    finally:
        pyro.clear_param_store()
        torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def _recorded_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of a few updates see replays too, which alone would not make up for a recording."""
    monkeypatch.setattr(evaluator, "PAYS", 0)
