"""G13: the memory that enumeration takes is known before it is taken.

What is predicted is the largest single table, and that is what is measured here: the storage behind every tensor that
an E-step of the reference makes from a run of the model (the model's own arithmetic is the user's).
"""

from __future__ import annotations

import math
import os
import resource
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_em
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.errors import ResourceError
from pyro_em.evidence.discrete import contract
from pyro_em.model.resources import table_cells
from pyro_em.problem import Problem as Bound
from pyro_em.problem import bind
from tests.problem import Problem
from tests.problems import BY_NAME, PROBLEMS


class Largest(TorchDispatchMode):
    """Bytes of the largest new memory that any operation asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in old:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


def _bound(problem: Problem) -> Bound:
    weights = None if problem.weights is None else {str(problem.plate): problem.weights}
    return bind(problem.model, problem.args, {}, with_prior=problem.priors, weights=weights)


def _predicted(bound: Bound) -> int:
    """Bytes of the largest table: of a site over its states and rows; of a loop over pairs of its states and steps."""
    tables = [table_cells(bound.capture, site)[0] for site in bound.capture.sites.values()]
    for loop in bound.capture.loops:
        latents = [s for s in bound.capture.sites.values() if s.markov and s.enumerable and not s.observed]
        later = [s for s in latents if any(plate.size == loop.steps - loop.history for plate in s.plates)]
        states = math.prod(site.num_states for site in later) ** max(1, loop.history)
        plates = max(math.prod(plate.size for plate in site.plates) for site in later)
        tables.append(states**2 * plates)
    return 8 * max(tables)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_largest_table_is_the_one_predicted(problem: Problem) -> None:
    """Never more, and not less than half of it (an interval has two ends, but one probability).

    A loop is contracted within the E-step, and may sum a latent out of each step before steps are joined.
    """
    bound = _bound(problem)
    predicted = _predicted(bound)
    if bound.capture.loops:
        with Largest() as largest:
            Interpreted(bound).e_step(problem.start())
        assert 0 < largest.bytes <= predicted
        return
    run = bound.run(problem.start())
    with Largest() as largest, torch.enable_grad():
        factors = bound.factors(run)
        total = sum(contract(bound.graph, c, factors).sum() for c in bound.graph.components)
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
    assert predicted / 2 <= largest.bytes <= predicted


def _several(y: Tensor, states: int) -> None:
    """Three latents that meet in every row: N x states³ cells."""
    total = torch.zeros(())
    with pyro.plate("rows", len(y)):
        for i in range(3):
            total = total + pyro.sample(f"z_{i}", dist.Categorical(torch.ones(states)))
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("y", dist.Normal(loc + total, 1.0), obs=y)


def test_the_limit_holds_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bytes of the table the E-step runs; a byte below it is refused, with nothing larger made on the way."""
    y = torch.linspace(0.0, 9.0, 50)
    needed = 8 * 50 * 4**3
    bound = bind(_several, (y, 4), {}, with_prior=False)
    monkeypatch.setattr(pyro_em.settings, "max_table_bytes", needed)
    bound.evidence(bound.start)
    monkeypatch.setattr(pyro_em.settings, "max_table_bytes", needed - 1)
    bound = bind(_several, (y, 4), {}, with_prior=False)
    run = bound.run(bound.start)
    with Largest() as largest, pytest.raises(ResourceError, match=r"'y'.*3 latents.*3200 cells.*max_table_bytes"):
        bound.factors(run)
    assert largest.bytes <= 8 * 4  # that of one latent


def test_the_plan_states_the_bytes_of_all_tables() -> None:
    """Those of the three latents, and of the data."""
    plan = pyro_em.plan(_several, torch.zeros(50), 4)
    assert plan.predicted_bytes == 8 * 50 * (4 + 4 + 4 + 4**3)
    assert "MiB" in str(plan)


def _fully_connected(y: Tensor, number: int, states: int) -> None:
    """`number` latents which all meet in one observation: a table of states**number cells."""
    w = pyro.param("w", torch.full((states,), 1.0 / states), constraint=constraints.simplex)
    total = torch.zeros(())
    for i in range(number):
        total = total + pyro.sample(f"z_{i}", dist.Categorical(w))
    pyro.sample("y", dist.Normal(total, 1.0), obs=y)


def test_a_table_too_large_is_refused_before_it_is_allocated() -> None:
    """G13: 10 latents of 12 states need 12^10 cells (half a terabyte); the process must not even try."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ResourceError, match=r"z_0|z_9"):
        pyro_em.fit(_fully_connected, torch.tensor(3.0), 10, 12, max_iter=1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 200_000, f"{grown} kB were allocated on the way to the refusal"


def _resident_bytes() -> int:
    with open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("name", ["gmm_full", "transformed", "categorical_hmm"])
def test_memory_is_flat(name: str) -> None:
    """G13: 200 iterations hold no more than 20: no graph grows from one to the next."""
    problem = BY_NAME[name]
    seen: list[int] = []
    pyro_em.fit(
        problem.model,
        *problem.args,
        init=problem.start(),
        max_iter=200,
        tol=0,
        callbacks=[lambda *args: seen.append(_resident_bytes()) or None],
    )
    assert len(seen) >= 200
    assert seen[-1] - seen[20] < 8 * 2**20
