"""Logarithms that are exact at the boundary, and small helpers shared by the families.

`torch.where` alone is not enough there: its backward pass multiplies the infinite derivative of
log 0 by 0, which is NaN. Every guard below therefore also feeds the logarithm a harmless argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.factors import cholesky, inverse
from pyro_em.families.spaces import some


def floats(*values: Any) -> tuple[Tensor, ...]:
    """The values as tensors of one floating type: the widest among the floating tensors given.

    Python numbers and integer tensors follow, so that 0.1 does not pass through float32.
    """
    kinds = {v.dtype for v in values if isinstance(v, Tensor)}
    if len(kinds) == 1 and (dtype := next(iter(kinds))).is_floating_point:
        return tuple([v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=dtype) for v in values])
    floating = [kind for kind in kinds if kind.is_floating_point]
    dtype = floating[0] if floating else torch.get_default_dtype()
    for kind in floating[1:]:
        dtype = torch.promote_types(dtype, kind)
    return tuple([torch.as_tensor(v, dtype=dtype) for v in values])


def real(value: Tensor) -> Tensor:
    """Counts and flags as float64, in which sums of them are exact; floating values as they are."""
    return value if value.is_floating_point() else value.double()


def log_gamma_half(x: Tensor) -> Tensor:
    """log Γ(x + ½) − log Γ(x) for x > 0, whose difference loses all digits as x grows.

    Above 30 it is Stirling's: ½ log x − 1/(8x) + 1/(192x³) − 1/(640x⁵), the next term below 1e-13.
    """
    large = x > 30
    near, far = torch.where(large, 1.0, x), torch.where(large, x, 30.0)
    inverse = far.reciprocal()
    square = inverse * inverse
    series = 0.5 * far.log() - inverse * (1 / 8 - square * (1 / 192 - square / 640))
    return torch.where(large, series, torch.lgamma(near + 0.5) - torch.lgamma(near))


def log_rising(x: Tensor, n: Tensor) -> Tensor:
    """log Γ(x + n) − log Γ(x) for x > 0 and n >= 0, whose difference loses all digits as x grows.

    Above 30 both are Stirling's, with the next term below 1e-15:
    (x − ½) log(1 + n/x) + n log(x + n) − n + s(x + n) − s(x),  s(x) = 1/(12x) − 1/(360x³) + 1/(1260x⁵) − 1/(1680x⁷).
    """
    x, n = torch.broadcast_tensors(x, n)
    large = x > 30
    near, far = torch.where(large, 1.0, x), torch.where(large, x, 30.0)

    def series(y: Tensor) -> Tensor:
        inverse = y.reciprocal()
        square = inverse * inverse
        return inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))

    stirling = (far - 0.5) * torch.log1p(n / far) + n * (far + n).log() - n + series(far + n) - series(far)
    return torch.where(large, stirling, torch.lgamma(near + n) - torch.lgamma(near))


def weighted_log(weight: Tensor, probability: Tensor) -> Tensor:
    """weight · log(probability), with 0 · log 0 = 0; no gradient flows from the boundary."""
    return _weighted(weight, probability, probability <= 0, torch.log)


def weighted_log1m(weight: Tensor, probability: Tensor) -> Tensor:
    """weight · log(1 − probability), likewise."""
    return _weighted(weight, probability, probability >= 1, lambda p: torch.log1p(-p))


def weighted(weight: Tensor, log_probability: Tensor) -> Tensor:
    """weight · log_probability, likewise with 0 · (−inf) = 0."""
    return _weighted(weight, log_probability, log_probability == -torch.inf, lambda log: log)


def _weighted(weight: Tensor, probability: Tensor, boundary: Tensor, log: Callable[[Tensor], Tensor]) -> Tensor:
    if not some(boundary):
        return weight * log(probability)
    weight, probability, boundary = torch.broadcast_tensors(weight, probability, boundary)
    inside = torch.where(boundary, torch.full_like(probability, 0.5), probability)
    # A negative weight occurs in priors below 1, whose density is infinite on the boundary.
    limit = -torch.inf * weight.detach().sign()
    limit = torch.where(weight == 0, torch.zeros_like(limit), limit)
    return torch.where(boundary, limit, weight * log(inside))


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part, which removes the rounding of a contraction."""
    return (matrix + matrix.mT) / 2


def precision_matrix(args: Mapping[str, Any]) -> Tensor:
    """Σ⁻¹ from whichever of the three matrix arguments was given."""
    if "precision_matrix" in args:
        precision: Tensor = args["precision_matrix"]
        return precision
    if "scale_tril" in args:
        return torch.cholesky_inverse(args["scale_tril"])
    return torch.cholesky_inverse(cholesky(args["covariance_matrix"]))


def precision_factor(args: Mapping[str, Any]) -> Tensor:
    """F with FᵀF = Σ⁻¹ from whichever of the three matrix arguments was given."""
    if "precision_matrix" in args:
        return cholesky(args["precision_matrix"]).mT
    return inverse(args["scale_tril"] if "scale_tril" in args else cholesky(args["covariance_matrix"]))


def half_log_det(args: Mapping[str, Any]) -> Tensor:
    """½ log|Σ| from whichever of the three matrix arguments was given, shape U."""
    if "precision_matrix" in args:
        return -cholesky(args["precision_matrix"]).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    lower = args["scale_tril"] if "scale_tril" in args else cholesky(args["covariance_matrix"])
    return lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def covariance_matrix(args: Mapping[str, Any]) -> Tensor:
    """Σ from whichever of the three matrix arguments was given."""
    if "covariance_matrix" in args:
        covariance: Tensor = args["covariance_matrix"]
        return covariance
    if "scale_tril" in args:
        return args["scale_tril"] @ args["scale_tril"].mT
    return torch.cholesky_inverse(cholesky(args["precision_matrix"]))


def log_det(matrix: Tensor) -> Tensor:
    """log|matrix| of a positive definite matrix, shape U."""
    return 2 * torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)
