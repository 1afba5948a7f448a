"""Positive parameters in a linear solve: scales that multiply a Gaussian latent (tau * e[g]).

Q is quadratic in them as in any slope, and where the latent's sign may turn its maximum lies inside: θ > 0. A step that
would leave that space is cut so that the entry that would leave it first is halved. Q is concave: any part of the step
to its maximum raises it, and rounds go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.distributions import constraints

from pyro_em.model.use import Use


def is_positive_slope(constraint: constraints.Constraint, uses: Sequence[Use]) -> bool:
    """A positive parameter that multiplies a continuous latent."""
    moving = any(use.predictor is not None and use.predictor.moving for use in uses)
    return moving and getattr(constraint, "lower_bound", None) == 0 and not hasattr(constraint, "upper_bound")


def in_logarithms(gradient: Tensor, theta: Mapping[int, Tensor]) -> Tensor:
    """∂Q/∂u from ∂Q/∂θ (P,), u = log θ where `theta`, by the place at which its entries begin, is positive."""
    gradient = gradient.clone() if theta else gradient
    for begin, value in theta.items():
        gradient[begin : begin + len(value)] *= value
    return gradient


def inside(step: Tensor, theta: Mapping[int, Tensor]) -> Tensor:
    """The step (P,), or the part of it that keeps every entry of `theta` positive."""
    for begin, value in theta.items():
        own = step[begin : begin + len(value)]
        beyond = own <= -value
        if bool(beyond.any()):
            step = step * (-0.5 * value[beyond] / own[beyond]).amin()
    return step
