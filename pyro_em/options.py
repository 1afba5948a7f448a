"""Checks of what a user passes to `fit`, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_em.errors import InputError, Refusal
from pyro_em.evidence.rule import Quadrature
from pyro_em.model.capture import ParameterRecord
from pyro_em.model.compat import base_distribution
from pyro_em.model.starts import violation
from pyro_em.store import isolated_rng
from pyro_em.types import Model, Params

ALGORITHMS = ("em", "map-em", "gem", "svi", "cem", "sem")
EXACT = ("em", "map-em", "gem")
HARD = ("cem", "sem")  # EM's loop with another E-step than the exact posterior


def check_algorithm(algorithm: str) -> None:
    """Raise `InputError` for an unknown algorithm."""
    if algorithm not in ALGORITHMS:
        raise InputError(f"algorithm: there is no '{algorithm}'. Valid names: {', '.join(map(repr, ALGORITHMS))}.")


def check_given(model: Any, weights: Any = None, seed: Any = None, callbacks: Any = ()) -> None:
    """Raise `InputError` for arguments of another kind than `fit` takes."""
    if not callable(model):
        raise InputError(
            f"The model is a {type(model).__name__}, not a function: fit(model, *data) calls it with the data. (The "
            "command line takes a model as file.py:function.)"
        )
    if weights is not None and not isinstance(weights, Mapping):
        raise InputError(
            f"weights is a dict by plate, {{'plate': tensor}}, not a {type(weights).__name__}: it weights that plate."
        )
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise InputError(f"seed must be an integer, not {seed!r}.")
    if callable(callbacks) or not isinstance(callbacks, Iterable):
        raise InputError("callbacks is a list of functions, each called with a Step: callbacks=[function].")


def check_restarts(restarts: int) -> None:
    """Raise `InputError` unless there is at least one start."""
    if not isinstance(restarts, int) or isinstance(restarts, bool) or restarts < 1:
        raise InputError(f"restarts must be a positive integer, not {restarts!r}.")


def checked_rules(e_step: Any) -> dict[str, Quadrature]:
    """The rules of `e_step`, by site.

    :raises InputError: for anything but "auto" or a dict of `Quadrature` by site.
    """
    if isinstance(e_step, str) and e_step == "auto":
        return {}
    if not isinstance(e_step, Mapping) or not all(isinstance(rule, Quadrature) for rule in e_step.values()):
        raise InputError(
            f"e_step={e_step!r}: use 'auto' (exact, or refused), or a dict of pyro_em.Quadrature by latent site."
        )
    return dict(e_step)


def checked_init(records: Mapping[str, ParameterRecord], init: Mapping[str, Any]) -> Params:
    """The model's own start with the given values put in.

    :raises InputError: for an unknown name, a wrong shape, a value that is not finite or violates the
        parameter's constraint.
    """
    params = {name: record.value for name, record in records.items()}
    for name, value in init.items():
        if name not in params:
            known = ", ".join(params) or "none"
            raise InputError(f"init: the model has no parameter '{name}'. Its parameters: {known}.")
        record = records[name]
        value = torch.as_tensor(value).detach().to(record.value).clone()
        if value.shape != record.value.shape:
            raise InputError(
                f"init: parameter '{name}' has shape {tuple(record.value.shape)}, its start {tuple(value.shape)}."
            )
        if not bool(value.isfinite().all()):
            raise InputError(f"init: the start of parameter '{name}' is not finite.")
        wrong = violation(record.constraint, value)
        if wrong is not None:
            raise InputError(f"init: the start of parameter '{name}' violates its constraint: {wrong}")
        params[name] = value
    return params


def point_estimated(guide: Model | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Names of the Delta sites of a guide.

    :raises Refusal: for a guide site that is not a Delta: its posterior would not be the exact one.
    """
    if guide is None:
        return ()
    with pyro.get_param_store().scope(), isolated_rng(0), poutine.block():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    found = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or poutine.util.site_is_subsample(site):
            continue
        if type(base_distribution(site["fn"])).__name__ != "Delta":
            raise Refusal(
                name,
                "the guide gives it a distribution of its own, but an exact algorithm uses the exact posterior.",
                "leave it out of the guide, or use algorithm='svi'.",
            )
        found.append(name)
    return tuple(found)


def refuse_with(algorithm: str, **given: Any) -> None:
    """Raise `InputError` for options that were given but belong to the exact algorithms only."""
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} belongs to the exact algorithms (em, map-em, gem); '{algorithm}' cannot use it.")
