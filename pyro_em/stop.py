"""When to stop, and what to say about it: outcomes are sentences.

Converged means that the score is small: max|∂ objective/∂u| / N <= tol, with u the free coordinates and N the
number of elements of the data plates. A small change of the log-likelihood is not convergence: EM can creep
(on the London Times deaths at iteration 535 the change is tiny and a weight still 2 % off).
"""

from __future__ import annotations

import math
from enum import Enum

from pyro_em.errors import InputError


class Outcome(Enum):
    """Why a fit stopped; the value is the sentence.

    >>> pyro_em.fit(model, x, max_iter=1).outcome is pyro_em.Outcome.max_iter
    True
    """

    converged = "Converged: the score per observation is below tol."
    max_iter = (
        "The maximum number of iterations was reached before the score fell below tol. Raise max_iter, try "
        "accelerate='squarem' or 'anderson', or accept a larger tol."
    )
    stalled = (
        "Stalled: the objective no longer rises beyond rounding, but the score is above tol. The likelihood is "
        "flat here in this precision; use float64 or a larger tol."
    )
    interrupted = "Interrupted by a callback or by Ctrl-C: the last complete iterate is returned."
    degenerate = "Degenerate: the likelihood is unbounded; the last finite iterate is returned."
    averaged = (
        "The requested number of stochastic updates was performed; the average of the last half of them is returned, "
        "and convergence is not assessed."
    )
    steps_done = "The requested number of optimiser steps was performed; convergence is not assessed."

    def __str__(self) -> str:
        return self.value


PATIENCE = 25  # iterations without a rise beyond rounding or a new lowest score before a fit counts as stalled


class StoppingRule:
    """Watches score and objective; `outcome` answers after each E-step.

    :param tol: bound on the score per observation; 0 never converges, so that exactly `max_iter` updates
        are performed.
    """

    def __init__(self, max_iter: int, tol: float) -> None:
        if not isinstance(max_iter, int) or isinstance(max_iter, bool) or max_iter < 0:
            raise InputError(f"max_iter must be a non-negative integer, not {max_iter!r}.")
        if not (isinstance(tol, int | float) and math.isfinite(tol) and tol >= 0):
            raise InputError(f"tol must be a finite number >= 0, not {tol!r}.")
        self.max_iter, self.tol = max_iter, float(tol)
        self._best, self._lowest = -math.inf, math.inf
        self._idle = 0
        self._first: tuple[int, float] | None = None

    def outcome(self, iteration: int, score: float, objective: float, rounding: float) -> Outcome | None:
        """The outcome if the fit is over after `iteration` updates, else None."""
        if self.tol > 0 and score <= self.tol:
            return Outcome.converged
        if iteration >= self.max_iter:
            return Outcome.max_iter
        # On a plateau the objective is flat to rounding long before the score is: a falling score is progress.
        moved = objective > self._best + rounding or score < self._lowest
        self._idle = 0 if moved else self._idle + 1
        self._best = objective if objective > self._best else self._best
        self._lowest = score if score < self._lowest else self._lowest
        if self.tol > 0 and self._idle >= PATIENCE:
            return Outcome.stalled
        return None

    def remaining(self, iteration: int, score: float) -> float:
        """Updates that may be expected to follow, at the pace at which the score per observation has fallen so far."""
        most = float(self.max_iter - iteration)
        if self._first is None:
            self._first = iteration, score
        began, first = self._first
        if not (self.tol > 0 and 0 < score < first):
            return most
        return min(most, math.log(score / self.tol) / math.log(first / score) * (iteration - began))
