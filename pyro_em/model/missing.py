"""Missing data: NaN cells of observed sites, and continuous sites observed only where `obs_mask` says so.

Both become what every part of the package (and Pyro itself) already understands, before any other handler sees
them, so that one mechanism serves EM, posteriors, standard errors and SVI:

    univariate cells            a mask, over the batch or (inside of `.to_event`) over the elements of the event
    whole events                the same
    some cells of a normal      distributions.IncompleteNormal, IncompleteLowRankNormal: these integrate them out
    some cells of other events  refused

Missing at random (Rubin 1976): that a cell is missing says nothing beyond what was observed. A missing value is NaN
to the rest of the model, too; a site that reads it would make it a latent, and is refused (`check_unread`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.distributions import IncompleteLowRankNormal, IncompleteNormal
from pyro_em.distributions.chain import GaussianChain
from pyro_em.errors import InputError, Refusal
from pyro_em.model import compat, wrappers
from pyro_em.types import Model

SERIES = (dist.GaussianHMM, dist.LinearHMM, GaussianChain)  # their densities leave out cells that are NaN by themselves
INCOMPLETE = "_pyro_em_incomplete"  # in a site's `infer`: which cells of its value are missing


def complete_cases(model: Model, missing: str | None) -> Model:
    """The model, whose NaN observations count as missing if `missing` is "nan".

    :raises InputError: for another value of `missing`.
    """
    if missing is None:
        return model
    if missing != "nan":
        raise InputError(f"missing={missing!r}: use 'nan' (NaN cells of observed sites are missing), or None.")
    wrapped: Model = _Missing()(model)
    return wrapped


class _Missing(Messenger):
    """The innermost handler of a model: masks NaN cells, and hands them back to the model as NaN."""

    def __init__(self) -> None:
        super().__init__()
        self._gone: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not msg["is_observed"] or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if not hasattr(msg["fn"], "event_dim") or not bool(value.isnan().any()):
            return
        name, fn = msg["name"], msg["fn"]
        gone = value.isnan()
        if isinstance(compat.base_distribution(fn), SERIES):
            msg["infer"] = {**msg["infer"], INCOMPLETE: gone}
            return
        self._gone[name] = gone
        base_event = compat.base_distribution(fn).event_dim
        elements = fn.event_dim - base_event
        flat = gone.flatten(gone.dim() - base_event) if base_event else gone.unsqueeze(-1)
        whole = flat.all(-1)
        if bool((flat.any(-1) & ~whole).any()):
            fn = _incomplete(name, fn, flat, whole)
        else:
            msg["value"] = _filled(fn, value, whole, base_event, elements)
        if elements and bool(whole.any()):
            fn = wrappers.mask_elements(fn, ~whole)
        rows = whole.flatten(whole.dim() - elements).all(-1) if elements else whole
        if bool(rows.any()):
            mask = msg["mask"]
            msg["mask"] = ~rows if mask is None or mask is True else mask & ~rows
        msg["fn"] = fn
        msg["infer"] = {**msg["infer"], INCOMPLETE: gone}

    def _pyro_post_sample(self, msg: Any) -> None:
        gone = self._gone.pop(msg["name"], None)
        if gone is not None and msg["is_observed"]:
            # Handlers further out have recorded the site by now; the model goes on with what it gave.
            msg["value"] = torch.where(gone, torch.nan, msg["value"])


def _incomplete(name: str, fn: Any, gone: Tensor, whole: Tensor) -> Any:
    base = compat.base_distribution(fn)
    if isinstance(base, dist.MultivariateNormal):
        return wrappers.replace_base(fn, IncompleteNormal)
    if isinstance(base, dist.LowRankMultivariateNormal):
        return wrappers.replace_base(fn, IncompleteLowRankNormal)
    row = (gone.any(-1) & ~whole).nonzero()[0].tolist()
    where = row[0] if len(row) == 1 else tuple(row)
    raise Refusal(
        name,
        f"some cells of its value in row {where} are missing, and the density of the others is not known for "
        f"{type(base).__name__}.",
        "make the whole row NaN or leave it out, or write the cells as sites (or elements of .to_event) of their own.",
    )


def _filled(fn: Any, value: Tensor, gone: Tensor, event_dim: int, elements: int) -> Tensor:
    """Missing events replaced by the first that was observed (of the same element where there is one)."""
    event = value.shape[value.dim() - event_dim :]
    rows = value.reshape(-1, *value.shape[value.dim() - event_dim - elements : value.dim() - event_dim], *event)
    flags = gone.reshape(rows.shape[: rows.dim() - event_dim])
    seen = value[~gone]
    some = seen[0] if len(seen) else _any_value(fn, value, event)
    first = (~flags).long().argmax(0)
    filler = rows.gather(0, first.reshape((1, *first.shape, *(1,) * event_dim)).expand((1, *rows.shape[1:])))[0]
    empty = flags.all(0).reshape((*first.shape, *(1,) * event_dim))
    filler = torch.where(empty, some, filler)
    return torch.where(gone.reshape((*gone.shape, *(1,) * event_dim)), filler, value)


def _any_value(fn: Any, value: Tensor, event: torch.Size) -> Tensor:
    """A value of the support, where nothing at all was observed."""
    for number in (1.0, 0.5, 0.0, 1 / max(1, event.numel())):
        candidate = value.new_full(event, number)
        if bool(compat.base_distribution(fn).support.check(candidate).all()):
            return candidate
    return value.new_ones(event)


def observe_where(name: str, fn: Any, obs: Any, obs_mask: Any, *args: Any, **options: Any) -> Tensor | None:
    """`pyro.sample(name, fn, obs=, obs_mask=)` of a site that is not enumerable: masked where it was not observed.

    Pyro's two sites have the same evidence, but its unobserved half is a latent that no data inform. None for
    enumerable sites (labels.py) and for sites without an observation.
    """
    if obs is None or fn.has_enumerate_support:
        return None
    keep: Any = torch.as_tensor(obs_mask)
    gone: Tensor = ~keep.reshape(keep.shape + (1,) * fn.event_dim)
    options["infer"] = {**(options.get("infer") or {}), INCOMPLETE: gone}
    with poutine.mask(mask=keep):
        value: Tensor = pyro.sample(name, fn, *args, obs=obs, **options)
    return torch.where(gone, torch.nan, value)


def check_unread(name: str, upstream: frozenset[str], incomplete: frozenset[str]) -> None:
    """Raise `Refusal` if site `name` reads a site some of whose values are missing."""
    read = sorted(upstream & incomplete)
    if read:
        raise Refusal(
            name,
            f"it reads '{read[0]}', some of whose values are missing: these would be latents with data of their own.",
            f"write the missing part of '{read[0]}' as a latent (pyro.sample without obs), or leave those rows out.",
        )


Observe = Callable[..., Tensor | None]


def first_of(*observers: Observe) -> Observe:
    """The first of several treatments of `obs_mask` that applies."""

    def observe(*args: Any, **options: Any) -> Tensor | None:
        return next((found for found in (own(*args, **options) for own in observers) if found is not None), None)

    return observe
