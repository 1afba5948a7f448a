"""The first rows of a run: checks of structure need not look at a million rows that are all treated alike."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from pyro_em.model.trace import Plate, Run, SiteRecord

ENOUGH_CELLS = 2**18  # a run whose log-densities have no more cells than that is used whole
ROWS = 2048


def first_rows(run: Run, plate: str | None) -> Run:
    """The run with one plate cut to its first `ROWS` elements (unchanged for `plate=None`)."""
    if plate is None:
        return run
    return dataclasses.replace(run, sites={name: rows_of(site, plate, 0, ROWS) for name, site in run.sites.items()})


def rows_like_others(run: Run) -> Run:
    """The run cut to its first rows if it is large, and no argument varies along the plate; else as it is."""
    plate = plate_to_cut(run)
    if plate is None or any(_varies(site, plate) for site in run.sites.values()):
        return run
    return first_rows(run, plate)


def _varies(site: SiteRecord, name: str) -> bool:
    plate = next((p for p in site.plates if p.name == name), None)
    if plate is None or site.family is None:
        return False
    for argument, value in (site.arguments or {}).items():
        position = value.dim() - site.family.arguments[argument] - site.element_dims + plate.dim
        if position >= 0 and value.shape[position] > 1:
            return True
    return False


def plate_to_cut(run: Run) -> str | None:
    """The largest plate of a run that is too large to be checked whole; None if it is small or cannot be cut."""
    cells = sum(math.prod(site.batch_shape) for site in run.sites.values())
    sizes = {plate.name: plate.size for site in run.sites.values() for plate in site.plates}
    hidden = any(site.arguments is None for site in run.sites.values())
    if cells <= ENOUGH_CELLS or not sizes or hidden:
        return None
    name = max(sizes, key=sizes.__getitem__)
    return name if sizes[name] > ROWS else None


def rows_of(site: SiteRecord, name: str, begin: int, count: int) -> SiteRecord:
    """The site with one plate cut to `count` elements from `begin` (unchanged if it is not in the plate)."""
    plate = next((p for p in site.plates if p.name == name), None)
    if plate is None:
        return site
    assert site.family is not None and site.arguments is not None
    dim, elements = plate.dim, site.element_dims
    count = min(count, plate.size - begin)

    def cut(x: Tensor, trailing: int) -> Tensor:
        """`trailing` dims stand right of the plate dims: elements of `.to_event` and event dims."""
        i = x.dim() - trailing + dim
        return x if i < 0 or x.shape[i] == 1 else x.narrow(i, begin, count)

    shape = list(site.batch_shape)
    shape[len(shape) + dim] = min(count, shape[len(shape) + dim])
    arguments = {a: cut(v, elements + site.family.arguments[a]) for a, v in site.arguments.items()}
    constants = {
        name: cut(v, elements) if isinstance(v, Tensor) and v.dim() > elements else v
        for name, v in site.constants.items()
    }
    return dataclasses.replace(
        site,
        constants=constants,
        value=cut(site.value, site.fn.event_dim),
        arguments=arguments,
        mask=None if site.mask is None else cut(site.mask, 0),
        element_mask=None if site.element_mask is None else cut(site.element_mask, elements),
        batch_shape=tuple(shape),
        plates=tuple(Plate(p.name, p.dim, count if p.name == name else p.size) for p in site.plates),
    )
