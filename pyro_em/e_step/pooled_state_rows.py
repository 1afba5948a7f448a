"""The rows of a set of Gaussian latents beside a discrete one, and its sites in every state: what `PooledStates` reads.

In state k a site's location is that of bilinear.py with the entries of the parameters that the state picks, and its
noise the k-th of its scales or covariances. Everything that depends on the state stands in the dims left of the
plates, of which one varies. Taken are rows that have a latent of their own and loadings that all rows share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.e_step.bilinear import read_form
from pyro_em.e_step.pooled_data import Pooled, Rows
from pyro_em.e_step.pooled_location import PooledSite
from pyro_em.e_step.pooled_sets import (
    at_units,
    check_site,
    element_weights,
    elements_read,
    known_scale,
    moves_otherwise,
    reaching,
    rows_of,
)
from pyro_em.evidence.gaussian import GaussianRoute
from pyro_em.families.multivariate_normal import MultivariateNormalFamily
from pyro_em.families.normal import LocationScaleFamily, LogNormalFamily
from pyro_em.model.density import clean_value
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.problem import Problem


@dataclass(frozen=True)
class StateRows:
    """The sites of a set and their rows (N, V₀ + P), in every state of the discrete latent that they read.

    `dims` and `sizes` are those of the set's evidence, packed, states first; `weight` (N,) how often a row counts;
    `rank` the number of plate-like dims right of the states. `rows` are those of each site by element, where rows read
    the latents by an index (pooled_groups.py).
    """

    states: tuple[tuple[tuple[PooledSite, Tensor], ...], ...]
    run: Run
    dims: str
    sizes: tuple[int, ...]
    weight: Tensor
    rank: int
    num_latents: int
    rows: tuple[tuple[Rows, ...], ...] | None = None


def state_rows(problem: Problem) -> StateRows:
    """The set of a model whose rows have one Gaussian set and a discrete latent beside it.

    :raises NotCompiled: with the reason.
    """
    continuous = problem.continuous
    assert continuous is not None
    if len(continuous.sets) > 1:
        raise NotCompiled("several sets of continuous latents beside discrete ones")
    (route,), graph = continuous.routes, problem.graph
    if not isinstance(route, GaussianRoute):
        raise NotCompiled(f"{route.name} latents")
    geometry, m = route.geometry, len(route.geometry.layout)
    if geometry.num_b or not route.plates:
        raise NotCompiled("discrete latents beside effects that rows share")
    long = any(reading.index is not None for reading in route.readings)
    plain, run = at_units(problem, [route])
    read = {s for r in route.readings for d, s in plain.sites[r.site].symbols.items() if d < -m}
    if len(read) != 1:
        raise NotCompiled("the Gaussian latents meet several discrete ones")
    (symbol,) = read
    states = num_states(problem, symbol)
    if plain.sites[graph.symbol_sites[symbol]].plate_dims != plain.sites[route.latents.names[0]].plate_dims:
        raise NotCompiled("the discrete latent is in another plate than the effects")
    component = next(c for c in graph.components if route.latents.symbol in c.symbols)
    weight = element_weights(problem, route, component, plain)
    plates = [(route.symbols[d], n) for d, n in zip(range(-m, 0), geometry.layout, strict=True) if n > 1]
    found = []
    for k in range(states):
        rows = []
        for reading in route.readings:
            site = plain.sites[reading.site]
            own = dataclasses.replace(
                site,
                batch_shape=site.batch_shape[max(0, len(site.batch_shape) - m + 1) :],
                arguments=at_state(site, site.arguments or {}, m, k),
            )
            rows.append(_state_row(problem, own, run, route, m, weight, k, long))
        found.append(tuple(rows))
    by_element = tuple(tuple(own for *_, own in rows) for rows in found) if long else None
    both = tuple(tuple((site, data) for site, data, _ in rows) for rows in found)
    dims = "".join([symbol, *(name for name, _ in plates)])
    sizes = tuple(n for _, n in plates)
    return StateRows(both, plain, dims, sizes, weight, m, len(geometry.columns_a), by_element)


def num_states(problem: Problem, symbol: str) -> int:
    """Number of states of the discrete latent with this symbol."""
    return problem.capture.sites[problem.graph.symbol_sites[symbol]].num_states


def at_state(site: SiteRecord, arguments: Mapping[str, Tensor], rank: int, k: int) -> dict[str, Tensor]:
    """A site's arguments in state k: states are the dims left of the last `rank` batch dims."""
    found = {}
    for slot, value in arguments.items():
        trailing = site.element_dims + (site.family.arguments[slot] if site.family is not None else 0)
        if value.dim() > rank + trailing:
            value = value.reshape(-1, *value.shape[value.dim() - rank - trailing :])
            value = value[k if len(value) > 1 else 0]
        found[slot] = value
    return found


def _state_row(
    problem: Problem, site: SiteRecord, run: Run, route: GaussianRoute, m: int, weight: Tensor, k: int, long: bool
) -> tuple[PooledSite, Tensor, Rows]:
    """One site in one state, and its rows, also by element."""
    check_site(site)
    if isinstance(site.family, LogNormalFamily) or known_scale(site, problem, m).numel() > 1:
        raise NotCompiled(f"'{site.name}' is log-normal, or its scale differs from row to row")
    reading = next(r for r in route.readings if r.site == site.name)
    element, kept = elements_read(problem, site, reading, route, weight)
    if not bool(kept.all()):
        raise NotCompiled(f"'{site.name}' is masked")
    one = torch.ones(1, dtype=torch.float64)
    form = read_form(site, run, problem.start, reaching(problem, site), route.geometry.columns_a, m, one, state=k)
    count = len(element) if long else len(weight)
    alike = long or (form.shared.shape[1] <= 1 and bool((form.shared == form.shared[:1]).all()))
    if len(form.shared) not in (1, count) or not alike:
        raise NotCompiled(f"loadings of '{site.name}' differ from row to row")
    alone = form.alone.expand(count, -1)
    if not site.latent:
        assert isinstance(site.family, LocationScaleFamily | MultivariateNormalFamily)
        y = rows_of(site.family.location(clean_value(site)).detach().double(), site)
        alone = torch.cat([alone, y.expand(count, -1)], -1)
    width = form.shared.shape[1]
    design = form.shared.new_zeros(1, width, width) if long else form.shared[:1].reshape(1, width, width)
    zero = torch.zeros((), dtype=torch.float64)
    empty = Pooled(design, torch.zeros(1, 1, alone.shape[1], 1, dtype=torch.float64), alone[:0], zero)
    own = PooledSite(site, form, empty, True, moves_otherwise(form, problem, site))
    return own, alone.contiguous(), Rows(element, form.shared.expand(count, -1), alone)
