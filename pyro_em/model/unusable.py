"""Why a model's first run failed: data with NaN, which the model computes with before any of its sites has seen them.

Starts are often made from the data (principal axes, quantiles, clusters). What linear algebra says of NaN does not name
them: here the argument and its first such row are named. Any other failure is the model's own to tell.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import InputError, PyroEMError
from pyro_em.model.timeline import Unplanned
from pyro_em.types import Model


@contextlib.contextmanager
def explained(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Around the first run: what fails there for want of data, or for NaN in them, is said in a sentence.

    :raises InputError: instead of the model's own error.
    """
    try:
        yield
    except InputError as error:  # Pyro has appended the shapes of the trace so far, which say nothing about data
        raise InputError(str(error).split("\nTrace Shapes:")[0]) from error
    except (PyroEMError, Unplanned):
        raise
    except Exception as error:
        if isinstance(error, IndexError):
            error.add_note("A table that is indexed by a latent (loc[z]) needs a row for each of the latent's states.")
        if isinstance(error, ZeroDivisionError) and "size cannot be zero" in str(error):
            raise InputError("A plate of the model is empty. There are no data to fit.") from error
        found = _not_a_number(model, args, kwargs, error)
        if found is None:
            raise
        raise found from error


def _not_a_number(
    model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception
) -> InputError | None:
    for name, value in _named(model, args, kwargs):
        if not value.is_floating_point() or not value.dim():
            continue
        bad = value.isnan()
        if not bool(bad.any()):
            continue
        rows = bad.reshape(len(bad), -1).any(-1).nonzero().squeeze(-1).tolist()
        more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
        return InputError(
            f"Argument {name} of the model is NaN in row {rows[0]}{more}, and the model computes with it before a site "
            f"observes it, which failed ({type(error).__name__}). Correct the data, or leave these rows out; if they "
            "are missing, let the model make its start from what was observed (x[~x.isnan().any(-1)], torch.nanmean) "
            "and use missing='nan'."
        )
    return None


def _named(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    try:
        names = [f"'{name}'" for name in inspect.signature(model).parameters]
    except (TypeError, ValueError):
        names = []
    numbers = [f"number {i + 1}" for i in range(len(names), len(args))]
    for name, value in [*zip([*names, *numbers], args, strict=False), *((f"'{n}'", v) for n, v in kwargs.items())]:
        if isinstance(value, Tensor):
            yield name, torch.as_tensor(value).detach()
