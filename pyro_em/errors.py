"""What can go wrong, each as a sentence: what, where (site, row, component, iteration), why, what to do.

Errors are typed so that a program can react to them; their text is for the person who reads it.
Warnings share one base, so that `warnings.filterwarnings("error", category=EMWarning)` is enough.
"""

from __future__ import annotations

from typing import Any


class PyroEMError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(PyroEMError, ValueError):
    """Data, starting values, weights or options that cannot be used as given."""


class Refusal(PyroEMError):
    """A structure which the exact engine will not approximate silently.

    Attributes: `site` (name), `reason` and `remedy` (sentences).
    """

    def __init__(self, site: str, reason: str, remedy: str) -> None:
        self.site, self.reason, self.remedy = site, reason, remedy
        super().__init__(f"Site '{site}': {reason} Remedy: {remedy}")


class ResourceError(PyroEMError, MemoryError):
    """A table that would not fit, found before it is allocated."""


class DegenerateLikelihoodError(PyroEMError):
    """A component has collapsed: its likelihood is unbounded and no maximum exists.

    Attributes: `site`, `component` (index or None), `iteration`, and `result`, the last finite
    `FitResult` (attached by `fit`).
    """

    def __init__(self, site: str, component: int | None, reason: str, remedy: str) -> None:
        self.site, self.component, self.reason, self.remedy = site, component, reason, remedy
        self.iteration: int | None = None
        self.result: Any = None
        super().__init__(reason)

    def __str__(self) -> str:
        where = f"site '{self.site}'" + ("" if self.component is None else f", component {self.component}")
        when = "" if self.iteration is None else f" at iteration {self.iteration}"
        return f"Degenerate likelihood in {where}{when}: {self.reason} Remedy: {self.remedy}"


class MonotonicityError(PyroEMError):
    """The objective fell in an exact step, which the theory excludes."""

    def __init__(self, iteration: int, previous: float, current: float) -> None:
        self.iteration, self.previous, self.current = iteration, previous, current
        super().__init__(
            f"The objective fell from {previous!r} to {current!r} at iteration {iteration}. An exact EM step "
            "never lowers it: the model changed between two calls (does it draw random numbers, or change "
            "its data?), or this is a defect of pyro_em worth a report."
        )


class NonFiniteError(PyroEMError):
    """A log-density or parameter became NaN or infinite; `site` names where."""

    def __init__(self, site: str, message: str) -> None:
        self.site = site
        self.result: Any = None
        super().__init__(message)


class CheckpointError(PyroEMError):
    """A saved result that is truncated, altered, foreign or of another model."""


class EMWarning(UserWarning):
    """Base of every warning of this package."""


class BoundaryEstimate(EMWarning):
    """A parameter ended on the boundary of its space, where standard errors do not apply."""


class SymmetricStart(EMWarning):
    """Components start equal; EM keeps them equal for ever."""


class UnidentifiedParameter(EMWarning):
    """No data (an empty component, an unvisited state) informs a parameter; it keeps its value."""


class CollinearDesign(EMWarning):
    """Covariates that the data cannot tell apart: their coefficients are not identified."""


class LostPrecision(EMWarning):
    """The model's own arithmetic in float32 is far from that in float64, at the returned parameters."""


class SeparatedData(EMWarning):
    """A likelihood that rises for ever as coefficients grow: its maximum is at infinity."""
