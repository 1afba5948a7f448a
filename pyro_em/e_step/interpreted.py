"""The reference engine: run the model, contract its factors. Serves every model the package accepts."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_em.e_step.base import Expectation, Unread, is_possible
from pyro_em.e_step.vanishing import NEXT_TO_NOTHING, vanishing
from pyro_em.errors import NonFiniteError, Refusal
from pyro_em.evidence.discrete import Evidence
from pyro_em.evidence.elimination import atoms_of
from pyro_em.model.trace import Run
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors, SiteMoments, argument_cells, expected_moments, site_center, with_integrated
from pyro_em.sufficient import Sufficient, raw_arguments
from pyro_em.types import Params


class Interpreted:
    """Re-runs the model at every E-step."""

    name = "interpreted"

    def __init__(self, problem: Problem, reason: str = "") -> None:
        _ = problem.tables_fit  # so that the plan says so already
        self.problem, self.reason = problem, reason
        self._centers: dict[str, Tensor | None] = {}

    def e_step(self, params: Params) -> Expectation:
        """Exact E-step at `params` by `Problem.evidence`."""
        return self.unread(params).read()

    def vanishing(self, params: Params) -> dict[str, bool]:
        """Spreads of latents whose estimate is 0, see vanishing.py."""
        if self.problem.continuous is None:
            return {}

        def evidence(at: Params) -> tuple[float, float]:
            try:
                found, _ = self.problem.evidence(at)
            except (LinAlgError, NonFiniteError, Refusal):
                # a covariance so close to singular that the model's own distribution refuses it; a spread so large
                # that densities overflow at some node, or that the nodes are too few
                return -math.inf, 0.0
            return float(found.log_likelihood), float(found.magnitude)

        return vanishing(self.problem, params, evidence, NEXT_TO_NOTHING)

    def unread(self, params: Params) -> Unread:
        """The same before any of its numbers is read."""
        evidence, run = self.problem.evidence(params)
        return unread(self.problem, run, evidence, self._centers)


def expectation(problem: Problem, run: Run, evidence: Evidence) -> Expectation:
    """An E-step in the form that the M-step reads."""
    return unread(problem, run, evidence).read()


def unread(problem: Problem, run: Run, evidence: Evidence, centers: dict[str, Tensor | None] | None = None) -> Unread:
    """`expectation` before any of its numbers is read.

    :param centers: cache of the data's means, which do not change between E-steps.
    """
    known = {} if centers is None else centers
    if evidence.parts:
        problem = problem.at_atoms(atoms_of(evidence.parts))
        known = {}  # the latents' values are new at every E-step

    weights = with_integrated(run, problem.graph, evidence.weights)

    def moments_of(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
        site = run.sites[name]
        if name not in known:
            known[name] = site_center(site, argument_cells(site, arguments))
        return expected_moments(site, problem.graph.factors[name], weights.get(name), arguments, known[name])

    error = torch.as_tensor(sum(part.error for part in evidence.parts), dtype=torch.float64)
    totals = torch.stack([evidence.log_likelihood, evidence.log_prior, evidence.magnitude, error])
    sufficient = Sufficient(problem, run.sites, raw_arguments(run.sites), moments_of)
    return Unread(totals.detach(), sufficient, lambda: weights)


def reference(problem: Problem, params: Params) -> Expectation:
    """The E-step by the model itself.

    :raises NonFiniteError: naming the site and the rows, where the data are impossible.
    """
    evidence, run = problem.evidence(params)
    return expectation(problem, run, evidence)


def read(problem: Problem, params: Params, found: Unread) -> Expectation:
    """The E-step of a compiled engine with its numbers, by the reference where they are not finite."""
    own = found.read()
    finite = math.isfinite(own.log_likelihood) and (math.isfinite(own.log_prior) or not problem.with_prior)
    return own if finite else reference(problem, params)


def at_atoms(problem: Problem, params: Params, sufficient: Sufficient) -> Callable[[], Posteriors]:
    """Weights of the reference's atoms, for a numeric step of the M-step, which needs the model at these."""

    kept = weakref.ref(sufficient)  # to which the M-step gives this function: no cycle

    def posterior() -> Posteriors:
        found = reference(problem, params)
        if (own := kept()) is not None:
            own.problem = found.sufficient.problem
        return found.weights

    return posterior


def from_totals(
    problem: Problem,
    params: Params,
    totals: Tensor,
    sufficient: Sufficient,
    posterior: Callable[[], Posteriors] | None = None,
) -> Expectation:
    """`read` of an engine in stages, which scores impossible data with `IMPOSSIBLE`.

    :param totals: log p(x|θ), log p(θ) and Σ|ll_n|, (3,).
    :param posterior: weights of the factors; if not given, those of the reference.
    """
    likelihood, prior, magnitude = totals.tolist()
    if not is_possible(likelihood):
        return reference(problem, params)
    return Expectation(
        log_likelihood=likelihood,
        log_prior=prior,
        magnitude=magnitude,
        sufficient=sufficient,
        posterior=posterior or (lambda: problem.evidence(params)[0].weights),
    )
