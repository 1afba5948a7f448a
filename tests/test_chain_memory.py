"""Chains in memory O(T·K): no E-step, and no fit around it, holds a table of pairs for every step.

The measure is how far the resident set rises, by Linux's own counters; a table of pairs is T·K² numbers.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import chains
from benchmarks.machine import peak_bytes
from pyro_em.evidence import chain
from pyro_em.evidence.chain import smooth

STEPS, STATES = 50_000, 24


def _table(steps: int) -> int:
    return 8 * steps * STATES**2


def _rise(call: Callable[[], Any]) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to serve the call
    found = peak_bytes(call)
    if found is None:
        pytest.skip("the system does not tell the peak of the resident set")
    return found


@pytest.mark.parametrize("states", [12, 48])
def test_a_fit_is_linear_in_states(states: int) -> None:
    """From the data to the result (tracing, updates, the check of the returned parameters): about a dozen numbers for
    each step and state, however many states there are. (Chains whose tables of pairs take less than 64 MiB are checked
    against the reference, which forms them.)"""
    chains.fit(chains.chain(500, 1, 4, features=2), 3)  # what is loaded and compiled once is no part of it
    problem = chains.chain(STEPS, 1, states, features=2)
    rises = (_rise(lambda: chains.fit(problem, 1)) for _ in range(3))  # what else the process takes only adds to them
    assert any(rise < 20 * 8 * STEPS * states for rise in rises)


@pytest.mark.parametrize(("lowest", "steps"), [(-600.0, STEPS), (float("inf"), 20_000)])
def test_smoothing_holds_none(lowest: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By scaled probabilities, and in log-space; sums of pairs included."""
    monkeypatch.setattr(chain, "LOWEST", lowest)
    generator = torch.Generator().manual_seed(0)
    unary = torch.randn(steps, 1, STATES, generator=generator)
    pair = torch.rand(1, 1, STATES, STATES, generator=generator).log_softmax(-1)
    totals: list[torch.Tensor] = []
    assert _rise(lambda: totals.append(smooth(unary, pair).total_pairs(None))) < _table(steps)
    assert float(totals[0].sum()) == pytest.approx(steps - 1, rel=1e-9)
