"""Observed information of the exact log-evidence, and standard errors by the delta method.

The Hessian of log p(x|θ(u)) (+ log p(θ) under map-em) in free coordinates u is taken by differentiating
through the contraction twice; no complete-data information and no missing-information correction (Louis
1982) is needed. At a stationary point it transforms as a tensor, so the choice of coordinates does not
matter. Probabilities that ended on their boundary are held fixed: they have standard error 0, and
`BoundaryEstimate` says so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.charts import Chart, base_constraint, free_dimension
from pyro_em.errors import BoundaryEstimate
from pyro_em.evidence.discrete import contract, weighted_sum
from pyro_em.m_step.numeric import Block
from pyro_em.model.trace import Run
from pyro_em.problem import Problem
from pyro_em.types import Params

# A probability within this many expected observations of 0 or 1 counts as being there: EM approaches the
# boundary only geometrically, and its logit would carry a useless interval.
BOUNDARY_COUNT = 0.01


@dataclass(frozen=True)
class Information:
    """Observed information in free coordinates, and the way back to the parameters.

    `hessian` is (P, P), of the log-objective; `covariance` its negative inverse; `jacobian[name]`
    (numel, P) the derivative of each parameter; `estimate` (P,) the free coordinates.
    """

    names: tuple[str, ...]
    charts: dict[str, Chart]
    estimate: Tensor
    hessian: Tensor
    covariance: Tensor
    jacobian: dict[str, Tensor]

    def constrained(self, u: Tensor) -> Params:
        """Parameters at free coordinates `u`."""
        parts = torch.split(u, [self.charts[n].size for n in self.names])
        return {n: self.charts[n].from_free(part) for n, part in zip(self.names, parts, strict=True)}


def log_objective(problem: Problem, params: Params) -> tuple[Tensor, Run]:
    """log p(x|θ) (+ log p(θ) if priors count), twice differentiable in `params`, and the run behind it."""
    with torch.enable_grad():
        factors, run = problem.integrated_factors(params)
        graph = problem.reduced_graph
        total = torch.zeros((), dtype=torch.float64)
        for component in graph.components:
            total = total + weighted_sum(contract(graph, component, factors), component.weight)
        names = (*graph.constants, *(graph.priors if problem.with_prior else ()))
        for name in names:
            total = total + weighted_sum(factors[name], graph.factors[name].weight)
        return total, run


def snapped(constraint: constraints.Constraint, value: Tensor, margin: float) -> Tensor:
    """Probabilities within `margin` of 0 or 1 put there exactly, so that their chart freezes them."""
    constraint = base_constraint(constraint)
    if constraint is constraints.simplex:
        low = value < margin
        kept = torch.where(low, torch.zeros_like(value), value)
        return kept / kept.sum(-1, keepdim=True) if bool(low.any()) else value
    if constraint is constraints.unit_interval:
        value = torch.where(value < margin, torch.zeros_like(value), value)
        return torch.where(value > 1 - margin, torch.ones_like(value), value)
    return value


def observed_information(problem: Problem, params: Params, names: tuple[str, ...]) -> Information:
    """Hessian of the log-objective at `params` in the free coordinates of `names`.

    Warns `BoundaryEstimate` if a probability is on its boundary, or if the information is singular
    (a parameter that the data do not identify); directions without information get variance 0.
    """
    records = problem.parameters
    margin = min(1e-3, BOUNDARY_COUNT / problem.graph.num_observations)
    at = {n: snapped(records[n].constraint, v.detach(), margin) for n, v in params.items()}
    block = Block(problem, at, lambda values: log_objective(problem, values), names)
    charts = block.charts
    frozen = [
        n
        for n in names
        if not torch.equal(at[n], params[n]) or charts[n].size < free_dimension(records[n].constraint, at[n])
    ]
    if frozen:
        warnings.warn(
            f"Parameters {', '.join(repr(n) for n in frozen)} have entries on the boundary of their space. These are "
            "held fixed: their standard error is given as 0.",
            BoundaryEstimate,
            stacklevel=3,
        )
    estimate = block.free()
    _, _, hessian = block.hessian(estimate)
    hessian = (hessian + hessian.mT) / 2
    covariance = _inverse(-hessian)
    jacobian = {}
    for name, part in zip(names, torch.split(estimate, block.sizes), strict=True):
        own = torch.autograd.functional.jacobian(lambda u, c=charts[name]: c.from_free(u).reshape(-1), part)
        offset = sum(block.sizes[: names.index(name)])
        wide = torch.zeros(own.shape[0], len(estimate), dtype=torch.float64)
        wide[:, offset : offset + own.shape[1]] = own
        jacobian[name] = wide
    return Information(names, charts, estimate, hessian, covariance, jacobian)


def _inverse(information: Tensor) -> Tensor:
    # In units in which every coordinate has information 1: what counts as none must not depend on the data's units.
    size = information.diagonal().abs()
    unit = torch.where(size > 0, size, torch.ones_like(size)).rsqrt()
    values, vectors = torch.linalg.eigh(information * unit * unit.unsqueeze(-1))
    largest = float(values.abs().max()) if values.numel() else 0.0
    usable = (values > 1e-10 * largest) & (values > 0)
    if not bool(usable.all()):
        warnings.warn(
            f"The observed information has {int((~usable).sum())} directions without (or with negative) curvature: "
            "the data do not identify them, or the fit has not converged. Their variance is given as 0.",
            BoundaryEstimate,
            stacklevel=4,
        )
    inverse = torch.where(usable, 1 / torch.where(usable, values, torch.ones_like(values)), torch.zeros_like(values))
    vectors = vectors * unit.unsqueeze(-1)
    return (vectors * inverse) @ vectors.mT


def standard_errors(information: Information, params: Params) -> Params:
    """Standard error of every parameter (delta method), 0 for those that were held fixed."""
    errors = {}
    for name, value in params.items():
        if name not in information.jacobian:
            errors[name] = torch.zeros_like(value)
            continue
        j = information.jacobian[name]
        variance = ((j @ information.covariance) * j).sum(-1)
        errors[name] = variance.clamp(min=0).sqrt().reshape(value.shape).to(value.dtype)
    return errors
