"""Acceleration of any EM map by extrapolation: `accelerate="squarem" | "anderson"` in `fit`."""

from __future__ import annotations

from collections.abc import Callable

from pyro_em.accelerate.anderson import Anderson
from pyro_em.accelerate.squarem import Squarem
from pyro_em.errors import InputError
from pyro_em.loop import EMMap, Stepper

ACCELERATORS: dict[str, Callable[[EMMap], Stepper]] = {"squarem": Squarem, "anderson": Anderson}


def choose_accelerator(name: str | None) -> Callable[[EMMap], Stepper] | None:
    """The accelerator of that name, to be made anew for every start; None is plain EM.

    :raises InputError: for an unknown name.
    """
    if name is None:
        return None
    if name not in ACCELERATORS:
        raise InputError(f"accelerate: '{name}' is none of None, {', '.join(map(repr, ACCELERATORS))}.")
    return ACCELERATORS[name]
