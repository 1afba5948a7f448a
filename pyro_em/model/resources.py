"""How much memory enumeration will take, known before anything is enumerated.

The plain run knows which latents each site depends on; the site's table has one cell for every
configuration of those (and of its own states), times its plates.
"""

from __future__ import annotations

import math

from pyro_em import settings
from pyro_em.errors import ResourceError
from pyro_em.families import family_for
from pyro_em.families.batches import ChainFamily
from pyro_em.families.categorical import CategoricalFamily
from pyro_em.model.capture import Capture, PlainSite
from pyro_em.model.compat import base_distribution

MAX_LATENTS_OUTSIDE_MARKOV = 25  # torch tensors have at most 64 dims, einsum 52 letters


def table_cells(capture: Capture, site: PlainSite) -> tuple[int, list[str]]:
    """Cells of the site's enumerated log-density, and the latents that span it.

    Upstream latents of a `pyro.markov` context are those that the site reads directly, which is what
    Pyro's dim recycling keeps.
    """
    latents = list(_upstream_latents(capture, site))
    if site.enumerable and not site.observed:
        latents.append(site.name)
    states = math.prod(capture.sites[name].num_states for name in latents)
    plates = math.prod(plate.size for plate in site.plates)
    event = math.prod(site.value.shape[site.value.dim() - site.fn.event_dim :]) if site.observed else 1
    event = max(event, 1)  # the value of a `pyro.factor` is empty, its table is not
    family = family_for(base_distribution(site.fn))
    if isinstance(family, ChainFamily):  # states that come before the first observation have a row of cells too
        event += family.steps_before * site.value.shape[-1]
    if site.observed and isinstance(family, CategoricalFamily) and capture.stacked.intersection(latents):
        event = base_distribution(site.fn).param_shape[-1]  # probabilities of every row, of which one is picked
    return states * plates * event, latents


def _upstream_latents(capture: Capture, site: PlainSite) -> list[str]:
    return [
        name
        for name in capture.sites
        if name in site.upstream and capture.sites[name].enumerable and not capture.sites[name].observed
    ]


def predicted_bytes(capture: Capture) -> int:
    """Peak of the enumerated tables of one run, in bytes (float64, all sites alive)."""
    return 8 * sum(table_cells(capture, site)[0] for site in capture.sites.values())


def check_states(capture: Capture) -> None:
    """Raise `ResourceError` if the joint states that some site reads are too many, however few its rows.

    A compiled engine needs no table over the rows (`check_tables`), but the run that it is made from has one over
    the states.
    """
    for site in capture.sites.values():
        latents = table_cells(capture, site)[1]
        _check(site, math.prod(capture.sites[name].num_states for name in latents), latents)
    latents_outside = [s for s in capture.sites.values() if s.enumerable and not s.observed and not s.markov]
    loose = [s for s in latents_outside if s.num_states > 1]
    if len(loose) > MAX_LATENTS_OUTSIDE_MARKOV:
        raise ResourceError(
            f"{len(loose)} discrete latents ('{loose[0].name}' ... '{loose[-1].name}') are enumerated side by side, "
            f"but a tensor has room for about {MAX_LATENTS_OUTSIDE_MARKOV}. Put a loop over time into "
            "pyro.markov(range(T)), and independent repetitions into a pyro.plate."
        )


def check_tables(capture: Capture) -> bool:
    """True, or `ResourceError` if the table of some site over its states and rows is too large for the reference."""
    for site in capture.sites.values():
        _check(site, *table_cells(capture, site))
    return True


def _check(site: PlainSite, cells: int, latents: list[str]) -> None:
    needed = 8 * cells
    if needed <= settings.max_table_bytes:
        return
    shown = ", ".join(f"'{name}'" for name in latents[:6]) + (" ..." if len(latents) > 6 else "")
    raise ResourceError(
        f"Site '{site.name}': enumerating {len(latents)} latents ({shown}) jointly needs a table of "
        f"{needed / 2**20:.3g} MiB ({cells} cells), more than the limit of "
        f"{settings.max_table_bytes / 2**20:.0f} MiB. Give the site fewer latent parents, reduce their "
        "states, split the data, or raise pyro_em.settings.max_table_bytes."
    )
