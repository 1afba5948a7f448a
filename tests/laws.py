"""Helpers shared by the laws: questions asked of a result, and unconstrained coordinates of parameters.

The coordinates u are log p for a simplex, log x for positive x, the logit for probabilities, and for
covariances the Cholesky factor with the logarithm of its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

Tensors = Mapping[str, Tensor]


def marginal_probs(posterior: Any, site: str, shape: torch.Size) -> Tensor:
    """Posterior probabilities of a discrete latent over the marginal's own support, reshaped to (batch..., K)."""
    marginal = posterior.marginal(site)
    support = marginal.enumerate_support()
    return marginal.log_prob(support).exp().movedim(0, -1).reshape(shape)


def _kind(constraint: Any) -> Any:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _free(value: Tensor, constraint: Any) -> Tensor:
    constraint = _kind(constraint)
    if constraint is constraints.simplex:
        return value.log()
    if constraint is constraints.positive_definite:
        return _free(torch.linalg.cholesky(value), constraints.lower_cholesky)
    if constraint is constraints.lower_cholesky:
        return value.tril(-1) + torch.diag_embed(value.diagonal(dim1=-2, dim2=-1).log())
    return biject_to(constraint).inv(value)


def _constrained(u: Tensor, constraint: Any) -> Tensor:
    constraint = _kind(constraint)
    if constraint is constraints.simplex:
        return u.softmax(-1)
    if constraint is constraints.positive_definite:
        factor = _constrained(u, constraints.lower_cholesky)
        return factor @ factor.mT
    if constraint is constraints.lower_cholesky:
        return u.tril(-1) + torch.diag_embed(u.diagonal(dim1=-2, dim2=-1).exp())
    return biject_to(constraint)(u)


def to_free(params: Tensors, support: Mapping[str, Any]) -> dict[str, Tensor]:
    """Coordinates u of the parameters."""
    return {name: _free(value.detach(), support[name]) for name, value in params.items()}


def to_constrained(free: Tensors, support: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters at u; differentiable."""
    return {name: _constrained(u, support[name]) for name, u in free.items()}


def perturbed(params: Tensors, support: Mapping[str, Any], scale: float, rng: torch.Generator) -> dict[str, Tensor]:
    """A feasible neighbour: a Gaussian step of size `scale` in the coordinates u."""
    free = to_free(params, support)
    return to_constrained({n: u + scale * torch.randn(u.shape, generator=rng) for n, u in free.items()}, support)


def polished(value: Callable[[Tensor], Tensor], u: Tensor, steps: int = 5) -> Tensor:
    """Newton's steps, with Hessians by automatic differentiation, from near a maximum of `value` to rounding.

    Directions along which the value is constant (the common factor of a simplex) stay.
    """
    for _ in range(steps):
        gradient = torch.autograd.functional.jacobian(value, u)
        hessian = torch.autograd.functional.hessian(value, u)
        u = u - torch.linalg.pinv(hessian, rtol=1e-10, hermitian=True) @ gradient
    return u


def largest_score(gradient: Tensors, params: Tensors, support: Mapping[str, Any]) -> float:
    """max |d objective / d u|, a simplex counted in its K - 1 ratios log(p_k / p_ref), p_ref its largest entry."""
    sizes = []
    for name, g in gradient.items():
        if _kind(support[name]) is constraints.simplex:
            g = g.scatter(-1, params[name].argmax(-1, keepdim=True), 0.0)
        sizes.append(float(g.abs().max()))
    return max(sizes)
