"""Whether a model says the same in every run: it may draw random numbers by its sample sites only.

A start may be drawn (`pyro.param("w", torch.rand(3))`), as a fit has the parameter's value. Whatever else is drawn is
taken for data, others in each run. Where a run, whose sites are all given, has moved a random state (of the processor),
the model is run again and its log-densities are compared, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.util import get_rng_state, set_rng_state

from pyro_em.errors import Refusal
from pyro_em.model import compat
from pyro_em.model.density import packed_log_density
from pyro_em.model.trace import Run

RUNS = 8  # that are compared: two of them see one coin for all rows fall the same way as often as not


@contextlib.contextmanager
def repeatable(again: Callable[[], Run]) -> Iterator[None]:
    """Around runs of a model; `again` is one more.

    :raises Refusal: naming a site whose log-density is another in another run.
    """
    before = get_rng_state()
    yield
    after = get_rng_state()
    if _same(before, after):
        return
    try:
        first, *others = (again() for _ in range(RUNS))
    finally:
        set_rng_state(after)
    if any(_draws(first, other) for other in others):  # Pyro's own draws, of sites that are refused elsewhere
        return
    for site in first.sites:
        refuse_changing(site, first, *others)


def _draws(first: Run, other: Run) -> bool:
    """Whether sites without data have other values in two runs."""
    both = ((site, other.sites[n]) for n, site in first.sites.items() if not site.observed and n in other.sites)
    return not all(torch.equal(one.value, two.value) for one, two in both)


def refuse_changing(site: str, *runs: Run) -> None:
    """Raise `Refusal` if runs with the same parameters gave a site different densities."""
    if all(site in run.sites for run in runs):
        first, *others = (compat.detached(packed_log_density(run.sites[site])) for run in runs)
        if all(torch.allclose(first, other, rtol=0.0, atol=0.0, equal_nan=True) for other in others):
            return
    raise Refusal(
        site,
        "two runs of the model with the same parameters gave it different log-densities: the model draws random "
        "numbers outside of its sites, or changes its data.",
        "draw what is random before the fit and pass it as an argument, or make it a pyro.sample site.",
    )


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    torch_state = torch.equal(before["torch"], after["torch"])
    return torch_state and before["random"] == after["random"] and _numpy(before) == _numpy(after)


def _numpy(state: dict[str, Any]) -> tuple[Any, ...]:
    name, keys, *rest = state["numpy"]
    return name, keys.tobytes(), *rest
