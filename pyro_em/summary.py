"""A fit as a page of text: what was done, how good it is, and every parameter with its uncertainty.

Two steps, so that a NetCDF file prints the same page as the result that it came from:

    result -> facts (numbers and sentences by name) and estimates (arrays by parameter) -> text

Intervals are estimate ± 1.96 standard errors on the scale on which an entry is unbounded (identity, log, or
logit between its bounds), mapped back, entry by entry: they never leave the parameter's space. They are
not simultaneous, and not profile intervals.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
from pyro.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_em.errors import EMWarning, PyroEMError
from pyro_em.information import Information, standard_errors
from pyro_em.version import __version__

if TYPE_CHECKING:
    from pyro_em.result import FitResult

Facts = dict[str, str | int | float]

STATISTICS = ("estimate", "standard_error", "lower", "upper")
QUANTILE = 1.959963984540054  # of the standard normal at 0.975
MAX_ROWS = 40
MAX_HESSIAN = 500  # free parameters up to which a summary computes the observed information by itself
TRIANGULAR = (
    constraints.positive_definite,
    constraints.positive_semidefinite,
    constraints.lower_cholesky,
    constraints.softplus_lower_cholesky,
)


@dataclass(frozen=True)
class Estimate:
    """One parameter, entry by entry; arrays of its shape, NaN where there is no standard error.

    `triangular`: matrices of which the entries above the diagonal repeat others, or are zero.
    """

    value: np.ndarray
    standard_error: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    triangular: bool = False


def summary(result: FitResult, max_rows: int = MAX_ROWS) -> str:
    """The page that `print(result)` shows. Never raises for want of standard errors: it says why.

    :param max_rows: most parameter entries listed.
    """
    information, notes = available_information(result, MAX_HESSIAN)
    return render(facts(result), estimates(result, information), notes, max_rows)


def facts(result: FitResult) -> Facts:
    """Everything about a fit but its arrays, as str, int and float; what is not known is left out."""
    exact = result.log_likelihood is not None
    found: dict[str, Any] = {
        "inference_library": "pyro_em",
        "inference_library_version": __version__,
        "pyro_version": pyro.__version__,
        "algorithm": result.algorithm,
        "outcome": result.outcome.name,
        "outcome_sentence": str(result.outcome),
        "converged": int(result.converged),
        "exact": int(result.exact),
        "log_likelihood": result.log_likelihood,
        "log_posterior": result.log_posterior,
        "elbo": result.elbo,
        "gap": result.gap,
        "aic": result.aic if exact else None,
        "bic": result.bic if exact else None,
        "num_iterations": result.num_iterations,
        "num_observations": result.num_observations,
        "num_parameters": result.num_parameters,
        "integration_error": result.integration_error if result.rules else None,
        "seed": result.seed,
        "restarts": json.dumps([list(start) for start in result.restarts]),
        "warnings": "\n".join(result.warnings) or None,
        "plan": str(result.plan),
    }
    return {name: value for name, value in found.items() if value is not None}


def available_information(result: FitResult, max_hessian: int) -> tuple[Information | None, list[str]]:
    """Observed information if it can be had at a reasonable price, and notes: its warnings, or why not."""
    if not result.exact:
        return None, [
            f"No standard errors: '{result.algorithm}' does not end at a maximum of the exact likelihood. Where the "
            "latents are discrete, refit with 'em' or 'map-em' and init=result.params."
        ]
    if result.problem is None:
        return None, ["No standard errors: the result was loaded without its model, pyro_em.load(path, model=...)."]
    if result.num_parameters > max_hessian:
        return None, [
            f"No standard errors: {result.num_parameters} parameters make a large Hessian. "
            "result.standard_errors() computes it."
        ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            information = result.information()
        except (PyroEMError, RuntimeError) as error:
            return None, [f"No standard errors: {error}"]
    return information, [str(w.message) for w in caught if issubclass(w.category, EMWarning)]


def estimates(result: FitResult, information: Information | None) -> dict[str, Estimate]:
    """Estimates of all parameters; without `information` their standard errors and intervals are NaN."""
    errors = {} if information is None else standard_errors(information, result.params)
    found = {}
    for name, tensor in result.params.items():
        value = tensor.detach().cpu().double().numpy()
        constraint = result.constraints.get(name, constraints.real)
        error = errors[name].cpu().double().numpy() if name in errors else np.full(value.shape, np.nan)
        lower, upper = interval(value, error, *entry_bounds(constraint, value.shape))
        found[name] = Estimate(value, error, lower, upper, _plain(constraint) in TRIANGULAR)
    return found


def entry_bounds(constraint: Constraint, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of each entry by itself (±inf where there is none), two arrays of the given shape."""
    constraint = _plain(constraint)
    lower, upper = np.full(shape, -np.inf), np.full(shape, np.inf)
    if constraint is constraints.simplex:
        return np.zeros(shape), np.ones(shape)
    if constraint in TRIANGULAR:
        diagonal = np.arange(shape[-1])
        lower[..., diagonal, diagonal] = 0.0
        return lower, upper
    if hasattr(constraint, "lower_bound"):
        lower[...] = np.asarray(constraint.lower_bound)
    if hasattr(constraint, "upper_bound"):
        upper[...] = np.asarray(constraint.upper_bound)
    return lower, upper


def interval(
    value: np.ndarray, error: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of each entry, by the unbounded scale that its bounds leave.

    >>> low, high = interval(np.array(2.0), np.array(0.5), np.array(0.0), np.array(np.inf))
    >>> round(float(low), 3), round(float(high), 3)
    (1.225, 3.265)
    """
    below, above = np.isfinite(lower), np.isfinite(upper)
    start = np.where(below, lower, 0.0)
    width = np.where(below & above, upper - start, 1.0)
    with np.errstate(all="ignore"):  # branches that do not apply, and entries on a bound, put right below
        scales = [
            (below & above, np.log((value - start) / (upper - value)), width / ((value - start) * (upper - value))),
            (below, np.log(value - start), 1 / (value - start)),
            (above, -np.log(upper - value), 1 / (upper - value)),
        ]
        free = np.select([s[0] for s in scales], [s[1] for s in scales], value)
        slope = np.select([s[0] for s in scales], [s[2] for s in scales], 1.0)
        ends = []
        for side in (-QUANTILE, QUANTILE):
            u = free + side * slope * error
            back = [start + width / (1 + np.exp(-u)), start + np.exp(u), upper - np.exp(-u)]
            end = np.select([s[0] for s in scales], back, u)
            ends.append(np.where(error == 0, value, end))
    return ends[0], ends[1]


def render(known: Mapping[str, Any], rows: Mapping[str, Estimate], notes: list[str], max_rows: int = MAX_ROWS) -> str:
    """The page, from `facts` and `estimates` (or from what a file holds of them)."""
    lines = [f"{known['algorithm']}: {known['outcome_sentence']}", *_figures(known), *_restarts(known), ""]
    lines += _table(rows, max_rows)
    remarks = [*str(known.get("warnings", "")).split("\n"), *notes]
    unique = list(dict.fromkeys(remark for remark in remarks if remark))
    if unique:
        lines += ["", *(f"Note: {remark}" for remark in unique)]
    return "\n".join(lines)


def _figures(known: Mapping[str, Any]) -> list[str]:
    counts = [
        (known["num_iterations"], "iterations"),
        (known["num_observations"], "observations"),
        (known["num_parameters"], "free parameters"),
    ]
    labels = {
        "log_likelihood": "log-likelihood",
        "log_posterior": "log-posterior",
        "elbo": "ELBO",
        "gap": "gap",
        "aic": "AIC",
        "bic": "BIC",
    }
    if known["exact"]:  # the bound is the log-likelihood itself
        del labels["elbo"], labels["gap"]
    numbers = {name: float(known[name]) for name in labels if name in known}
    if "gap" in numbers and abs(numbers["gap"]) <= 1e-12 * (1 + abs(float(known["elbo"]))):
        numbers["gap"] = 0.0  # rounding
    figures = [f"{label} {numbers[name]:.9g}" for name, label in labels.items() if name in numbers]
    if "integration_error" in known:
        figures.append(f"error of quadrature {float(known['integration_error']):.1e}")
    return ["  " + ", ".join(f"{float(n):.9g} {what}" for n, what in counts), "  " + ", ".join(figures)]


def _restarts(known: Mapping[str, Any]) -> list[str]:
    starts = json.loads(str(known.get("restarts", "[]")))
    if len(starts) < 2:
        return []
    objectives = [objective for objective, outcome in starts if outcome != "degenerate"]
    collapsed = len(starts) - len(objectives)
    line = f"  {len(starts)} starts"
    if objectives:
        best = max(objectives)
        reached = sum(objective >= best - 1e-6 * (1 + abs(best)) for objective in objectives)
        line += f": best objective {best:.9g}, reached by {reached}; worst {min(objectives):.9g}"
    return [line + (f"; {collapsed} collapsed" if collapsed else "")]


def _table(rows: Mapping[str, Estimate], max_rows: int) -> list[str]:
    entries = [(name, index) for name, row in rows.items() for index in _shown(row)]
    with_errors = any(bool(np.isfinite(row.standard_error).any()) for row in rows.values())
    head = ["parameter", "estimate", *(("std. error", "95 % from", "to") if with_errors else ())]
    cells = [head]
    for name, index in entries[:max_rows]:
        row = rows[name]
        label = f"{name}[{','.join(map(str, index))}]" if index else name
        cell = [label, f"{row.value[index]:.5g}"]
        if with_errors and row.standard_error[index] == 0:
            cell += ["fixed", "", ""]
        elif with_errors:
            cell += [f"{number[index]:.5g}" for number in (row.standard_error, row.lower, row.upper)]
        cells.append(cell)
    widths = [max(len(cell[i]) for cell in cells) for i in range(len(head))]
    lines = [
        "  " + "  ".join([c[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(c[1:], widths[1:], strict=True))])
        for c in cells
    ]
    if len(entries) > max_rows:
        lines.append(f"  ... and {len(entries) - max_rows} more entries")
    return [line.rstrip() for line in lines]


def _shown(row: Estimate) -> list[tuple[int, ...]]:
    """Indices worth a row: of a covariance or a triangular factor those up to the diagonal."""
    return [i for i in np.ndindex(row.value.shape) if not row.triangular or i[-1] <= i[-2]]


def _plain(constraint: Any) -> Any:
    """The constraint below `independent`, which only says how many dims make one event."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint
