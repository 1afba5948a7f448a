"""Helpers shared by the laws: small questions asked of a result, and random feasible steps of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to


def marginal_probs(posterior: Any, site: str) -> Tensor:
    """Posterior probabilities of a discrete latent, (batch shape..., K), over the marginal's own support."""
    marginal = posterior.marginal(site)
    support = marginal.enumerate_support()
    return marginal.log_prob(support).exp().movedim(0, -1)


def to_free(params: Mapping[str, Tensor], constraints: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unconstrained coordinates u of the parameters."""
    return {name: biject_to(constraints[name]).inv(value) for name, value in params.items()}


def to_constrained(free: Mapping[str, Tensor], constraints: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: biject_to(constraints[name])(u) for name, u in free.items()}


def perturbed(
    params: Mapping[str, Tensor], constraints: Mapping[str, Any], scale: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """A feasible neighbour: a Gaussian step of size `scale` in the unconstrained coordinates."""
    free = to_free(params, constraints)
    moved = {n: u + scale * torch.randn(u.shape, generator=generator, dtype=u.dtype) for n, u in free.items()}
    return to_constrained(moved, constraints)
