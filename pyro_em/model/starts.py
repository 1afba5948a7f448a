"""Starting values, of the model's own `pyro.param` statements and of `init=`: what is wrong with one, in words.

Pyro puts a start through the inverse of its constraint's transform before anybody sees it. That makes NaN of a negative
scale, and *something else* of a row that does not sum to 1 (divided by its sum), of a probability above 1 (cut off),
of a matrix that is not symmetric (its upper half dropped). A start is therefore read as it was written.

Rounding is no violation: sums of probabilities are taken in float64 and may miss 1 by `ROUNDING`. Neither is the end of
a half-line: a scale or rate of exactly 0 is a structural zero, which EM keeps. Constraints that cannot be asked
(`constraints.dependent`) forbid nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.charts import base_constraint
from pyro_em.errors import InputError
from pyro_em.model.data import first_bad

ROUNDING = 1e-6  # of a sum of probabilities in float32


def check_start(name: str, value: Any, constraint: constraints.Constraint) -> None:
    """Raise `InputError` on a start that is no floating point tensor, is NaN, or violates its constraint.

    >>> check_start("w", torch.tensor([0.5, 0.6]), constraints.simplex)
    Traceback (most recent call last):
    pyro_em.errors.InputError: Parameter 'w' starts outside of its constraint: it sums to 1.1, not to 1. Divide ...
    """
    if not isinstance(value, Tensor):
        raise InputError(f"Parameter '{name}' starts as a {type(value).__name__}; give it a torch.tensor.")
    if not value.is_floating_point():
        raise InputError(f"Parameter '{name}' has dtype {value.dtype}; use a floating point one (1.0 instead of 1).")
    if bool(value.isnan().any()):
        raise InputError(f"Parameter '{name}' starts as NaN in entry {first_bad(value.isnan())}.")
    wrong = violation(constraint, value)
    if wrong is not None:
        raise InputError(f"Parameter '{name}' starts outside of its constraint: {wrong}")


def violation(constraint: constraints.Constraint, value: Tensor) -> str | None:
    """What about a value violates its constraint, as the end of a sentence; None where nothing does.

    >>> violation(constraints.simplex, torch.tensor([[0.5, 0.5], [0.2, 0.9]]))
    'row 1 sums to 1.1, not to 1. Divide each row by its sum.'
    >>> violation(constraints.positive, torch.tensor([1.0, -2.0]))
    'entry 1 is -2, which GreaterThan(lower_bound=0.0) forbids.'
    >>> violation(constraints.simplex, torch.tensor([0.1, 0.2, 0.7]))
    """
    base = base_constraint(constraint)
    if base is constraints.real:
        return None
    if base is constraints.simplex:
        return _no_simplex(value)
    lower, upper = getattr(base, "lower_bound", None), getattr(base, "upper_bound", None)
    if lower is not None or upper is not None:
        bad = torch.zeros_like(value, dtype=torch.bool)
        bad = bad if lower is None else bad | (value < lower)
        bad = bad if upper is None else bad | (value > upper)
        return f"entry {_shown(bad, value)}, which {base} forbids." if bool(bad.any()) else None
    try:
        if bool(constraint.check(value).all()):
            return None
    except (NotImplementedError, ValueError):
        return None
    if base is constraints.positive_definite:
        even = bool(torch.isclose(value, value.mT, atol=ROUNDING).all())
        return "it has an eigenvalue that is not positive." if even else "it is not symmetric."
    return f"its value is not what {base} asks for."


def _no_simplex(value: Tensor) -> str | None:
    if not value.dim():
        return "a single number is no vector of probabilities."
    if bool((value < 0).any()):
        return f"entry {_shown(value < 0, value)}; probabilities are not negative."
    sums = value.double().sum(-1)
    bad = (sums - 1).abs() > ROUNDING
    if not bool(bad.any()):
        return None
    if sums.dim():
        return f"row {_shown(bad, sums, 'sums to')}, not to 1. Divide each row by its sum."
    return f"it sums to {sums.item():.6g}, not to 1. Divide it by its sum."


def _shown(bad: Tensor, value: Tensor, verb: str = "is") -> str:
    first = value[bad].reshape(-1)[0].item()
    return f"{first_bad(bad)} {verb} {first:.6g}"
