"""Constraints as words, for checkpoints: "positive", "interval 0.0 2.5", "independent 1 real".

A fixed table in both directions. A name read from a file selects an entry of the table and nothing
else: no attribute look-up, no import. Only constraints that a parameter can have are in it, with
bounds that are numbers.
"""

from __future__ import annotations

from typing import Any

from pyro.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_em.errors import InputError

_PLAIN: dict[str, Any] = {
    "real": constraints.real,
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "softplus_positive": constraints.softplus_positive,
    "unit_interval": constraints.unit_interval,
    "simplex": constraints.simplex,
    "lower_cholesky": constraints.lower_cholesky,
    "softplus_lower_cholesky": constraints.softplus_lower_cholesky,
    "unit_lower_cholesky": constraints.unit_lower_cholesky,
    "positive_definite": constraints.positive_definite,
    "positive_semidefinite": constraints.positive_semidefinite,
    "ordered_vector": constraints.ordered_vector,
    "positive_ordered_vector": constraints.positive_ordered_vector,
    "corr_cholesky": constraints.corr_cholesky,
    "corr_matrix": constraints.corr_matrix,
}

_BOUNDED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "half_open_interval": (constraints.half_open_interval, ("lower_bound", "upper_bound")),
}


def constraint_name(constraint: Constraint) -> str:
    """The name of a constraint. Raises InputError for one which is not in the table.

    >>> constraint_name(constraints.interval(0, 2.5))
    'interval 0.0 2.5'
    """
    event_dims, base = 0, constraint
    while isinstance(base, constraints.independent):
        event_dims, base = event_dims + base.reinterpreted_batch_ndims, base.base_constraint
    if event_dims:
        return f"independent {event_dims} {constraint_name(base)}"
    for name, plain in _PLAIN.items():
        if constraint is plain:
            return name
    for name, (kind, fields) in _BOUNDED.items():
        if type(constraint) is kind:
            bounds = [getattr(constraint, field) for field in fields]
            if all(getattr(bound, "ndim", 0) == 0 for bound in bounds):
                return " ".join([name, *(repr(float(bound)) for bound in bounds)])
    raise InputError(
        f"The constraint {constraint} cannot be saved. A saved parameter needs one of {', '.join(_PLAIN)}, "
        f"or {', '.join(_BOUNDED)} with bounds that are numbers."
    )


def constraint_from_name(name: str) -> Constraint:
    """The constraint that `constraint_name` called so. Raises InputError for any other text.

    >>> constraint_from_name("interval 0.0 2.5")
    Interval(lower_bound=0.0, upper_bound=2.5)
    """
    word, *rest = name.split(" ")
    # One level only, as `constraint_name` writes it: a file cannot make this recurse without end.
    if word == "independent" and len(rest) > 1 and rest[0].isdecimal() and rest[1] != "independent":
        return constraints.independent(constraint_from_name(" ".join(rest[1:])), int(rest[0]))
    if word in _PLAIN and not rest:
        return _PLAIN[word]
    kind, fields = _BOUNDED.get(word, (None, ()))
    try:
        bounds = [float(bound) for bound in rest]
    except ValueError:
        bounds = []
    if kind is None or len(bounds) != len(fields):
        raise InputError(f"{name!r} is not the name of a constraint that a parameter can have.")
    return kind(*bounds)
