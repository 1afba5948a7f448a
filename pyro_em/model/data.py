"""The data of a fit: brought into a form that can be computed with, and what is wrong with them said by site and row.

Nothing is repaired silently. Half precision is promoted (exactly), gradients are not followed into data; all else that
cannot be used (NaN, infinities, values outside of the support, shapes that do not go with the model) is an `InputError`
before the first iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance, get_provenance
from torch import Tensor
from torch.distributions import constraints

from pyro_em.charts import base_constraint
from pyro_em.distributions import Coarse, IncompleteLowRankNormal, IncompleteNormal
from pyro_em.errors import InputError
from pyro_em.families.spaces import beyond, bounded_arguments, bounds_of, some
from pyro_em.model import compat
from pyro_em.model.missing import SERIES
from pyro_em.model.timeline import open_loop
from pyro_em.model.trace import combined_masks
from pyro_em.shapes import broadcast_shapes

HALF = (torch.float16, torch.bfloat16)


def as_data(value: Any) -> Any:
    """Tensors (also in lists, tuples and dicts) without gradients, those of half precision in torch's default dtype.

    Squares and sums of half precision would keep three digits. What needs no change is returned as it is.
    """
    if isinstance(value, Tensor):
        value = value.to(torch.get_default_dtype()) if value.dtype in HALF else value
        return value.detach() if value.requires_grad else value
    if type(value) in (list, tuple):
        found = [as_data(x) for x in value]
        return type(value)(found) if any(a is not b for a, b in zip(found, value, strict=True)) else value
    if type(value) is dict:
        entries = {key: as_data(x) for key, x in value.items()}
        return entries if any(entries[key] is not x for key, x in value.items()) else value
    return value


def plain_support(fn: Any) -> Any:
    """The support of a distribution, None where it does not say."""
    try:
        return fn.support
    except NotImplementedError:
        return None


def check_sites(sites: Sequence[tuple[str, bool, Tensor]]) -> None:
    """Raise on a model without sites (name, observed, value), or without data."""
    if not sites:
        raise InputError(
            "The model has no sites: there is nothing to fit. Is a loop over its data empty (a sequence of length 0)?"
        )
    values = [value for _, observed, value in sites if observed]
    if not values:
        names = ", ".join(repr(name) for name, *_ in sites[:5])
        raise InputError(
            f"The model observes no data: none of its sites ({names}) has obs=. Write pyro.sample(name, fn, obs=data), "
            "and give fit the data (an argument of the model may have stayed at its default None)."
        )
    if all(_is_missing(value) for value in values):
        names = ", ".join(repr(name) for name, observed, _ in sites if observed)
        raise InputError(f"Every value of {names} is missing (NaN): there are no data to fit.")


def _is_missing(value: Tensor) -> bool:
    """Whether a value is NaN throughout; of the most it is seen by the first entry that they are not."""
    if not value.is_floating_point() or not value.numel():
        return False
    return bool(value[(0,) * value.dim()].isnan()) and bool(value.isnan().all())


def check_data(name: str, fn: Any, value: Tensor, mask: Any, gaps: bool, plates: Sequence[Any]) -> None:
    """Raise on observations that are NaN, infinite or outside the support, naming site and rows.

    :param gaps: NaN cells of the site are missing.
    :param plates: Pyro's frames of the vectorised plates around the site.
    """
    if not isinstance(value, Tensor):
        raise InputError(
            f"Site '{name}': the observation is a {type(value).__name__}, not a torch tensor. Give the model "
            "torch.as_tensor(data) (of a DataFrame: torch.tensor(frame.to_numpy()))."
        )
    if isinstance(compat.base_distribution(fn), SERIES) and not value.shape[-2]:
        raise InputError(f"Site '{name}': the series has no steps. Leave series of length 0 out.")
    if 0 in tuple(fn.event_shape):
        return  # a `pyro.factor` has no value
    batch = _check_shapes(name, fn, value, plates)
    support = plain_support(fn)
    real = support is constraints.real or getattr(support, "base_constraint", None) is constraints.real
    if real and value.is_floating_point() and bool(value.sum().isfinite()):
        return  # a sum of finite numbers; nothing of the size of the data was made to see it
    rows_of = value.dim() - fn.event_dim
    rows = value.expand(batch + value.shape[rows_of:])
    over_batch, over_elements = combined_masks(fn, detach_provenance(mask))
    keep = torch.ones(rows.shape, dtype=torch.bool, device=value.device)
    base = compat.base_distribution(fn)
    if over_batch is not None:
        over_batch = detach_provenance(over_batch)
        keep = keep & over_batch.reshape(over_batch.shape + (1,) * fn.event_dim)
    if over_elements is not None:
        over_elements = detach_provenance(over_elements)
        keep = keep & over_elements.reshape(over_elements.shape + (1,) * base.event_dim)
    infinite_values = isinstance(base, Coarse) and base.infinite_values
    finite = ~rows.isnan() if infinite_values or not rows.is_floating_point() else rows.isfinite()
    if isinstance(base, IncompleteNormal | IncompleteLowRankNormal) or (gaps and isinstance(base, SERIES)):
        finite = finite | rows.isnan()
        rows = rows.nan_to_num(0.0) if isinstance(base, SERIES) else rows
    bad = (~finite & keep).reshape(*batch, -1).any(-1)
    if bool(bad.any()):
        raise InputError(
            f"Site '{name}': the observation in {_row(bad)} is NaN or infinite. Correct it, or declare it "
            "missing: missing='nan' for all NaN observations, or pyro.poutine.mask(mask=...) around the site, true "
            "where the value is known."
        )
    if support is None:
        return
    inside = detach_provenance(support.check(rows))
    bad = ~inside.expand(batch) & keep.reshape(*batch, -1).any(-1)
    if bool(bad.any()):
        raise InputError(
            f"Site '{name}': the observation in {_row(bad)} lies outside of the support of "
            f"{type(compat.base_distribution(fn)).__name__}, {support}. Check the coding of the data "
            "(categories count from 0, counts are non-negative integers)."
        )


def _check_shapes(name: str, fn: Any, value: Tensor, plates: Sequence[Any]) -> torch.Size:
    """The batch shape of value and distribution together."""
    split = value.dim() - fn.event_dim
    event = tuple(zip(value.shape[max(split, 0) :], fn.event_shape, strict=False))
    if split < 0 or any(a != b and 1 not in (a, b) for a, b in event):  # a size of 1 is repeated over time
        raise InputError(
            f"Site '{name}': the observation has shape {tuple(value.shape)}, each of its events shape "
            f"{tuple(fn.event_shape)} under {type(compat.base_distribution(fn)).__name__}: these do not go together."
        )
    own = value.shape[:split]
    # Pyro lets data of several rows into a plate of one, which then counts their latents once.
    wrong = [f for f in plates if len(own) >= -f.dim and own[f.dim] not in (1, f.size)] if open_loop() is None else []
    try:
        if not wrong:
            return broadcast_shapes(own, fn.batch_shape)
        raise ValueError
    except ValueError:
        within = ", ".join(f"'{f.name}' of {f.size} elements" for f in wrong or plates)
        where = f" in plate {within}" if within else ""
        raise InputError(
            f"Site '{name}': the observation has batch shape {tuple(own)}, its distribution{where} has "
            f"{tuple(fn.batch_shape)}: these do not go together. Does the size of the plate agree with the data?"
        ) from None


FINITE = frozenset({"loc", "scale", "rate", "logits", "concentration"})  # arguments of which none is +inf


def check_arguments(name: str, fn: Any, raw: Mapping[str, Any]) -> None:
    """Raise on arguments that are NaN or overflow: what the data depend on (covariates, offsets) is not known there.

    A logit of -inf is a structural zero, and a limit may be infinite. Raise also on an argument outside of its space.
    """
    outside = outside_of_space(fn, raw, edge=True)
    if outside is not None:
        raise InputError(f"Site '{name}': {outside}")
    for argument, value in raw.items():
        value = detach_provenance(value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.sum().isfinite()):
            continue
        for bad, word in ((value.isnan(), "NaN"), (value == torch.inf, "infinite")):
            if bool(bad.any()) and (word == "NaN" or argument in FINITE):
                raise InputError(
                    f"Site '{name}': its argument '{argument}' is {word} in row {first_bad(bad)}. A covariate, an "
                    f"offset or a starting value is {word} there; correct it, or leave the row out."
                )


def outside_of_space(fn: Any, raw: Mapping[str, Any], *, edge: bool = False) -> str | None:
    """What is said of the first argument that is no number of its space, such as a negative scale; None if all are.

    :param edge: a scale of 0 will do: a step without noise has no density, but may be summed out with others.
    """
    base = compat.base_distribution(fn)
    kind: Any = type(base.base if isinstance(base, Coarse) else base)
    for argument, constraint in bounded_arguments(kind).items():
        if argument not in raw:
            continue
        value, sources = torch.as_tensor(detach_provenance(raw[argument])), sorted(get_provenance(raw[argument]))
        low, high = bounds_of(constraint)
        strict = isinstance(base_constraint(constraint), constraints.greater_than)
        bad = beyond(value, (low, high))
        bad = bad | (value == low) if strict and not edge else bad
        if some(bad):
            least = f"greater than {low:g}" if strict else f"at least {low:g}"
            space = least if high == math.inf else f"between {low:g} and {high:g}"
            where = f" in row {first_bad(bad)}" if bad.dim() else ""
            made = f" It is made of {', '.join(map(repr, sources))}." if sources else ""
            return (
                f"its argument '{argument}' is {value[bad][0].item():.6g}{where}, and has to be {space}."
                f"{made} Start inside, and stay there: by pyro.param(..., constraint=constraints.positive) or the "
                "like, or by an expression that cannot leave (exp, softplus, sigmoid)."
            )
    return None


def _row(bad: Tensor) -> str:
    """The first bad row of a site; time, where the steps of a loop are run together, is its leftmost plate."""
    loop = open_loop()
    if loop is None or bad.dim() < 1 + loop.depth or bad.shape[-1 - loop.depth] != loop.steps - loop.history:
        return f"row {first_bad(bad)}"
    where = bad.movedim(-1 - loop.depth, 0)
    steps = where.reshape(len(where), -1).any(1).nonzero().reshape(-1)
    step = int(steps[0])
    row = f"row {first_bad(where[step])} of " if where.dim() > 1 else ""
    more = f" (and {len(steps) - 1} more steps)" if len(steps) > 1 else ""
    return f"{row}step {step + loop.history}{more}"


def first_bad(bad: Tensor) -> str:
    """The index of the first true entry, and how many more there are."""
    index = [int(i) for i in bad.nonzero()[0]]
    more = int(bad.sum()) - 1
    where = str(index[0]) if len(index) == 1 else str(tuple(index)) if index else "(the only one)"
    return where + (f" (and {more} more)" if more else "")
