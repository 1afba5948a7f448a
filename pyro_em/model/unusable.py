"""Why a model's first run failed, where Pyro's or torch's own words do not name what is to be changed.

Data with NaN, which the model computes with before any of its sites has seen them: starts are often made from the data
(principal axes, quantiles, clusters), and linear algebra does not say which row. Distributions that do not fit their
plate, as columns without `.to_event` do not. Matrices that are no covariance. Names that a loop uses again. Data that
are no tensors. Any other failure is the model's own to tell.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from traceback import walk_tb
from typing import Any

import pyro
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_em.errors import InputError, PyroEMError
from pyro_em.model import compat
from pyro_em.model.data import outside_of_space
from pyro_em.model.starts import violation
from pyro_em.model.timeline import Unplanned
from pyro_em.model.trace import Run
from pyro_em.types import Model

# What Pyro says of a distribution that does not fit its plate, and torch of an argument outside of its space.
MISMATCH = re.compile(
    r"Shape mismatch inside plate\('(?P<plate>.*)'\) at site (?P<site>.*) dim (?P<dim>-\d+), "
    r"(?P<size>\d+) vs (?P<own>\d+)"
)
TWICE = re.compile(r"Multiple sample sites named '(.*)'")
REFUSED = re.compile(r"Expected parameter (\w+) .* to satisfy the constraint")


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
        found = _not_a_number(model, args, kwargs, error) or _no_plate(error) or _no_covariance(error) or _twice(error)
        if found is None:
            _note_other_data(model, args, kwargs, error)
            raise
        raise found from error


def _no_plate(error: Exception) -> InputError | None:
    mismatch = MISMATCH.search(str(error))
    if mismatch is None:
        return None
    plate, site, size, own, dim = *mismatch.group("plate", "site", "size", "own"), int(mismatch["dim"])
    return InputError(
        f"Site '{site}': plate '{plate}' has {size} elements, at dim {dim}, where its distribution has {own} of them. "
        f"If these {own} belong to one observation (columns of a row), make them its event: fn.to_event({-dim}). If "
        f"they are independent, give them a plate of their own, pyro.plate('columns', {own}, dim={dim}), and plate "
        f"'{plate}' dim={dim - 1}. Otherwise the plate's size is not that of the data."
    )


def _no_covariance(error: Exception) -> InputError | None:
    if not isinstance(error, LinAlgError) or "positive-definite" not in str(error):
        return None
    return InputError(
        "A matrix of the model is not positive definite where it starts (its Cholesky factor does not exist). A "
        "covariance that is a parameter needs constraint=constraints.positive_definite, or its factor "
        "constraints.lower_cholesky; one made from data needs more rows than columns, and no column that others add "
        "up to."
    )


def _twice(error: Exception) -> InputError | None:
    """A name of a plate or a site that is used again."""
    named = TWICE.match(str(error))
    if named is None:
        return None
    name, inside = named[1], [frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)]
    if "pyro.poutine.subsample_messenger" in inside:
        return InputError(
            f"Plate '{name}' is made twice in one run of the model, where every plate has a name of its own. To enter "
            f"the same plate again (at each step of a loop), make it once, before: plate = pyro.plate('{name}', size), "
            "and then write 'with plate:' (or 'for i in plate:'). A plate of other elements needs another name."
        )
    return InputError(
        f"Site '{name}' is sampled twice in one run of the model, where every site has a name of its own. In a loop, "
        f"write the number of the step into it (f'{name}_{{t}}'); of independent rows make a plate instead of a loop."
    )


def _note_other_data(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> None:
    """Say of arguments that are no tensors what they are: a model that indexes them fails in its own words."""
    for name, value in _named(model, args, kwargs):
        if isinstance(value, list) or (hasattr(value, "__array__") and not isinstance(value, Tensor)):
            error.add_note(
                f"Argument {name} of the model is a {type(value).__name__}, not a torch tensor. Give the model "
                "torch.as_tensor(data) (of a DataFrame: torch.tensor(frame.to_numpy()))."
            )


def checked_run(run: Callable[[], Run], *, validated: bool) -> Run:
    """A run of the model, `validated` by Pyro unless the user has switched that off.

    :raises InputError: for an argument that torch refuses, with its site, which torch does not know.
    """
    try:
        with contextlib.nullcontext() if validated else pyro.validation_enabled(False):
            return run()
    except ValueError as error:
        found = REFUSED.search(str(error))
        if found is None:
            raise
        refused = found[1]
        with pyro.validation_enabled(False):
            sites = run().sites
        for name, site in sites.items():
            raw = site.arguments or {}
            said = outside_of_space(site.fn, raw)
            constraint = getattr(compat.base_distribution(site.fn), "arg_constraints", {}).get(refused)
            if said is None and refused in raw and constraint is not None:
                wrong = violation(constraint, raw[refused])
                said = None if wrong is None else f"its argument '{refused}' cannot be used: {wrong}"
            if said is not None:
                raise InputError(f"Site '{name}': {said}") from error
        raise


def check_spaces(run: Run) -> None:
    """Raise `InputError` naming the first site with an argument outside of its space."""
    for name, site in run.sites.items():
        said = outside_of_space(site.fn, site.arguments or {})
        if said is not None:
            raise InputError(f"Site '{name}': {said}")


def _not_a_number(
    model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception
) -> InputError | None:
    for name, value in _named(model, args, kwargs):
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
            continue
        bad = value.detach().isnan()
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


def _named(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments with what to call them."""
    try:
        names = [f"'{name}'" for name in inspect.signature(model).parameters]
    except (TypeError, ValueError):
        names = []
    numbers = [f"number {i + 1}" for i in range(len(names), len(args))]
    yield from zip([*names, *numbers], args, strict=False)
    yield from ((f"'{name}'", value) for name, value in kwargs.items())
