"""Dims and coordinates of what a fit gives to ArviZ: plates and time by name, the rest by number.

Arrays lie in `xarray.Dataset`s with a coordinate for every dim; xarray takes no dim that is called like a variable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray
from torch import Tensor

from pyro_em.model.trace import Plate
from pyro_em.series import Series

Dims = tuple[str, ...]
SeriesByName = Mapping[str, Series]
SAMPLE: Dims = ("chain", "draw")
RESERVED = {*SAMPLE, "statistic", "moment"}  # dims that a plate may not be


def series_dims(own: Series, series: SeriesByName, shape: tuple[int, ...]) -> Dims:
    """Of the values of a series: time first where it has steps."""
    lead = () if own.steps is None else (_time(own, series),)
    return (*lead, *plate_dims(own.name, own.plates, shape[len(lead) :], own.event_dim, (*series, *lead)))


def _time(own: Series, series: SeriesByName) -> str:
    """Time has one dim where all loops have the same steps, else each series its own."""
    taken = {*series, *(plate.name for other in series.values() for plate in other.plates)}
    steps = {other.steps for other in series.values()} - {None}
    return "time" if len(steps) == 1 and "time" not in taken else f"{own.name}_time"


def times(variables: Iterable[str], series: SeriesByName) -> dict[str, Any]:
    """Coordinates of those variables that are series: the numbers of their steps."""
    own = [series[name] for name in variables if name in series]
    return {_time(s, series): np.asarray(s.steps) for s in own if s.steps is not None}


def plate_dims(
    name: str, plates: Sequence[Plate], shape: tuple[int, ...], event_dim: int, names: Iterable[str]
) -> Dims:
    """Plate names where a plate of that size lies, but for `names` of variables.

    Of a shape without event dims, as that of a latent's states is, the plates are the last dims.
    """
    taken = {*names, *RESERVED}
    batch = len(shape) - max(0, min(len(shape) - len(plates), event_dim))
    dims = [f"{name}_dim_{i}" for i in range(len(shape))]
    for i, plate in enumerate(plates):
        axis = i if batch == len(plates) else batch + plate.dim  # values have no dim where there is no plate
        if 0 <= axis < batch and shape[axis] == plate.size and plate.name not in taken:
            dims[axis] = plate.name
    return tuple(dims)


def dataset(
    variables: Mapping[str, Any], attributes: dict[str, Any] | None = None, coords: dict[str, Any] | None = None
) -> xarray.Dataset:
    """A dataset with a coordinate for every dim; "/" is the separator of groups, so names get a "." for it."""
    named = {
        name.replace("/", "."): (tuple(dim.replace("/", ".") for dim in dims), *rest)
        for name, (dims, *rest) in variables.items()
    }
    coords = {name.replace("/", "."): values for name, values in (coords or {}).items()}
    for dims, values, *_ in named.values():
        for dim, size in zip(dims, values.shape, strict=True):
            coords.setdefault(dim, np.arange(size))
    return xarray.Dataset(named, coords, attributes)


def numpy(value: Tensor) -> np.ndarray:
    """The values in the memory of the CPU."""
    return value.detach().cpu().numpy()
